"""This module counts the instructions that a call of `_cpu.extrapolate` executes, by single steps of a traced process.

Hardware counters are missing in many virtual machines, and valgrind knows no AVX-512. A count of single steps is exact
and the same at every run, whatever else the machine does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable

PTRACE_TRACEME, PTRACE_CONT, PTRACE_SINGLESTEP = 0, 7, 9


def _ptrace(request: int, process: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, process, None, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def count_instructions(call: Callable[[], object]) -> int:
    """Return how many instructions of user mode a forked process executes for a call, and for its two signals.

    The caller's process has one thread. Raises PermissionError where the system allows no tracing.
    """
    process = os.fork()
    if process == 0:
        try:
            _ptrace(PTRACE_TRACEME, 0)
            signal.raise_signal(signal.SIGSTOP)
            call()
            signal.raise_signal(signal.SIGSTOP)
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    if not os.WIFSTOPPED(status):
        raise PermissionError("this system allows no tracing")
    count = 0
    libc = ctypes.CDLL(None)
    step = libc.ptrace
    step.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    while True:
        step(PTRACE_SINGLESTEP, process, None, None)
        _, status = os.waitpid(process, 0)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the traced process ended with the status {status}")
        if os.WSTOPSIG(status) == signal.SIGSTOP:
            break
        count += 1
    _ptrace(PTRACE_CONT, process)
    os.waitpid(process, 0)
    return count


def instructions_per_element(variant: str, dtypes: tuple[int, int], alphas: tuple[float, ...], measure: bool) -> float:
    """Return the instructions for each element and output, without what a call costs for any number of elements.

    Args:
        variant: A variant of `_cpu`.
        dtypes: The codes of the dtypes of sft and aligned.
        alphas: One alpha for each output.
        measure: True to compute statistics.
    """
    from expo.kernels import _cpu

    counts = []
    sizes = (2048, 6144)  # one block and three of them
    for n in sizes:
        memories = [mmap.mmap(-1, 4 * n) for _ in range(2 + len(alphas))]  # they start at a page
        arguments = memories[0], dtypes[0], memories[1], dtypes[1], n, tuple(memories[2:]), alphas, measure, variant
        counts.append(count_instructions(lambda arguments=arguments: _cpu.extrapolate(*arguments)))
    return (counts[1] - counts[0]) / (sizes[1] - sizes[0]) / len(alphas)


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # steps take less time if both processes share a core
    name, sft, aligned, outputs, statistics = sys.argv[1:]
    alphas = tuple(0.3 + k for k in range(int(outputs)))
    print(instructions_per_element(name, (int(sft), int(aligned)), alphas, statistics == "1"))
