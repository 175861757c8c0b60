"""The arguments of a search, checked: prompts, alphas, the settings of the sampling, and all other options."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..inputs.resolve import alphas_of


@dataclass(frozen=True)
class Sampling:
    """The settings with which tokens are sampled; the defaults are the paper's."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    presence_penalty: float = 0.1
    frequency_penalty: float = 0.1
    max_new_tokens: int = 2048


@dataclass(frozen=True)
class SearchOptions:
    """The options of search_alpha(), which explains each of them."""

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
        """Raise UsageError if an option has a value that makes no sense."""
        for name in ("batch_size", "budget"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")


def make_sampling(max_new_tokens: int, overrides: Mapping[str, float] | None) -> Sampling:
    """Return the paper's settings with a reply length and with the overrides of the caller.

    Raises:
        UsageError: An override has an unknown name, or a value makes no sense.
    """
    try:
        sampling = Sampling(max_new_tokens=max_new_tokens, **dict(overrides or {}))  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"sampling: {str(error).partition(') ')[2] or error}") from error
    if sampling.max_new_tokens < 1 or sampling.top_k < 1 or sampling.temperature <= 0 or not 0 < sampling.top_p <= 1:
        raise UsageError(
            "`max_new_tokens` and top_k must be at least 1, temperature must be above 0, and top_p must be above 0 and "
            f"at most 1, got {sampling}"
        )
    return sampling


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as a list. Raises UsageError if there is none or if one is not a string."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"prompts must be a list of at least one string, got {texts!r:.80}")
    return texts


def sort_alphas(alphas: Iterable[float] | str) -> list[float]:
    """Return 0 and the given alphas, each once, in ascending order of magnitude. Raises UsageError."""
    if isinstance(alphas, str):
        raise UsageError(f'alphas must be numbers or "auto", got {alphas!r}')
    values = alphas_of(alphas)
    infinite = [value for value in values if not math.isfinite(value)]
    if infinite:
        raise UsageError(f"alpha must be finite, got {infinite[0]}")
    return sorted({0.0, *(value + 0.0 for value in values)}, key=lambda alpha: (abs(alpha), alpha))
