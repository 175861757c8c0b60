"""All tensors of a model in one launch, in place or not: the Triton kernel, and the table of addresses it works from.

The formula is extrapolate.py's. A row of the table is a run of at most SEGMENT blocks of one tensor, and every program
finds its row by a shift: no search, no copy, no launch for each tensor. Bytes moved per element: those of
extrapolate.py, and 32 for each row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .extrapolate import BLOCK, OPTIONS, block, current, ptx

SEGMENT = 128  # blocks of a row: 2^18 elements, so a tensor wastes at most 127 programs, and 7B parameters take 0.9 MB
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WIDE = 16  # bytes of the alignment that 128-bit accesses need


ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def whole_model(  # type: ignore[no-untyped-def]
    table_ptr, alpha, SFT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNMENT: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rows of int64: the addresses of sft, aligned and out, multiples of ALIGNMENT bytes, and the elements there.

    SFT, ALIGNED: the dtypes of the elements. They are not types of pointers, which Triton can neither hash nor write as
    JSON, and it writes the constants of a kernel so for a compile hook.
    """
    # Triton's compiler passes constants in a wrapper that `pointer_type` does not take, and its interpreter bare.
    program = tl.program_id(0)
    row = table_ptr + (program // SEGMENT).to(tl.int64) * 4
    start = (program % SEGMENT) * BLOCK
    left = tl.load(row + 3) - start
    sft_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.constexpr(SFT).value)), ALIGNMENT)
    aligned_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.constexpr(ALIGNED).value)), ALIGNMENT)
    out_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.constexpr(ALIGNED).value)), ALIGNMENT)
    block(sft_ptr + start, aligned_ptr + start, out_ptr + start, left, alpha, BLOCK, PTX)


class Group(NamedTuple):
    """Tensors that one launch does: (sft, aligned, out) of one pair of dtypes, and the kernel's table of them.

    constants: the kernel's, for the dtypes of sft and aligned and for the alignment of all addresses. The tensors are
    held, so that the addresses stay theirs.
    """

    triples: list[Triple]
    table: torch.Tensor
    constants: dict[str, Any]

    def launch(self, alpha: float) -> None:
        """Run the kernel; alpha not 0, finite in fp32."""
        if len(self.table):
            with current(self.table):
                whole_model[len(self.table) * SEGMENT,](
                    self.table, alpha, **self.constants, SEGMENT=SEGMENT, BLOCK=BLOCK, PTX=ptx(), **OPTIONS
                )


class Table:
    """Where the tensors of a model are on the GPU: made once, launched for every alpha.

    groups: one for each pair of dtypes, and for odd addresses.
    """

    def __init__(
        self, sft: Iterable[torch.Tensor], aligned: Iterable[torch.Tensor], out: Iterable[torch.Tensor]
    ) -> None:
        """Tensors in the same order: three by three contiguous, of one shape, on one device; out has aligned's dtype.

        dtypes BF16, F16 and F32 in any mix; out[i] may be sft[i] or aligned[i]; nothing is checked but the lengths.
        """
        kinds: defaultdict[tuple[torch.dtype, torch.dtype, int], list[Triple]] = defaultdict(list)
        for s, a, o in zip(sft, aligned, out, strict=True):
            apart = any(tensor.data_ptr() % WIDE for tensor in (s, a, o))
            kinds[s.dtype, a.dtype, 1 if apart else WIDE].append((s, a, o))
        self.groups = [
            Group(triples, rows(triples), {"SFT": ELEMENTS[s], "ALIGNED": ELEMENTS[a], "ALIGNMENT": alignment})
            for (s, a, alignment), triples in kinds.items()
        ]

    def launch(self, alpha: float) -> None:
        """Run the kernel for all groups; alpha not 0, finite in fp32."""
        for group in self.groups:
            group.launch(alpha)


def rows(triples: Sequence[Triple]) -> torch.Tensor:
    """The table, int64 of shape (rows, 4), on the tensors' device; without rows for empty tensors."""
    run = SEGMENT * BLOCK
    addresses = np.array([[tensor.data_ptr() for tensor in triple] for triple in triples], np.int64).reshape(-1, 3)
    items = np.array([[tensor.element_size() for tensor in triple] for triple in triples], np.int64).reshape(-1, 3)
    lengths = np.array([aligned.numel() for _, aligned, _ in triples], np.int64)
    counts = -(-lengths // run)
    tensor = np.repeat(np.arange(len(triples)), counts)
    start = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * run
    table = np.empty((len(tensor), 4), np.int64)
    table[:, :3] = addresses[tensor] + start[:, None] * items[tensor]
    table[:, 3] = np.minimum(lengths[tensor] - start, run)
    return torch.from_numpy(table).to(triples[0][1].device)
