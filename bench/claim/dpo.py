"""Direct preference optimisation: the standard loss, AdamW over all weights, and two checkpoints.

The loss is that of "Direct Preference Optimization" (arXiv 2305.18290).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import stages
from .models import matmul_precision
from .settings import Settings


class PreferencePair(NamedTuple):
    """A prompt and two replies.

    Attributes:
        prompt: The tokens of the prompt.
        better: The tokens of the better reply.
        worse: The tokens of the worse reply.
        reference_better: The reference model's log-probability of the better reply.
        reference_worse: The reference model's log-probability of the worse reply.
    """

    prompt: list[int]
    better: list[int]
    worse: list[int]
    reference_better: float = 0.0
    reference_worse: float = 0.0


def dpo_loss(better_gain: torch.Tensor, worse_gain: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the mean of -log sigmoid(beta * (better_gain - worse_gain)).

    A gain is a reply's log-probability under the model minus that under the reference model, [pairs].
    """
    return -torch.nn.functional.logsigmoid(beta * (better_gain - worse_gain)).mean()


def log_probabilities(
    model: Any, prompts: Sequence[list[int]], replies: Sequence[list[int]], bf16: bool
) -> torch.Tensor:
    """Return the log-probability of every reply after its prompt, summed over its tokens, [replies]."""
    width = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
    tokens = torch.full((len(prompts), width), int(model.config.pad_token_id))
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        tokens[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        scored[row, len(prompt) : len(prompt) + len(reply)] = True
    # The padding is on the right, so causal attention hides it from every scored token.
    with matmul_precision(bf16):
        hidden = model.base_model(input_ids=tokens[:, :-1]).last_hidden_state[scored[:, 1:]]
        logits = model.get_output_embeddings()(hidden).float()
    by_token = -torch.nn.functional.cross_entropy(logits, tokens[:, 1:][scored[:, 1:]], reduction="none")
    rows = scored[:, 1:].nonzero()[:, 0]
    return torch.zeros(len(prompts)).index_add(0, rows, by_token)


@torch.no_grad()
def add_reference(model: Any, pairs: Sequence[PreferencePair], settings: Settings) -> list[PreferencePair]:
    """Return the pairs with the reference model's log-probabilities, which are the same for all steps."""
    complete, size = [], settings.pairs_per_step
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        better, worse = _score_pairs(model, part, settings.bf16)
        complete += [
            pair._replace(reference_better=b, reference_worse=w)
            for pair, b, w in zip(part, better.tolist(), worse.tolist(), strict=True)
        ]
    return complete


def _score_pairs(model: Any, pairs: Sequence[PreferencePair], bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of the better and of the worse replies."""
    prompts = [pair.prompt for pair in pairs]
    replies = [pair.better for pair in pairs] + [pair.worse for pair in pairs]
    better, worse = log_probabilities(model, prompts + prompts, replies, bf16).chunk(2)
    return better, worse


def make_batches(pairs: Sequence[PreferencePair], settings: Settings, seed: int) -> Iterator[list[PreferencePair]]:
    """Yield the pairs of every step, shuffled anew for each pass: a function of the seed and the step."""
    order = random.Random(seed)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < settings.pairs_per_step:
            queue += order.sample(range(len(pairs)), len(pairs))
        yield [pairs[index] for index in queue[: settings.pairs_per_step]]
        del queue[: settings.pairs_per_step]


class Training:
    """A model in training, with its optimizer and the log of its steps; its state can be saved and loaded."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self._settings = model, settings
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self.log: list[dict[str, float]] = []

    def step(self, pairs: Sequence[PreferencePair]) -> None:
        """Do one step of AdamW on these pairs, and append its loss, margin and accuracy to the log."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * min(1.0, (len(self.log) + 1) / self._settings.warmup)
        better, worse = _score_pairs(self.model, pairs, self._settings.bf16)
        better = better - torch.tensor([pair.reference_better for pair in pairs])
        worse = worse - torch.tensor([pair.reference_worse for pair in pairs])
        loss = dpo_loss(better, worse, self._settings.beta)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        margin = (better - worse).detach()
        entry = {"loss": loss.item(), "margin": margin.mean().item(), "accuracy": (margin > 0).float().mean().item()}
        self.log.append({name: round(value, 5) for name, value in entry.items()})

    def save_state(self, path: Path) -> None:
        """Write everything that a continued training needs, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict(), "log": self.log}, partial
        )
        partial.replace(path)

    def load_state(self, path: Path) -> None:
        """Continue with a saved state, if the file exists."""
        if path.exists():
            state = torch.load(path, weights_only=True, mmap=True)
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.log = state["log"]


def train(
    model: Any,
    pairs: Sequence[PreferencePair],
    settings: Settings,
    seed: int,
    work: Path,
    report: Callable[[str], None],
) -> list[dict[str, float]]:
    """Train a model, or continue a training that was interrupted, and return its log.

    Args:
        model: The model, which is changed.
        pairs: The pairs, with the reference model's log-probabilities.
        settings: The settings of the training.
        seed: The seed of the order of the pairs.
        work: The folder that gets early/ and full/, checkpoints of transformers.
        report: Called with a line after each step.
    """
    training, state = Training(model, settings), work / "training-state.pt"
    training.load_state(state)
    save_interval = max(1, settings.steps // 5)
    for number, batch in enumerate(make_batches(pairs, settings, seed), 1):
        if number <= len(training.log):
            continue
        training.step(batch)
        report(f"step {number}/{settings.steps} {training.log[-1]}")
        if number == settings.early_step:
            stages.make_folder(work / "early", model.save_pretrained)
        if number % save_interval == 0 and number < settings.steps:
            training.save_state(state)
    stages.make_folder(work / "full", model.save_pretrained)
    state.unlink(missing_ok=True)
    return training.log
