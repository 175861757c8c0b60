"""This module lists mistakes in the kernels; executing the compiled code must show each of them.

`package` makes a copy of kernels/ with one mistake. Mistakes in the statistics are in `statistics_mutants.py`, because
threads exchange values there and `executor.py` does not support that. Fused multiply-adds are no mistake in the source:
`test_mutants.py` asks the compiler for them.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
OUTSIDE, DIFFERENT = "accesses not allowed", "differ"  # the errors: accesses outside the tensors, or wrong elements


class Mutant(NamedTuple):
    """A mistake puts `new` in place of `old`, which a file of kernels/ contains once.

    `seen` is in the message of the error that executing `variant` raises.
    """

    file: str
    variant: str
    name: str
    old: str
    new: str
    seen: str


plain = partial(Mutant, "extrapolate.py", "extrapolate_bf16")
mixed = partial(Mutant, "extrapolate.py", "extrapolate_fp32_bf16")
sweep = partial(Mutant, "sweep.py", "sweep2_bf16")
whole = partial(Mutant, "whole_model.py", "whole_model_bf16")

POINTERS = "write_block(sft_ptr + start, aligned_ptr + start"
PRODUCT = "[d, alpha]"
ROUND = "return (a + p).to(dtype)"
BITS = "(a + p).to(tl.uint32, bitcast=True)"
CAST = "return ({} >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)"
FLUSH = "return tl.where((a + p < 2.0**-126) & (a + p > -(2.0**-126)), 0 * (a + p), a + p).to(dtype)"
STORE = "rounded(a, d, alpha, out_ptr.dtype.element_ty, PTX)"
TWO_PRODUCTS = "((1 + alpha) * a - alpha * widen(sft)).to(out_ptr.dtype.element_ty)"

MUTANTS = [
    plain("offset_in_32_bits", "tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0) * BLOCK", OUTSIDE),
    plain("body_mask_too_wide", "at, at < body,", "at, at < body + TAIL_ELEMENTS,", OUTSIDE),
    plain("body_mask_of_all", "at, at < body,", "at, at < left,", DIFFERENT),
    plain("body_not_masked", "at, at < body,", "at, None,", OUTSIDE),
    plain("body_lost", "at, at < body,", "at, at < 0,", DIFFERENT),
    plain("tail_mask_too_wide", "tail, tail < left,", "tail, tail <= left,", OUTSIDE),
    plain("tail_not_masked", "tail, tail < left,", "tail, None,", OUTSIDE),
    plain("tail_lost", "tail, tail < left,", "tail, tail < body,", DIFFERENT),
    plain("tail_one_short", "tail, tail < left,", "tail, tail < left - 1,", DIFFERENT),
    plain("full_one_too_soon", "if left >= BLOCK:", "if left >= BLOCK - 1:", OUTSIDE),
    plain("sft_for_aligned", "aligned = tl.load(aligned_ptr", "aligned = tl.load(sft_ptr", DIFFERENT),
    plain("pointers_swapped", POINTERS, "write_block(aligned_ptr + start, sft_ptr + start", DIFFERENT),
    plain("operands_swapped", "d = a - widen(sft)", "d = widen(sft) - a", DIFFERENT),
    plain("no_alpha", PRODUCT, "[d, 1.0 + 0.0 * d]", DIFFERENT),
    plain("square_of_d", PRODUCT, "[d, d]", DIFFERENT),
    plain("alpha_on_all", ROUND, "return (alpha * (a + d)).to(dtype)", DIFFERENT),
    plain("two_products", STORE, TWO_PRODUCTS, DIFFERENT),
    plain("difference_rounded", "d = a - widen(sft)", "d = (a - widen(sft)).to(tl.bfloat16).to(tl.float32)", DIFFERENT),
    plain("product_rounded", ROUND, "return (a + p.to(tl.bfloat16).to(tl.float32)).to(dtype)", DIFFERENT),
    plain("truncated", ROUND, CAST.format(BITS), DIFFERENT),
    plain("half_rounded_up", ROUND, CAST.format(f"({BITS} + 0x8000)"), DIFFERENT),
    plain("subnormals_flushed", ROUND, FLUSH, DIFFERENT),
    mixed("nan_rounded_as_a_number", ROUND, CAST.format(f"({BITS} + 0x7FFF + (({BITS} >> 16) & 1))"), DIFFERENT),
    sweep("offset_in_32_bits", "tl.program_id(0).to(tl.int64) * 2", "tl.program_id(0) * 2", OUTSIDE),
    sweep("programs_too_far_apart", "start = row * PART", "start = row * BLOCK", OUTSIDE),
    sweep("second_part_lost", "at = part * PART +", "at =", DIFFERENT),
    sweep("body_not_masked", "here, here < body, K", "here, None, K", OUTSIDE),
    sweep("tail_mask_too_wide", "tail, tail < left, K", "tail, tail <= left, K", OUTSIDE),
    sweep("tail_lost", "tail, tail < left, K", "tail, tail < body, K", DIFFERENT),
    sweep("operands_swapped", "d = a - widen(sft)", "d = widen(sft) - a", DIFFERENT),
    sweep("next_alpha", "tl.load(alphas_ptr + k)", "tl.load(alphas_ptr + (k + 1) % K)", DIFFERENT),
    sweep("alpha_beyond", "tl.load(alphas_ptr + k)", "tl.load(alphas_ptr + k + 1)", OUTSIDE),
    sweep("pitch_ignored", "out_ptr + k * pitch + at", "out_ptr + at", DIFFERENT),
    sweep("pitch_in_bytes", "out_ptr + k * pitch + at", "out_ptr + 2 * k * pitch + at", OUTSIDE),
    whole("row_of_three", "(program // SEGMENT).to(tl.int64) * 4", "(program // SEGMENT).to(tl.int64) * 3", OUTSIDE),
    whole("rows_too_short", "(program // SEGMENT)", "(program // (SEGMENT // 2))", OUTSIDE),
    whole("start_in_no_row", "start = (program % SEGMENT) * BLOCK", "start = program * BLOCK", DIFFERENT),
    whole("left_not_reduced", "tl.load(row + 3) - start", "tl.load(row + 3)", OUTSIDE),
    whole("aligned_for_sft", "tl.load(row).to", "tl.load(row + 1).to", DIFFERENT),
    whole("always_in_place", "tl.load(row + 2).to", "tl.load(row + 1).to", OUTSIDE),
    whole("last_row_lost", "-(-lengths // run)", "lengths // run", DIFFERENT),
    whole("rows_at_one_address", "addresses[tensor] + start[:, None] * items[tensor]", "addresses[tensor]", DIFFERENT),
    whole("rows_by_elements", "start[:, None] * items[tensor]", "start[:, None]", DIFFERENT),
    whole("last_row_too_long", "np.minimum(lengths[tensor] - start, run)", "lengths[tensor]", OUTSIDE),
]  # fmt: skip


def package(folder: Path, name: str, file: str, old: str, new: str, patch: pytest.MonkeyPatch, times: int = 1) -> Any:
    """Return aot.py of a copy of kernels/ in which `new` replaces `old`, which the file must contain `times` times.

    Triton reads the source of a kernel from its file. The modules of expo/ that kernels/ needs are copied too.
    """
    copy = folder / f"mutant_{name}" / "kernels"
    copy.mkdir(parents=True)
    for needed in ("dtypes.py", "errors.py"):
        (copy.parent / needed).write_text((KERNELS.parent / "expo" / needed).read_text())
    for source in KERNELS.glob("*.py"):
        text = source.read_text()
        if source.name == file:
            assert text.count(old) == times, f"{file} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        (copy / source.name).write_text(text)
    patch.syspath_prepend(folder)
    return importlib.import_module(f"{copy.parent.name}.kernels.aot")
