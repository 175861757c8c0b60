"""The options of a merge: one frozen object, checked once, passed whole, and turned back into words to type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

from .dtypes import OUTPUT_DTYPES
from .errors import UsageError
from .kernels.contract import working_alpha
from .text import alpha_text

ENGINES = ("auto", "numpy", "cpu", "triton")
ON_UNPAIRED = ("error", "aligned")
ON_MISMATCH = ("error", "rows", "aligned")
MAX_ALPHAS = 64
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# The options that decide what an output holds; the others decide how it is made.
CONTENT = ("alpha_for", "on_unpaired", "on_mismatch", "dtype", "max_shard_size", "carry")


class AlphaRule(NamedTuple):
    """One `--alpha-for`: tensors in whose name the pattern is found take this alpha in every output."""

    pattern: re.Pattern[str]
    alpha: float


@dataclass(frozen=True)
class MergeOptions:
    """What a user may choose about a merge; `merge()` explains each option.

    Attributes:
        alphas: One alpha for each output; None where the caller sets alphas later, as a live model does.

    Raises:
        UsageError: An option makes no sense by itself.
    """

    alphas: tuple[float, ...] | None = None
    alpha_for: Mapping[str, float] = field(default_factory=dict)
    on_unpaired: str = "error"
    on_mismatch: str = "error"
    dtype: str | None = None
    max_shard_size: str | int | None = None
    carry: Sequence[str] = ()
    engine: str = "auto"
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    digest: bool = False
    check: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        _check_alphas(self.alphas, self.alpha_for)
        choices: tuple[tuple[str, str, Iterable[str]], ...] = (
            ("on_unpaired", self.on_unpaired, ON_UNPAIRED),
            ("on_mismatch", self.on_mismatch, ON_MISMATCH),
            ("dtype", "bf16" if self.dtype is None else self.dtype, OUTPUT_DTYPES),
        )
        for option, value, known in choices:
            if value not in known:
                raise UsageError(f"`{option}` must be one of {', '.join(known)}, got {value!r}")
        if isinstance(self.carry, str) or not all(isinstance(pattern, str) and pattern for pattern in self.carry):
            raise UsageError(f"`carry` must be a list of patterns, such as ['*.png'], got {self.carry!r}")
        _ = self.alpha_rules, self.shard_bytes  # both are checked here, before anything is downloaded

    @cached_property
    def alpha_rules(self) -> tuple[AlphaRule, ...]:
        """The compiled `alpha_for`, in the order given: the last match wins."""
        rules = []
        for pattern, alpha in self.alpha_for.items():
            try:
                if not isinstance(pattern, str):
                    raise TypeError(f"it is a {type(pattern).__name__}")
                rules.append(AlphaRule(re.compile(pattern), float(alpha)))
            except (re.error, OverflowError, RecursionError, TypeError) as error:
                raise UsageError(f"`alpha_for` {pattern!r} is not a regular expression: {error}") from error
        return tuple(rules)

    @cached_property
    def shard_bytes(self) -> int | None:
        """The largest size of an output's file in bytes; None for aligned's own files."""
        return _bytes_of(self.max_shard_size)

    def alpha_of(self, name: str) -> float | None:
        """Return the alpha that `alpha_for` gives the tensor of this name; None where the output's alpha counts."""
        return next((rule.alpha for rule in reversed(self.alpha_rules) if rule.pattern.search(name)), None)

    def content(self) -> dict[str, Any]:
        """Return the options that decide what an output holds, by their names on the command line."""
        return {_option(name): getattr(self, name) for name in CONTENT}

    def changed(self) -> dict[str, str]:
        """Return the options of `content` that are not at their defaults, as text, apart from `--alpha-for`."""
        defaults = {each.name: each.default for each in fields(self)}
        found = {
            _option(name): str(getattr(self, name))
            for name in ("on_unpaired", "on_mismatch", "dtype", "max_shard_size")
            if getattr(self, name) != defaults[name]
        }
        return found | ({"--carry": " ".join(self.carry)} if self.carry else {})

    def to_argv(self, alpha: float) -> list[str]:
        """Return the words of the command line that make the output of one alpha again, without its path."""
        words = ["--alpha", alpha_text(alpha)]
        for pattern, value in self.alpha_for.items():
            words += ["--alpha-for", f"{pattern}={alpha_text(value)}"]
        words += [word for option, value in self.changed().items() if option != "--carry" for word in (option, value)]
        return words + [word for pattern in self.carry for word in ("--carry", pattern)]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_alphas(alphas: Sequence[float] | None, alpha_for: Mapping[str, float]) -> None:
    """Raise UsageError for an alpha that is not finite in fp32, and for too many alphas or two equal ones."""
    for number in (*(alphas or ()), *alpha_for.values()):
        try:
            working_alpha(number)
        except (ValueError, TypeError) as error:
            raise UsageError(f"alpha must be a number that is finite in float32, got {number!r}") from error
    if alphas is not None and (not 1 <= len(alphas) <= MAX_ALPHAS or len(set(alphas)) < len(alphas)):
        raise UsageError(f"alphas must be 1 to {MAX_ALPHAS} different numbers, got {list(alphas)}")


def _bytes_of(text: str | int | None) -> int | None:
    """Return the bytes that "5GB", "500MB", "2GiB" or a number mean. Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]I?|)B?", str(text).strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise UsageError(f"`max_shard_size` takes bytes, or a size such as 5GB or 500MiB, got {text!r}")
    return size
