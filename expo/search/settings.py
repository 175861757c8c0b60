"""What a search is asked for, checked: prompts, alphas, how replies are sampled, and the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..inputs.resolve import alphas_of


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the paper's settings."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    presence_penalty: float = 0.1
    frequency_penalty: float = 0.1
    max_new_tokens: int = 2048


@dataclass(frozen=True)
class Options:
    """See search_alpha()."""

    batch_size: int
    seed: int
    device: str
    keep: str
    budget: int
    on_unpaired: str
    on_mismatch: str
    trust_remote_code: bool
    alpacaeval: bool
    quiet: bool

    def check(self) -> None:
        """Raise UsageError for what makes no sense."""
        for name in ("batch_size", "budget"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")


def sampling_of(max_new_tokens: int, given: Mapping[str, float] | None) -> Sampling:
    """The paper's settings, but for those that are given. Raises UsageError."""
    try:
        sampling = Sampling(max_new_tokens=max_new_tokens, **dict(given or {}))  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"sampling: {str(error).partition(') ')[2] or error}") from error
    if sampling.max_new_tokens < 1 or sampling.top_k < 1 or sampling.temperature <= 0 or not 0 < sampling.top_p <= 1:
        raise UsageError(
            "max_new_tokens and top_k must be at least 1, temperature above 0, top_p above 0 and at most 1, "
            f"got {sampling}"
        )
    return sampling


def texts_of(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises UsageError."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"prompts must be one text at least, and nothing but texts, got {texts!r:.80}")
    return texts


def ascending(given: Iterable[float] | str) -> list[float]:
    """0 and these, each once, in ascending order of size. Raises UsageError."""
    if isinstance(given, str):
        raise UsageError(f'alphas must be numbers or "auto", got {given!r}')
    values = alphas_of(given)
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise UsageError(f"alpha must be finite, got {wrong[0]}")
    return sorted({0.0, *(value + 0.0 for value in values)}, key=lambda alpha: (abs(alpha), alpha))
