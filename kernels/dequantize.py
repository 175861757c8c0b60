"""The Triton kernel for the values of quantised elements, fp32(element) * scale, each rounded once, and its launcher.

The elements are F8_E4M3 or F4 (E2M1), one in each byte; `contract.Scales` describes the scales. Bytes moved for each
element: one is read, and four are written; the scales stay in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contract import Operand
from .extrapolate import OPTIONS, launching

PROGRAM_ELEMENTS = 1024
MOST_ELEMENTS = 1 << 31  # positions in the matrix are int32, because an int64 division is slow


@triton.jit  # type: ignore[untyped-decorator]
def number(element, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the numbers of a block of elements, in uint8, without their scales: fp32, exact."""
    bits = element.to(tl.uint32)
    if E4M3:
        magnitude, sign = bits & 0x7F, (bits & 0x80) << 24
        normal = (magnitude << 20) + (120 << 23)  # the exponent's bias is 7, and fp32's is 127
        small = magnitude.to(tl.float32) * 0.001953125  # subnormals are multiples of 2^-9
        value = tl.where(magnitude < 8, small.to(tl.uint32, bitcast=True), normal)
        value = tl.where(magnitude == 0x7F, 0x7FC00000, value)
    else:
        magnitude, sign = bits & 7, (bits & 8) << 28
        normal = (magnitude << 22) + (126 << 23)
        small = magnitude.to(tl.float32) * 0.5
        value = tl.where(magnitude < 2, small.to(tl.uint32, bitcast=True), normal)
    return (value.to(tl.uint32) | sign).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "first"])  # type: ignore[untyped-decorator]
def dequantize(  # type: ignore[no-untyped-def]
    element_ptr, scale_ptr, out_ptr, n, first, columns, width, block_rows, block_columns,
    E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the values of n elements, BLOCK in each program; `columns` is the number of scales of a row of blocks."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row, column = (first + at) // width, (first + at) % width
    scale = tl.load(scale_ptr + (row // block_rows) * columns + column // block_columns, mask=inside)
    value = number(tl.load(element_ptr + at, mask=inside), E4M3)
    tl.store(out_ptr + at, value * scale, mask=inside)


def launch(operand: Operand, values: torch.Tensor, out: torch.Tensor) -> None:
    """Write the values of quantised elements.

    Args:
        operand: The elements, a contiguous uint8 tensor on the device, and their scales.
        values: The scales on the device, fp32 and contiguous.
        out: fp32, with one element for each of the operand's, on the device.

    Raises:
        ValueError: The scales do not cover the elements, or the elements are too many for one launch.
    """
    scales, n = operand.scales, out.numel()
    assert scales is not None
    scales.check(n)
    if scales.first + n > MOST_ELEMENTS - PROGRAM_ELEMENTS:
        raise ValueError(f"elements up to number {scales.first + n} of a matrix: one launch takes fewer than 2^31")
    if n:
        with launching(out):
            dequantize[triton.cdiv(n, PROGRAM_ELEMENTS),](
                operand.memory, values, out, n, scales.first, values.shape[1], scales.width, *scales.block,
                E4M3=operand.dtype == "F8_E4M3", BLOCK=PROGRAM_ELEMENTS, **OPTIONS,
            )  # fmt: skip
