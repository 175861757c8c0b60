"""Define the options of a merge: one frozen object, which checks itself and can write its command line."""

from __future__ import annotations

import os
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
# The options that decide the content of an output; the others decide how the output is made.
CONTENT = ("alpha_for", "on_unpaired", "on_mismatch", "dtype", "max_shard_size", "carry", "aligned_config")


class AlphaRule(NamedTuple):
    """One rule of `alpha_for`: a tensor whose name the pattern matches has this alpha in every output."""

    pattern: re.Pattern[str]
    alpha: float


@dataclass(frozen=True)
class MergeOptions:
    """The options of a merge, without its inputs and paths; the docstring of `merge()` explains each of them.

    Attributes:
        alphas: One alpha for each output; None if the caller sets alphas later, as a live model does.

    Raises:
        UsageError: An option has a value that is not allowed.
    """

    alphas: tuple[float, ...] | None = None
    alpha_for: Mapping[str, float] = field(default_factory=dict)
    on_unpaired: str = "error"
    on_mismatch: str = "error"
    dtype: str | None = None
    max_shard_size: str | int | None = None
    carry: Sequence[str] = ()
    aligned_config: str | None = None
    engine: str = "auto"
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    digest: bool = False
    check: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        """Check every option. Raises UsageError."""
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
        _ = self.alpha_rules, self.shard_bytes  # these properties raise their errors here, before a download

    @cached_property
    def alpha_rules(self) -> tuple[AlphaRule, ...]:
        """The rules of `alpha_for` with compiled patterns, in their order; the last rule that matches a name counts."""
        rules = []
        for pattern, alpha in self.alpha_for.items():
            try:
                if not isinstance(pattern, str):
                    raise TypeError(f"its type is {type(pattern).__name__}")
                rules.append(AlphaRule(re.compile(pattern), float(alpha)))
            except (re.error, OverflowError, RecursionError, TypeError) as error:
                raise UsageError(f"`alpha_for` {pattern!r} is not a regular expression: {error}") from error
        return tuple(rules)

    @cached_property
    def shard_bytes(self) -> int | None:
        """The largest number of tensor bytes in a file; None for aligned's division into files."""
        return _bytes_of(self.max_shard_size)

    def alpha_of(self, name: str) -> float | None:
        """Return the alpha that `alpha_for` gives the tensor of this name; None if the output's alpha applies."""
        return next((rule.alpha for rule in reversed(self.alpha_rules) if rule.pattern.search(name)), None)

    def content(self) -> dict[str, Any]:
        """Return the options that decide the content of an output, by their names on the command line."""
        return {_option(name): getattr(self, name) for name in CONTENT}

    def changed(self) -> dict[str, str]:
        """Return the options of `content`, except `--alpha-for`, that do not have their default values, as text."""
        defaults = {each.name: each.default for each in fields(self)}
        changed = {
            _option(name): str(getattr(self, name))
            for name in ("on_unpaired", "on_mismatch", "dtype", "max_shard_size")
            if getattr(self, name) != defaults[name]
        }
        return changed | ({"--carry": " ".join(self.carry)} if self.carry else {})

    def to_argv(self, alpha: float) -> list[str]:
        """Return the command-line words that make the output of one alpha again, without paths."""
        words = ["--alpha", alpha_text(alpha)]
        for pattern, value in self.alpha_for.items():
            words += ["--alpha-for", f"{pattern}={alpha_text(value)}"]
        words += [word for option, value in self.changed().items() if option != "--carry" for word in (option, value)]
        if self.aligned_config is not None:  # the folder's name alone, as for the inputs: the rest may be private
            words += ["--aligned-config", os.path.basename(os.path.abspath(self.aligned_config))]
        return words + [word for pattern in self.carry for word in ("--carry", pattern)]


def _option(name: str) -> str:
    """Return the option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def _check_alphas(alphas: Sequence[float] | None, alpha_for: Mapping[str, float]) -> None:
    """Raise UsageError if an alpha is not finite in fp32, if two alphas are equal, or if there are too many."""
    for number in (*(alphas or ()), *alpha_for.values()):
        try:
            working_alpha(number)
        except (ValueError, TypeError) as error:
            raise UsageError(f"alpha must be a number that is finite in float32, got {number!r}") from error
    if alphas is not None and (not 1 <= len(alphas) <= MAX_ALPHAS or len(set(alphas)) < len(alphas)):
        raise UsageError(f"alphas must be 1 to {MAX_ALPHAS} different numbers, got {list(alphas)}")


def _bytes_of(text: str | int | None) -> int | None:
    """Return the number of bytes that a text such as "5GB" or "2GiB", or a number, means. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]I?|)B?", str(text).strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"`max_shard_size` takes bytes, or a size such as 5GB or 500MiB, got {text!r}")
    return size
