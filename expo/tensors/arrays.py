"""extrapolate(): the formula for NumPy arrays and torch tensors, on any device."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from ..dtypes import ITEMSIZE, numpy_names, torch_names
from ..errors import EngineError, UsageError
from ..execution.engines import Engine, choose, cpu_count
from ..kernels.contract import Address, Operand, extrapolation, working_alpha
from . import gpu_calls, gpu_tensors
from .distributed_tensors import check_alike, is_distributed, local_part
from .memory_checks import check_memory, check_unmasked, mark_firsts
from .versions import count_writes

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Array = TypeVar("Array", npt.NDArray[Any], torch.Tensor)
    Several = Sequence[Array] | Iterator[Array]

# Several threads share a call of at least this many elements. With fewer elements, one thread is faster.
SPLIT_ELEMENTS = 1 << 22
MOST_THREADS = 8  # they saturate a memory controller


@overload
def extrapolate(sft: Array, aligned: Array, alpha: float, *, out: Array | None = None) -> Array: ...
@overload
def extrapolate(
    sft: Several[Array], aligned: Several[Array], alpha: float, *, out: Several[Array] | None = None
) -> list[Array]: ...
def extrapolate(sft: Any, aligned: Any, alpha: float, *, out: Any = None) -> Any:
    """Return aligned + alpha * (aligned - sft), the formula of ExPO (arXiv 2404.16792), rounded once.

    The compiled engine computes contiguous memory on the CPU, and releases the GIL; NumPy computes it if that engine is
    not built. The Triton kernel computes CUDA tensors. Torch's own operations compute them if the kernel cannot run or
    fails its self-test, at first use; then a RuntimeWarning gives the reason, once for each device. A CUDA graph that
    is captured before the self-test contains torch's operations too: call this function once, with the same dtypes,
    before the capture. Autograd is not recorded. A write to `out` counts in its version, so that a backward pass that
    needs the former numbers raises an error.

    Each process computes the local parts of DTensors, without communication. The result has aligned's mesh and
    placements.

    Args:
        sft: A NumPy array or a torch tensor, of dtype bf16 (in NumPy: ml_dtypes.bfloat16), fp16, fp32 or fp64.
        aligned: Another one of the same kind, shape and device, of the same or another of these dtypes. The arithmetic
            is fp32, or fp64 if one of the two is. DTensors have the same mesh and placements, none of them Partial.
        alpha: Any number that is finite in fp32; 0 copies aligned bit for bit.
        out: The array or tensor that takes the result, of aligned's shape and dtype. It may be aligned or sft itself,
            and must not overlap them otherwise. Without it the result is new memory.

        All but alpha may also be sequences or iterators of as many arrays or tensors, such as model.parameters(). On a
        GPU a whole model takes one launch. Tied weights that are listed twice are computed once.

    Returns:
        The result in aligned's dtype, with the same bits on every device; a list for sequences.

    Raises:
        UsageError: The arguments do not fit together; a tensor has no memory of its own (FakeTensor, meta tensors,
            wrappers); or the result of a list would depend on its order, as an out overlaps the memory of
            another pair.
        EngineError: The floating-point mode of this thread would give other bits, and NumPy would follow it.
    """
    torch = sys.modules.get("torch")  # a caller that passes a tensor has imported torch
    if torch is not None and isinstance(aligned, torch.Tensor):
        if out is not None and gpu_calls.compute_one(torch, sft, aligned, alpha, out):
            count_writes(torch, (out,))
            return out
        return _extrapolate_tensors(torch, sft, aligned, alpha, out)
    if isinstance(aligned, Iterable) and not isinstance(aligned, str | bytes) and not hasattr(aligned, "dtype"):
        return _extrapolate_lists(torch, list(sft), list(aligned), alpha, None if out is None else list(out))
    return _extrapolate_arrays(sft, aligned, alpha, out)


def _extrapolate_lists(
    torch: Any, sft: list[Any], aligned: list[Any], alpha: float, out: list[Any] | None
) -> list[Any]:
    """Check all pairs, then compute them; pairs on one GPU share a launch if they can."""
    outs = [None] * len(aligned) if out is None else out
    if not len(sft) == len(aligned) == len(outs):
        raise UsageError(f"as many of each are needed, got sft {len(sft)}, aligned {len(aligned)}, out {len(outs)}")
    key = None if torch is None or out is None else gpu_calls.make_key(torch, sft, aligned, out)
    if key is not None and out is not None and gpu_calls.compute_again(key, sft, aligned, alpha, out):
        count_writes(torch, out)
        return out
    whole: dict[int, Any] = {}  # the results that are DTensors, by position
    for i, (s, a, o) in enumerate(zip(sft, aligned, outs, strict=True)):
        if is_distributed(a) or is_distributed(s) or is_distributed(o):
            sft[i], aligned[i], outs[i], whole[i] = _local_parts(torch, s, a, o, f"[{i}]")
    checked = []
    for s, a, o in zip(sft, aligned, outs, strict=True):
        is_tensor = torch is not None and isinstance(a, torch.Tensor)
        checked.append(_check_tensors(torch, s, a, alpha, o) if is_tensor else _check_arrays(s, a, alpha, o))
    results = [each.out for each in checked]
    triples = list(zip(sft, aligned, results, strict=True))
    firsts = [True] * len(triples) if out is None else mark_firsts(triples)  # new memory overlaps no other
    if torch is not None and out is not None:
        count_writes(torch, [o for o in (*results, *whole.values()) if isinstance(o, torch.Tensor)])
    together: defaultdict[Any, list[int]] = defaultdict(list)  # the positions of pairs for each device
    for place, (s, a, each) in enumerate(zip(sft, aligned, checked, strict=True)):
        if not firsts[place]:
            continue
        if torch is None or not isinstance(a, torch.Tensor):
            _compute_arrays(s, a, each)
        elif gpu_tensors.on_gpu(a) and each.addresses is not None and "F64" not in each.dtypes:
            together[a.device].append(place)
        else:
            _compute_tensors(s, a, each)
    for places in together.values():
        on_device = [tuple(tensor.detach() for tensor in triples[place]) for place in places]
        table = gpu_tensors.compute_together(on_device, working_alpha(alpha))
        if key is not None and table is not None and len(places) == sum(firsts):
            gpu_calls.tables.keep(key, places, table)
    return [whole.get(i, result) for i, result in enumerate(results)] if whole else results


class _CheckedPair(NamedTuple):
    """The rest of a call's arguments, after the check that they fit together.

    Attributes:
        out: The array or tensor that takes the result.
        dtypes: The dtypes of sft and aligned.
        alpha: The working alpha.
        addresses: The addresses of sft, aligned and out; None if alpha is 0, or if the elements of one of
            them do not lie in memory one after the other.
    """

    out: Any
    dtypes: tuple[str, str]
    alpha: float
    addresses: tuple[int, ...] | None


@cache
def _cpu_engine() -> Engine:
    """Return the engine for memory on the CPU."""
    return choose("auto", "cpu")


def _check_kinds(sft: Any, aligned: Any, out: Any, kind: Any) -> None:
    """Raise UsageError unless all three are of one kind and one shape, and out has aligned's dtype."""
    if not isinstance(sft, kind) or not isinstance(out, kind):
        raise UsageError(
            f"sft, aligned and out must all be {kind.__module__}.{kind.__name__}, got {type(sft).__name__}, "
            f"{type(aligned).__name__} and {type(out).__name__}"
        )
    if sft.shape != aligned.shape or out.shape != aligned.shape:
        raise UsageError(
            f"shapes differ: sft {tuple(sft.shape)}, aligned {tuple(aligned.shape)}, out {tuple(out.shape)}"
        )
    if out.dtype != aligned.dtype:
        raise UsageError(f"out is {out.dtype}, but the result has aligned's dtype {aligned.dtype}")


def _check_dtypes(sft: Any, aligned: Any, names: dict[Any, str]) -> tuple[str, str]:
    """Return the names of the dtypes of sft and aligned. Raises UsageError for dtypes that are not extrapolated."""
    found = names.get(sft.dtype, ""), names.get(aligned.dtype, "")
    if found[0] not in ITEMSIZE or found[1] not in ITEMSIZE:
        raise UsageError(f"dtypes must be bf16, fp16, fp32 or fp64, got sft {sft.dtype} and aligned {aligned.dtype}")
    return found


def _check_alpha(alpha: float, dtypes: tuple[str, str]) -> float:
    """Return the working alpha. Raises UsageError."""
    try:
        return working_alpha(alpha, *dtypes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"alpha must be a number that is finite in float32, got {alpha!r}") from error


def _extrapolate_tensors(torch: Any, sft: Any, aligned: Any, alpha: float, out: Any) -> Any:
    if is_distributed(aligned) or is_distributed(sft) or is_distributed(out):
        *parts, whole = _local_parts(torch, sft, aligned, out)
        _extrapolate_tensors(torch, parts[0], parts[1], alpha, parts[2])
        count_writes(torch, (whole,))
        return whole
    checked = _check_tensors(torch, sft, aligned, alpha, out)
    if out is not None:
        count_writes(torch, (out,))
    _compute_tensors(sft, aligned, checked)
    return checked.out


def _local_parts(torch: Any, sft: Any, aligned: Any, out: Any, place: str = "") -> tuple[Any, Any, Any, Any]:
    """Return the local parts of sft, aligned and out, and out, which is a new DTensor if there is none.

    Args:
        torch: The module.
        sft: A tensor; at least one of the three is a DTensor.
        aligned: A tensor.
        out: A tensor or None.
        place: The position in the lists, for messages.

    Raises:
        UsageError: The three are not distributed alike, or their shapes or dtypes do not fit together.
    """
    given = {f"aligned{place}": aligned, f"sft{place}": sft} | ({} if out is None else {f"out{place}": out})
    _check_kinds(sft, aligned, aligned if out is None else out, torch.Tensor)
    check_alike(list(given.items()))
    if out is None:
        with torch.no_grad():
            out = torch.empty_like(aligned)  # an operation of DTensor: the same mesh, placements and strides
    return local_part(sft), local_part(aligned), local_part(out), out


def _check_tensors(torch: Any, sft: Any, aligned: Any, alpha: float, out: Any) -> _CheckedPair:
    """Return the checked arguments for tensors of torch, with a new out if there is none. Raises UsageError."""
    given = aligned if out is None else out
    _check_kinds(sft, aligned, given, torch.Tensor)
    _check_layouts(torch, sft, aligned, given)
    dtypes = _check_dtypes(sft, aligned, torch_names())
    used_alpha = _check_alpha(alpha, dtypes)
    device = aligned.device
    if sft.device != device or given.device != device:
        raise UsageError(f"devices differ: sft {sft.device}, aligned {device}, out {given.device}")
    for role, tensor in (("sft", sft), ("aligned", aligned), ("out", given)):
        check_memory(torch, tensor, role)
    if out is None:
        out = torch.empty_like(aligned, requires_grad=False)
        check_memory(torch, out, "out")  # in a FakeTensorMode a new tensor has no memory
    elif out.numel() and any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise UsageError(f"out has elements that share memory: shape {tuple(out.shape)}, strides {out.stride()}")
    addresses = None
    if used_alpha and _are_plain(sft, aligned, out):
        addresses = sft.data_ptr(), aligned.data_ptr(), out.data_ptr()
        _check_overlap(addresses, dtypes, aligned.numel())
    return _CheckedPair(out, dtypes, used_alpha, addresses)


def _are_plain(sft: Any, aligned: Any, out: Any) -> bool:
    """Return True if the memory of each tensor holds its elements one after the other, as they are."""
    contiguous = sft.is_contiguous() and aligned.is_contiguous() and out.is_contiguous()
    return contiguous and not (sft.is_neg() or aligned.is_neg() or out.is_neg())


def _compute_tensors(sft: Any, aligned: Any, checked: _CheckedPair) -> None:
    """Write the result into checked.out, for tensors of torch."""
    out, dtypes, used_alpha, addresses = checked
    if used_alpha == 0:
        source = aligned.detach()
        apart = out is aligned or out.untyped_storage().data_ptr() != aligned.untyped_storage().data_ptr()
        out.detach().copy_(source if apart else source.clone())  # copy_ gives wrong results if the two overlap
    elif addresses is None:
        plain = [x.detach().resolve_neg().contiguous() for x in (sft, aligned)]
        out.detach().copy_(extrapolate(plain[0], plain[1], used_alpha))
    elif aligned.device.type == "cpu":
        _compute_at_addresses(addresses, dtypes, aligned.numel(), used_alpha)
    else:
        gpu_tensors.compute(sft.detach(), aligned.detach(), used_alpha, out.detach())


def _check_layouts(torch: Any, sft: Any, aligned: Any, out: Any) -> None:
    """Raise UsageError for sparse tensors."""
    if not sft.layout == aligned.layout == out.layout == torch.strided:
        raise UsageError(f"tensors must be dense, got sft {sft.layout}, aligned {aligned.layout}, out {out.layout}")


def _extrapolate_arrays(sft: Any, aligned: Any, alpha: float, out: Any) -> Any:
    checked = _check_arrays(sft, aligned, alpha, out)
    _compute_arrays(sft, aligned, checked)
    return checked.out


def _check_arrays(sft: Any, aligned: Any, alpha: float, out: Any) -> _CheckedPair:
    """Return the checked arguments for arrays of NumPy, with a new out if there is none. Raises UsageError."""
    import numpy as np

    if not isinstance(aligned, np.ndarray):
        raise UsageError(f"aligned must be a NumPy array or a torch tensor, got {type(aligned).__name__}")
    if out is None:
        out = np.empty_like(aligned)
    _check_kinds(sft, aligned, out, np.ndarray)
    for role, array in (("sft", sft), ("aligned", aligned), ("out", out)):
        check_unmasked(np, array, role)
    dtypes = _check_dtypes(sft, aligned, numpy_names())
    used_alpha = _check_alpha(alpha, dtypes)
    if not out.flags.writeable:
        raise UsageError("out is read-only")
    addresses = None
    if used_alpha and all(x.flags.c_contiguous for x in (sft, aligned, out)):
        addresses = tuple(x.__array_interface__["data"][0] for x in (sft, aligned, out))
        _check_overlap(addresses, dtypes, aligned.size)
    return _CheckedPair(out, dtypes, used_alpha, addresses)


def _compute_arrays(sft: Any, aligned: Any, checked: _CheckedPair) -> None:
    """Write the result into checked.out, for arrays of NumPy."""
    import numpy as np

    out, dtypes, used_alpha, addresses = checked
    if used_alpha == 0:
        out[...] = aligned
    elif addresses is None:
        out[...] = extrapolate(np.ascontiguousarray(sft), np.ascontiguousarray(aligned), used_alpha).reshape(out.shape)
    else:
        _compute_at_addresses(addresses, dtypes, aligned.size, used_alpha)


def _compute_at_addresses(addresses: tuple[int, ...], dtypes: tuple[str, str], n: int, alpha: float) -> None:
    """Compute n contiguous elements at the addresses of sft, aligned and out; several threads share a large tensor."""
    item = ITEMSIZE[dtypes[1]]
    sft = Operand(Address(addresses[0], n * ITEMSIZE[dtypes[0]]), dtypes[0])
    aligned = Operand(Address(addresses[1], n * item), dtypes[1])
    out = Address(addresses[2], n * item)
    if n < SPLIT_ELEMENTS:
        return compute_on_cpu(sft, aligned, alpha, out)
    threads = min(cpu_count(), MOST_THREADS, n // SPLIT_ELEMENTS + 1)
    share = -(-n // threads)
    with ThreadPoolExecutor(threads) as pool:
        work = []
        for at in range(0, n, share):
            some = min(share, n - at)
            parts = sft.part(at, some), aligned.part(at, some), alpha, out.part(at * item, some * item)
            work.append(pool.submit(compute_on_cpu, *parts))
        for future in work:
            future.result()
    return None


def compute_on_cpu(sft: Operand, aligned: Operand, alpha: float, out: Address) -> None:
    """Compute aligned + alpha * (aligned - sft) into out, in this thread; alpha is the working alpha, and not 0."""
    try:
        _cpu_engine().run(*extrapolation(sft, aligned, (alpha,)), (out,), False)
    except RuntimeError as error:
        raise EngineError(str(error)) from error


def _check_overlap(addresses: tuple[int, ...], dtypes: tuple[str, str], n: int) -> None:
    """Raise UsageError if out overlaps a part of sft or aligned."""
    sft_item, aligned_item = ITEMSIZE[dtypes[0]], ITEMSIZE[dtypes[1]]
    out, size = addresses[2], n * aligned_item
    for name, start, item in (("sft", addresses[0], sft_item), ("aligned", addresses[1], aligned_item)):
        same = start == out and item == aligned_item
        has_memory = out != 0  # an empty tensor may be at address 0
        if has_memory and not same and start < out + size and out < start + n * item:
            raise UsageError(f"out overlaps {name} in part; out may be the same memory as {name}, or separate memory")
