"""Direct preference optimisation, plainly: the standard loss, AdamW over all the weights, two checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cache
from .models import precision
from .settings import Settings


class Pair(NamedTuple):
    """Tokens of a prompt and of two replies, and the reference model's log-probabilities of these."""

    prompt: list[int]
    better: list[int]
    worse: list[int]
    base_better: float = 0.0
    base_worse: float = 0.0


def loss_of(gain_better: torch.Tensor, gain_worse: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * margin), on average; a gain is how much likelier a reply is than for the reference."""
    return -torch.nn.functional.logsigmoid(beta * (gain_better - gain_worse)).mean()


def logps(model: Any, prompts: Sequence[list[int]], tails: Sequence[list[int]], bf16: bool) -> torch.Tensor:
    """Log-probability of every reply after its prompt, summed over its tokens."""
    width = max(len(prompt) + len(tail) for prompt, tail in zip(prompts, tails, strict=True))
    tokens = torch.full((len(prompts), width), int(model.config.pad_token_id))
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        tokens[row, : len(prompt) + len(tail)] = torch.tensor(prompt + tail)
        scored[row, len(prompt) : len(prompt) + len(tail)] = True
    # Padding stands on the right, where causal attention never lets a scored token see it.
    with precision(bf16):
        hidden = model.base_model(input_ids=tokens[:, :-1]).last_hidden_state[scored[:, 1:]]
        logits = model.get_output_embeddings()(hidden).float()
    each = -torch.nn.functional.cross_entropy(logits, tokens[:, 1:][scored[:, 1:]], reduction="none")
    rows = scored[:, 1:].nonzero()[:, 0]
    return torch.zeros(len(prompts)).index_add(0, rows, each)


@torch.no_grad()
def with_base(model: Any, pairs: Sequence[Pair], settings: Settings) -> list[Pair]:
    """The pairs with the reference's log-probabilities, once for all steps."""
    done, size = [], settings.pairs_per_step
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        better, worse = _both(model, part, settings.bf16)
        done += [
            pair._replace(base_better=b, base_worse=w)
            for pair, b, w in zip(part, better.tolist(), worse.tolist(), strict=True)
        ]
    return done


def _both(model: Any, pairs: Sequence[Pair], bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = [pair.prompt for pair in pairs]
    tails = [pair.better for pair in pairs] + [pair.worse for pair in pairs]
    better, worse = logps(model, prompts + prompts, tails, bf16).chunk(2)
    return better, worse


def batches(pairs: Sequence[Pair], settings: Settings, seed: int) -> Iterator[list[Pair]]:
    """The pairs of every step: shuffled anew for each pass, so a function of the seed and the step."""
    order = random.Random(seed)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < settings.pairs_per_step:
            queue += order.sample(range(len(pairs)), len(pairs))
        yield [pairs[place] for place in queue[: settings.pairs_per_step]]
        del queue[: settings.pairs_per_step]


class Training:
    """A model in training: its optimizer, the steps done and what was seen in them; all of it can be put away."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self._settings = model, settings
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self.log: list[dict[str, float]] = []

    def step(self, pairs: Sequence[Pair]) -> None:
        """One step of AdamW on these pairs."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * min(1.0, (len(self.log) + 1) / self._settings.warmup)
        better, worse = _both(self.model, pairs, self._settings.bf16)
        better = better - torch.tensor([pair.base_better for pair in pairs])
        worse = worse - torch.tensor([pair.base_worse for pair in pairs])
        loss = loss_of(better, worse, self._settings.beta)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        margin = (better - worse).detach()
        seen = {"loss": loss.item(), "margin": margin.mean().item(), "accuracy": (margin > 0).float().mean().item()}
        self.log.append({name: round(value, 5) for name, value in seen.items()})

    def put_away(self, path: Path) -> None:
        """Everything that going on needs, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict(), "log": self.log}, partial
        )
        partial.replace(path)

    def take_up(self, path: Path) -> None:
        """Go on from what was put away; a no-op where nothing was."""
        if path.exists():
            kept = torch.load(path, weights_only=True, mmap=True)
            self.model.load_state_dict(kept["model"])
            self._optimizer.load_state_dict(kept["optimizer"])
            self.log = kept["log"]


def train(
    model: Any, pairs: Sequence[Pair], settings: Settings, seed: int, work: Path, said: Callable[[str], None]
) -> list[dict[str, float]]:
    """Train; leave work/early and work/full, checkpoints of transformers'. Goes on where it was interrupted."""
    training, kept = Training(model, settings), work / "going-on.pt"
    training.take_up(kept)
    every = max(1, settings.steps // 5)
    for number, part in enumerate(batches(pairs, settings, seed), 1):
        if number <= len(training.log):
            continue
        training.step(part)
        said(f"step {number}/{settings.steps} {training.log[-1]}")
        if number == settings.early_step:
            cache.folder(work / "early", model.save_pretrained)
        if number % every == 0 and number < settings.steps:
            training.put_away(kept)
    cache.folder(work / "full", model.save_pretrained)
    kept.unlink(missing_ok=True)
    return training.log
