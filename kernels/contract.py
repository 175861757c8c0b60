"""The contract of every engine: its arguments, the working alpha, and the statistics of a merge.

An engine computes, for an anchor o and terms (c_k, x_k, y_k) in the order given:

    r = f32(o);  for each k:  d = f32(x_k) - f32(y_k);  p = f32(c_k) * d;  r = r + p
    out = round-to-nearest-even(r -> dtype of o)

Each fp32 operation rounds once; no engine fuses a multiplication with an addition or flushes subnormal numbers. If one
of the tensors is F64, the same steps run in fp64 with the coefficients as doubles.

ExPO, "Model Extrapolation Expedites Alignment" (arXiv 2404.16792), is one term with o = x_1 = aligned and y_1 = sft:
out = aligned + alpha * (aligned - sft). `extrapolation` builds these arguments. Alpha 0 copies aligned bit for bit:
callers copy, and never ask an engine for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..dtypes import ITEMSIZE, torch_names
from ..errors import EngineError

CODES = {"BF16": 0, "F16": 1, "F32": 2}  # the numbers of the dtypes that `_cpu.c` knows


class Address(NamedTuple):
    """Memory of the host at a bare address, for tensors that export no buffer; the caller keeps it alive.

    Attributes:
        start: The address of the first byte.
        nbytes: The number of bytes of the memory.
    """

    start: int
    nbytes: int

    def part(self, first: int, nbytes: int) -> Address:
        """Return the memory of `nbytes` bytes from byte `first` on."""
        return Address(self.start + first, nbytes)


def buffer_of(memory: Any) -> Any:
    """Return an object that exports the memory as a buffer: the memory itself unless it is an `Address`."""
    if type(memory) is not Address:
        return memory
    import ctypes

    return (ctypes.c_ubyte * memory.nbytes).from_address(memory.start)


class Operand(NamedTuple):
    """One input of an engine: elements of one dtype, one after the other.

    Attributes:
        memory: A C-contiguous buffer of raw little-endian bytes at any address, or an `Address`; for engines that
            compute with torch, a contiguous tensor.
        dtype: The dtype of the elements: "BF16", "F16", "F32" or "F64".
        scales: The scales of quantised elements. No engine computes with them yet, so all refuse any but None.
    """

    memory: Any
    dtype: str
    scales: Any = None

    @classmethod
    def of_tensor(cls, tensor: Any) -> Operand:
        """Return a contiguous tensor of torch as an operand. Raises KeyError for an unknown dtype."""
        return cls(tensor, torch_names()[tensor.dtype])

    def part(self, first: int, count: int) -> Operand:
        """Return elements [first, first + count) of an operand whose memory is an `Address`."""
        item = ITEMSIZE[self.dtype]
        return Operand(self.memory.part(first * item, count * item), self.dtype, self.scales)

    @property
    def elements(self) -> int:
        """The number of elements in the memory. Raises ValueError if the memory ends inside an element."""
        memory, item = self.memory, ITEMSIZE[self.dtype]
        nbytes: int = memory.nbytes if hasattr(memory, "nbytes") else memoryview(memory).nbytes
        count, rest = divmod(nbytes, item)
        if rest:
            raise ValueError(f"a buffer of {nbytes} bytes has no whole number of {self.dtype} elements")
        return count


class Term(NamedTuple):
    """One term of the sum: coefficient * (plus - minus).

    Attributes:
        coefficients: One number for each output, as `working_alpha` gives it; for `sweep.launch`, a tensor of them.
        plus: The operand x.
        minus: The operand y.
    """

    coefficients: Any
    plus: Operand
    minus: Operand


class Statistics(NamedTuple):
    """The statistics of a merge: sums over the difference of two tensors or pieces, and counts of the outputs.

    The letter d stands for aligned - sft, computed in fp32, or in fp64 if a tensor is F64. For a term that is not the
    term of ExPO, d stands for plus - minus, and the word aligned stands for the anchor.

    Attributes:
        d_squared: The sum of d*d over the elements whose d is finite, accumulated in fp32 over short runs and in fp64
            across them. Its relative error is below 1e-5 as long as the squares are normal fp32 numbers.
        aligned_squared: The sum of aligned*aligned over the same elements, accumulated in the same way.
        max_abs_d: The largest finite |d|.
        counts: For each output (changed, non_finite). The first number counts the elements that compare unequal to
            aligned by the rule of IEEE 754: -0 equals +0, and NaN equals nothing. The second number counts the elements
            that are inf or NaN.
    """

    d_squared: float
    aligned_squared: float
    max_abs_d: float
    counts: tuple[tuple[int, int], ...]


# engine(anchor, terms, outputs, measure) fills the outputs, one for each coefficient of a term, and returns Statistics
# if `measure`, else None. The anchor fixes the number of elements that the engine computes, and the dtype of the
# outputs; the other memories may be longer. If there is one output and `measure` is False, the output may be the memory
# of an input.
EngineFunction = Callable[[Operand, Sequence[Term], Sequence[Any], bool], "Statistics | None"]


def extrapolation(sft: Operand, aligned: Operand, alphas: Any) -> tuple[Operand, tuple[Term]]:
    """Return the anchor and the terms of ExPO: `engine(*extrapolation(sft, aligned, alphas), outputs, measure)`."""
    return aligned, (Term(alphas, aligned, sft),)


def tensor_extrapolation(sft: Any, aligned: Any, alphas: Any) -> tuple[Operand, tuple[Term]]:
    """Return the anchor and the terms of ExPO for contiguous tensors of torch."""
    return extrapolation(Operand.of_tensor(sft), Operand.of_tensor(aligned), alphas)


def is_extrapolation(anchor: Operand, terms: Sequence[Term]) -> bool:
    """Return True if these arguments are those of ExPO, without scales."""
    if len(terms) != 1:
        return False
    _, plus, minus = terms[0]
    same = plus is anchor or (plus.memory is anchor.memory and plus.dtype == anchor.dtype and plus.scales is None)
    return same and anchor.scales is None and minus.scales is None


def extrapolation_term(engine: str, anchor: Operand, terms: Sequence[Term]) -> Term:
    """Return the term of ExPO, for an engine that computes nothing else.

    Args:
        engine: The name of the engine, for the message.
        anchor: The anchor, as the engine got it.
        terms: The terms, as the engine got them.

    Raises:
        EngineError: The arguments are not those of ExPO.
    """
    if is_extrapolation(anchor, terms):
        return terms[0]
    check_no_scales(anchor, terms)
    given = "another term" if len(terms) == 1 else f"{len(terms)} terms"
    raise EngineError(
        f"the engine {engine} computes only aligned + alpha * (aligned - sft), and got {given}: use the engine numpy, "
        "which computes any terms"
    )


def check_no_scales(anchor: Operand, terms: Sequence[Term]) -> None:
    """Raise EngineError if an operand has scales, which no engine knows yet."""
    operands = [anchor, *(operand for term in terms for operand in (term.plus, term.minus))]
    if any(operand.scales is not None for operand in operands):
        raise EngineError("an operand has scales, and no engine computes with quantised elements yet")


def total_statistics(parts: Iterable[Statistics], outputs: int) -> Statistics:
    """Return the statistics of several pieces together; the sums are exact, so the order of the pieces has no effect.

    Args:
        parts: The statistics of each piece.
        outputs: The number of outputs, which is the same for all pieces.
    """
    parts = list(parts)
    counts = tuple(
        (sum(part.counts[k][0] for part in parts), sum(part.counts[k][1] for part in parts)) for k in range(outputs)
    )
    d_squared = exact_sum(part.d_squared for part in parts)
    aligned_squared = exact_sum(part.aligned_squared for part in parts)
    return Statistics(d_squared, aligned_squared, max((part.max_abs_d for part in parts), default=0.0), counts)


def exact_sum(values: Iterable[float]) -> float:
    """Return the sum, rounded once; inf if the sum overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def working_alpha(alpha: float, *dtypes: str) -> float:
    """Return alpha as the arithmetic of these dtypes uses it: rounded to fp32, or the double itself if one is F64.

    Raises:
        ValueError: The alpha is not finite in fp32, whatever the dtypes.
    """
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", alpha))
    except (OverflowError, struct.error):  # The number is too large, or is not a number.
        rounded = math.inf
    # A number that is subnormal in fp32 is rounded in doubles: the thread's mode may flush the conversion's result.
    if abs(alpha) < 2.0**-126:
        rounded = math.copysign(math.ldexp(round(math.ldexp(abs(alpha), 149)), -149), alpha)
    if not math.isfinite(rounded):
        raise ValueError(f"alpha must be finite in float32, got {alpha!r}")
    return float(alpha) if "F64" in dtypes else float(rounded)
