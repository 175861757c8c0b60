"""Tests of the output's layout: rows of a tensor, shards of a size, names, the index, and another dtype."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import ALPHA, COPY, EXTRAPOLATE, Shapes, check_cut, checkpoint, make_plan

from expo.checkpoints.checkpoint import Checkpoint
from expo.checkpoints.files import SINGLE
from expo.checkpoints.safetensors_header import ALIGNMENT, element_count, parse
from expo.dtypes import BITS
from expo.errors import UsageError
from expo.options import MergeOptions
from expo.planning.plan import Plan
from expo.planning.shards import OutputShard, cut, output_name
from expo.planning.steps import Action, Step, by_tensor, join_shapes, some_rows

LIMITS = st.integers(1, 40_000)


def make(sft: Shapes, aligned: Shapes | Checkpoint, alphas: Sequence[float] = (ALPHA,), **options: Any) -> Plan:
    second = aligned if isinstance(aligned, Checkpoint) else checkpoint(aligned)
    return make_plan(checkpoint(sft, "/models/sft"), second, alphas, **options)


def check_headers(plan: Plan, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Assert that the headers are valid, list each of these tensors once, and give every step its place."""
    listed = {}
    for shard in plan.shards:
        header = parse(shard.name, shard.header[8:], shard.size)
        assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
        assert len(shard.header) % ALIGNMENT == 0
        parts = itertools.groupby(shard.steps, key=lambda part: part[0].name)
        for tensor, (name, group) in zip(header.tensors, parts, strict=True):
            assert tensor.name == name
            at, rows = tensor.start, 0
            for step, placed in group:
                assert (placed.name, placed.dtype, placed.shape) == (name, step.dtype, step.shape)
                assert (placed.start, placed.stop) == (at, at + step.nbytes)
                if step.rows is not None:
                    assert step.rows == (rows, rows + step.shape[0])
                    rows = step.rows[1]
                at = placed.stop
            assert at == tensor.stop
            assert name not in listed
            listed[name] = (tensor.dtype, tensor.shape)
    assert listed == dict(shapes)
    assert [tensor.name for tensor, _ in by_tensor(plan.steps)] == list(shapes)
    for tensor, steps in by_tensor(plan.steps):
        assert (tensor.dtype, tensor.shape) == shapes[tensor.name]
        assert (tensor.start, tensor.stop) == (0, sum(step.nbytes for step in steps))
        assert tensor.nbytes == element_count(tensor.shape) * BITS[tensor.dtype] // 8
    assert plan.output_bytes == sum(shard.size for shard in plan.shards) * len(plan.alphas)


def labels(plan: Plan) -> list[tuple[str, str]]:
    return [(step.label, step.reason) for step in plan.steps]


# Rows.


@pytest.mark.parametrize("tail", [(), (4,), (4, 3)], ids=str)
@pytest.mark.parametrize(("sft", "aligned"), [("BF16", "BF16"), ("F32", "BF16"), ("BF16", "F32"), ("F16", "F64")])
def test_more_rows_in_aligned_are_kept(tail: tuple[int, ...], sft: str, aligned: str) -> None:
    shapes: Shapes = {"w": (aligned, (12, *tail)), "v": ("BF16", (3,))}
    plan = make({"w": (sft, (10, *tail)), "v": ("BF16", (3,))}, shapes, on_mismatch="rows")
    plan.check()
    check_headers(plan, shapes)
    reason = f"sft has {sft} {[10, *tail]}"
    assert labels(plan) == [("w[0:10]", reason), ("w[10:12]", reason), ("v", "")]
    first, rest, _ = plan.steps
    assert (first.action, rest.action) == (EXTRAPOLATE, COPY)
    assert first.sft is not None
    assert (first.sft.shape, first.aligned.shape, rest.aligned.shape) == ((10, *tail), (10, *tail), (2, *tail))
    row = element_count(tail) * BITS[aligned] // 8
    assert (first.aligned.start, first.aligned.stop) == (101, 101 + 10 * row)
    assert (rest.aligned.start, rest.aligned.stop) == (101 + 10 * row, 101 + 12 * row)
    assert first.sft.nbytes == 10 * element_count(tail) * BITS[sft] // 8
    assert plan.input_bytes == 12 * row + first.sft.nbytes + 2 * 3 * 2
    assert plan.extrapolated() == 2, "tensors are counted, not steps"
    assert plan.copied() == (("w[10:12]", reason),)
    assert plan.noted == (("w[0:10]", reason),)


@pytest.mark.parametrize("tail", [(), (4,)], ids=str)
def test_more_rows_in_sft_are_not_read(tail: tuple[int, ...]) -> None:
    shapes: Shapes = {"w": ("BF16", (10, *tail))}
    plan = make({"w": ("F32", (12, *tail))}, shapes, on_mismatch="rows")
    plan.check()
    check_headers(plan, shapes)
    (step,) = plan.steps
    assert step.rows is None
    assert (step.label, step.reason, step.action) == ("w", f"sft has F32 {[12, *tail]}", EXTRAPOLATE)
    assert step.sft is not None
    assert (step.sft.shape, step.sft.start, step.sft.nbytes) == ((10, *tail), 101, 40 * element_count(tail))
    assert plan.copied() == ()
    assert plan.dropped == {}


def test_tensors_with_equal_rows_are_the_same_without_the_option() -> None:
    shapes: Shapes = {"w": ("BF16", (10, 4)), "s": ("F32", ()), "i": ("I64", (3,)), "e": ("BF16", (0, 4))}
    assert make(shapes, shapes, on_mismatch="rows") == make(shapes, shapes)


@pytest.mark.parametrize(
    ("sft", "aligned"),
    [
        pytest.param(("BF16", (10, 4)), ("BF16", (10, 5)), id="other columns"),
        pytest.param(("BF16", (10, 4)), ("BF16", (12, 5)), id="other rows and columns"),
        pytest.param(("BF16", (10, 4)), ("BF16", (40,)), id="another rank"),
        pytest.param(("BF16", (10,)), ("BF16", (10, 1)), id="a column"),
        pytest.param(("BF16", ()), ("BF16", (1,)), id="a scalar in sft"),
        pytest.param(("BF16", (1,)), ("BF16", ()), id="a scalar in aligned"),
        pytest.param(("BF16", (0, 4)), ("BF16", (3, 4)), id="no rows in sft"),
        pytest.param(("BF16", (3, 4)), ("BF16", (0, 4)), id="no rows in aligned"),
        pytest.param(("I64", (10, 4)), ("I64", (12, 4)), id="integers"),
        pytest.param(("I64", (10, 4)), ("BF16", (12, 4)), id="integers in sft"),
        pytest.param(("BF16", (10, 4)), ("I64", (12, 4)), id="integers in aligned"),
        pytest.param(("I64", (10, 4)), ("BF16", (10, 4)), id="another kind of dtype alone"),
        pytest.param(("BF16", (3, 10, 4)), ("BF16", (3, 12, 4)), id="the second dimension"),
    ],
)
def test_rows_do_not_solve_every_mismatch(sft: Any, aligned: Any) -> None:
    rest: Shapes = {"rest": ("BF16", (100, 4))}
    plan = make({**rest, "w": sft}, {**rest, "w": aligned}, on_mismatch="rows")
    (problem,) = plan.problems
    if 0 in (*sft[1], *aligned[1]):
        assert "empty" in problem
        assert "on_mismatch" not in problem, "no option is offered for an empty tensor, which is no part of a model"
        assert make({**rest, "w": sft}, {**rest, "w": aligned}, on_mismatch="aligned").problems
        return
    assert f"w: sft {sft[0]} {list(sft[1])}, aligned {aligned[0]} {list(aligned[1])}" in problem
    assert ("`on_mismatch='aligned'`" in problem) is (sft[0] == aligned[0]), (
        "no option is offered for integers in a weight's place"
    )
    assert "rows extrapolates" not in problem, "an option that is given already is not offered"
    check_headers(plan, {**rest, "w": aligned})
    make({**rest, "w": sft}, {**rest, "w": aligned}, on_mismatch="aligned").check()


def test_no_option_is_offered_where_most_of_the_model_differs_in_shape() -> None:
    (problem,) = make(
        {"w": ("BF16", (10, 4)), "s": ("BF16", (4,))}, {"w": ("BF16", (10, 5)), "s": ("BF16", (4,))}
    ).problems
    assert "models of different sizes" in problem
    assert "on_mismatch" not in problem


def test_only_mismatches_that_rows_do_not_solve_are_listed() -> None:
    sft: Shapes = {"a": ("BF16", (4, 2)), "b": ("BF16", (4, 2))}
    (problem,) = make(sft, {"a": ("BF16", (5, 2)), "b": ("BF16", (4, 3))}, on_mismatch="rows").problems
    assert problem.startswith("1 tensor whose")
    assert "b: " in problem


def test_rows_with_several_alphas_and_rules() -> None:
    shapes: Shapes = {"a": ("BF16", (5, 2)), "b": ("BF16", (5, 2)), "c": ("F32", (5, 2))}
    small: Shapes = {name: (dtype, (4, 2)) for name, (dtype, _) in shapes.items()}
    plan = make(small, shapes, (0.1, 0, -1), alpha_for={"b": 0.5, "c": 0}, on_mismatch="rows")
    plan.check()
    check_headers(plan, shapes)
    assert [(step.label, step.alphas) for step in plan.steps] == [
        ("a[0:4]", (0.1, 0.0, -1)), ("a[4:5]", (0.0,) * 3), ("b[0:4]", (0.5,) * 3), ("b[4:5]", (0.0,) * 3),
        ("c[0:4]", (0.0,) * 3), ("c[4:5]", (0.0,) * 3),
    ]  # fmt: skip
    assert [step.sft is None for step in plan.steps] == [False, True, False, True, True, True]
    assert (plan.extrapolated(), plan.extrapolated(0), plan.extrapolated(1)) == (2, 2, 1)
    assert plan.copied(1)[0] == ("a[0:4]", "alpha is 0")
    assert dict(plan.copied())["c[0:4]"] == "alpha is 0"
    assert dict(plan.copied())["c[4:5]"] == "sft has F32 [4, 2]"


def test_rows_of_one_tensor_stay_together_in_its_shard() -> None:
    shapes: Shapes = {"x": ("F32", (3,)), "embed": ("BF16", (7, 3)), "y": ("BF16", (2,)), "head": ("F16", (7, 3))}
    sft: Shapes = {**shapes, "embed": ("F32", (5, 3)), "head": ("F16", (6, 3))}
    for dtype in (None, "fp32"):
        aligned = checkpoint(shapes, shards=[["embed", "x"], ["head", "y"]])
        plan = make(sft, aligned, on_mismatch="rows", dtype=dtype)
        plan.check()
        check_headers(plan, {name: (aligned.tensors[name].dtype if dtype is None else "F32", shape)
                             for name in aligned.tensors for _, shape in [shapes[name]]})  # fmt: skip
        assert plan.index is not None
        assert json.loads(plan.index)["weight_map"] == aligned.weight_map
        assert json.loads(plan.index)["metadata"]["total_size"] == sum(step.nbytes for step in plan.steps)


def test_some_rows() -> None:
    tensor = checkpoint({"w": ("F32", (6, 5, 2))}).tensors["w"]
    parts = [some_rows(tensor, start, stop) for start, stop in ((0, 1), (1, 4), (4, 4), (4, 6))]
    assert [part.shape for part in parts] == [(1, 5, 2), (3, 5, 2), (0, 5, 2), (2, 5, 2)]
    steps = [Step("w", Action.COPY, "", part, None, "F32") for part in parts]
    assert join_shapes(steps) == tensor.shape
    assert join_shapes([steps[0]._replace(whole=(6, 5, 2)), steps[1]]) == tensor.shape
    assert (parts[0].start, parts[-1].stop) == (tensor.start, tensor.stop)
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    assert all(part.nbytes == element_count(part.shape) * 4 for part in parts)
    empty = checkpoint({"w": ("F32", (0, 5))}).tensors["w"]
    assert some_rows(empty, 0, 0) == empty


@st.composite
def resized(draw: st.DrawFn) -> tuple[Shapes, Checkpoint]:
    """Return a pair whose tensors differ in the number of rows, in any number of shards."""
    dtypes = st.sampled_from(["BF16", "F16", "F32", "F64"])
    sft: dict[str, tuple[str, tuple[int, ...]]] = {}
    aligned: dict[str, tuple[str, tuple[int, ...]]] = {}
    rows = st.integers(1, 3000) | st.sampled_from([2, 1024, 4096])
    for i in range(draw(st.integers(1, 8))):
        tail = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
        sft[f"t{i}"], aligned[f"t{i}"] = ((draw(dtypes), (draw(rows), *tail)) for _ in range(2))
    names = list(aligned)
    n = draw(st.integers(1, len(names)))
    return sft, checkpoint(aligned, shards=[names[k::n] for k in range(n)])


@given(resized(), st.integers(1, 4), LIMITS | st.none(), st.sampled_from([None, "bf16", "fp32"]))
@settings(deadline=None, max_examples=60)
def test_chunks_tile_split_tensors(
    inputs: tuple[Shapes, Checkpoint], blocks: int, most: int | None, dtype: str | None
) -> None:
    sft, aligned = inputs
    plan = make(sft, aligned, on_mismatch="rows", max_shard_size=most, dtype=dtype)
    plan.check()
    kind = {None: None, "bf16": "BF16", "fp32": "F32"}[dtype]
    check_headers(plan, {name: (kind or tensor.dtype, tensor.shape) for name, tensor in aligned.tensors.items()})
    check_split(plan, blocks * ALIGNMENT)


def check_split(plan: Plan, size: int) -> None:
    """Assert that each byte of each step is in one piece, at its place, and that no element is in two pieces."""
    reached: dict[str, int] = {}
    for chunk in cut(plan.shards, size):
        assert chunk.stop - chunk.start <= size
        end = max(len(chunk.shard.header) - chunk.start, 0)
        places = {step.label: placed for step, placed in chunk.shard.steps}
        for step, start, stop, at in chunk.pieces:
            assert start == reached.get(step.label, 0) < stop
            assert chunk.start + at == places[step.label].start + start
            assert at == end
            assert start * 8 % BITS[step.dtype] == stop * 8 % BITS[step.dtype] == 0
            reached[step.label], end = stop, at + stop - start
        assert end == chunk.stop - chunk.start or chunk.stop <= len(chunk.shard.header)
    assert reached == {step.label: step.nbytes for step in plan.steps if step.nbytes}


# --max-shard-size: sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), (12345, 12345),
        ("12345", 12345), ("1", 1), (1, 1), ("0.5KiB", 512), ("10KB", 10_000), ("3TB", 3 * 10**12), ("1TiB", 1 << 40),
        ("5gb", 5 * 10**9), ("5 GB", 5 * 10**9), (" 5GB\n", 5 * 10**9), ("7B", 7), ("5G", 5 * 10**9), ("2Gi", 2 << 30),
        ("1.9", 1), (1024.0, 1024), (2**40, 2**40), ("0.1GB", 10**8), (None, None),
    ],
)  # fmt: skip
def test_sizes(text: Any, size: int | None) -> None:
    assert MergeOptions(max_shard_size=text).shard_bytes == size


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "x", "-1", "0", 0, -5, "0GB", "0.5", "0.0001KB", "5 parsecs", "5XB", "GB", "5GBB", "5 5GB", "5..5GB",
        "1e9", "5,5GB", "+5GB", "inf", "nan", float("inf"), float("nan"), True, False, [], b"5GB", "9" * 400,
        "9" * 5000, "5GB;", "\N{ARABIC-INDIC DIGIT FIVE}GB", ".5GB", "5.GB", "5iB",
    ],
    ids=lambda text: repr(text)[:12],
)  # fmt: skip
def test_a_text_that_is_no_size(text: Any) -> None:
    with pytest.raises(UsageError, match="`max_shard_size` takes bytes, or a size such as 5GB") as caught:
        MergeOptions(max_shard_size=text)
    assert repr(text) in str(caught.value)
    with pytest.raises(UsageError):
        make({"w": ("BF16", (1,))}, {"w": ("BF16", (1,))}, max_shard_size=text)


# --max-shard-size: files.


def payload(shard: OutputShard) -> int:
    return shard.size - len(shard.header)


def grouped(plan: Plan) -> dict[str, list[str]]:
    """Return the sorted names of the tensors in each file, because their order in a file is the header's."""
    return {shard.name: sorted(step.name for step, _ in shard.steps) for shard in plan.shards}


SIZES: Shapes = {f"t{i}": ("F32", (n,)) for i, n in enumerate((10, 20, 30, 100, 5, 0, 15, 0))}


@pytest.mark.parametrize(
    ("most", "groups"),
    [
        (1, ["t0", "t1", "t2", "t3", "t4 t5", "t6 t7"]),
        (79, ["t0", "t1", "t2", "t3", "t4 t5", "t6 t7"]),
        (80, ["t0", "t1", "t2", "t3", "t4 t5 t6 t7"]),
        (119, ["t0", "t1", "t2", "t3", "t4 t5 t6 t7"]),
        (120, ["t0 t1", "t2", "t3", "t4 t5 t6 t7"]),
        (240, ["t0 t1 t2", "t3", "t4 t5 t6 t7"]),
        (719, ["t0 t1 t2 t3 t4 t5", "t6 t7"]),
        (720, ["t0 t1 t2 t3 t4 t5 t6 t7"]),
        ("5GB", ["t0 t1 t2 t3 t4 t5 t6 t7"]),
    ],
)
def test_files_are_filled_in_order_up_to_the_limit(most: Any, groups: list[str]) -> None:
    plan = make(SIZES, SIZES, max_shard_size=most)
    plan.check()
    files = grouped(plan)
    assert [" ".join(names) for names in files.values()] == groups
    if len(groups) == 1:
        assert list(files) == [SINGLE]
        assert plan.index is None
    else:
        n = len(groups)
        assert list(files) == [f"model-{k + 1:05}-of-{n:05}.safetensors" for k in range(n)]
        assert plan.index is not None
        index = json.loads(plan.index)
        assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
        assert list(index["weight_map"]) == sorted(SIZES)
        assert index["metadata"] == {"total_size": 720}


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20), LIMITS)
@settings(deadline=None, max_examples=100)
def test_no_file_is_larger_than_the_limit_unless_one_tensor_is(lengths: list[int], most: int) -> None:
    shapes: Shapes = {f"t{i:02}": ("BF16", (n,)) for i, n in enumerate(lengths)}
    plan = make(shapes, shapes, max_shard_size=most)
    check_headers(plan, shapes)
    order = []
    for shard in plan.shards:
        large = [step for step, _ in shard.steps if step.nbytes > most]
        assert payload(shard) <= most or (len(large) == 1 and payload(shard) == large[0].nbytes)
        order += sorted(step.name for step, _ in shard.steps)
    assert order == list(shapes)
    for one, other in itertools.pairwise(plan.shards):
        following = min(other.steps, key=lambda part: part[0].name)[0]
        assert payload(one) + following.nbytes > most, "the next tensor does not fit into the file"
    check_cut(plan, list(cut(plan.shards, ALIGNMENT)), ALIGNMENT)


@pytest.mark.parametrize("shards", [None, [["a"], ["b"], ["c"]]], ids=["one file", "three"])
def test_new_shards_take_the_metadata_of_the_index_and_not_of_the_files(shards: list[list[str]] | None) -> None:
    shapes: Shapes = dict.fromkeys("abc", ("F32", (10,)))
    index = {"metadata": {"total_size": 1, "total_parameters": 30}, "weight_map": {}} if shards else None
    aligned = checkpoint(shapes, shards=shards, metadata={"made": "by"}, index=index)
    plan = make(shapes, aligned, max_shard_size=80)
    assert list(grouped(plan).values()) == [["a", "b"], ["c"]]
    assert plan.index is not None
    metadata = json.loads(plan.index)["metadata"]
    assert metadata == ({"total_size": 120, "total_parameters": 30} if shards else {"total_size": 120})
    for shard in plan.shards:
        assert parse(shard.name, shard.header[8:], shard.size).metadata == {"format": "pt"}
    whole = make(shapes, aligned, max_shard_size="1GB")
    assert (list(grouped(whole)), whole.index) == ([SINGLE], None)


def test_a_shard_is_measured_in_the_outputs_dtype() -> None:
    shapes: Shapes = dict.fromkeys("abcd", ("F32", (10,)))
    assert len(make(shapes, shapes, max_shard_size=80).shards) == 2
    assert len(make(shapes, shapes, max_shard_size=80, dtype="bf16").shards) == 1


def test_rows_of_one_tensor_are_in_one_file() -> None:
    shapes: Shapes = {"a": ("F32", (10, 2)), "b": ("F32", (10, 2))}
    sft: Shapes = {"a": ("F32", (4, 2)), "b": ("F32", (12, 2))}
    plan = make(sft, shapes, on_mismatch="rows", max_shard_size=40)
    plan.check()
    check_headers(plan, shapes)
    assert [set(names) for names in grouped(plan).values()] == [{"a"}, {"b"}]


def test_a_bare_file_is_not_divided_into_shards() -> None:
    bare = dataclasses.replace(checkpoint(SIZES, "/models/aligned.safetensors"), folder=None)
    make(SIZES, bare).check()
    with pytest.raises(
        UsageError, match=r"`max_shard_size='5GB'` makes shards, but aligned /models/aligned\.safetensors"
    ):
        make(SIZES, bare, max_shard_size="5GB")


# Names.


@pytest.mark.parametrize(
    ("shard", "output"),
    [
        ("model.safetensors", "model.safetensors"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("pytorch_model.safetensors", "pytorch_model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"), ("foo.bin", "foo.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"), ("model.pt", "model.safetensors"),
        ("foo.bin.safetensors", "foo.bin.safetensors"), ("no-suffix", "no-suffix"),
    ],
)  # fmt: skip
def test_output_names(shard: str, output: str) -> None:
    assert output_name(shard) == output


def renamed(aligned: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return the checkpoint with other names of its shards."""
    known = dict(zip(aligned.shards, names, strict=True))
    return dataclasses.replace(
        aligned,
        shards={known[name]: shard for name, shard in aligned.shards.items()},
        weight_map={tensor: known[name] for tensor, name in aligned.weight_map.items()},
    )


def test_shards_of_bin_files() -> None:
    shapes: Shapes = dict.fromkeys("abc", ("F32", (10,)))
    bins = [f"pytorch_model-{k + 1:05}-of-00002.bin" for k in range(2)]
    plan = make(shapes, renamed(checkpoint(shapes, shards=[["a", "c"], ["b"]]), bins))
    plan.check()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert grouped(plan) == {one: ["a", "c"], two: ["b"]}
    assert plan.index is not None
    assert json.loads(plan.index)["weight_map"] == {"a": one, "b": two, "c": one}
    single = make(shapes, renamed(checkpoint(shapes), ["pytorch_model.bin"]))
    assert (list(grouped(single)), single.index) == ([SINGLE], None)


@pytest.mark.parametrize(
    "names", [("pytorch_model-1.bin", "model-1.safetensors"), ("foo.bin", "foo.pt"), ("foo.pth", "foo.safetensors")]
)
def test_shards_whose_outputs_would_have_one_name_become_one_file(names: tuple[str, str]) -> None:
    shapes: Shapes = dict.fromkeys("abc", ("F32", (10,)))
    plan = make(shapes, renamed(checkpoint(shapes, shards=[["a", "c"], ["b"]]), names))
    plan.check()
    check_headers(plan, {name: shapes[name] for name in ("a", "c", "b")})
    assert len(plan.shards) == 1
    assert plan.index is not None
    assert json.loads(plan.index)["weight_map"] == dict.fromkeys("abc", plan.shards[0].name)


# --dtype.

MIXED: Shapes = {
    "half": ("BF16", (8,)), "single": ("F32", (8,)), "double": ("F64", (8,)), "ids": ("I64", (8,)),
    "mask": ("BOOL", (8,)), "layers.0.rotary_emb.inv_freq": ("F32", (8,)),
    "h.0.attn.bias": ("F32", (1, 1, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_floats_take_the_dtype_and_integers_and_buffers_keep_theirs(dtype: str, name: str) -> None:
    plan = make(MIXED, MIXED, (0.1, 0.2), dtype=dtype)
    plan.check()
    expected: Shapes = {**MIXED, **dict.fromkeys(("half", "single", "double"), (name, (8,)))}
    check_headers(plan, expected)
    assert {step.name: step.plain for step in plan.steps} == {
        key: MIXED[key][0] == kind for key, (kind, _) in expected.items()
    }
    data = 3 * 8 * BITS[name] // 8 + 64 + 8 + 32 + 16
    assert plan.output_bytes == 2 * (ALIGNMENT + data)
    assert plan.input_bytes == 2 * (16 + 32 + 64) + 64 + 8 + 32 + 16
    assert {step.aligned.dtype for step in plan.steps} == {dtype for dtype, _ in MIXED.values()}, (
        "the inputs keep their dtypes"
    )


def test_copies_take_the_dtype_too() -> None:
    sft: Shapes = {"rows": ("F32", (4, 2)), "other": ("F32", (3, 3))}
    shapes: Shapes = {"rows": ("F32", (5, 2)), "other": ("F32", (3, 2)), "mine": ("F32", (2,))}
    with_rows = {"on_mismatch": "rows", "on_unpaired": "aligned"}
    plan = make({**sft, "other": shapes["other"]}, shapes, alpha_for={"other": 0}, dtype="bf16", **with_rows)
    plan.check()
    assert {step.dtype for step in plan.steps} == {"BF16"}
    plan = make(sft, shapes, dtype="bf16", on_mismatch="aligned", on_unpaired="aligned")
    plan.check()
    assert {step.dtype for step in plan.steps} == {"BF16"}
    check_headers(plan, {name: ("BF16", shape) for name, (_, shape) in shapes.items()})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"hidden_size": 8}, {"hidden_size": 8, "torch_dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"torch_dtype": "bfloat16"}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        (
            {"dtype": "float16", "text_config": {"dtype": "float32", "x": 1}, "vision_config": {"torch_dtype": None}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1},
             "vision_config": {"torch_dtype": "bfloat16"}},
        ),
        (
            {"thinker_config": {"text_config": {"torch_dtype": "float32"}}, "other": {"dtype": "float32"}},
            {"thinker_config": {"text_config": {"torch_dtype": "bfloat16"}}, "other": {"dtype": "float32"},
             "torch_dtype": "bfloat16"},
        ),
        ({"dtype": "float32", "mamba_ssm_dtype": "float32"}, {"dtype": "bfloat16", "mamba_ssm_dtype": "float32"}),
        ({"text_config": None, "dtype": "float32"}, {"text_config": None, "dtype": "bfloat16"}),
    ],
    ids=str,
)  # fmt: skip
def test_the_config_has_the_new_dtype(config: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(config)
    aligned = checkpoint(MIXED, config=config, files=["config.json", "tokenizer.json"])
    plan = make(MIXED, aligned, dtype="bf16")
    assert json.loads(plan.rewritten["config.json"]) == expected
    assert list(json.loads(plan.rewritten["config.json"])) == list(expected), "in aligned's order"
    assert plan.carried == ("tokenizer.json",), "a rewritten file is not copied too"
    assert json.dumps(aligned.config) == before


@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16", "text_config": {}}], ids=str)
def test_a_config_with_the_new_dtype_is_copied(config: dict[str, Any]) -> None:
    plan = make(MIXED, checkpoint(MIXED, config=config, files=["config.json"]), dtype="bf16")
    assert (plan.rewritten, plan.carried) == ({}, ("config.json",))


def test_no_config_is_made_without_the_option_or_a_config() -> None:
    config = {"dtype": "float64"}
    assert make(MIXED, checkpoint(MIXED, config=config, files=["config.json"])).rewritten == {}
    assert make(MIXED, checkpoint(MIXED), dtype="bf16").rewritten == {}
