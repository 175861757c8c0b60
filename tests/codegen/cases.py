"""This module launches compiled kernels over fenced memory and compares their outputs with the numerics contract.

A launch must give the same bits and must write nothing else. `FAMILIES` maps each kernel to the function that places a
launch of it in memory. `cases` yields the small launches of any variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import exact
import numpy as np
import torch
from engine_calls import run_engine
from executor import Kernel, Range
from same import assert_same

from expo.dtypes import ITEMSIZE
from expo.kernels import aot, numerics
from expo.kernels.contract import working_alpha

Array = Any
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
POISON, GUARD = 0xA5, 256  # the byte that surrounds tensors, and how many such bytes there are
FAR = 2**31  # elements: an offset from here on does not fit into 32 bits
ALPHAS = (0.3, -0.7, 25.0, 1e-30)


class Case(NamedTuple):
    """A launch holds the bits of the inputs, and the input that the output overwrites, if `place` names one.

    If `far` is true, the programs are so late that their offsets pass FAR. `lengths` are those of the tensors, for a
    kernel that takes many tensors.
    """

    sft: Array
    aligned: Array
    alphas: Sequence[float] = ALPHAS
    place: str = ""
    far: bool = False
    lengths: Sequence[int] = ()


class Fenced:
    """This object holds n elements amid poisoned memory, `shift` elements past an address that GUARD divides."""

    def __init__(self, n: int, dtype: str, shift: int = 0) -> None:
        item = ITEMSIZE[dtype]
        self._memory = np.full((n + shift) * item + 3 * GUARD, POISON, np.uint8)
        self._start = -self._memory.ctypes.data % GUARD + GUARD + shift * item
        self._stop = self._start + n * item
        self.bits = self._memory[self._start : self._stop].view(BITS[dtype])
        self.address = self._memory.ctypes.data + self._start
        self.range: Range = (self.address, self.address + n * item)

    @classmethod
    def of(cls, bits: Array, dtype: str, shift: int = 0) -> Fenced:
        fenced = cls(len(bits), dtype, shift)
        fenced.bits[:] = bits
        return fenced

    def stands(self) -> bool:
        """Return True if all memory around the elements still has the poison."""
        return bool((self._memory[: self._start] == POISON).all() and (self._memory[self._stop :] == POISON).all())


class Laid(NamedTuple):
    """A case in memory: `results` are the outputs for each alpha; `fenced` is the memory that must keep its poison."""

    values: dict[str, Any]
    programs: range
    readable: list[Range]
    writable: list[Range]
    results: list[list[Array]]
    fenced: list[Fenced]


def dtypes(variant: aot.Variant) -> tuple[str, str]:
    """Return the dtypes of sft and aligned."""
    if "SFT" in variant.constants:
        return NAMES[str(variant.constants["SFT"])], NAMES[str(variant.constants["ALIGNED"])]
    return NAMES[variant.types["sft_ptr"][1:]], NAMES[variant.types["aligned_ptr"][1:]]


def shift(variant: aot.Variant, pointer: str) -> int:
    """Return how many elements past an aligned address a tensor starts: one if the compiled code takes any address."""
    return 0 if pointer in variant.wide else 1


def programs(variant: aot.Variant, n: int, far: bool) -> tuple[range, int]:
    """Return the programs that compute n elements, and the count of elements before the first program."""
    block = variant.constants["BLOCK"]
    first = FAR // block + 3 if far else 0
    return range(first, first - (-n // block)), first * block


def inputs(variant: aot.Variant, case: Case) -> tuple[Fenced, Fenced]:
    sft, aligned = dtypes(variant)
    s = Fenced.of(case.sft, sft, shift(variant, "sft_ptr"))
    return s, Fenced.of(case.aligned, aligned, shift(variant, "aligned_ptr"))


def plain(variant: aot.Variant, case: Case) -> Laid:
    s, a = inputs(variant, case)
    apart = Fenced(len(a.bits), dtypes(variant)[1], shift(variant, "out_ptr"))
    out = {"": apart, "sft": s, "aligned": a}[case.place]
    numbers, before = programs(variant, len(a.bits), case.far)
    values = {
        "sft_ptr": s.address - before * s.bits.itemsize,
        "aligned_ptr": a.address - before * a.bits.itemsize,
        "out_ptr": out.address - before * out.bits.itemsize,
        "n": before + len(a.bits),
        "alpha": working_alpha(case.alphas[0]),
    }
    return Laid(values, numbers, [s.range, a.range], [out.range], [[out.bits]], [s, a, out])


def sweep(variant: aot.Variant, case: Case) -> Laid:
    """Place a sweep in memory, with gaps between its outputs; the gaps are poisoned too."""
    s, a = inputs(variant, case)
    n, item, alphas = len(a.bits), a.bits.itemsize, variant.constants["K"]
    pitch = -(-n // 16) * 16 + 32 if "pitch" in variant.wide else n + 3
    apart = Fenced((alphas - 1) * pitch + n, dtypes(variant)[1], shift(variant, "out_ptr"))
    out = {"": apart, "sft": s, "aligned": a}[case.place]
    factors = Fenced.of(np.array(case.alphas[:alphas], np.float32).view(np.uint32), "F32")
    numbers, before = programs(variant, n, case.far)
    values = {
        "sft_ptr": s.address - before * item,
        "aligned_ptr": a.address - before * item,
        "out_ptr": out.address - before * item,
        "alphas_ptr": factors.address,
        "n": before + n,
        "pitch": pitch,
    }
    starts = range(out.address, out.range[1], pitch * item)
    writable = [(start, start + n * item) for start in starts]
    results = [[out.bits[k * pitch : k * pitch + n]] for k in range(alphas)]
    return Laid(values, numbers, [s.range, a.range, factors.range], writable, results, [s, a, out, factors])


def whole_model(variant: aot.Variant, case: Case) -> Laid:
    """Place a whole model in memory; its tensors have the case's lengths, or five lengths that cover all elements.

    If the case is far, the rows of the table are far; the tensors are not.
    """
    n, kinds, by = len(case.aligned), dtypes(variant), 0 if variant.constants["ALIGNMENT"] == 16 else 1
    lengths = case.lengths or (n // 3, 0, n // 5, min(n, 1), n - n // 3 - n // 5 - min(n, 1))
    sft, aligned = (
        [Fenced.of(part, kind, by) for part in np.split(bits, np.cumsum(lengths)[:-1])]
        for bits, kind in zip((case.sft, case.aligned), kinds, strict=True)
    )
    apart = [Fenced(length, kinds[1], by) for length in lengths]
    out = {"": apart, "sft": sft, "aligned": aligned}[case.place]
    triples = [tuple(torch.from_numpy(x.bits) for x in three) for three in zip(sft, aligned, out, strict=True)]
    rows = variant.kernel.fn.__globals__["rows"](triples).numpy()  # the function of the kernel's own module
    table = Fenced.of(rows.reshape(-1).view(np.uint64), "F64")
    segment, row = variant.constants["SEGMENT"], 2**23 if case.far else 0
    values = {"table_ptr": table.address - row * 32, "alpha": working_alpha(case.alphas[0])}
    numbers = range(row * segment, (row + len(rows)) * segment)
    readable = [table.range, *(x.range for x in [*sft, *aligned])]
    return Laid(
        values, numbers, readable, [x.range for x in out], [[x.bits for x in out]], [*sft, *aligned, *out, table]
    )


FAMILIES: dict[str, Callable[[aot.Variant, Case], Laid]] = {
    "extrapolate": plain,
    "sweep": sweep,
    "whole_model": whole_model,
}


def reference(kinds: tuple[str, str], case: Case, alphas: int) -> list[Array]:
    outs = [np.empty_like(case.aligned) for _ in range(alphas)]
    used = [working_alpha(alpha) for alpha in case.alphas[:alphas]]
    run_engine(numerics.extrapolate, case.sft, case.aligned, kinds, outs, used)
    return outs


def verify(kernel: Kernel, variant: aot.Variant, case: Case) -> None:
    """Run the case, and raise AssertionError if its bits are not the reference's or memory beside them has changed."""
    laid = FAMILIES[variant.kernel.fn.__name__](variant, case)
    kernel.run(laid.programs, laid.values, laid.readable, laid.writable)
    kinds = dtypes(variant)
    for result, expected in zip(laid.results, reference(kinds, case, len(laid.results)), strict=True):
        assert_same(np.concatenate(result), expected, kinds[1])
    assert all(each.stands() for each in laid.fenced), "written beside a tensor"


# Small launches of any variant


def random_bits(dtype: str, n: int, seed: int) -> Array:
    kind = BITS[dtype]
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, n, kind, endpoint=True)


def specials(kinds: tuple[str, str]) -> tuple[Array, Array]:
    """Return every combination of a special value of one dtype with a special value of the other."""
    both = list(product(*(exact.specials(kind) for kind in kinds)))
    sft, aligned = (np.array([pair[i] for pair in both], BITS[kind]) for i, kind in enumerate(kinds))
    return sft, aligned


def lengths(variant: aot.Variant) -> list[int]:
    """Return lengths around 8, which is the tail's width, and around a block and its parts."""
    block = variant.constants["BLOCK"]
    return [1, 7, 8, 9, block // 2 - 1, block // 2 + 9, block - 8, block - 1, block, block + 1, 2 * block + 13]


def cases(variant: aot.Variant) -> Iterator[Case]:
    kinds = dtypes(variant)
    for n in lengths(variant):
        bits = [random_bits(kind, n, seed) for seed, kind in enumerate(kinds)]
        yield Case(*bits)
        if variant.types.get("n") != "i32":
            yield Case(*bits, far=True)
    if variant.constants.get("K", 1) == 1:
        for place, kind in zip(("sft", "aligned"), kinds, strict=True):
            if kind == kinds[1] and (f"{place}_ptr" in variant.wide) == ("out_ptr" in variant.wide):
                yield Case(*bits, place=place)
    if "SEGMENT" in variant.constants:
        run = variant.constants["SEGMENT"] * variant.constants["BLOCK"]
        sizes = [run + n, 2 * run, 3]
        yield Case(*(random_bits(kind, sum(sizes), seed) for seed, kind in enumerate(kinds)), lengths=sizes)
    yield from (Case(*specials(kinds), alphas=ALPHAS[i:] + ALPHAS[:i]) for i in range(len(ALPHAS)))


def with_plain_product(variant: aot.Variant) -> aot.Variant:
    """Return the variant for AMD's GPUs: its product is not inline assembly, so a compiler with permission fuses it."""
    return variant._replace(constants={**variant.constants, "PTX": False})


def instructions(llir: str) -> str:
    """Return the LLVM IR without its references to the source."""
    return "\n".join(line.partition(", !dbg")[0] for line in llir.splitlines() if not line.startswith("!"))


def built(variant: aot.Variant, target: str = "cuda:90", compiler: Any = aot, **options: Any) -> Kernel:
    """Return the variant, compiled for a GPU and then for this CPU."""
    kernel = compiler.compiled(variant, compiler.target_of(target), **options)
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    return Kernel(kernel.asm["llir"], list(variant.arguments), threads, kernel.metadata.shared)
