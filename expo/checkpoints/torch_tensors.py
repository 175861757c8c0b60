"""The tensors that a pickle of PyTorch's describes: each is a view of a storage, with an offset, a shape and strides.

Source: github.com/pytorch/pytorch, torch/_utils.py (_rebuild_tensor_v2 and the functions below it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..dtypes import FROM_TORCH
from ..errors import CheckpointError
from .safetensors_header import element_count, is_unicode
from .unpickler import DTYPES, FIX, PARAMETERS, TENSORS, TORCH_ITEMSIZE, Call, Reference, Storage, are_naturals, kind_of

HOLDERS = ("state_dict", "model", "module")  # the names under which trainers save a state dict
MAX_DIMS = 64  # most dimensions of a tensor, as in torch
MAX_STRIDED_DIMS = 32  # most dimensions of a tensor whose elements have to be gathered: the limit of NumPy 1


class View(NamedTuple):
    """A tensor as a view of a storage.

    Attributes:
        name: The tensor's name in the dict.
        dtype: torch's name for its dtype.
        storage: The storage, or the part of one.
        offset: The first element, counted from the storage's start in elements of the tensor's dtype.
        shape: The number of elements along each dimension.
        strides: The elements between two neighbours along each dimension.
    """

    name: str
    dtype: str
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_views(path: str, top: Any) -> list[View]:
    """Return the tensors of the dict that a pickle builds. Raises CheckpointError for any other value."""
    top = find_weights(path, top)
    if type(top) is not dict:
        raise CheckpointError(f"{path}: not plain weights: it holds {kind_of(top)}, not a dict of tensors; {FIX}")
    views = []
    for name, value in top.items():
        if name is None:
            raise CheckpointError(f"{path}: not plain weights: a dict with a key that is not a string; {FIX}")
        if type(value) is not Call:
            raise CheckpointError(
                f"{path}: not plain weights: entry {name!r} is {kind_of(value)}, where a tensor is expected; {FIX}"
            )
        if name == "__metadata__" or not is_unicode(name):
            raise CheckpointError(f"{path}: tensor {name!r} has a name that safetensors cannot hold")
        views.append(read_view(path, name, value))
    return views


def find_weights(path: str, top: Any) -> Any:
    """Return the dict of tensors inside a dict that a trainer wrote, such as {"state_dict": ..., "epoch": 3}.

    A dict with tensors of its own has no other inside. Raises CheckpointError if several dicts may be the weights.
    """
    if type(top) is not dict or any(type(value) is Call for value in top.values()):
        return top
    holders = [key for key in HOLDERS if type(top.get(key)) is dict and top[key]]
    if len(holders) > 1:
        raise CheckpointError(
            f"{path}: it holds dicts named {' and '.join(map(repr, holders))}, and only one may be the weights: load "
            f"it with torch, and torch.save() that dict alone"
        )
    return top[holders[0]] if holders else top


def _tensor_call(path: str, name: str, call: Call) -> Call:
    """Return the call that builds the tensor, also for a parameter, which another call makes of a tensor."""
    function, arguments = call
    if function in PARAMETERS:
        if (
            len(arguments) != PARAMETERS[function]
            or type(arguments[0]) is not Call
            or type(arguments[1]) is not bool
            or not _is_empty(arguments[2])
        ):
            what = "a parameter that is not made of a tensor, a flag for gradients, and no hooks"
            raise tensor_error(path, name, what)
        function, arguments = arguments[0]
    if function not in TENSORS or len(arguments) not in TENSORS[function]:
        what = f"{len(arguments)} arguments of {function.replace(' ', '.')}, not those of a tensor"
        raise tensor_error(path, name, what)
    return Call(function, arguments)


def read_view(path: str, name: str, call: Call) -> View:
    """Return the view that a call describes.

    The call is _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks[, metadata]), or
    _rebuild_tensor_v3, which has the dtype before the metadata and a storage of bytes. The metadata say if the tensor
    is to be conjugated or negated.
    """
    function, arguments = _tensor_call(path, name, call)
    storage, offset, shape, strides, gradient, hooks = arguments[:6]
    if type(storage) is not Storage or type(gradient) is not bool:
        raise tensor_error(
            path, name, "it is not made of a storage, its place in the storage, and a flag for gradients"
        )
    if not _is_empty(hooks):
        raise tensor_error(path, name, f"it has hooks, {kind_of(hooks)}, but nothing in a checkpoint is run; {FIX}")
    dtype, bits = storage.dtype, arguments[6:]
    if max(TENSORS[function]) == 8:
        dtype, bits = DTYPES.get(bits[0].name, "") if type(bits[0]) is Reference else "", bits[1:]
    if bits and not _is_empty(bits[0]):
        raise tensor_error(path, name, f"it is conjugated or negated as it is read, which is not supported; {FIX}")
    if dtype not in FROM_TORCH:
        found = f"torch.{dtype}" if dtype else "unknown"
        raise tensor_error(path, name, f"dtype {found} is none of {', '.join(FROM_TORCH)}")
    if not all(map(are_naturals, ((offset,), shape, strides))) or len(shape) != len(strides):
        what = "offset, shape and strides are not whole numbers from 0 to 2^63 - 1, with a stride for each dimension"
        raise tensor_error(path, name, what)
    if len(shape) > MAX_DIMS:
        raise tensor_error(path, name, f"{len(shape)} dimensions, but at most {MAX_DIMS} are read")
    return View(name, dtype, storage, offset, shape, strides)


def _is_empty(values: Any) -> bool:
    """Return True for None and for an empty dict."""
    return values is None or (type(values) is dict and not values)


def locate(path: str, view: View) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Return where a tensor lies in its storage.

    Returns:
        The byte of the storage that the tensor starts at, the number of its bytes, and a (length, stride) for each
        dimension, with as few dimensions as possible.

    Raises:
        CheckpointError: The tensor ends outside its storage, or has more dimensions than NumPy can gather.
    """
    item, storage = TORCH_ITEMSIZE[view.dtype], view.storage
    available = storage.length * TORCH_ITEMSIZE[storage.dtype]
    nbytes = element_count(view.shape) * item
    if nbytes >= 2**63:
        raise tensor_error(path, view.name, f"shape {list(view.shape)} of torch.{view.dtype} is over 2^63 bytes")
    if not nbytes:
        return 0, 0, ()
    last = view.offset + sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))
    if (last + 1) * item > available:
        what = (
            f"shape {list(view.shape)}, strides {list(view.strides)} and offset {view.offset} end at byte "
            f"{(last + 1) * item} of storage {storage.key!r}, which has {available}"
        )
        raise tensor_error(path, view.name, what)
    dims = _merge_dims(view.shape, view.strides)
    if len(dims) > MAX_STRIDED_DIMS:
        what = f"{len(dims)} strided dimensions, but at most {MAX_STRIDED_DIMS} can be read"
        raise tensor_error(path, view.name, what)
    return storage.first * TORCH_ITEMSIZE[storage.dtype] + view.offset * item, nbytes, dims


def _merge_dims(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (length, stride) of each dimension longer than 1; two become one where one stride serves for both."""
    dims: list[tuple[int, int]] = []
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            continue
        if dims and dims[-1][1] == length * stride:
            length *= dims.pop()[0]
        dims.append((length, stride))
    return tuple(dims)


def tensor_error(path: str, tensor: str, what: str) -> CheckpointError:
    """Return an error that names the file and the tensor."""
    return CheckpointError(f"{path}: tensor {tensor!r}: {what}")
