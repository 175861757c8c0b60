"""Replies sampled as the paper samples them, each from a random stream of its own.

Temperature 0.7, top-k 50, top-p 0.9, presence and frequency penalty 0.1 over what was generated, one turn of the user
through the tokenizer's chat template. What is drawn at a step is a function of the seed, the prompt's index, the step
and the token: neither the batch nor what was done before matters, and every alpha meets the same chances, so that two
models differ in their replies no more than they must. What remains is rounding: another batch pads otherwise and sums
in another order, and where two tokens are nearly as likely that may tip a draw. The same batches on the same machine
give the same replies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..errors import UsageError
from .models import memory_explained
from .settings import Sampling

GRAM = 4  # tokens of the pieces whose repetition is counted
_GOLDEN, _FIRST, _SECOND = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Sampled(NamedTuple):
    """A reply: its text, its tokens with the one that ends it, whether it has that one, repeated 4-grams."""

    text: str
    tokens: tuple[int, ...]
    finished: bool
    repetition: float


class Penalties(LogitsProcessor):
    """Presence and frequency penalties as OpenAI and vLLM define them: on generated tokens, not on the prompt's.

    logits -= presence * (count > 0) + frequency * count
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        """prompt_length: columns of the prompts, padding included."""
        self._start, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        generated = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class Draw(LogitsProcessor):
    """Draw a token after temperature, top-k and top-p, in this order, and leave it alone: the others get -inf."""

    def __init__(self, prompt_length: int, streams: torch.Tensor, sampling: Sampling) -> None:
        """streams: the number of each row's random stream, int64."""
        self._start, self._streams, self._sampling = prompt_length, streams, sampling

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = input_ids.shape[1] - self._start
        logits, tokens = (scores / self._sampling.temperature).topk(min(self._sampling.top_k, scores.shape[1]))
        chances = logits.softmax(1)
        beyond = chances.cumsum(1) - chances >= self._sampling.top_p  # those before it are enough
        noise = gumbel(self._streams[:, None], step, tokens)
        best = (logits.double() + noise).masked_fill(beyond, float("-inf")).argmax(1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.gather(1, best), 0.0)


def gumbel(streams: torch.Tensor, step: int, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise: of logits plus it, the largest is a draw from their softmax. A function of the arguments alone."""
    bits = _mixed(_mixed(streams ^ step) + tokens * _GOLDEN)
    uniform = (_shifted(bits, 12).double() + 0.5) / 2**52
    return -torch.log(-torch.log(uniform))


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted to the right as an unsigned number."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def stream_of(seed: int, index: int) -> int:
    """The number of a prompt's random stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "little", signed=True)


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that occurred before; 0 of fewer than 4 tokens."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as the model takes it: one turn of the user, where the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        return tokens
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


class Sampler:
    """Samples replies to given prompts, in batches that depend on the prompts and on nothing else.

    batches: lists of indices of prompts. notes: what the user should know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        sampling: Sampling,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        """Raises UsageError where a prompt leaves no room for a reply."""
        self._model, self._tokenizer, self._sampling, self._seed = model, tokenizer, sampling, seed
        self.notes: list[str] = []
        self._prompts = self._encoded(prompts)
        self._room = [self._room_of(index) for index in range(len(prompts))]
        short = sum(room < sampling.max_new_tokens for room in self._room)
        if short:
            self.notes.append(
                f"the model's context of {self._context} tokens leaves {short} of {len(prompts)} prompts "
                f"{min(self._room)} to {max(room for room in self._room if room < sampling.max_new_tokens)} new tokens"
            )
        self.batches = list(_batches(self._room, [len(prompt) for prompt in self._prompts], batch_size))
        self._ends = _end_tokens(model, tokenizer)
        self._pad = next(token for token in (tokenizer.pad_token_id, *sorted(self._ends), 0) if token is not None)
        # What the checkpoint says of sampling must not join in: generate() takes from here whatever it is not told.
        model.generation_config = _plain(sorted(self._ends), self._pad)

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            self.notes.append("the tokenizer has no chat template: prompts are given to the model as they are")
        encoded = []
        for index, prompt in enumerate(prompts):
            try:
                encoded.append(encode(self._tokenizer, prompt))
            except Exception as error:  # a template is a program
                raise UsageError(f"prompt {index}: the tokenizer's chat template fails: {error}") from error
        return encoded

    @property
    def _context(self) -> int | None:
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def _room_of(self, index: int) -> int:
        """New tokens that the context has room for after a prompt."""
        length = len(self._prompts[index])
        room = self._sampling.max_new_tokens if self._context is None else self._context - length
        if room < 1 or not length:
            raise UsageError(
                f"prompt {index} is {length} tokens long, of a context of {self._context}: leave it out or shorten it"
            )
        return min(room, self._sampling.max_new_tokens)

    def __call__(self, indices: Sequence[int]) -> list[Sampled]:
        """Replies to a batch of prompts, by their indices. Raises EngineError where the memory is too small."""
        width = max(len(self._prompts[index]) for index in indices)
        rows = [self._prompts[index] for index in indices]
        device = self._model.device
        tokens = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        streams = torch.tensor([stream_of(self._seed, index) for index in indices], device=device)
        sampling = self._sampling
        with memory_explained("--batch-size, or --keep host"):
            made = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=min(self._room[index] for index in indices),
                logits_processor=LogitsProcessorList(
                    [
                        Penalties(width, sampling.presence_penalty, sampling.frequency_penalty),
                        Draw(width, streams, sampling),
                    ]
                ),
            )
        return [self._reply(row) for row in made[:, width:].tolist()]

    def _reply(self, tokens: list[int]) -> Sampled:
        length = next((at for at, token in enumerate(tokens) if token in self._ends), len(tokens))
        finished = length < len(tokens)
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return Sampled(text, tuple(tokens[: length + finished]), finished, round(repetition(tokens[:length]), 6))


def _batches(rooms: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterable[list[int]]:
    """Indices of prompts of about one length and of one room, the longest replies first."""
    batch: list[int] = []
    for index in sorted(range(len(rooms)), key=lambda at: (-rooms[at], -lengths[at], at)):
        if batch and (len(batch) == batch_size or rooms[index] != rooms[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that the model, its generation config or its tokenizer says ends a reply."""
    said = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    return frozenset(
        token for each in said if each is not None for token in (each if isinstance(each, list) else [each])
    )


def _plain(ends: list[int], pad: int) -> Any:
    """Greedy, as Draw has left one token, and nothing else that changes logits."""
    make: Callable[..., Any] = GenerationConfig
    return make(do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad)
