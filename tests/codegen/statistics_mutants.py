"""This module lists mistakes in sweep.py that the tests of its compiled code must catch.

`mutants.package` makes a copy of kernels/ with one of them. A mutant that leaves out other=0.0 would not fail, because
Triton sets the registers of masked lanes to zero anyway.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A replacement in sweep.py; `variant` is one whose results show it."""

    name: str
    old: str
    new: str
    variant: str = "statistics1_bf16"


MUTANTS = [
    Mutant("no_finite_rule_for_d", "d = tl.where(finite, d, 0.0)", "d = d * 1.0"),
    Mutant("no_finite_rule_for_a", "a = tl.where(finite, a, 0.0)", "a = a * 1.0"),
    Mutant("infinite_d_counts", 'tl.abs(d) < float("inf")', 'tl.abs(d) <= float("inf")'),
    Mutant(
        "masked_sft_pollutes", "tl.load(sft_ptr + at, mask=inside, other=0.0)", "tl.load(sft_ptr + at, inside, 1.0)"
    ),
    Mutant(
        "masked_aligned_pollutes",
        "tl.load(aligned_ptr + at, mask=inside, other=0.0)",
        "tl.load(aligned_ptr + at, inside, 1.0)",
    ),
    Mutant("tail_in_a_part_s_row", "row + 2, tail", "row + 1, tail"),
    Mutant("parts_in_one_row", "row + part, at, None", "row, at, None"),
    Mutant("tail_counted_twice", "here < body", "here < left"),
    Mutant("rows_of_sums_overlap", "sums_ptr + row * 3", "sums_ptr + row"),
    Mutant("rows_of_counts_overlap", "counts_ptr + row * K + k", "counts_ptr + row + k", "statistics4_bf16"),
    Mutant(
        "changed_by_bits",
        "(value != a)",
        "(value.to(tl.int32, bitcast=True) != a.to(tl.int32, bitcast=True))",
    ),
    Mutant("changed_ignores_nan", "(value != a)", "((value < a) | (value > a))"),
    Mutant("infinity_is_finite", 'tl.abs(value) < float("inf")', 'tl.abs(value) <= float("inf")'),
    Mutant("nan_is_finite", 'tl.abs(value) < float("inf")', 'tl.abs(value) != float("inf")'),
    Mutant("counts_collide", "(1 - finite) << 16", "(1 - finite) << 8"),
    Mutant("max_without_abs", "tl.max(tl.abs(d), 0)", "tl.max(d, 0)"),
    Mutant("outputs_in_one_place", "out_ptr + k * pitch + at", "out_ptr + at", "statistics4_bf16"),
    Mutant("one_alpha_for_all", "tl.load(alphas_ptr + k)", "tl.load(alphas_ptr)", "statistics4_bf16"),
    Mutant("rows_in_32_bits", "tl.program_id(0).to(tl.int64) * 2", "tl.program_id(0) * 2"),
    Mutant("pitch_in_32_bits", "k * pitch + at", "(k * pitch).to(tl.int32) + at", "statistics4_bf16"),
]
