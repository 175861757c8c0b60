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
# The dtypes of quantised elements, and their numbers in `_cpu.c`; each element takes one byte. F4 is E2M1 in the low
# four bits of its byte.
QUANTIZED = {"F8_E4M3": 3, "F4": 4}


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


class Scales(NamedTuple):
    """The scales of quantised elements: the elements of a matrix, in C order, of which blocks share a scale.

    The value of an element is fp32(element) * scale, rounded once to fp32.

    Attributes:
        values: The scales, in fp32, C-contiguous, of shape (rows of blocks, columns of blocks): an array of NumPy.
        width: The number of columns of the matrix.
        block: The rows and the columns of the matrix that share a scale; the last blocks may be smaller.
        first: The number of the operand's first element in the matrix.
    """

    values: Any
    width: int
    block: tuple[int, int]
    first: int = 0

    def check(self, n: int) -> None:
        """Raise ValueError if n elements have no place in the matrix of the scales."""
        rows, columns = self.values.shape
        height, width = self.block
        fits = self.first >= 0 and self.first + n <= rows * height * self.width
        if min(self.width, height, width) < 1 or columns != -(-self.width // width) or not fits:
            raise ValueError(
                f"scales of shape {rows} x {columns} for blocks of {height} x {width} do not cover elements "
                f"{self.first} to {self.first + n} of a matrix with {self.width} columns"
            )


class Operand(NamedTuple):
    """One input of an engine: elements of one dtype, one after the other.

    Attributes:
        memory: A C-contiguous buffer of raw little-endian bytes at any address, or an `Address`; for engines that
            compute with torch, a contiguous tensor.
        dtype: The dtype of the elements: "BF16", "F16", "F32" or "F64"; for quantised elements a name of QUANTIZED.
        scales: The scales of quantised elements; None for any other dtype. An engine computes with the values of such
            elements as with elements of F32, and the outputs of a quantised anchor are F32.
    """

    memory: Any
    dtype: str
    scales: Scales | None = None

    @classmethod
    def of_tensor(cls, tensor: Any) -> Operand:
        """Return a contiguous tensor of torch as an operand. Raises KeyError for an unknown dtype."""
        return cls(tensor, torch_names()[tensor.dtype])

    def part(self, first: int, count: int) -> Operand:
        """Return elements [first, first + count) of an operand whose memory is an `Address`."""
        item = self.itemsize
        scales = self.scales and self.scales._replace(first=self.scales.first + first)
        return Operand(self.memory.part(first * item, count * item), self.dtype, scales)

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return ITEMSIZE[self.dtype] if self.scales is None else 1

    @property
    def value_dtype(self) -> str:
        """The dtype of the values, in which an engine gets the elements: F32 for quantised ones."""
        return self.dtype if self.scales is None else "F32"

    @property
    def elements(self) -> int:
        """The number of elements in the memory. Raises ValueError if the memory ends inside an element."""
        memory, item = self.memory, self.itemsize
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
    """Return True if these arguments are those of ExPO."""
    if len(terms) != 1:
        return False
    _, plus, _ = terms[0]
    return plus is anchor or (
        plus.memory is anchor.memory and plus.dtype == anchor.dtype and plus.scales is anchor.scales
    )


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
    given = "another term" if len(terms) == 1 else f"{len(terms)} terms"
    raise EngineError(
        f"the engine {engine} computes only aligned + alpha * (aligned - sft), and got {given}: use the engine numpy, "
        "which computes any terms"
    )


def check_no_scales(anchor: Operand, terms: Sequence[Term]) -> None:
    """Raise EngineError if an operand has scales, for an engine that does not compute with quantised elements."""
    operands = [anchor, *(operand for term in terms for operand in (term.plus, term.minus))]
    if any(operand.scales is not None for operand in operands):
        raise EngineError("this engine does not compute with quantised elements: dequantise them first")


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
