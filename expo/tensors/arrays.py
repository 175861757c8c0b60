"""extrapolate(): the formula over NumPy arrays and torch tensors, on any device."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from ..dtypes import ITEMSIZE, numpy_names, torch_names
from ..errors import EngineError, UsageError
from ..execution import gpu_kernels as gpu
from ..execution.engines import Engine, choose, cpu_count
from ..kernels.contract import Address, Operand, extrapolation, working_alpha
from .memory_checks import check_memory, check_unmasked, first_ones

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Array = TypeVar("Array", npt.NDArray[Any], torch.Tensor)
    Several = Sequence[Array] | Iterator[Array]

SPLIT = 1 << 22  # elements from which several threads share a call: below, starting them costs more than it saves
THREADS = 8  # at most; they saturate a memory controller


@overload
def extrapolate(sft: Array, aligned: Array, alpha: float, *, out: Array | None = None) -> Array: ...
@overload
def extrapolate(
    sft: Several[Array], aligned: Several[Array], alpha: float, *, out: Several[Array] | None = None
) -> list[Array]: ...
def extrapolate(sft: Any, aligned: Any, alpha: float, *, out: Any = None) -> Any:
    """Return aligned + alpha * (aligned - sft), the formula of ExPO (arXiv 2404.16792), rounded once.

    sft, aligned: two NumPy arrays or two torch tensors of one shape, any shape; torch tensors on one device, any
        device. dtype bf16 (in NumPy: ml_dtypes.bfloat16), fp16, fp32 or fp64, which may differ; the arithmetic is fp32,
        or fp64 where one of them is. The result has aligned's dtype, the same bits on every device.
    alpha: any number that is finite in fp32; 0 copies aligned bit for bit.
    out: where to put the result, of aligned's shape and dtype; it may be aligned or sft itself, else it must not
        overlap them. Without it the result is a new array of the caller's own. autograd is not recorded.

    All three may also be as many arrays or tensors in sequences or iterators, such as model.parameters(); the result
    is then a list. On a GPU a whole model takes one launch. Tied weights that are listed twice are computed once; lists
    whose result would depend on the order, as an out overlaps what belongs to another pair, are refused.

    Contiguous memory on the CPU takes the compiled engine (NumPy where that is not built), which releases the GIL;
    CUDA tensors take the Triton kernel. A kernel that fails its self-test, at first use, or cannot run is replaced by
    torch's own operations, and a RuntimeWarning says so once for each device. A CUDA graph that is captured before the
    self-test holds torch's operations too: call this once, with the same dtypes, before the capture.
    Raises UsageError for arguments that do not fit together, and for tensors that have no memory of their own: DTensor,
    FakeTensor, meta tensors, wrappers.
    """
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    if torch is not None and isinstance(aligned, torch.Tensor):
        return _tensors(torch, sft, aligned, alpha, out)
    if isinstance(aligned, Iterable) and not isinstance(aligned, str | bytes) and not hasattr(aligned, "dtype"):
        return _many(torch, list(sft), list(aligned), alpha, None if out is None else list(out))
    return _arrays(sft, aligned, alpha, out)


def _many(torch: Any, sft: list[Any], aligned: list[Any], alpha: float, out: list[Any] | None) -> list[Any]:
    """Compute several pairs: all are checked first, and one launch on a GPU does together what it can."""
    outs = [None] * len(aligned) if out is None else out
    if not len(sft) == len(aligned) == len(outs):
        raise UsageError(f"as many of each are needed, got sft {len(sft)}, aligned {len(aligned)}, out {len(outs)}")
    checked = []
    for s, a, o in zip(sft, aligned, outs, strict=True):
        is_tensor = torch is not None and isinstance(a, torch.Tensor)
        checked.append(_checked(torch, s, a, alpha, o) if is_tensor else _checked_arrays(s, a, alpha, o))
    results = [each.out for each in checked]
    triples = list(zip(sft, aligned, results, strict=True))
    wanted = [True] * len(triples) if out is None else first_ones(triples)  # new memory is nobody else's
    together: defaultdict[Any, list[tuple[Any, Any, Any]]] = defaultdict(list)  # by device
    for (s, a, o), each, first in zip(triples, checked, wanted, strict=True):
        if not first:
            continue
        if torch is None or not isinstance(a, torch.Tensor):
            _compute_arrays(s, a, each)
        elif gpu.on_gpu(a) and each.addresses is not None and "F64" not in each.dtypes:
            together[a.device].append((s.detach(), a.detach(), o.detach()))
        else:
            _compute(s, a, each)
    for launched in together.values():
        gpu.compute_together(launched, working_alpha(alpha))
    return results


class _Checked(NamedTuple):
    """Arguments that fit together.

    Attributes:
        out: The array or tensor that takes the result.
        dtypes: The dtypes of sft and aligned.
        alpha: The working alpha.
        addresses: The addresses of sft, aligned and out, if alpha is not 0 and the elements of each are contiguous.
    """

    out: Any
    dtypes: tuple[str, str]
    alpha: float
    addresses: tuple[int, ...] | None


@cache
def _cpu_engine() -> Engine:
    return choose("auto", "cpu")


def _check(sft: Any, aligned: Any, out: Any, kind: Any) -> None:
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


def _dtypes(sft: Any, aligned: Any, names: dict[Any, str]) -> tuple[str, str]:
    """Return the names of the dtypes of sft and aligned. Raises UsageError for dtypes that are not extrapolated."""
    found = names.get(sft.dtype, ""), names.get(aligned.dtype, "")
    if found[0] not in ITEMSIZE or found[1] not in ITEMSIZE:
        raise UsageError(f"dtypes must be bf16, fp16, fp32 or fp64, got sft {sft.dtype} and aligned {aligned.dtype}")
    return found


def _working(alpha: float, dtypes: tuple[str, str]) -> float:
    try:
        return working_alpha(alpha, *dtypes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"alpha must be a number that is finite in float32, got {alpha!r}") from error


def _tensors(torch: Any, sft: Any, aligned: Any, alpha: float, out: Any) -> Any:
    checked = _checked(torch, sft, aligned, alpha, out)
    _compute(sft, aligned, checked)
    return checked.out


def _checked(torch: Any, sft: Any, aligned: Any, alpha: float, out: Any) -> _Checked:
    given = aligned if out is None else out
    _check(sft, aligned, given, torch.Tensor)
    _check_layouts(torch, sft, aligned, given)
    dtypes = _dtypes(sft, aligned, torch_names())
    al = _working(alpha, dtypes)
    device = aligned.device
    if sft.device != device or given.device != device:
        raise UsageError(f"devices differ: sft {sft.device}, aligned {device}, out {given.device}")
    for role, tensor in (("sft", sft), ("aligned", aligned), ("out", given)):
        check_memory(torch, tensor, role)
    if out is None:
        out = torch.empty_like(aligned, requires_grad=False)
        check_memory(torch, out, "out")  # a FakeTensorMode that is on gives none
    elif out.numel() and any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise UsageError(f"out has elements that share memory: shape {tuple(out.shape)}, strides {out.stride()}")
    addresses = None
    if al and _plain(sft, aligned, out):
        addresses = sft.data_ptr(), aligned.data_ptr(), out.data_ptr()
        _check_overlap(addresses, dtypes, aligned.numel())
    return _Checked(out, dtypes, al, addresses)


def _plain(sft: Any, aligned: Any, out: Any) -> bool:
    """Return True if the memory of each tensor holds its elements one after the other, as they are."""
    contiguous = sft.is_contiguous() and aligned.is_contiguous() and out.is_contiguous()
    return contiguous and not (sft.is_neg() or aligned.is_neg() or out.is_neg())


def _compute(sft: Any, aligned: Any, checked: _Checked) -> None:
    out, dtypes, al, addresses = checked
    if al == 0:
        source = aligned.detach()
        apart = out is aligned or out.untyped_storage().data_ptr() != aligned.untyped_storage().data_ptr()
        out.detach().copy_(source if apart else source.clone())  # copy_ is wrong where they overlap
    elif addresses is None:
        plain = [x.detach().resolve_neg().contiguous() for x in (sft, aligned)]
        out.detach().copy_(extrapolate(plain[0], plain[1], al))
    elif aligned.device.type == "cpu":
        _on_cpu(addresses, dtypes, aligned.numel(), al)
    else:
        gpu.compute(sft.detach(), aligned.detach(), al, out.detach())


def _check_layouts(torch: Any, sft: Any, aligned: Any, out: Any) -> None:
    if not sft.layout == aligned.layout == out.layout == torch.strided:
        raise UsageError(f"tensors must be dense, got sft {sft.layout}, aligned {aligned.layout}, out {out.layout}")


def _arrays(sft: Any, aligned: Any, alpha: float, out: Any) -> Any:
    checked = _checked_arrays(sft, aligned, alpha, out)
    _compute_arrays(sft, aligned, checked)
    return checked.out


def _checked_arrays(sft: Any, aligned: Any, alpha: float, out: Any) -> _Checked:
    import numpy as np

    if not isinstance(aligned, np.ndarray):
        raise UsageError(f"aligned must be a NumPy array or a torch tensor, got {type(aligned).__name__}")
    if out is None:
        out = np.empty_like(aligned)
    _check(sft, aligned, out, np.ndarray)
    for role, array in (("sft", sft), ("aligned", aligned), ("out", out)):
        check_unmasked(np, array, role)
    dtypes = _dtypes(sft, aligned, numpy_names())
    al = _working(alpha, dtypes)
    if not out.flags.writeable:
        raise UsageError("out is read-only")
    addresses = None
    if al and all(x.flags.c_contiguous for x in (sft, aligned, out)):
        addresses = tuple(x.__array_interface__["data"][0] for x in (sft, aligned, out))
        _check_overlap(addresses, dtypes, aligned.size)
    return _Checked(out, dtypes, al, addresses)


def _compute_arrays(sft: Any, aligned: Any, checked: _Checked) -> None:
    import numpy as np

    out, dtypes, al, addresses = checked
    if al == 0:
        out[...] = aligned
    elif addresses is None:
        out[...] = extrapolate(np.ascontiguousarray(sft), np.ascontiguousarray(aligned), al).reshape(out.shape)
    else:
        _on_cpu(addresses, dtypes, aligned.size, al)


def _on_cpu(addresses: tuple[int, ...], dtypes: tuple[str, str], n: int, alpha: float) -> None:
    """Compute n contiguous elements at the addresses of sft, aligned and out, by as many threads as pay."""
    item = ITEMSIZE[dtypes[1]]
    sft = Operand(Address(addresses[0], n * ITEMSIZE[dtypes[0]]), dtypes[0])
    aligned = Operand(Address(addresses[1], n * item), dtypes[1])
    out = Address(addresses[2], n * item)
    if n < SPLIT:
        return compute_on_cpu(sft, aligned, alpha, out)
    threads = min(cpu_count(), THREADS, n // SPLIT + 1)
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


def _check_overlap(addresses: tuple[int, ...], dtypes: tuple[Any, ...], n: int) -> None:
    sft_item, aligned_item = ITEMSIZE[dtypes[0]], ITEMSIZE[dtypes[1]]
    out, size = addresses[2], n * aligned_item
    for name, start, item in (("sft", addresses[0], sft_item), ("aligned", addresses[1], aligned_item)):
        same = start == out and item == aligned_item
        if out and not same and start < out + size and out < start + n * item:  # 0: a tensor without memory
            raise UsageError(f"out overlaps {name} in part; it may be all of it, or none")
