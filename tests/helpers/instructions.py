"""This module counts the instructions of `_cpu` that a call executes, by single steps of a traced process on x86-64.

Hardware counters are missing in many virtual machines, and valgrind knows no AVX-512. A count of single steps is exact
and the same at every run, whatever else the machine does. The interpreter's own instructions depend on addresses, which
differ from run to run, so they are left out.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

PTRACE_TRACEME, PTRACE_PEEKUSER, PTRACE_CONT, PTRACE_SINGLESTEP = 0, 3, 7, 9
SYS_PTRACE = 101  # libc's own function returns the value that it reads, as the system's call does not
RIP = 128  # the instruction pointer's place in Linux's `struct user`, in bytes


def _ptrace(request: int, process: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, process, None, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def executable_addresses(library: str) -> range:
    """Return the addresses of a loaded library's code."""
    with open("/proc/self/maps") as lines:
        fields = next(line.split() for line in lines if "r-xp" in line and line.rstrip().endswith(library))
    first, last = fields[0].split("-")
    return range(int(first, 16), int(last, 16))


def count_instructions(call: Callable[[], object], among: range) -> int:
    """Return how many instructions at these addresses a forked process executes for a call.

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
    step.argtypes, step.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    pointer = ctypes.c_ulong()
    while True:
        step(PTRACE_SINGLESTEP, process, None, None)
        _, status = os.waitpid(process, 0)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the traced process ended with the status {status}")
        if os.WSTOPSIG(status) == signal.SIGSTOP:
            break
        libc.syscall(SYS_PTRACE, PTRACE_PEEKUSER, process, ctypes.c_void_p(RIP), ctypes.byref(pointer))
        count += pointer.value in among
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

    code = executable_addresses(os.path.realpath(_cpu.__file__))
    sizes = (2048, 4096)  # one block and two
    memories = [mmap.mmap(-1, 4 * sizes[1]) for _ in range(2 + len(alphas))]  # they start at a page
    sft, aligned, *outputs = memories
    counts = []
    for n in sizes:
        call = partial(
            _cpu.extrapolate, sft, dtypes[0], aligned, dtypes[1], n, tuple(outputs), alphas, measure, variant
        )
        counts.append(count_instructions(call, code))
    return (counts[1] - counts[0]) / (sizes[1] - sizes[0]) / len(alphas)


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # steps take less time if both processes share a core
    name, sft, aligned, outputs, statistics = sys.argv[1:]
    alphas = tuple(0.3 + k for k in range(int(outputs)))
    print(instructions_per_element(name, (int(sft), int(aligned)), alphas, statistics == "1"))
