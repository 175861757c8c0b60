"""Short ways for tensors that are plain and on one GPU, where the checks would take longer than a launch.

`compute_one` computes one tensor after the fewest checks that make the kernel safe. `TableCache` finds the pointer
table of lists that an earlier call has checked, by numbers that say everything about the tensors that the checks and
the kernel read. If a tensor is not plain, or if anything about the call is wrong, these functions compute nothing; then
the caller's own checks decide, and raise the errors.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from ..dtypes import ITEMSIZE, torch_names
from ..execution import gpu_fallback
from ..kernels.contract import working_alpha
from . import gpu_tensors

MOST_TABLES = 8  # tables that the cache holds; the table of a model with 7B parameters takes 0.9 MB of the GPU's memory
MOST_OFFSET = 1 << 46  # bytes: no storage is as large, so a larger number is an address and no offset in a storage
_dtype_of, _shape_of = operator.attrgetter("dtype"), operator.attrgetter("shape")


@cache
def _plain_types(torch: Any) -> frozenset[type]:
    """Return the types of tensors whose methods are torch's own: a subclass may override them, or have no memory."""
    return frozenset((torch.Tensor, torch.nn.Parameter))


@cache
def _item_sizes() -> dict[Any, int]:
    """Return the bytes of an element for each of torch's dtypes that the kernels compute."""
    return {dtype: ITEMSIZE[name] for dtype, name in torch_names().items() if name in ITEMSIZE and name != "F64"}


def _kernel_alpha(alpha: Any) -> float:
    """Return the working alpha, and 0.0 for an alpha that no kernel gets: 0, or one that the caller refuses."""
    try:
        return working_alpha(alpha)
    except (TypeError, ValueError):
        return 0.0


def compute_one(torch: Any, sft: Any, aligned: Any, alpha: Any, out: Any) -> bool:
    """Compute one tensor on a GPU. Return False, without a result, if the caller's own checks must decide."""
    if not gpu_tensors.on_gpu(aligned):  # nearly every call for the CPU ends here
        return False
    types = _plain_types(torch)
    if not (type(sft) in types and type(aligned) in types and type(out) in types):
        return False
    used_alpha = _kernel_alpha(alpha)
    if not used_alpha or not _fit(sft, aligned, out):
        return False
    gpu_tensors.compute_by_kernel(sft, aligned, used_alpha, out)
    return True


def _fit(sft: Any, aligned: Any, out: Any) -> bool:
    """Return True if three plain tensors fit together for the kernel, as the checks in arrays.py define it."""
    sizes, dtype = _item_sizes(), aligned.dtype
    item, sft_item = sizes.get(dtype), sizes.get(sft.dtype)
    if item is None or sft_item is None or out.dtype is not dtype:
        return False
    try:
        shape, device = aligned.shape, aligned.get_device()
        if sft.shape != shape or out.shape != shape or sft.get_device() != device or out.get_device() != device:
            return False
        if not (sft.is_contiguous() and aligned.is_contiguous() and out.is_contiguous()):
            return False
        if sft.is_neg() or aligned.is_neg() or out.is_neg():
            return False
        s, a, o, n = sft.data_ptr(), aligned.data_ptr(), out.data_ptr(), aligned.numel()
    except RuntimeError:  # torch raises this error for tensors without memory or without a shape
        return False
    if (s < MOST_OFFSET or a < MOST_OFFSET or o < MOST_OFFSET) and (
        # The address of a tensor whose memory was freed is the offset in its storage.
        s == sft.storage_offset() * sft_item or a == aligned.storage_offset() * item
        or o == out.storage_offset() * item
    ):  # fmt: skip
        return False
    end = o + n * item
    apart_from_aligned = o == a or end <= a or a + n * item <= o
    return apart_from_aligned and ((o == s and item == sft_item) or end <= s or s + n * sft_item <= o)


class _Key(NamedTuple):
    """Everything about lists of contiguous tensors that the checks and the kernel read, without the tensors.

    If tensors are freed and others have the same key later, the same table is right for them.

    Attributes:
        addresses: The address of the first element of each tensor: those of sft, those of aligned, and those of out
            unless they are aligned's own tensors. The address of a tensor whose memory was freed is the offset in its
            storage, which is no address of a GPU.
        dtypes: Their dtypes.
        shapes: Their shapes. The tensors are contiguous, so the shapes give the strides.
        device: The number of their device.
        triples: The number of triples.
        stream: The handle of the device's current stream.
    """

    addresses: list[int]
    dtypes: list[Any]
    shapes: list[tuple[int, ...]]
    device: int
    triples: int
    stream: int


class _Entry(NamedTuple):
    """A table in the cache.

    Attributes:
        key: The key of the lists.
        places: The positions of the table's triples in the lists, which may list tied weights twice.
        table: The table.
    """

    key: _Key
    places: Sequence[int]
    table: Any


def make_key(torch: Any, sft: Sequence[Any], aligned: Sequence[Any], out: Sequence[Any]) -> _Key | None:
    """Return the key of lists of plain, contiguous tensors, or None for other lists and for those of the CPU."""
    count = len(aligned)
    if not (count and len(sft) == count == len(out) and type(aligned[0]) in _plain_types(torch)):
        return None
    if not gpu_tensors.on_gpu(aligned[0]):
        return None
    in_place = all(map(operator.is_, aligned, out))
    tensors = [*sft, *aligned] if in_place else [*sft, *aligned, *out]
    if not _plain_types(torch).issuperset(map(type, tensors)):
        return None
    kind = torch.Tensor
    try:  # each map runs in C: a loop in Python takes three times as long
        if not all(map(kind.is_contiguous, tensors)) or any(map(kind.is_neg, tensors)):
            return None
        devices = set(map(kind.get_device, tensors))
        if len(devices) > 1:
            return None
        return _Key(
            list(map(kind.data_ptr, tensors)),
            list(map(_dtype_of, tensors)),
            list(map(_shape_of, tensors)),
            devices.pop(),
            count,
            gpu_fallback.current_stream(aligned[0].device),
        )
    except RuntimeError:  # torch raises this error for tensors without memory or without a shape
        return None


class TableCache:
    """The pointer tables of the latest lists. Several threads may use it.

    The cache holds no tensor of a caller. It may drop a table while the GPU still reads it, because all uses of a
    table's memory are in the order of one stream: the stream is a part of the key, torch allocates the table while that
    stream is the current one, and every launch with the table goes to it. Torch gives the memory to later work of the
    same stream only. A thread that has found a table holds it until its launch is queued.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []  # the latest one is the last
        self._lock = threading.Lock()

    def keep(self, key: _Key, places: Sequence[int], table: Any) -> None:
        """Keep the table of the triples at `places`, and drop the table that was not used for the longest time."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.key != key][1 - MOST_TABLES :]
            self._entries.append(_Entry(key, places, table))

    def find(self, key: _Key) -> _Entry | None:
        """Return the entry of a key, if the cache has it."""
        with self._lock:
            for i, entry in enumerate(self._entries):
                if entry.key == key:
                    self._entries.append(self._entries.pop(i))
                    return entry
        return None

    def clear(self) -> None:
        """Drop all tables."""
        with self._lock:
            self._entries = []


tables = TableCache()


def compute_again(key: _Key, sft: Sequence[Any], aligned: Sequence[Any], alpha: Any, out: Sequence[Any]) -> bool:
    """Compute lists whose table is in the cache. Return False, without a result, if the caller's checks must decide.

    A graph that is captured would read the table after the cache has dropped it, so a capture uses none.
    """
    entry, used_alpha = tables.find(key), _kernel_alpha(alpha)
    if entry is None or not used_alpha or gpu_fallback.capturing(aligned[0].device):
        return False
    places = entry.places

    def tensors_at(position: int) -> tuple[Any, Any, Any]:
        place = places[position]
        return sft[place], aligned[place], out[place]

    gpu_tensors.compute_table(entry.table, used_alpha, tensors_at)
    return True
