"""A GPU in software, for tests of the whole way that a user of a GPU takes.

Three edges are replaced, and nothing in expo/ or kernels/:

- Triton's driver, by `software_gpu`: kernels are launched by `kernel[grid](...)` through Triton's own binder, compiler
  and caches, and the launcher runs the PTX that the compiler emitted on the memory of the tensors.
- the CUDA driver's library, which ctypes loads, for one attribute of a device;
- torch's CUDA layer: `torch.cuda`, and the tensors of the device "cuda". These are tensors on the CPU whose storage
  lies in a range of addresses that belongs to a device (`gpu_memory`); a TorchFunctionMode answers for them as torch
  would, and puts results of their operations into the same range. Launches and copies run late (`gpu_streams`); any
  other operation waits for its stream first.

Every access of a kernel is checked against the tensors that exist when it runs: a read of memory that nothing has
written, a use of freed memory, and two programs that write one byte are a `ptx.Fault`. The machine code of ptxas, and
the time that anything takes, are not simulated.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from gpu_memory import UNWRITTEN, WRITTEN, DeviceMemory, HostMemory, LaunchMemory, RegisteredMemory, find, span_of
from gpu_streams import Event, Graph, Scheduler, Stream
from software_gpu import Launcher, SoftwareGpu
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

# Functions that read no element, so that work on the streams may still be late when they return.
LAZY = set(
    """data_ptr size stride numel nelement dim ndimension view reshape flatten unflatten untyped_storage storage
    is_contiguous element_size storage_offset detach __getitem__ unsqueeze squeeze as_strided split chunk narrow
    transpose t unbind select expand is_neg is_conj resolve_neg resolve_conj requires_grad_ is_floating_point
    is_complex get_device permute movedim view_as expand_as swapaxes is_pinned is_shared is_set_to __len__ __hash__
    __format__ _is_view is_inference _make_subclass register_hook record_stream""".split()  # noqa: SIM905
)
CDLL = ctypes.CDLL
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}


class SoftwareCuda(TorchFunctionMode):
    """The devices, and the answers of torch for tensors on them.

    Attributes:
        scheduler: The streams.
        memories: The memory of each device, and at last the pinned memory of the host.
        launches: The name, the grid and the device of every kernel that has run.
        written: The bytes that kernels have written.
        moved: The bytes that copies have taken over the bus, "up" and "down".
        registered: The memory of the host that is registered with CUDA.
        host_page_tables: True if the devices use the page tables of the host, as the CUDA driver says when it is asked.
    """

    def __init__(self, devices: int = 1, order: str | int = "needed") -> None:
        super().__init__()
        self.scheduler = Scheduler(order, devices)
        self.memories = [DeviceMemory(f"cuda:{i}") for i in range(devices)]
        self.pinned = DeviceMemory("pinned memory")
        self.pinned.limit = 8 << 30
        self.launches: list[tuple[str, int, int]] = []
        self.written = 0
        self.moved = {"up": 0, "down": 0}
        self.host_page_tables = False
        self.registered = RegisteredMemory()
        self.driver = Driver(self)
        self._all = sorted([*self.memories, self.pinned], key=lambda memory: memory.base)
        self._answers = {
            torch.Tensor.device.__get__: self._device,  # type: ignore[attr-defined]
            torch.Tensor.is_cuda.__get__: lambda tensor: self._index(tensor) is not None,  # type: ignore[attr-defined]
            torch.Tensor.is_cpu.__get__: lambda tensor: self._index(tensor) is None,  # type: ignore[attr-defined]
            torch.Tensor.get_device: lambda tensor: -1 if self._index(tensor) is None else self._index(tensor),
            torch.Tensor.is_pinned: lambda tensor, *_: self._is_pinned(tensor),
            torch.Tensor.pin_memory: lambda tensor, *_: self._moved(tensor, self.pinned),
            torch.Tensor.to: self._to,
            torch.Tensor.cpu: lambda tensor, *_, **__: self._to(tensor, "cpu"),
            torch.Tensor.cuda: lambda tensor, device=None, non_blocking=False, **_: self._to(
                tensor, torch.device("cuda", self.scheduler.index(device)), non_blocking=non_blocking
            ),
            torch.Tensor.copy_: self._copy,
            torch.Tensor.clone: self._clone,
            torch.Tensor.record_stream: lambda tensor, stream: None,
        }

    def reset(self, order: str | int = "needed") -> None:
        """Forget errors, unfinished work and what has run, as in a new process; compiled kernels are kept."""
        self.scheduler.reset(order)
        self.launches.clear()
        self.written = 0
        self.moved = {"up": 0, "down": 0}

    # Answers to calls of torch's functions

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        answer = self._answers.get(function) if callable(getattr(function, "__hash__", None)) else None
        if answer is not None:
            return answer(*args, **kwargs)
        name = getattr(function, "__name__", "")
        own = str(function).removesuffix(".default").replace("expo.", "expo::")
        if own in OPDEFS:  # torch's dispatcher calls this function, and modes see what happens in it
            with self:
                return OPDEFS[own]._init_fn(*args, **kwargs)
        target = self._asked_device(kwargs)
        if target is None and kwargs.get("device") is not None and name in EMPTY:
            return function(*args, **kwargs)  # new memory of the host, like a tensor of a GPU
        devices = {index for tensor in tensors_in((args, kwargs)) if (index := self._index(tensor)) is not None}
        if target is None and not devices and not kwargs.get("pin_memory"):
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)
        pin = kwargs.pop("pin_memory", False)
        if len(devices) > 1 and not name.startswith("_"):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found {sorted(devices)}")
        if name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        memory = self.pinned if pin else self.memories[target if target is not None else devices.pop()]
        works = name not in LAZY and name != "__get__" and memory is not self.pinned and name not in EMPTY
        if works and self.scheduler.capturing is not None:
            return self._captured(functools.partial(function, *args, **kwargs), memory)
        if works:
            self.scheduler.current(self._number(memory)).synchronize()
        result = function(*args, **kwargs)
        if name.endswith("_") or name in ("__setitem__", "__set__") or "out" in kwargs:
            for tensor in tensors_in((args[:1], kwargs.get("out"))):
                self._mark(tensor)
        state = UNWRITTEN if name in EMPTY else WRITTEN
        return tree_map(lambda x: self._moved(x, memory, state) if isinstance(x, torch.Tensor) else x, result)

    def _captured(self, operation: Callable[[], Any], memory: DeviceMemory) -> Any:
        """Record an operation of torch in the graph; its result has memory of its own, which each replay fills."""
        result = operation()
        if not isinstance(result, torch.Tensor):
            raise RuntimeError("operation not permitted when stream is capturing")
        moved = self._moved(result, memory)

        def work() -> None:
            moved.copy_(operation())  # where the result is an argument the copy changes nothing

        self.scheduler.add(self.scheduler.current(self._number(memory)), work)
        return moved

    def _asked_device(self, kwargs: dict[str, Any]) -> int | None:
        """Return the index of the GPU that a call asks for, and make the call one for the CPU."""
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return None
        kwargs["device"] = "cpu"
        return self.scheduler.index(device)

    def _number(self, memory: DeviceMemory) -> int:
        return self.memories.index(memory)

    def _index(self, tensor: torch.Tensor) -> int | None:
        """Return the index of the GPU that a tensor is on, or None."""
        memory = find(self._all, tensor)
        return None if memory is None or memory is self.pinned else self._number(memory)

    def _device(self, tensor: torch.Tensor) -> torch.device:
        index = self._index(tensor)
        return tensor.device if index is None else torch.device("cuda", index)

    def _mark(self, tensor: torch.Tensor) -> None:
        memory = find(self._all, tensor)
        if memory is not None:
            memory.mark(*span_of(tensor))

    def _empty(self, like: torch.Tensor, memory: DeviceMemory) -> torch.Tensor:
        """Return a tensor of the same dtype, shape and strides in a memory, with garbage as its elements."""
        _, size = span_of(like)
        stream = None if memory is self.pinned else self.scheduler.current(self._number(memory))

        def when_freed(free: Callable[[], None]) -> None:
            """Free in the order of the stream, as torch's allocator gives memory to later work on it alone."""
            with self.scheduler.lock:
                if stream is None or not stream.queue:
                    free()
                else:
                    stream.queue.append(("free", free))

        storage = memory.allocate(size, when_freed)
        if self.scheduler.capturing is not None:
            self.scheduler.capturing.pool.append(storage)
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape, like.stride())

    def _moved(self, tensor: torch.Tensor, memory: DeviceMemory, state: int = WRITTEN) -> torch.Tensor:
        """Return a tensor whose storage is in a memory: the tensor itself if it is there already, else a copy."""
        if find(self._all, tensor) is memory or type(tensor).__name__ in ("FakeTensor", "DTensor"):
            return tensor
        with torch.no_grad():
            moved = self._empty(tensor, memory)
            if state == WRITTEN:
                moved.copy_(tensor.detach())
                memory.mark(*span_of(moved))
        if tensor.requires_grad or type(tensor) is not torch.Tensor:
            tensor.data = moved
            return tensor
        return moved

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], torch.Tensor):
            args = (self._device(args[0]), args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        here = self._index(tensor)
        there = here if device is None else self.scheduler.index(device) if device.type == "cuda" else None
        if here == there and (dtype is None or dtype == tensor.dtype) and not copy:
            return tensor
        memory = find(self._all, tensor) if there is None else self.memories[there]
        if there is not None and there != here and non_blocking and dtype in (None, tensor.dtype):
            result = self._empty(tensor, self.memories[there])
            return self._copy(result, tensor, non_blocking=True)
        if (here is None) != (there is None):
            self.moved["up" if here is None else "down"] += tensor.nbytes
        if here is not None:
            self.scheduler.current(here).synchronize()
        result = tensor.to(dtype or tensor.dtype, copy=True, memory_format=layout or torch.preserve_format)
        if there is None:
            return result
        assert memory is not None
        return self._moved(result, memory)

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Copy as copy_ does: late if the memory of the host is pinned and the copy is one of bytes."""
        indexes = [index for tensor in (to, source) if (index := self._index(tensor)) is not None]
        if not indexes:
            return to.copy_(source)
        if len(set(indexes)) == 2:
            self.scheduler.defaults[indexes[1]].synchronize()
        if len(indexes) == 1:
            self.moved["up" if self._index(source) is None else "down"] += to.nbytes
        stream = self.scheduler.current(indexes[0])
        host = [tensor for tensor in (to, source) if self._index(tensor) is None]
        plain = to.dtype == source.dtype and to.shape == source.shape and to.is_contiguous() and source.is_contiguous()
        registered = self.registered.find(host[0]) if host else None
        if not plain or (host and not (non_blocking and self._is_pinned(host[0]))):
            stream.synchronize()
            to.copy_(source)
            self._mark(to)
            return to
        (address, size), (start, _) = span_of(to), span_of(source)
        target, origin = find(self._all, to), find(self._all, source)
        pins = [] if registered is not None else host  # torch keeps pinned memory of its own until the copy is done
        self.registered.enter(registered)

        def work() -> None:
            if origin is not None and origin is not self.pinned:
                origin.require(start, size, "a copy", WRITTEN)
            if target is not None and target is not self.pinned:
                target.copy_in(address, start, size)
            else:
                ctypes.memmove(address, start, size)
            pins.clear()
            self.registered.leave(registered)

        self.scheduler.add(stream, work)
        return to

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return find(self._all, tensor) is self.pinned or self.registered.find(tensor) is not None

    def _clone(self, tensor: torch.Tensor, memory_format: Any = torch.preserve_format) -> torch.Tensor:
        index = self._index(tensor)
        if index is None:
            return tensor.clone(memory_format=memory_format)
        if tensor.requires_grad or memory_format is not torch.preserve_format:
            self.scheduler.current(index).synchronize()
            return self._moved(tensor.clone(memory_format=memory_format), self.memories[index])
        return self._copy(self._empty(tensor, self.memories[index]), tensor)

    # Launches

    def run(self, launcher: Launcher, x: int, stream: int, arguments: dict[str, Any]) -> None:
        """Enqueue a launch; the arguments are addresses and numbers, so that it keeps no tensor alive."""
        index = self.scheduler.index()
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments.values()]
        for value in arguments.values():
            if isinstance(value, torch.Tensor) and self._index(value) != index:
                raise RuntimeError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {value.device}")

        def work() -> None:
            memory = LaunchMemory(self.memories[index], self._host_memory())
            launcher.run(x, numbers, memory)
            memory.check_writers()
            self.written += sum(len(each) for each, _ in memory._written)
            self.launches.append((launcher.name, x, index))

        self.scheduler.add(self.scheduler.by_id(index, stream), work)

    def _host_memory(self) -> HostMemory | None:
        """Return the memory of the host that kernels may access: all pages, or the registered ones."""
        if self.host_page_tables:
            return HostMemory.mapped()
        registered = sorted((start, start + size, "rw") for start, size in list(self.registered.sizes.items()))
        return HostMemory(registered) if registered else None

    # torch.cuda

    def patches(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield the module or class, the name and the replacement of each part of torch.cuda."""
        scheduler, cuda = self.scheduler, torch.cuda

        @contextmanager
        def device(which: Any) -> Iterator[None]:
            before = scheduler.index()
            if which is not None and which != -1:
                scheduler.local.device = scheduler.index(which)
            try:
                yield
            finally:
                scheduler.local.device = before

        @contextmanager
        def stream(which: Stream | None) -> Iterator[None]:
            if which is None:
                yield
                return
            before = scheduler.current(which.device_index)
            with device(which.device_index):
                scheduler.set_current(which)
                try:
                    yield
                finally:
                    scheduler.set_current(before)

        def mem_get_info(which: Any = None) -> tuple[int, int]:
            memory = self.memories[scheduler.index(which)]
            return memory.limit - memory.used, memory.limit

        properties = type(
            "Properties",
            (),
            {
                "name": "a GPU in software",
                "major": 9,
                "minor": 0,
                "total_memory": 1 << 28,
                "multi_processor_count": 1,
                "gcnArchName": "",
            },
        )()
        replacements: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: scheduler.devices,
            "current_device": scheduler.index,
            "set_device": lambda which: setattr(scheduler.local, "device", scheduler.index(which)),
            "device": device,
            "stream": stream,
            "Stream": Stream,
            "Event": Event,
            "current_stream": scheduler.current,
            "default_stream": lambda which=None: scheduler.defaults[scheduler.index(which)],
            "set_stream": scheduler.set_current,
            "synchronize": scheduler.synchronize,
            "is_current_stream_capturing": lambda: scheduler.capturing is not None,
            "CUDAGraph": Graph,
            "graph": scheduler.capture,
            "_sleep": lambda cycles: None,
            "mem_get_info": mem_get_info,
            "memory_allocated": lambda which=None: self.memories[scheduler.index(which)].used,
            "memory_reserved": lambda which=None: self.memories[scheduler.index(which)].used,
            "empty_cache": lambda: None,
            "get_device_properties": lambda which=None: properties,
            "get_device_name": lambda which=None: properties.name,
            "get_device_capability": lambda which=None: (9, 0),
            "is_bf16_supported": lambda *_, **__: True,
            "cudart": lambda: self.registered,
        }
        for name, value in replacements.items():
            yield cuda, name, value
        yield threading.Thread, "run", self._run_in_thread(threading.Thread.run)
        yield torch.version, "cuda", "13.0"
        yield ctypes, "CDLL", self._load_library

    def _load_library(self, name: Any, *rest: Any, **more: Any) -> Any:
        """Return a library, as ctypes.CDLL does; the library of the CUDA driver says what the devices can do."""
        return CudaDriver(self) if name == "libcuda.so.1" else CDLL(name, *rest, **more)

    def _run_in_thread(self, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        """Return Thread.run with this mode, because torch's modes belong to a thread."""

        @functools.wraps(run)
        def with_mode(thread: threading.Thread) -> None:
            with self:
                run(thread)

        return with_mode

    @contextmanager
    def active(self) -> Iterator[SoftwareCuda]:
        """Put the software GPU in the place of torch's CUDA layer and of Triton's driver."""
        with ExitStack() as stack:
            for owner, name, value in self.patches():
                before = getattr(owner, name)
                setattr(owner, name, value)
                stack.callback(setattr, owner, name, before)
            stack.enter_context(self.driver.active())
            stack.enter_context(self)
            yield self


class CudaDriver:
    """The functions of the CUDA driver's library that are asked for a device's attributes."""

    def __init__(self, cuda: SoftwareCuda) -> None:
        self._cuda = cuda

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0 if ordinal < self._cuda.scheduler.devices else 101  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = int(attribute == 100 and self._cuda.host_page_tables)
        return 0


class Driver(SoftwareGpu):
    """Triton's driver for all devices of a SoftwareCuda."""

    def __init__(self, cuda: SoftwareCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.first = self._number

    def get_current_device(self) -> int:
        return self.first + self.cuda.scheduler.index()

    def get_current_stream(self, device: int) -> int:
        return self.cuda.scheduler.current(device - self.first).cuda_stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.cuda.scheduler.index())

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return CudaLauncher(self, source, metadata)


class CudaLauncher(Launcher):
    """The launcher of a compiled kernel on a SoftwareCuda."""

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        assert (y, z) == (1, 1)
        self._gpu.cuda.run(self, x, stream, self.given(rest))


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return all tensors in a nest of tuples, lists and dicts."""
    return [each for each in tree_flatten(tree)[0] if isinstance(each, torch.Tensor)]
