"""May the Triton kernels compute on a GPU here? They are tried first, and given up with one warning where they fail.

An engine that was asked for by name fails instead: see `engines.py`. torch is imported by callers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

PART = 1 << 24  # elements that torch computes at a time: its temporaries take 16 bytes for each

_given_up: set[Any] = set()  # of torch.device
_lock = threading.Lock()


def on_gpu(tensor: Any) -> bool:
    """Return whether a tensor is where kernels run."""
    return bool(tensor.is_cuda)


def give_up(device: Any, error: Exception) -> None:
    """Use the kernels no more on this torch.device in this process, and say so once."""
    with _lock:
        if device in _given_up:
            return
        _given_up.add(device)
    warnings.warn(
        f"the Triton kernels are not used on {device}; what computes instead is slower, with the same bits. "
        f"The reason: {said(error)}",
        RuntimeWarning,
        stacklevel=2,
    )


def said(error: Exception) -> str:
    """Return the start of an error's text, which may hold all of a kernel, after the kind that a compiler's needs."""
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip()[:500]}"


def usable(device: Any) -> bool:
    """Return whether kernels may run on this torch.device; where they may not, a warning has said why."""
    if device in _given_up:
        return False
    try:
        from .kernels import selftest

        selftest.check(device)
    except Exception as error:  # wrong bits; no Triton; a compiler, a linker or a cache folder that is missing
        give_up(device, error)
        return False
    return True


def attempt(device: Any, launch: Callable[[], None]) -> bool:
    """Launch a kernel and return True; False where that is not to be, or fails, and nothing was computed."""
    if not usable(device):
        return False
    try:
        launch()
    except Exception as error:  # of other dtypes, of which another kernel is compiled
        give_up(device, error)
        return False
    return True


def compute(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """Compute with torch tensors on one device that is not the CPU, contiguous; alpha as it works, and not 0."""
    import torch

    if on_gpu(aligned) and torch.float64 not in (sft.dtype, aligned.dtype):

        def launch() -> None:
            from .kernels import extrapolate

            extrapolate.launch(sft, aligned, alpha, out)

        if attempt(aligned.device, launch):
            return
    by_torch(sft, aligned, alpha, out)


def by_torch(sft: Any, aligned: Any, alpha: float, out: Any) -> None:
    """As `compute`, in several passes over memory and without a kernel of this project."""
    from .kernels.twin import twin

    for s, a, o in zip(*(each.view(-1).split(PART) for each in (sft, aligned, out)), strict=True):
        o.copy_(twin(s, a, alpha))


def table(triples: Iterable[Sequence[Any]]) -> Any:
    """Return the `whole_model.Table` of tensors (sft, aligned, out) on one GPU; None where kernels cannot be used."""
    triples = list(triples)
    if not usable(triples[0][1].device):
        return None
    from .kernels.whole_model import Table

    return Table(*zip(*triples, strict=True))


def compute_table(table: Any, alpha: float) -> None:
    """Launch a table's groups; a group whose launch fails is computed by torch."""
    for group in table.groups:
        if not attempt(group.table.device, partial(group.launch, alpha)):
            for sft, aligned, out in group.triples:
                by_torch(sft, aligned, alpha, out)


def compute_together(triples: Sequence[Sequence[Any]], alpha: float) -> None:
    """Compute tensors (sft, aligned, out) on one GPU in few launches, or one by one by torch."""
    made = table(triples)
    if made is not None:
        compute_table(made, alpha)
        return
    for sft, aligned, out in triples:
        by_torch(sft, aligned, alpha, out)
