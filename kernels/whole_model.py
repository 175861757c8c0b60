"""The Triton kernel for all tensors of a model in one launch, in place or not, and its table of addresses.

The formula is the one of extrapolate.py. A row of the table is a run of one tensor for at most SEGMENT programs, and
every program finds its row by a shift: no program searches, and no tensor needs a copy or a launch of its own. Bytes
moved for each element: those of extrapolate.py, and 32 for each row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from ..dtypes import TABLE, torch_names
from .extrapolate import OPTIONS, PROGRAM_ELEMENTS, launching, ptx, write_block

# The number of programs of a row, which compute 2^18 elements. At most 127 programs of a tensor have nothing to do, and
# the table of a model with 7B parameters takes 0.9 MB.
SEGMENT = 128
ACCESS_BYTES = 16  # 128-bit accesses need addresses that are multiples of this number
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit  # type: ignore[untyped-decorator]
def whole_model(  # type: ignore[no-untyped-def]
    table_ptr, alpha, SFT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNMENT: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr, IN_MEMORY: tl.constexpr = False,
):  # fmt: skip
    """Compute the rows of a table: int64 addresses of sft, aligned and out, and the number of elements there.

    The addresses are multiples of ALIGNMENT bytes. SFT and ALIGNED are the dtypes of the elements, and not types of
    pointers: Triton can neither hash such a type nor write it as JSON, as it writes constants for a compile hook.
    The argument alpha is a number that is not 0, or with IN_MEMORY the address of a number in fp32, which may be 0.
    """
    if IN_MEMORY:
        alpha = tl.load(alpha)
    program = tl.program_id(0)
    row = table_ptr + (program // SEGMENT).to(tl.int64) * 4
    start = (program % SEGMENT) * BLOCK
    left = tl.load(row + 3) - start
    # `pointer_type` takes a bare dtype: Triton's compiler passes constants in a wrapper, and its interpreter does not.
    sft_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.constexpr(SFT).value)), ALIGNMENT)
    aligned_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.constexpr(ALIGNED).value)), ALIGNMENT)
    out_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.constexpr(ALIGNED).value)), ALIGNMENT)
    write_block(sft_ptr + start, aligned_ptr + start, out_ptr + start, left, alpha, IN_MEMORY, BLOCK, PTX)


class Group(NamedTuple):
    """The tensors of one launch, of one pair of dtypes.

    Attributes:
        places: The positions of the tensors in the lists that the table was made of.
        table: The kernel's table, as `rows` makes it. It has addresses, so the caller of a launch holds the tensors.
        programs: The number of the kernel's programs.
        constants: The kernel's constants for the dtypes of sft and aligned and for the alignment of all addresses, in
            the order of its parameters.
    """

    places: list[int]
    table: torch.Tensor
    programs: int
    constants: dict[str, Any]

    def launch(self, alpha: float | torch.Tensor) -> None:
        """Run the kernel for an alpha that is not 0 and finite in fp32, or for the fp32 number in a tensor on the GPU.

        The GPU reads the tensor when the kernel runs, and at each replay of a graph that has captured the launch.
        """
        if self.programs:
            with launching(self.table):
                # Constants by position: by name they would take a microsecond more on the host.
                whole_model[self.programs,](
                    self.table, alpha, *self.constants.values(), SEGMENT, PROGRAM_ELEMENTS, ptx(),
                    isinstance(alpha, torch.Tensor), **OPTIONS,
                )  # fmt: skip


class Table:
    """The addresses of the tensors of a model on a GPU: made once, and launched for every alpha.

    A table holds none of the tensors: a caller that launches it must hold them until the launch is queued.

    Attributes:
        groups: For each pair of dtypes, one group of the tensors whose addresses are multiples of ACCESS_BYTES, and one
            group of the other tensors, if there are any.
    """

    def __init__(
        self, sft: Iterable[torch.Tensor], aligned: Iterable[torch.Tensor], out: Iterable[torch.Tensor]
    ) -> None:
        """Make the table of tensors in the same order, all contiguous and on one device.

        The three tensors at one position have one shape, and out has aligned's dtype; out[i] may be sft[i] or
        aligned[i]. The dtypes are BF16, F16 and F32 in any mix. The caller checks the tensors.

        Raises:
            ValueError: The numbers of tensors differ.
        """
        triples: list[Triple] = list(zip(sft, aligned, out, strict=True))
        kinds: defaultdict[tuple[torch.dtype, torch.dtype, int], list[int]] = defaultdict(list)
        for place, (s, a, o) in enumerate(triples):
            unaligned = any(tensor.data_ptr() % ACCESS_BYTES for tensor in (s, a, o))
            kinds[s.dtype, a.dtype, 1 if unaligned else ACCESS_BYTES].append(place)
        self.groups = []
        for (sft_dtype, aligned_dtype, alignment), places in kinds.items():
            table = rows([triples[place] for place in places])
            kernel_constants = constants(torch_names()[sft_dtype], torch_names()[aligned_dtype], alignment)
            self.groups.append(Group(places, table, len(table) * SEGMENT, kernel_constants))

    def launch(self, alpha: float | torch.Tensor) -> None:
        """Run the kernel for all groups; alpha is that of `Group.launch`."""
        for group in self.groups:
            group.launch(alpha)


def constants(sft: str, aligned: str, alignment: int) -> dict[str, Any]:
    """Return the kernel's constants for the dtypes of sft and aligned and an alignment of all addresses in bytes."""
    kinds = [getattr(tl, TABLE[dtype].torch) for dtype in (sft, aligned)]  # Triton's dtypes have the names of torch's
    return {"SFT": kinds[0], "ALIGNED": kinds[1], "ALIGNMENT": alignment}


def rows(triples: Sequence[Triple]) -> torch.Tensor:
    """Return the table, int64 of shape (rows, 4), on the tensors' device; an empty tensor has no row."""
    run = SEGMENT * PROGRAM_ELEMENTS
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
