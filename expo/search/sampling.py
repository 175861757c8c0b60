"""Sample replies with the paper's settings, each from a random stream of its own.

The settings are temperature 0.7, top-k 50, top-p 0.9, and a presence and a frequency penalty of 0.1 over the generated
tokens; a prompt is one turn of the user in the tokenizer's chat template.

The random number of a token is a function of the seed, the number of the prompt, the step and the token. It depends
neither on the batch nor on earlier replies, and it is the same for every alpha, so the replies of two models differ
only because of the models. Rounding remains: in another batch a row has other padding and its sums another order, so
where two tokens are nearly equally likely, another one may be drawn. The same batches on the same machine give the same
replies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..errors import UsageError
from .models import explain_gpu_memory_errors
from .settings import Sampling

GRAM = 4  # tokens of the pieces whose repetition is counted
# The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers of 64 bits.
GOLDEN_GAMMA, FIRST_FACTOR, SECOND_FACTOR = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class SampledReply(NamedTuple):
    """A reply of a model.

    Attributes:
        text: The text, without special tokens.
        tokens: The generated tokens, the end token included.
        finished: True if the reply has an end token.
        repetition: The share of repeated 4-grams.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    repetition: float


class PenaltyProcessor(LogitsProcessor):
    """Apply presence and frequency penalties as OpenAI and vLLM define them: to generated tokens, not to the prompt.

    logits -= presence * (count > 0) + frequency * count
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        """Take the number of columns of the prompts, padding included, and both penalties."""
        self._start, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the logits [rows, vocabulary] after the penalties."""
        generated = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class DrawProcessor(LogitsProcessor):
    """Draw one token after temperature, top-k and top-p, in this order, and set all other logits to -inf."""

    def __init__(self, prompt_length: int, streams: torch.Tensor, sampling: Sampling) -> None:
        """Take the number of columns of the prompts, the rows' stream numbers (int64, [rows]), and the settings."""
        self._start, self._streams, self._sampling = prompt_length, streams, sampling

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return logits [rows, vocabulary] that are 0 for the drawn token of a row and -inf for the others."""
        step = input_ids.shape[1] - self._start
        logits, tokens = (scores / self._sampling.temperature).topk(min(self._sampling.top_k, scores.shape[1]))
        probabilities = logits.softmax(1)
        # A token is excluded if the more likely tokens reach top_p without it.
        excluded = probabilities.cumsum(1) - probabilities >= self._sampling.top_p
        noise = gumbel_noise(self._streams[:, None], step, tokens)
        drawn = (logits.double() + noise).masked_fill(excluded, float("-inf")).argmax(1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.gather(1, drawn), 0.0)


def gumbel_noise(streams: torch.Tensor, step: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return Gumbel noise in fp64, as a function of the arguments alone.

    The largest of logits plus Gumbel noise is a draw from the softmax of the logits (the Gumbel-max trick).

    Args:
        streams: The numbers of random streams, int64, [rows, 1].
        step: The number of the generated token.
        tokens: Token ids, int64, [rows, candidates].
    """
    bits = _mix(_mix(streams ^ step) + tokens * GOLDEN_GAMMA)
    uniform = (_shift_right(bits, 12).double() + 0.5) / 2**52
    return -torch.log(-torch.log(uniform))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Return the result of SplitMix64's finaliser."""
    bits = (bits ^ _shift_right(bits, 30)) * FIRST_FACTOR
    bits = (bits ^ _shift_right(bits, 27)) * SECOND_FACTOR
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Return int64 numbers shifted to the right as if they were unsigned."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def stream_number(seed: int, index: int) -> int:
    """Return the number of a prompt's random stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "little", signed=True)


def repetition_share(tokens: Sequence[int]) -> float:
    """Return the share of the 4-grams that occurred earlier in the tokens; 0 for fewer than 4 tokens."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt: one turn of the user if the tokenizer has a chat template, else the plain text."""
    if getattr(tokenizer, "chat_template", None) is None:
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        return tokens
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


class Sampler:
    """Samples the replies of a model to a list of prompts, in batches that depend on the prompts alone.

    Attributes:
        batches: Lists of numbers of prompts; together they have every prompt once.
        notes: Sentences for the user.
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
        """Encode the prompts and form the batches. Raises UsageError if a prompt fills the model's whole context."""
        self._model, self._tokenizer, self._sampling, self._seed = model, tokenizer, sampling, seed
        self.notes: list[str] = []
        self._prompts = self._encode(prompts)
        self._limits = [self._reply_limit(index) for index in range(len(prompts))]
        short = [limit for limit in self._limits if limit < sampling.max_new_tokens]
        if short:
            self.notes.append(
                f"the model's context of {self._context} tokens leaves {min(short)} to {max(short)} new tokens for the "
                f"replies to {len(short)} of {len(prompts)} prompts"
            )
        self.batches = list(_make_batches(self._limits, [len(prompt) for prompt in self._prompts], batch_size))
        self._end_tokens = _find_end_tokens(model, tokenizer)
        candidates = (tokenizer.pad_token_id, *sorted(self._end_tokens), 0)
        self._pad = next(token for token in candidates if token is not None)
        # generate() reads every setting that it is not given from here, and the checkpoint's own settings for the
        # sampling must not take part.
        model.generation_config = _greedy_config(sorted(self._end_tokens), self._pad)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every prompt. Raises UsageError if the chat template fails."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            self.notes.append("the tokenizer has no chat template: the model gets the prompts as they are")
        encoded = []
        for index, prompt in enumerate(prompts):
            try:
                encoded.append(encode_prompt(self._tokenizer, prompt))
            except Exception as error:  # a template is a program, which may raise any error
                raise UsageError(f"prompt {index}: the tokenizer's chat template fails: {error}") from error
        return encoded

    @property
    def _context(self) -> int | None:
        """The model's context in tokens, None if its config names none."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def _reply_limit(self, index: int) -> int:
        """Return the number of new tokens that fit into the context after a prompt, max_new_tokens at most."""
        length = len(self._prompts[index])
        limit = self._sampling.max_new_tokens if self._context is None else self._context - length
        if limit < 1 or not length:
            raise UsageError(
                f"prompt {index} is {length} tokens long, of a context of {self._context}: leave it out or shorten it"
            )
        return min(limit, self._sampling.max_new_tokens)

    def __call__(self, indices: Sequence[int]) -> list[SampledReply]:
        """Return the replies to a batch of prompts, by their numbers. Raises EngineError if a GPU's memory is full."""
        width = max(len(self._prompts[index]) for index in indices)
        rows = [self._prompts[index] for index in indices]
        device = self._model.device
        tokens = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        streams = torch.tensor([stream_number(self._seed, index) for index in indices], device=device)
        sampling = self._sampling
        penalties = PenaltyProcessor(width, sampling.presence_penalty, sampling.frequency_penalty)
        with explain_gpu_memory_errors("`batch_size`, or `keep='host'`"):
            generated = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=min(self._limits[index] for index in indices),
                logits_processor=LogitsProcessorList([penalties, DrawProcessor(width, streams, sampling)]),
            )
        return [self._make_reply(row) for row in generated[:, width:].tolist()]

    def _make_reply(self, tokens: list[int]) -> SampledReply:
        """Return the reply of a row of generated tokens, which may have padding after its end token."""
        length = next((at for at, token in enumerate(tokens) if token in self._end_tokens), len(tokens))
        finished = length < len(tokens)
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        repetition = round(repetition_share(tokens[:length]), 6)
        return SampledReply(text, tuple(tokens[: length + finished]), finished, repetition)


def _make_batches(limits: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterable[list[int]]:
    """Yield batches of prompts with the same reply limit and about the same length, the longest ones first."""
    batch: list[int] = []
    for index in sorted(range(len(limits)), key=lambda at: (-limits[at], -lengths[at], at)):
        if batch and (len(batch) == batch_size or limits[index] != limits[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _find_end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a reply by the model's config, its generation config or its tokenizer."""
    values = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    return frozenset(
        token for value in values if value is not None for token in (value if isinstance(value, list) else [value])
    )


def _greedy_config(end_tokens: list[int], pad: int) -> Any:
    """Return settings under which generate() takes the one token that DrawProcessor leaves, and changes no logits."""
    make: Callable[..., Any] = GenerationConfig
    return make(do_sample=False, num_beams=1, eos_token_id=end_tokens or None, pad_token_id=pad)
