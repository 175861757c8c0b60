"""Pickles with more than plain weights: nothing in them is run, and each is refused in little memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_pickles import (
    FLOAT,
    FORMS,
    HOOKS,
    PARAMETER,
    STORED,
    V2,
    V3,
    Call,
    Code,
    Persistent,
    Ref,
    assembled,
    numbers,
    pickled_as,
    refused,
    save,
    tensor,
    text,
)

from expo.checkpoints import unpickler
from expo.checkpoints.torch_file import open_torch_file
from expo.errors import CheckpointError


@FORMS
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"weights": {"x": torch.ones(2)}, "epoch": 3}, "entry 'weights' is a dict"),
        ({"model": {"x": torch.ones(2)}, "y": torch.ones(2)}, "entry 'model' is a dict"),
        ({"x": torch.ones(2), "epoch": 3}, "entry 'epoch' is an int"),
        ({"x": torch.ones(2), "lr": 0.5}, "entry 'lr' is a float"),
        ({"x": torch.ones(2), "why": "not"}, "entry 'why' is a str"),
        ({"x": None}, "entry 'x' is None"),
        ({"x": torch.float16}, "entry 'x' is torch.float16"),
        ({"x": torch.ones(2).untyped_storage()}, "entry 'x' is a storage"),
        ({"x": [torch.ones(2)]}, "entry 'x' is a list"),
        ({"x": (torch.ones(2),)}, "entry 'x' is a tuple"),
        ({0: torch.ones(2)}, "a dict with a key that is not a string"),
        ([torch.ones(2)], "it holds a list, not a dict of tensors"),
        (torch.ones(2), "it holds a tensor, not a dict of tensors"),
        (7, "it holds an int, not a dict of tensors"),
    ],
)  # fmt: skip
def test_other_values_are_named_and_the_fix(tmp_path: Path, zipped: bool, value: Any, what: str) -> None:
    path = save(value, tmp_path / "a.bin", zipped)
    with pytest.raises(CheckpointError) as caught:
        open_torch_file(str(path))
    assert str(caught.value).startswith(f"{path}: not plain weights: ")
    assert what in str(caught.value)
    assert "save model.state_dict() alone, or load it with transformers and save it with save_pretrained()" in str(
        caught.value
    )


class Subclass(torch.Tensor):
    pass


def test_other_tensors_are_refused_by_the_global(tmp_path: Path) -> None:
    for value, name in [
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2).as_subclass(Subclass), "torch._tensor._rebuild_from_type_v2"),
        (torch.empty(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (numbers(2).numpy(), "_reconstruct"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.device("cpu"), "torch.device"),
    ]:
        path = save({"x": value}, tmp_path / "a.bin")
        with pytest.raises(CheckpointError, match=rf"it refers to .*{name}, which is not plain weights; nothing in it"):
            open_torch_file(str(path))
    path = save({"x": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"tensor 'x': it is conjugated or negated"):
        open_torch_file(str(path))
    path = save({"x": {1, 2}}, tmp_path / "a.bin", protocol=4)
    with pytest.raises(CheckpointError, match="its pickle has the instruction EMPTY_SET"):
        open_torch_file(str(path))


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@FORMS
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_is_run(tmp_path: Path, zipped: bool, protocol: int) -> None:
    sentinel = tmp_path / "ran"
    path = save({"x": torch.ones(2), "y": Runs(f"touch {sentinel}")}, tmp_path / "a.bin", zipped, protocol)
    with pytest.raises(CheckpointError, match=r"it refers to posix\.system, which is not plain weights; nothing in it"):
        open_torch_file(str(path))
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # pickle would run it
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("os system", "os.system"),
        ("builtins eval", "builtins.eval"),
        ("collections Counter", "collections.Counter"),
        ("collections abc.sys.modules", "collections.abc.sys.modules"),
        ("torch._utils __builtins__", "torch._utils.__builtins__"),
        ("torch hub.load", "torch.hub.load"),
        ("torch Tensor", "torch.Tensor"),
        ("torch._utils _rebuild_qtensor", "torch._utils._rebuild_qtensor"),
        ("torch.cuda FloatStorage", "torch.cuda.FloatStorage"),
        ("torch.serialization _get_layout", "torch.serialization._get_layout"),
        ("\x1b[2J\x07 é", r"\x1b[2J\x07.é"),
        ("a" * 9000 + " b", "a" * 200 + ".b"),
    ],
)
def test_any_other_global_is_refused(tmp_path: Path, name: str, shown: str) -> None:
    import re

    refused(
        tmp_path, pickled_as({"x": Call(Ref(name), ("true",))}), f"it refers to {re.escape(shown)}, which is not plain"
    )
    module, name = name.rsplit(" ", 1)
    stacked = Call(Code(text(module) + text(name) + b"\x93"), ("true",))
    refused(tmp_path, pickled_as({"x": stacked}), f"it refers to {re.escape(shown)}, which is not plain")


def deep(one: bytes, count: int, start: bytes = b")") -> Code:
    return Code(start + one * count)


TRICKS: dict[str, tuple[Any, str]] = {
    "reduce of text": (Call("os.system", ("true",)), "REDUCE of a str and a tuple"),
    "reduce of a tensor": (Call(tensor(), ()), "REDUCE of a tensor and a tuple"),
    "reduce with a list": (Call(V2, [1]), "REDUCE of torch._utils._rebuild_tensor_v2 and a list"),
    "reduce of a storage class": (Call(FLOAT, (4,)), "it calls torch.FloatStorage with 1 arguments"),
    "reduce of a dtype": (Call(Ref("torch float16"), ()), "it calls torch.float16"),
    "size of a number": (Call(Ref("torch Size"), (1 << 40,)), "it calls torch.Size with 1 arguments"),
    "dict with two arguments": (Call(Ref("collections OrderedDict"), ([], [])), "with 2 arguments"),
    "dict of a number": (Call(Ref("collections OrderedDict"), (3,)), "an OrderedDict of an int"),
    "dict of no pairs": (Call(Ref("collections OrderedDict"), ([[1]],)), "an OrderedDict of a list"),
    "dict that writes itself": (Code(b"}q\x00Xzzzz"), "a string of"),
    "build of a tensor": (Code(assembled(tensor()) + b"}b"), "it gives a tensor a state that is a dict"),
    "build of a global": (Code(assembled(V2) + assembled({"__code__": 1}) + b"b"), "a state that is a dict"),
    "build of a dict with a global": (Code(assembled(HOOKS) + assembled(V2) + b"b"), "it gives a dict a state"),
    "newobj": (Code(assembled(V2) + b")\x81"), "the instruction NEWOBJ,"),
    "newobj_ex": (Code(assembled(V2) + b")}\x92"), "the instruction NEWOBJ_EX,"),
    "inst": (Code(b"(ios\nsystem\n"), "the instruction INST,"),
    "obj": (Code(b"(" + assembled(V2) + b"o"), "the instruction OBJ,"),
    "ext": (Code(b"\x82\x01"), "the instruction EXT1,"),
    "persistent id as text": (Code(b"P0\n"), "the instruction PERSID,"),
    "a string with escapes": (Code(b"S'\\q'\n"), "the instruction STRING,"),
    "a global with escapes": (Code(b"co\\q\nsystem\n"), r"it refers to o\\\\q\.system"),
    "out of band": (Code(b"\x97"), "the instruction NEXT_BUFFER,"),
    "a module": (Persistent(("module", FLOAT, "a.py", "source", 1)), "it has a tuple in place of a storage"),
    "persistent number": (Persistent(5), "it has an int in place of a storage"),
    "persistent bytes": (Persistent((Code(b"C\x01s"), FLOAT, "0", "cpu", 4)), "it has a tuple in place of a storage"),
    "persistent dict": (Persistent({}), "it has a dict in place of a storage"),
    "short persistent": (Persistent(("storage",)), "it has a tuple in place of a storage"),
    "storage of no class": (Persistent(("storage", "torch FloatStorage", "0", "cpu", 4)), "not its class, key"),
    "storage of a function": (Persistent(("storage", V2, "0", "cpu", 4)), "not its class, key"),
    "storage with no key": (Persistent(("storage", FLOAT, 0, "cpu", 4)), "not its class, key"),
    "storage of True": (Persistent(("storage", FLOAT, "0", "cpu", True)), "not its class, key"),
    "storage of minus 1": (Persistent(("storage", FLOAT, "0", "cpu", -1)), "not its class, key"),
    "storage of 2^63": (Persistent(("storage", FLOAT, "0", "cpu", 1 << 63)), "not its class, key"),
    "storage nowhere": (Persistent(("storage", FLOAT, "0", 3, 4)), "not its class, key"),
    "part of a storage": (Persistent(("storage", FLOAT, "0", "cpu", 4, [])), "the part of a storage is not"),
    "part before a storage": (Persistent(("storage", FLOAT, "0", "cpu", 4, ("a", -1, 4))), "the part of a storage is"),
    "part past a storage": (Persistent(("storage", FLOAT, "0", "cpu", 4, ("a", 1, 1 << 62))), "of 4 elements"),
    "two sizes": (Code(assembled(STORED) + assembled(Persistent(("storage", FLOAT, "0", "cpu", 5)))), "and again of 5"),
    "two types": (
        Code(assembled(STORED) + assembled(Persistent(("storage", Ref("torch HalfStorage"), "0", "cpu", 4)))),
        "is of 4 torch.float32, and again of 4 torch.float16",
    ),
    "number of arguments": (Call(V2, (STORED, 0, (4,), (1,), False)), "5 arguments of torch._utils._rebuild_tensor_v2"),
    "v3 without a dtype": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS)), "6 arguments of"),
    "v3 with text": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS, "torch.float32")), "dtype unknown is none of"),
    "v3 with a class": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS, FLOAT)), "dtype unknown is none of"),
    "v3 beyond": (Call(V3, (STORED, 0, (4,), (1,), False, HOOKS, Ref("torch int64"))), "byte 32 .* has 16"),
    "tensor of a tensor": (tensor(tensor()), "tensor 'x': it is not made of a storage"),
    "tensor of None": (tensor(None), "tensor 'x': it is not made of a storage"),
    "gradients of 1": (Call(V2, (STORED, 0, (4,), (1,), 1, HOOKS)), "tensor 'x': it is not made of a storage"),
    "hooks": (Call(V2, (STORED, 0, (4,), (1,), False, {"0": V2})), "tensor 'x': it has hooks, a dict"),
    "hooks of another kind": (Call(V2, (STORED, 0, (4,), (1,), False, [1])), "tensor 'x': it has hooks, a list"),
    "negated": (tensor(more=({"neg": True},)), "tensor 'x': it is conjugated or negated"),
    "metadata of text": (tensor(more=("neg",)), "tensor 'x': it is conjugated or negated"),
    "parameter of text": (Call(PARAMETER, ("x", True, HOOKS)), "tensor 'x': a parameter that is not made of"),
    "parameter of two": (Call(PARAMETER, (tensor(), True)), "tensor 'x': a parameter that is not made of"),
    "parameter of a parameter": (
        Call(PARAMETER, (Call(PARAMETER, (tensor(), True, HOOKS)), True, HOOKS)),
        "3 arguments of torch._utils._rebuild_parameter, not those of a tensor",
    ),
    "parameter with hooks": (Call(PARAMETER, (tensor(), True, {"a": 1})), "a parameter that is not made of"),
    "offset of True": (tensor(offset=True), "are not whole numbers"),
    "negative offset": (tensor(offset=-1), "are not whole numbers"),
    "offset of 2^63": (tensor(offset=1 << 63), "are not whole numbers"),
    "offset past the end": (tensor(offset=1), r"shape \[4\], strides \[1\] and offset 1 end at byte 20 .*which has 16"),
    "far offset": (tensor(offset=(1 << 63) - 1), "end at byte .*, which has 16"),
    "shape of True": (tensor(size=(True,)), "are not whole numbers"),
    "shape of halves": (tensor(size=(0.5,)), "are not whole numbers"),
    "shape as a list": (tensor(size=[4]), "are not whole numbers"),
    "negative shape": (tensor(size=(-4,)), "are not whole numbers"),
    "shape of 2^61": (tensor(size=(1 << 61,)), r"shape \[2305843009213693952\] of torch.float32 is over 2\^63 bytes"),
    "shape of huge product": (tensor(size=(1 << 62,) * 60, stride=(0,) * 60), r"over 2\^63 bytes"),
    "shape past the end": (tensor(size=(5,)), "end at byte 20 of storage '0', which has 16"),
    "negative stride": (tensor(stride=(-1,)), "are not whole numbers"),
    "huge stride": (tensor(size=(2,), stride=((1 << 63) - 1,)), "end at byte 36893488147419103232"),
    "more strides": (tensor(stride=(1, 1)), "are not whole numbers"),
    "65 dimensions": (tensor(size=(1,) * 65, stride=(1,) * 65), "65 dimensions, but at most 64"),
    "a number of many bits": (Code(b"\x8a\xff" + b"\x7f" * 255), "a number of 2039 bits"),
    "a number of claimed gigabytes": (Code(b"\x8b\xff\xff\xff\x7f"), "a string of 2147483647 bytes"),
    "text of claimed gigabytes": (Code(b"X\xff\xff\xff\xff"), "a string of 4294967295 bytes"),
    "text of claimed exabytes": (Code(b"\x8d" + b"\xff" * 7 + b"\x0f"), "a string of"),
    "text of more than exabytes": (Code(b"\x8d" + b"\xff" * 8), "cannot be read at byte"),
    "bytes of claimed gigabytes": (Code(b"B\xff\xff\xff\xff"), "a string of 4294967295 bytes"),
    "bytes of claimed exabytes": (Code(b"\x8e" + b"\xff" * 7 + b"\x0f"), "a string of"),
    "a bytearray": (Code(b"\x96" + b"\xff" * 7 + b"\x0f"), "the instruction BYTEARRAY8,"),
    "negative text": (Code(b"T\xff\xff\xff\xff"), "cannot be read at byte"),
    "a frame of exabytes": (Code(b"\x95" + b"\xff" * 8 + b"X"), "cannot be read at byte|a string of"),
    "a far memo": (Code(b"}r\xff\xff\xff\xffj\xfe\xff\xff\xff"), "it reads value 4294967294 of its memo"),
    "a memo of nothing": (Code(b"(q\x00"), "cannot be read at byte"),
    "text that is not UTF-8": (Code(b"X\x02\x00\x00\x00\xff\xfe"), "cannot be read at byte"),
    "a global that is not UTF-8": (Code(b"c\xff\nb\n"), "cannot be read at byte"),
    "a global without an end": (Code(b"c" + b"a" * 100_000), "a name that does not end|cannot be read"),
    "no such instruction": (Code(b"\xff"), "no such instruction"),
    "nothing marked": (Code(b"tttt"), "cannot be read at byte"),
    "nothing there": (Code(b"\x87"), "a tuple of more values than there are"),
    "append to a dict": (Code(b"}Na"), "APPEND to what is not a list"),
    "items of a list": (Code(b"]NNs"), "SETITEM of what is not a dict"),
    "half an item": (Code(b"}(Nu"), "SETITEM of what is not a dict, or of half an item"),
    "stack global of numbers": (Code(b"K\x01K\x02\x93"), "STACK_GLOBAL of what is not a name"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks(tmp_path: Path, trick: str) -> None:
    value, match = TRICKS[trick]
    refused(tmp_path, pickled_as({"x": value}), match)


def test_deep_and_wide_values(tmp_path: Path) -> None:
    """A tuple in a tuple, 30000 deep; the same as a key, whose hash would overflow the stack; and 2^30000 elements."""
    for one in (b"\x85", b"]\x85", b"}\x86", b"h\x00\x86", b"\x94h\x00\x86"):
        value = Code(b")q\x00" + (b")" if b"\x86" in one else b"") + one * 30_000)
        refused(tmp_path, pickled_as({"x": value}), "entry 'x' is a tuple|cannot be read", most=0)
    double = Code(b")" + b"q\x01h\x01\x86" * 10_000)
    refused(tmp_path, pickled_as({"x": double}), "entry 'x' is a tuple", most=0)
    refused(tmp_path, b"\x80\x02}" + double.code + b"Ns.", "a key that is not a string", most=0)
    nested = Code(assembled(PARAMETER) * 10_000 + b")" + b"R\x85" * 10_000)
    refused(tmp_path, pickled_as({"x": nested}), "entry 'x' is a tuple", most=0)
    refused(tmp_path, b"\x80\x02]q\x00h\x00a.", "it holds a list")
    refused(tmp_path, b"\x80\x02}q\x00" + text("x") + b"h\x00s.", "entry 'x' is a dict")
    refused(tmp_path, b"\x80\x02.", "cannot be read at byte")
    refused(tmp_path, b"\x80\x02" + b"(" * 10_000 + b".", "cannot be read at byte")


def test_a_million_small_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickler, "MAX_STEPS", 10_000)
    refused(tmp_path, b"\x80\x02" + b"}" * 1_000_000 + b".", "a pickle of over 10000 instructions; not plain weights")
    pairs = b"](" + b"]K\x01aK\x02a" * 1000 + b"e\x85q\x00"
    shared = b"\x80\x02" + assembled(Ref("collections OrderedDict")) + b"q\x01" + pairs + b"h\x01h\x00R" * 1000 + b"."
    refused(tmp_path, shared, "a pickle of over 10000 instructions")


def test_a_pickle_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    save({"x": torch.ones(2)}, path, zipped=False)
    head = path.read_bytes()[:137]
    for code in (b"X\xff\xff\xff\xff", b"N" * 9, b"c", b"\x8b\xff\xff\xff\x7f"):
        path.write_bytes(head + b"\x80\x02" + code)
        os.truncate(path, 3 << 30)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=r"its pickle|plain weights"):
                open_torch_file(str(path))
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
