"""The Triton kernels compute tensors on a GPU; torch computes them where the kernels fail, and one warning says so.

An engine that was asked for by name fails instead: see `engines.py`. torch is imported by callers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..kernels.contract import tensor_extrapolation

_given_up: dict[Any, str] = {}  # the reason, by torch.device
_ran_out: set[Any] = set()  # torch.devices whose lack of memory a warning has reported
_lock = threading.Lock()


def on_gpu(tensor: Any) -> bool:
    """Return whether a tensor is where kernels run."""
    return bool(tensor.is_cuda)


def reason_given_up(device: Any) -> str:
    """Return why this process does not use the kernels on this torch.device any more; "" where it may use them."""
    return _given_up.get(device, "")


def fall_back(device: Any, error: Exception) -> None:
    """Warn once for each torch.device, and give its kernels up for this process unless it only ran out of memory.

    Memory may be free at the next call; wrong bits, and a compiler that fails, stay.
    """
    memory, text = is_out_of_memory(error), error_text(error)
    with _lock:
        if device in (_ran_out if memory else _given_up):
            return
        if memory:
            _ran_out.add(device)
        else:
            _given_up[device] = text
    calls = "where memory runs out" if memory else f"on {device}"
    warnings.warn(
        f"the Triton kernels are not used {calls}; what computes instead is slower, with the same bits. "
        f"The reason: {text}",
        RuntimeWarning,
        stacklevel=3,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch, of CUDA or of Triton says that memory ran out."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def error_text(error: Exception) -> str:
    """Return the start of an error's text, which may hold all of a kernel, after the kind that a compiler's needs."""
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip()[:500]}"


def capturing(device: Any) -> bool:
    """Return whether the current stream of this torch.device is being captured into a graph."""
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def usable(device: Any) -> bool:
    """Return whether kernels may run on this torch.device now; where they failed, a warning has said why.

    A device that has not passed the self-test has no usable kernels while a graph is captured, which would capture the
    test: torch's operations go into that graph.
    """
    if device in _given_up:
        return False
    try:
        from ..kernels import selftest

        if selftest.passed(device):
            return True
        if capturing(device):
            return False
        selftest.check(device)
    except Exception as error:  # wrong bits; no memory; no Triton; a compiler, a linker or a cache folder is missing
        fall_back(device, error)
        return False
    return True


def attempt(device: Any, launch: Callable[[], None]) -> bool:
    """Launch a kernel and return True; False where that is not to be, or fails, and nothing was computed.

    Raises what a launch raises while a graph is captured: the capture has failed with it.
    """
    if not usable(device):
        return False
    try:
        launch()
    except Exception as error:  # another kernel is compiled for other dtypes
        if capturing(device):
            raise
        fall_back(device, error)
        return False
    return True


def compute(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """Compute with torch tensors on one device that is not the CPU, contiguous; alpha as it works, and not 0."""
    import torch

    if on_gpu(aligned) and torch.float64 not in (sft.dtype, aligned.dtype):

        def launch() -> None:
            from ..kernels import extrapolate

            extrapolate.launch(*tensor_extrapolation(sft, aligned, (alpha,)), [out])

        if attempt(aligned.device, launch):
            return
    by_torch(sft, aligned, alpha, out)


def by_torch(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """Compute as `compute` does, in several passes over memory and without a kernel of this project."""
    from ..kernels import torch_eager

    torch_eager.extrapolate(*tensor_extrapolation(sft, aligned, (alpha,)), [out], False)


def table(triples: Iterable[Sequence[Any]]) -> Any:
    """Return the `whole_model.Table` of tensors (sft, aligned, out) on one GPU; None where none can be made now.

    A table is copied from the host, which a graph cannot capture.
    """
    triples = list(triples)
    device = triples[0][1].device
    if not usable(device) or capturing(device):
        return None
    from ..kernels.whole_model import Table

    try:
        return Table(*zip(*triples, strict=True))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fall_back(device, error)
        return None


def compute_table(table: Any, alpha: float) -> None:
    """Launch a table's groups; a group whose launch fails is computed by torch."""
    for group in table.groups:
        if not attempt(group.table.device, partial(group.launch, alpha)):
            for sft, aligned, out in group.triples:
                by_torch(sft, aligned, alpha, out)


def compute_together(triples: Sequence[Sequence[Any]], alpha: float) -> None:
    """Compute tensors (sft, aligned, out) on one GPU in few launches, or one by one."""
    made = table(triples)
    if made is not None:
        compute_table(made, alpha)
        return
    for sft, aligned, out in triples:
        compute(sft, aligned, alpha, out)
