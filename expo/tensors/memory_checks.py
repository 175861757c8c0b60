"""Checks of the memory of arrays and tensors: a tensor has memory, and no result overwrites another pair's input.

A kernel gets bare addresses, so these checks come before it. They read no element.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import UsageError

# NumPy tries at most this many solutions to find a byte that two strided views have in common. If these do not decide,
# the views count as overlapping.
MOST_CANDIDATES = 1 << 16


def check_memory(torch: Any, tensor: Any, role: str, advice: str = "") -> None:
    """Raise UsageError for a torch tensor that has elements, and no memory of its own.

    Tensors of a wrapper class (FakeTensor, quantised tensors) and those inside torch.func report a dtype and a
    shape, but their storage is at address 0. A subclass that owns its memory passes.

    Args:
        torch: The module.
        tensor: The tensor.
        role: The name of the tensor in the message.
        advice: The end of the message; without it, an advice for the type of the tensor.
    """
    if tensor.numel() and not _storage(torch, tensor):
        raise UsageError(f"{role} is a {_kind(tensor)} without memory of its own: {advice or _advice(torch, tensor)}")


def check_unmasked(np: Any, array: Any, role: str) -> None:
    """Raise UsageError for a masked array of NumPy, as the formula has no masks."""
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise UsageError(f"{role} is a masked array, and masks are not followed: pass its .filled(value) or its .data")


def _storage(torch: Any, tensor: Any) -> int:
    """Return the address at which the tensor's storage begins, and 0 if it has none.

    The tensor's own data_ptr() is of no use here: a subclass may override it, and a view of freed memory has an offset.
    """
    try:
        if type(tensor) is torch.Tensor:  # no subclass: this call takes a fifth of the time of the one below
            return int(tensor.untyped_storage().data_ptr())
        with torch._C.DisableTorchFunctionSubclass():
            return int(torch.Tensor.untyped_storage(tensor).data_ptr())
    except RuntimeError:  # torch raises this error for some tensors without storage
        return 0


def _kind(tensor: Any) -> str:
    """Return the type and the device of a tensor, as a message names them."""
    return f"{type(tensor).__name__} on {tensor.device}"


def _advice(torch: Any, tensor: Any) -> str:
    """Return the way out for a type of tensor without memory."""
    names = {kind.__name__ for kind in type(tensor).__mro__}
    if "FakeTensor" in names or tensor.is_meta:
        return (
            "it has a shape and no numbers; load the weights first, or, where shapes alone are wanted, "
            "call torch.ops.expo.extrapolate"
        )
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return (
            "its memory was freed, or a torch.func transform put it in the place of another; call extrapolate "
            "outside of torch.func's transforms, while the weights are in memory"
        )
    return "pass the plain tensors that it wraps, or what it stands for, such as its .dequantize()"


def mark_firsts(triples: Sequence[tuple[Any, Any, Any]]) -> list[bool]:
    """Return for each pair (sft, aligned, out) True if no earlier pair has the same memory, and False if one has it.

    Tied weights may be listed twice; the second pair is then not computed.

    Raises:
        UsageError: The result would depend on the order in which the pairs are computed, as two different pairs write
            to the same memory, or one reads memory that another writes. The message has their positions.
    """
    if _plainly_apart(triples):
        return [True] * len(triples)
    places = [(_place(s), _place(a), _place(o)) for s, a, o in triples]
    first: dict[tuple[_Place, ...], int] = {}
    is_first = [first.setdefault(each, index) == index for index, each in enumerate(places)]
    uses: defaultdict[str, list[_Use]] = defaultdict(list)
    for index, (s, a, o) in enumerate(places):
        if is_first[index]:
            for role, place in (("out", o), ("sft", s), ("aligned", a)):
                uses[place.device].append(_Use(*place.span, index, role, place))
    for on_device in uses.values():
        _check_apart(sorted((use for use in on_device if use.low < use.high), key=lambda use: use.low))
    return is_first


def _plainly_apart(triples: Sequence[tuple[Any, Any, Any]]) -> bool:
    """Return True if no pair reads or writes memory that another writes; False if only `_check_apart` can decide that.

    Nearly every list passes this test, which takes a third of the time of `_check_apart`.
    """
    spans = []
    for index, (s, a, o) in enumerate(triples):
        for x in (s, o) if a is o else (s, a, o):
            if not (x.is_contiguous() if hasattr(x, "data_ptr") else x.flags.c_contiguous):
                return False
            start = _start(x)
            spans.append((start, start + x.nbytes, index, x is o))
    spans.sort()
    write_end = writer = read_end = reader = -1
    for low, high, index, written in spans:
        if low == high:
            continue
        if (low < write_end and index != writer) or (written and low < read_end and index != reader):
            return False
        if written:
            write_end, writer = max(write_end, high), index
        else:
            reader = index if low >= read_end or index == reader else -1  # -1: there are several readers
            read_end = max(read_end, high)
    return True


def _start(x: Any) -> int:
    """Return the address of the first element."""
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.__array_interface__["data"][0])


class _Place(NamedTuple):
    """The memory of an array or tensor: equal places have the same elements in the same order.

    Attributes:
        device: The device.
        start: The address of the first element.
        shape: The lengths of the dimensions.
        strides: The bytes from one element to the next along each dimension.
        item: The bytes of an element.
        kind: The dtype, after a "-" if the tensor shows the negatives of the numbers in memory.
    """

    device: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int
    kind: str

    @property
    def span(self) -> tuple[int, int]:
        """The first address and the address after the last byte; both are equal for an empty tensor."""
        if 0 in self.shape:
            return self.start, self.start
        reach = [(size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)]
        return self.start + sum(x for x in reach if x < 0), self.start + sum(x for x in reach if x > 0) + self.item

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Return the description of the memory with which NumPy compares addresses."""
        data = (self.start, False)
        return {"version": 3, "data": data, "shape": self.shape, "strides": self.strides, "typestr": f"|V{self.item}"}


def _place(x: Any) -> _Place:
    """Return the place of an array or tensor."""
    if hasattr(x, "data_ptr"):
        item: int = x.element_size()
        device, kind, shape, count = str(x.device), f"{'-' * x.is_neg()}{x.dtype}", tuple(x.shape), x.numel()
        contiguous, strides = x.is_contiguous(), tuple(step * item for step in x.stride())
    else:
        item, device, kind, shape, count = x.itemsize, "cpu", str(x.dtype), x.shape, x.size
        contiguous, strides = x.flags.c_contiguous, x.strides
    if contiguous:
        shape, strides = (count,), (item,)
    return _Place(device, _start(x), shape, strides, item, kind)


class _Use(NamedTuple):
    """One use of memory.

    Attributes:
        low: The first address.
        high: The address after the last byte.
        pair: The position of the pair in the lists.
        role: "sft", "aligned" or "out".
        place: The memory.
    """

    low: int
    high: int
    pair: int
    role: str
    place: _Place


def _check_apart(uses: Iterable[_Use]) -> None:
    """Raise UsageError if an out overlaps the memory of another pair; `uses` ascend by their first address."""
    still_open: list[_Use] = []  # uses that begin before this one and end after its begin
    for use in uses:
        still_open = [other for other in still_open if other.high > use.low]
        for other in still_open:
            if use.pair != other.pair and "out" in (use.role, other.role) and _share(use.place, other.place):
                raise UsageError(_clash(*sorted((use, other), key=lambda each: (each.role != "out", each.pair))))
        still_open.append(use)


def _share(one: _Place, other: _Place) -> bool:
    """Return True if two places whose spans overlap have a byte in common; two columns of one matrix have none."""
    if len(one.shape) == len(other.shape) == 1 and one.strides == (one.item,) and other.strides == (other.item,):
        return True
    import numpy

    np: Any = numpy  # NumPy's stubs allow two values of max_work alone
    try:
        return bool(np.shares_memory(np.asarray(one), np.asarray(other), max_work=MOST_CANDIDATES))
    except np.exceptions.TooHardError:
        return True


def _clash(out: _Use, other: _Use) -> str:
    """Return the message about an out that overlaps the memory of another pair."""
    if other.role == "out":
        what = "are the same memory" if out.place == other.place else "overlap"
        return (
            f"out[{out.pair}] and out[{other.pair}] {what}, but their sft or aligned differ: one result would "
            "overwrite the other; list tied weights with one sft, or leave one of them out"
        )
    return (
        f"out[{out.pair}] overlaps {other.role}[{other.pair}], so the result would depend on the order: pass an "
        "out with separate memory, or no out"
    )
