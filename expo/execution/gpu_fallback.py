"""The GPUs that may run the Triton kernels: a GPU whose kernels fail is given up for this process, with one warning.

A caller computes in another way if `attempt` returns False. If the user asks for the engine triton by name, the engine
raises an error instead: see `engines.py`. A caller that has a GPU has imported torch already.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..planning.steps import Step

_given_up: dict[Any, str] = {}  # the reason, for each torch.device
_ran_out: set[Any] = set()  # torch.devices that ran out of memory; the warning about each was given
_lock = threading.Lock()


def reason_given_up(device: Any) -> str:
    """Return the reason why this process does not use the kernels on a torch.device any more; "" if it may use them."""
    return _given_up.get(device, "")


def fall_back(device: Any, error: Exception) -> None:
    """Warn once for each torch.device, and give up its kernels for this process unless the device ran out of memory.

    The next call may find free memory. A kernel that gives wrong bits or does not compile would fail again.
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
        f"the Triton kernels are not used {calls}; another engine computes instead, slower and with the same bits. "
        f"The reason: {text}",
        RuntimeWarning,
        stacklevel=3,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return True if an error of torch, of CUDA or of Triton says that memory ran out."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def error_text(error: Exception) -> str:
    """Return the start of an error's text, after the error's type unless that is RuntimeError.

    The text of a compiler's error may contain all of a kernel, and says little without the type.
    """
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip()[:500]}"


def has_kernel(step: Step) -> bool:
    """Return True if the kernels can compute a step: it is an extrapolation of stored tensors, none of them F64."""
    return step.plain and step.sft is not None and "F64" not in (step.sft.dtype, step.aligned.dtype)


def capturing(device: Any) -> bool:
    """Return True if the current stream of a torch.device is being captured into a graph."""
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def current_stream(device: Any) -> int:
    """Return the handle of the current stream of a torch.device, to which kernels are launched."""
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@cache
def _selftest() -> Any:
    """Return the module of the self-test. An import statement takes a microsecond at each launch; this call does not.

    Raises:
        ImportError: Triton cannot be imported. The next call tries again.
    """
    from ..kernels import selftest

    return selftest


def usable(device: Any) -> bool:
    """Return True if kernels may run on a torch.device now; if they have failed there, a warning says why.

    While a graph is captured, only a device that has passed the self-test is usable, because the graph would capture
    the test too. The graph of another device gets torch's own operations.
    """
    if device in _given_up:
        return False
    try:
        selftest = _selftest()
        if selftest.passed(device):
            return True
        if capturing(device):
            return False
        selftest.check(device)
    except Exception as error:  # wrong bits, too little memory, or no Triton, compiler, linker or cache folder
        fall_back(device, error)
        return False
    return True


def attempt(device: Any, launch: Callable[..., None], *arguments: Any) -> bool:
    """Call `launch(*arguments)`, which launches a kernel on a torch.device.

    Returns:
        True after a launch. False if the device's kernels are not usable, or if the launch fails; then nothing was
        computed.

    Raises:
        Exception: The launch failed during the capture of a graph, and the capture failed with it.
    """
    if not usable(device):
        return False
    try:
        launch(*arguments)
    except Exception as error:  # these dtypes may be the first ones that a kernel is compiled for
        if capturing(device):
            raise
        fall_back(device, error)
        return False
    return True
