"""extrapolate(): the formula over NumPy arrays and torch tensors, on any device."""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from . import gpu
from .engines import Engine, choose, cpu_count
from .errors import EngineError, UsageError
from .kernels.contract import ITEMSIZE, working_alpha

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
    is then a list. On a GPU a whole model takes one launch.

    Contiguous memory on the CPU takes the compiled engine (NumPy where that is not built), which releases the GIL;
    CUDA tensors take the Triton kernel. A kernel that fails its self-test, at first use, or cannot run is replaced by
    torch's own operations, and a RuntimeWarning says so once for each device. Raises UsageError for arguments that do
    not fit together.
    """
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    if torch is not None and isinstance(aligned, torch.Tensor):
        return _tensors(torch, sft, aligned, alpha, out)
    if isinstance(aligned, Iterable) and not isinstance(aligned, str | bytes) and not hasattr(aligned, "dtype"):
        return _many(torch, list(sft), list(aligned), alpha, None if out is None else list(out))
    return _arrays(sft, aligned, alpha, out)


def _many(torch: Any, sft: list[Any], aligned: list[Any], alpha: float, out: list[Any] | None) -> list[Any]:
    """One by one, but for what one launch on a GPU can do together; what is listed twice is done once."""
    outs = [None] * len(aligned) if out is None else out
    if not len(sft) == len(aligned) == len(outs):
        raise UsageError(f"as many of each are needed, got sft {len(sft)}, aligned {len(aligned)}, out {len(outs)}")
    results: list[Any] = []
    done: set[tuple[int, ...]] = set()
    together: defaultdict[Any, list[tuple[Any, Any, Any]]] = defaultdict(list)  # by device
    for s, a, o in zip(sft, aligned, outs, strict=True):
        if torch is None or not isinstance(a, torch.Tensor):
            results.append(extrapolate(s, a, alpha, out=o))
            continue
        checked = _checked(torch, s, a, alpha, o)
        results.append(checked.out)
        places = (s.data_ptr(), a.data_ptr(), checked.out.data_ptr(), a.numel())
        if places in done and a.numel():  # tied weights, listed twice
            continue
        done.add(places)
        if _on_gpu(a) and _plain(s, a, checked.out) and checked.alpha and "F64" not in checked.dtypes:
            together[a.device].append((s.detach(), a.detach(), checked.out.detach()))
        else:
            _compute(s, a, checked)
    for triples in together.values():
        gpu.compute_together(triples, working_alpha(alpha))
    return results


def _on_gpu(tensor: Any) -> bool:
    return bool(tensor.is_cuda)


class _Checked(NamedTuple):
    """Arguments that fit together: where the result goes, the dtypes of sft and aligned, the working alpha."""

    out: Any
    dtypes: tuple[Any, Any]
    alpha: float


@cache
def _cpu_engine() -> Engine:
    return choose("auto", "cpu")


@cache
def _torch_names() -> dict[Any, str]:
    from .kernels.twin import DTYPES

    return {dtype: name for name, dtype in DTYPES.items()}


@cache
def _numpy_names() -> dict[Any, str]:
    import ml_dtypes
    import numpy as np

    kinds = {np.float16: "F16", np.float32: "F32", np.float64: "F64", ml_dtypes.bfloat16: "BF16"}
    return {np.dtype(kind): name for kind, name in kinds.items()}


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


def _working(alpha: float, sft: Any, aligned: Any, names: tuple[str | None, str | None]) -> float:
    if names[0] is None or names[1] is None:
        raise UsageError(f"dtypes must be bf16, fp16, fp32 or fp64, got sft {sft.dtype} and aligned {aligned.dtype}")
    try:
        return working_alpha(alpha, names[0], names[1])
    except (TypeError, ValueError) as error:
        raise UsageError(f"alpha must be a number that is finite in float32, got {alpha!r}") from error


def _tensors(torch: Any, sft: Any, aligned: Any, alpha: float, out: Any) -> Any:
    checked = _checked(torch, sft, aligned, alpha, out)
    _compute(sft, aligned, checked)
    return checked.out


def _checked(torch: Any, sft: Any, aligned: Any, alpha: float, out: Any) -> _Checked:
    if out is None:
        out = torch.empty_like(aligned, requires_grad=False)
    _check(sft, aligned, out, torch.Tensor)
    _check_layouts(torch, sft, aligned, out)
    names = _torch_names()
    dtypes = names.get(sft.dtype), names.get(aligned.dtype)
    al = _working(alpha, sft, aligned, dtypes)
    device = aligned.device
    if sft.device != device or out.device != device:
        raise UsageError(f"devices differ: sft {sft.device}, aligned {device}, out {out.device}")
    if al and _plain(sft, aligned, out):
        _check_overlap((sft.data_ptr(), aligned.data_ptr(), out.data_ptr()), dtypes, aligned.numel())
    return _Checked(out, dtypes, al)


def _plain(*tensors: Any) -> bool:
    """Whether the elements lie one after the other, as they are."""
    return all(x.is_contiguous() and not x.is_neg() for x in tensors)


def _compute(sft: Any, aligned: Any, checked: _Checked) -> None:
    out, dtypes, al = checked
    if al == 0:
        source = aligned.detach()
        apart = out is aligned or out.untyped_storage().data_ptr() != aligned.untyped_storage().data_ptr()
        out.detach().copy_(source if apart else source.clone())  # copy_ is wrong where they overlap
    elif not _plain(sft, aligned, out):
        plain = [x.detach().resolve_neg().contiguous() for x in (sft, aligned)]
        out.detach().copy_(extrapolate(plain[0], plain[1], al))
    elif aligned.device.type == "cpu":
        _on_cpu((sft.data_ptr(), aligned.data_ptr(), out.data_ptr()), dtypes, aligned.numel(), al)
    else:
        gpu.compute(sft.detach(), aligned.detach(), al, out.detach())


def _check_layouts(torch: Any, sft: Any, aligned: Any, out: Any) -> None:
    if any(x.layout != torch.strided for x in (sft, aligned, out)):
        raise UsageError(f"tensors must be dense, got sft {sft.layout}, aligned {aligned.layout}, out {out.layout}")
    if out.numel() and any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise UsageError(f"out has elements that share memory: shape {tuple(out.shape)}, strides {out.stride()}")


def _arrays(sft: Any, aligned: Any, alpha: float, out: Any) -> Any:
    import numpy as np

    if not isinstance(aligned, np.ndarray):
        raise UsageError(f"aligned must be a NumPy array or a torch tensor, got {type(aligned).__name__}")
    if out is None:
        out = np.empty_like(aligned)
    _check(sft, aligned, out, np.ndarray)
    names = _numpy_names()
    dtypes = names.get(sft.dtype), names.get(aligned.dtype)
    al = _working(alpha, sft, aligned, dtypes)
    if not out.flags.writeable:
        raise UsageError("out is read-only")
    if al == 0:
        out[...] = aligned
    elif not (sft.flags.c_contiguous and aligned.flags.c_contiguous and out.flags.c_contiguous):
        out[...] = extrapolate(np.ascontiguousarray(sft), np.ascontiguousarray(aligned), alpha).reshape(out.shape)
    else:
        addresses = tuple(x.__array_interface__["data"][0] for x in (sft, aligned, out))
        _check_overlap(addresses, dtypes, aligned.size)
        _on_cpu(addresses, dtypes, aligned.size, al)
    return out


def _on_cpu(addresses: tuple[int, ...], dtypes: tuple[Any, ...], n: int, alpha: float) -> None:
    """n contiguous elements at each of the addresses of sft, aligned and out, by as many threads as pay."""
    items = ITEMSIZE[dtypes[0]], ITEMSIZE[dtypes[1]], ITEMSIZE[dtypes[1]]
    threads = min(cpu_count(), THREADS, n // SPLIT + 1)
    if threads == 1:
        return compute_at(addresses, dtypes, n, alpha)
    share = -(-n // threads)
    with ThreadPoolExecutor(threads) as pool:
        work = [
            pool.submit(
                compute_at,
                [a + at * item for a, item in zip(addresses, items, strict=True)],
                dtypes,
                min(share, n - at),
                alpha,
            )
            for at in range(0, n, share)
        ]
        for future in work:
            future.result()
    return None


def compute_at(addresses: Sequence[int], dtypes: tuple[Any, ...], n: int, alpha: float) -> None:
    """n contiguous elements at the addresses of sft, aligned and out; alpha as it works, and not 0."""
    engine = _cpu_engine()
    memories: Sequence[Any] = addresses
    if engine.name != "cpu" or "F64" in dtypes:  # NumPy wants buffers
        kinds = (*dtypes, dtypes[1])
        memories = [
            (ctypes.c_ubyte * (n * ITEMSIZE[kind])).from_address(address)
            for address, kind in zip(addresses, kinds, strict=True)
        ]
    try:
        engine.run(memories[0], dtypes[0], memories[1], dtypes[1], n, memories[2:], (alpha,), False)
    except RuntimeError as error:
        raise EngineError(str(error)) from error


def _check_overlap(addresses: tuple[int, ...], dtypes: tuple[Any, ...], n: int) -> None:
    sft_item, aligned_item = ITEMSIZE[dtypes[0]], ITEMSIZE[dtypes[1]]
    out, size = addresses[2], n * aligned_item
    for name, start, item in (("sft", addresses[0], sft_item), ("aligned", addresses[1], aligned_item)):
        same = start == out and item == aligned_item
        if out and not same and start < out + size and out < start + n * item:  # 0: a tensor without memory
            raise UsageError(f"out overlaps {name} in part; it may be all of it, or none")
