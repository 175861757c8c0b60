"""The safetensors header: every rule of the format, the layout of emit(), and agreement with safetensors itself."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from cpu_time import at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from expo.checkpoints.safetensors_header import (
    ALIGNMENT,
    MAX_HEADER,
    Header,
    element_count,
    emit,
    header_length,
    parse,
)
from expo.dtypes import BITS
from expo.errors import CheckpointError

FILE = "folder/model.safetensors"
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def whole_file(header: Any, data: int | bytes = b"") -> bytes:
    """Return a file with a header, given as an object or as JSON, and with data, given as bytes or as their number."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + (data if isinstance(data, bytes) else bytes(data))


def read(file: bytes) -> Header:
    """Parse a header as open_safetensors does: the length from the first bytes, then the JSON."""
    length = header_length(FILE, file[:64], len(file))
    return parse(FILE, file[8 : 8 + length], len(file))


def refusal(file: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(file)
    return str(caught.value)


def library_tensors(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
        for name, found in safetensors.deserialize(file)
    }


def library_accepts(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


# Headers that are accepted.


def test_tensors_come_in_the_order_of_their_data() -> None:
    header = {"z": entry(offsets=(4, 8)), "a": entry(offsets=(8, 12)), "m": entry(offsets=(0, 4))}
    file = whole_file(header, 12)
    tensors = read(file).tensors
    assert [tensor.name for tensor in tensors] == ["m", "z", "a"]
    assert [tensor.start for tensor in tensors] == [len(file) - 12, len(file) - 8, len(file) - 4]
    assert tensors[-1].stop == len(file)
    assert [tensor.nbytes for tensor in tensors] == [4, 4, 4]


def test_metadata_is_kept() -> None:
    header = {"__metadata__": {"format": "pt", "é": "\n"}, "a": entry()}
    assert read(whole_file(header, 4)).metadata == {"format": "pt", "é": "\n"}


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_is_known_here_and_to_the_library(dtype: str) -> None:
    file = whole_file({"a": entry(dtype, (8,), (0, BITS[dtype]))}, BITS[dtype])
    assert read(file).tensors[0].dtype == dtype
    assert library_tensors(file)["a"][:2] == (dtype, (8,))


@pytest.mark.parametrize(
    ("header", "size"),
    [
        pytest.param({"a": entry(shape=(), offsets=(0, 4))}, 4, id="scalar"),
        pytest.param({"a": entry(shape=(0,), offsets=(0, 0))}, 0, id="zero-size"),
        pytest.param({"a": entry(shape=(5, 0, 7), offsets=(0, 0))}, 0, id="zero-size of three dimensions"),
        pytest.param({"z": entry(shape=(0,), offsets=(0, 0)), "a": entry()}, 4, id="zero-size first"),
        pytest.param({"a": entry(), "z": entry(shape=(0,), offsets=(4, 4))}, 4, id="zero-size last"),
        pytest.param(
            {"c": entry(offsets=(4, 8)), "b": entry(shape=(0,), offsets=(4, 4)), "a": entry()},
            8,
            id="zero-size between",
        ),
        pytest.param({"a": entry("F4", (2, 3), (0, 3))}, 3, id="F4 of an even count"),
        pytest.param({"a": entry("F6_E3M2", (4,), (0, 3))}, 3, id="F6 in whole bytes"),
        pytest.param({"": entry()}, 4, id="empty name"),
        pytest.param({"wörld\0\U0001f600": entry()}, 4, id="name with a NUL and beyond the basic plane"),
        pytest.param({}, 0, id="no tensors"),
        pytest.param({"__metadata__": {}, "a": entry()}, 4, id="empty metadata"),
        pytest.param(json.dumps({"a": entry()}).encode() + b" \n\t\r ", 4, id="white space after the object"),
    ],
)
def test_accepted_as_by_the_library(header: Any, size: int) -> None:
    file = whole_file(header, size)
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in read(file).tensors}
    assert found == {name: parts[:2] for name, parts in library_tensors(file).items()}


# Headers that are refused: the message has the file, the tensor and both values.


@pytest.mark.parametrize("size", range(8))
def test_too_short(size: int) -> None:
    message = refusal(bytes(size))
    assert message.startswith(f"{FILE}: {size} bytes")
    assert "at least 8" in message


def test_header_longer_than_file() -> None:
    message = refusal((100).to_bytes(8, "little") + b"{}")
    assert message.startswith(FILE)
    assert "108" in message
    assert "has 10" in message


@pytest.mark.parametrize("kept", [9, 30, 60])
def test_truncated_in_the_header(kept: int) -> None:
    file = whole_file({"a": entry()}, 4)
    message = refusal(file[:kept])
    assert message.startswith(FILE)
    assert str(len(file) - 4) in message
    assert f"has {kept}" in message


def test_truncated_in_the_data() -> None:
    file = whole_file({"a": entry(), "last": entry(offsets=(4, 8))}, 8)
    message = refusal(file[:-1])
    assert message.startswith(FILE)
    assert "'last'" in message
    assert f"byte {len(file)}" in message
    assert f"has {len(file) - 1}" in message
    assert "truncated" in message


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_absurd_length(length: int) -> None:
    message = refusal(length.to_bytes(8, "little") + b"{}")
    assert message.startswith(FILE)
    assert str(length) in message
    assert str(MAX_HEADER) in message


def test_longest_length_allowed_is_judged_by_the_file_size() -> None:
    first = MAX_HEADER.to_bytes(8, "little") + b"{"
    assert header_length(FILE, first, MAX_HEADER + 8) == MAX_HEADER
    with pytest.raises(CheckpointError, match="truncated"):
        header_length(FILE, first, MAX_HEADER + 7)


def test_git_lfs_pointer() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    message = refusal(pointer)
    assert message.startswith(FILE)
    assert "Git LFS pointer" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="unfinished"),
        pytest.param(b"{}\0\0\0", id="padded with NUL"),
        pytest.param(b"{} {}", id="two objects"),
        pytest.param(b"{'a': 1}", id="single quotes"),
        pytest.param(b'{"a": 1,}', id="trailing comma"),
        pytest.param(b'{"a\n": 1}', id="raw control character"),
        pytest.param(b"\x80\x02}q\x00.", id="pickle"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', id="byte order mark"),
        pytest.param(json.dumps({"a": 1}).encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"\xff": 1}', id="not UTF-8"),
        pytest.param(b'{"\xed\xa0\x80": 1}', id="surrogate in UTF-8"),
        pytest.param(b'{"\xc0\x80": 1}', id="overlong UTF-8"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", id="number of 5000 digits"),
        pytest.param(b"[" * 100_000, id="deep nesting of lists"),
        pytest.param(b'{"a":' * 100_000, id="deep nesting of objects"),
    ],
)
def test_not_json(text: bytes) -> None:
    message = refusal(whole_file(text))
    assert message.startswith(f"{FILE}: the header is not JSON")
    assert len(message) < 500


@pytest.mark.parametrize("text", [b"[]", b"null", b"1", b'"a"', b"NaN", b" {}", b"\n{}"])
def test_not_an_object_at_once(text: bytes) -> None:
    message = refusal(whole_file(text))
    assert message.startswith(FILE)
    assert "object that starts with '{'" in message


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        (b'{"a": %b, "b": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 3), "'a'"),
        (b'{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}', "'shape'"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__'"),
        (b'{"__metadata__": {"k": "1", "k": "2"}}', "'k'"),
        (b'{"a": 1, "\\u0061": 2}', "'a'"),
    ],
)
def test_duplicate_keys(text: bytes, twice: str) -> None:
    message = refusal(whole_file(text, 4))
    assert message.startswith(FILE)
    assert f"{twice} occurs twice" in message


def test_duplicate_key_among_many_is_found_in_linear_time() -> None:
    names = [f"tensor.{i}" for i in range(20_000)]
    text = "{" + ",".join(f'"{name}":0' for name in [*names, names[-1]]) + "}"
    with at_most(1):  # not quadratic in the number of tensors
        message = refusal(whole_file(text.encode()))
    assert f"'{names[-1]}' occurs twice" in message


@pytest.mark.parametrize("metadata", [[], "pt", 1, None, {"k": 1}, {"k": None}, {"k": {"x": "y"}}, {"a": "b", "k": []}])
def test_metadata_not_strings(metadata: Any) -> None:
    message = refusal(whole_file({"__metadata__": metadata, "a": entry()}, 4))
    assert message.startswith(FILE)
    assert "__metadata__" in message


@pytest.mark.parametrize("metadata", [{"k": "\ud800"}, {"\udfff": "v"}])
def test_metadata_with_a_lone_surrogate(metadata: dict[str, str]) -> None:
    """Such metadata could not be written again, as UTF-8 has no lone surrogates."""
    message = refusal(whole_file({"__metadata__": metadata, "a": entry()}, 4))
    assert message.startswith(FILE)
    assert "__metadata__" in message


@pytest.mark.parametrize("name", ["\ud800", "layer\udc80", "\udfff\ud800"])
def test_name_with_a_lone_surrogate(name: str) -> None:
    message = refusal(whole_file({name: entry()}, 4))
    assert message.startswith(FILE)
    assert repr(name) in message
    assert "not valid Unicode" in message


@pytest.mark.parametrize(
    "broken",
    [
        None, 1, "F32", [], ["F32", [1], [0, 4]], {}, {"dtype": "F32"}, {"shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [1]}, {**entry(), "strides": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_entry_without_its_three_keys_or_with_others(broken: Any) -> None:
    message = refusal(whole_file({"the.tensor": broken}, 4))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': ")
    assert "dtype, shape and data_offsets" in message


@pytest.mark.parametrize("dtype", ["f32", "F32 ", "FLOAT", "F8", "I4", "", None, 1, True, ["F32"], {}])
def test_unknown_dtype(dtype: Any) -> None:
    message = refusal(whole_file({"the.tensor": entry(dtype)}, 4))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': dtype {dtype!r}")
    assert "BF16" in message


@pytest.mark.parametrize(
    "shape",
    [None, 1, "1", {}, {"0": 1}, [True], [False], [-1], [1, -1], [1.0], ["1"], [None], [[1]], [2**63], [10**30]],
    ids=str,
)
def test_shape_of_anything_but_whole_numbers(shape: Any) -> None:
    message = refusal(whole_file({"the.tensor": entry(shape=shape)}, 4))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': shape {shape!r}")


@pytest.mark.parametrize("number", [b"1e0", b"1.0", b"NaN", b"Infinity", b"-0"])
@pytest.mark.parametrize("field", ["shape", "data_offsets"])
def test_number_not_written_as_a_whole_number(number: bytes, field: str) -> None:
    """The parser is as strict as the library, which reads -0 as a float."""
    good = {"shape": b"[1, 0]", "data_offsets": b"[0, 0]"}
    parts = {**good, field: good[field].replace(b"0", number, 1)}
    text = b'{"a": {"dtype": "F32", "shape": %b, "data_offsets": %b}}' % (parts["shape"], parts["data_offsets"])
    file = whole_file(text)
    assert not library_accepts(file)
    assert refusal(file).startswith(FILE)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F32", [2**62, 2]), ("F32", [2**63 - 1]), ("U8", [2**32, 2**32]), ("BOOL", [2**63 - 1, 2**63 - 1]),
        ("F64", [2**63 - 1] * 1000), ("F4", [2**63 - 1] * 2),
    ],
)  # fmt: skip
def test_overflow(dtype: str, shape: list[int]) -> None:
    message = refusal(whole_file({"the.tensor": entry(dtype, shape)}, 4))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': shape {shape} of {dtype}")


@pytest.mark.parametrize(
    "offsets",
    [None, 4, "0:4", {}, [], [0], [4], [0, 2, 4], [-4, 0], [True, 4], [0.0, 4], [0, "4"], [0, 2**63], [4, 0], [8, 4]],
    ids=str,
)
def test_data_offsets_other_than_begin_and_end(offsets: Any) -> None:
    message = refusal(whole_file({"the.tensor": entry(offsets=offsets)}, 4))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': data_offsets {offsets!r}")


@pytest.mark.parametrize(
    ("dtype", "shape", "end", "needed"),
    [
        ("F32", [1], 3, "4"), ("F32", [2], 4, "8"), ("BF16", [2, 3], 13, "12"), ("F32", [], 0, "4"),
        ("F32", [0], 4, "0"), ("F64", [1, 0, 1], 8, "0"), ("BOOL", [9], 8, "9"),
    ],
)  # fmt: skip
def test_size_other_than_shape_times_dtype(dtype: str, shape: list[int], end: int, needed: str) -> None:
    message = refusal(whole_file({"the.tensor": entry(dtype, shape, (0, end))}, end))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': shape {shape} of {dtype} takes {needed} bytes")
    assert message.endswith(f"span {end}")


@pytest.mark.parametrize(
    ("dtype", "count", "needed"), [("F4", 3, "1.5"), ("F6_E2M3", 2, "1.5"), ("F6_E3M2", 1, "0.75")]
)
@pytest.mark.parametrize("end", [1, 2])
def test_sub_byte_dtype_not_in_whole_bytes(dtype: str, count: int, needed: str, end: int) -> None:
    message = refusal(whole_file({"the.tensor": entry(dtype, [count], (0, end))}, end))
    assert message.startswith(f"{FILE}: tensor 'the.tensor': shape [{count}] of {dtype} takes {needed} bytes")
    assert message.endswith(f"span {end}")


@pytest.mark.parametrize(
    ("entries", "size", "culprit", "before"),
    [
        pytest.param({"a": entry(), "b": entry(offsets=(5, 9))}, 9, ("'b'", 5), ("'a'", 4), id="gap"),
        pytest.param({"b": entry(offsets=(1, 5))}, 5, ("'b'", 1), ("the header", 0), id="gap after the header"),
        pytest.param({"a": entry(), "b": entry(offsets=(3, 7))}, 7, ("'b'", 3), ("'a'", 4), id="overlap"),
        pytest.param({"a": entry(), "b": entry()}, 4, ("'b'", 0), ("'a'", 4), id="the same bytes twice"),
        pytest.param(
            {"a": entry(), "b": entry(shape=[0], offsets=(2, 2))}, 4, ("'b'", 2), ("'a'", 4), id="zero-size inside"
        ),
        pytest.param(
            {"a": entry(), "b": entry(shape=[0], offsets=(6, 6))}, 4, ("'b'", 6), ("'a'", 4), id="zero-size outside"
        ),
    ],
)
def test_gap_or_overlap(entries: Any, size: int, culprit: tuple[str, int], before: tuple[str, int]) -> None:
    file = whole_file(entries, size)
    data = len(file) - size
    message = refusal(file)
    assert message.startswith(f"{FILE}: tensor {culprit[0]} starts at byte {data + culprit[1]}")
    assert before[0] in message
    assert message.endswith(str(data + before[1]))
    assert not library_accepts(file)


@pytest.mark.parametrize(("entries", "last"), [({"a": entry()}, "'a'"), ({}, "the header")])
def test_bytes_after_the_end(entries: Any, last: str) -> None:
    used = 4 * len(entries)
    file = whole_file(entries, used + 3)
    message = refusal(file)
    assert message.startswith(FILE)
    assert last in message
    assert f"byte {len(file) - 3}" in message
    assert f"has {len(file)}" in message
    assert "belong to no tensor" in message


# The library accepts these headers. They are ambiguous, or no program writes them, so the parser refuses them.
STRICTER = {
    "duplicate name": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
    b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "duplicate key in __metadata__": b'{"__metadata__": {"k": "1", "k": "2"}}',
    "__metadata__ null": b'{"__metadata__": null}',
    "a fourth key": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "strides": [1]}}',
    "an entry as a list": b'{"a": ["F32", [0], [0, 0]]}',
    "2^63 beside a 0": b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}',
    "overflow before a 0": b'{"a": {"dtype": "F32", "shape": [9223372036854775807, 0], "data_offsets": [0, 0]}}',
}


@pytest.mark.parametrize("kind", STRICTER)
def test_stricter_than_the_library(kind: str) -> None:
    file = whole_file(STRICTER[kind])
    assert refusal(file).startswith(FILE)
    assert library_accepts(file), "the library refuses it too now, so this is no difference any more"


# emit().


def shapes_of(dtype: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes whose tensors have whole bytes, with scalars and empty tensors among them."""
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    whole = {4: 2, 6: 4}.get(BITS[dtype])
    return shapes if whole is None else shapes.map(lambda shape: (*shape, whole))


NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
TENSORS = st.lists(
    st.tuples(NAMES, st.sampled_from(list(BITS))).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), shapes_of(pair[1]))
    ),
    unique_by=lambda tensor: tensor[0],
    max_size=12,
)
WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
METADATA = st.dictionaries(WORDS, WORDS)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=object)) * BITS[dtype] // 8


def emitted_file(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    head, placed = emit(tensors, metadata)
    return head + bytes(i % 251 for i in range(sum(tensor.nbytes for tensor in placed.values())))


@given(TENSORS, METADATA)
@settings(deadline=None, max_examples=150)
def test_emit_then_parse_is_the_identity(tensors: list[Tensor], metadata: dict[str, str]) -> None:
    _, placed = emit(tensors, metadata)
    header = read(emitted_file(tensors, metadata))
    assert header.metadata == metadata
    assert {tensor.name: tensor for tensor in header.tensors} == placed
    assert sorted((tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors) == sorted(tensors)
    starts = [tensor.start for tensor in placed.values()]
    assert starts == sorted(starts), "the order of the dict is that of the data"


@given(TENSORS, METADATA)
@settings(deadline=None, max_examples=150)
def test_emitted_data_start_on_a_block_and_tensors_on_their_elements(
    tensors: list[Tensor], metadata: dict[str, str]
) -> None:
    head, placed = emit(tensors, metadata)
    assert len(head) % ALIGNMENT == 0
    assert len(head) == 8 + int.from_bytes(head[:8], "little")
    assert min((tensor.start for tensor in placed.values()), default=len(head)) == len(head)
    for tensor in placed.values():
        assert tensor.start % max(BITS[tensor.dtype] // 8, 1) == 0
        assert tensor.nbytes == nbytes(tensor.dtype, tensor.shape)


@given(TENSORS, METADATA)
@settings(deadline=None, max_examples=150)
def test_library_reads_what_is_emitted(tensors: list[Tensor], metadata: dict[str, str]) -> None:
    file = emitted_file(tensors, metadata)
    _, placed = emit(tensors, metadata)
    expected = {t.name: (t.dtype, t.shape, file[t.start : t.stop]) for t in placed.values()}
    assert library_tensors(file) == expected


def test_library_opens_what_is_emitted(tmp_path: Path) -> None:
    tensors: list[Tensor] = [("b", "F16", (2, 3)), ("a", "I64", ()), ("é", "F32", (0, 4)), ("c", "BOOL", (3,))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(emitted_file(tensors, {"format": "pt"}))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(name for name, _, _ in tensors)
        for name, dtype, shape in tensors:
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (dtype, shape)
            assert file.get_tensor(name).shape == shape


@pytest.mark.parametrize("size", range(3900, 4300, 7))
def test_emitted_header_is_padded_by_less_than_a_block(size: int) -> None:
    head, _ = emit([("n" * size, "F32", (1,))], {})
    text = head[8:]
    assert len(head) % ALIGNMENT == 0
    assert 0 <= len(text) - len(text.rstrip(b" ")) < ALIGNMENT


# The names of the dtypes in the library's serializer, which cannot write F6.
SERIALIZER_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip


def library_order(tensors: Sequence[Tensor]) -> list[tuple[str, str]]:
    """Return (name, dtype) in the order of the data in a file that the library writes."""
    spec = getattr(safetensors, "TensorSpec", None)
    if spec is None:
        pytest.skip("this version of safetensors has no TensorSpec")
    memory = np.zeros(4096, np.uint8)
    specs = {
        name: spec(
            dtype=SERIALIZER_NAMES[dtype], shape=list(shape), data_ptr=memory.ctypes.data, data_len=nbytes(dtype, shape)
        )
        for name, dtype, shape in tensors
    }
    file = safetensors.serialize(specs)
    return [(tensor.name, tensor.dtype) for tensor in read(file).tensors]


@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from(list(SERIALIZER_NAMES)), st.lists(st.integers(1, 3), max_size=3).map(tuple)),
        unique_by=lambda tensor: tensor[0],
        min_size=1,
        max_size=20,
    )
)
@settings(deadline=None, max_examples=150)
def test_emitted_order_is_that_of_the_library(tensors: list[Tensor]) -> None:
    _, placed = emit(tensors, {})
    assert [(tensor.name, tensor.dtype) for tensor in placed.values()] == library_order(tensors)


def test_emitted_order_of_all_dtypes_is_that_of_the_library() -> None:
    tensors: list[Tensor] = [(f"{name}.{i}", name, (2,)) for i in (1, 0) for name in SERIALIZER_NAMES]
    _, placed = emit(tensors, {})
    assert [(tensor.name, tensor.dtype) for tensor in placed.values()] == library_order(tensors)


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((0,), 0), ((3,), 3), ((2, 3, 4), 24), ((2**40, 2**40), 2**80)])
def test_element_count(shape: tuple[int, ...], count: int) -> None:
    assert element_count(shape) == count


# All bytes give a CheckpointError or a header, and never a header that the library refuses.

SEED_HEADERS: list[Any] = [
    {"a": entry()},
    {"__metadata__": {"format": "pt"}, "w": entry("BF16", (2, 2), (0, 8)), "b": entry("F32", (), (8, 12))},
    {"z": entry("F4", (2,), (0, 1)), "e": entry("U8", (0,), (1, 1)), "i": entry("I64", (1,), (1, 9))},
]
TOKENS = [
    b"-", b"-0", b"0", b"1", b"e3", b".0", b"18446744073709551616", b"9223372036854775807", b"null", b"true", b"NaN",
    b"[", b"]", b"{", b"}", b"{}", b",", b":", b'"', b"\\", b"\\ud800", b"\\u0000", b'"a":', b'"dtype":', b'"F32"',
    b'"F4"', b'"__metadata__":', b" ", b"\n", b"\0", b"\xff", b"\xed\xa0\x80", b"[0,", b",0]",
]  # fmt: skip
DELIBERATE = (
    "occurs twice", "starts with '{'", "of dtype, shape and data_offsets alone", "__metadata__", "2^63",
)  # fmt: skip


def mutated(file: bytes, chance: random.Random) -> bytes:
    data = bytearray(file)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del data[at : at + chance.choice((1, 1, 2, 10))]
        elif kind == 2:
            data[at:at] = chance.choice(TOKENS)
        elif kind == 3:
            data[at : at + 1] = chance.choice(TOKENS)
        else:
            start = chance.randrange(len(data) + 1)
            data[at:at] = data[start : start + chance.randrange(20)]
    if chance.random() < 0.8 and len(data) >= 8:  # the length of the header is right, so that the JSON is tested
        data[:8] = max(len(data) - 8 - chance.choice((0, 4, 9, 12)), 0).to_bytes(8, "little")
    return bytes(data)


def verdict(file: bytes) -> Header | str:
    """Return the header, or the message of the only error that is allowed."""
    try:
        return read(file)
    except CheckpointError as error:
        return str(error)


def check_verdict(file: bytes) -> None:
    found = verdict(file)
    if isinstance(found, str):
        assert found.startswith(FILE)
        assert not library_accepts(file) or any(words in found for words in DELIBERATE), (found, file)
    else:
        seen = {tensor.name: (tensor.dtype, tensor.shape, file[tensor.start : tensor.stop]) for tensor in found.tensors}
        assert seen == library_tensors(file), file


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(seed: int) -> None:
    chance = random.Random(seed)
    files = [whole_file(header, size) for header, size in zip(SEED_HEADERS, (4, 12, 9), strict=True)]
    for file in files:
        check_verdict(file)
    for _ in range(30_000):
        check_verdict(mutated(chance.choice(files), chance))


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_refused(data: bytes) -> None:
    check_verdict(data)
    check_verdict(len(data).to_bytes(8, "little") + data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.lists(st.integers(0, 6) | st.integers(-2, 2**65), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(list(BITS)) | JSON, "shape": NUMBERS | JSON, "data_offsets": NUMBERS | JSON}
)


@given(st.dictionaries(st.sampled_from(["a", "b", "", "__metadata__"]), ENTRIES | JSON, max_size=4), st.integers(0, 12))
@settings(deadline=None, max_examples=400)
def test_random_json_is_refused_or_read_as_the_library_reads_it(header: dict[str, Any], size: int) -> None:
    check_verdict(whole_file(header, size))


@given(st.lists(st.tuples(st.sampled_from(list(BITS)), st.integers(0, 4), st.integers(0, 9), st.integers(0, 9))))
@settings(deadline=None, max_examples=400)
def test_random_layouts_are_refused_or_read_as_the_library_reads_them(layout: list[tuple[str, int, int, int]]) -> None:
    header = {f"t{i}": entry(dtype, (n,), (begin, end)) for i, (dtype, n, begin, end) in enumerate(layout)}
    check_verdict(whole_file(header, max((end for _, _, _, end in layout), default=0)))
