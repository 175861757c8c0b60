"""expo.stream() must give the same tensors as merge(), one by one, in memory that belongs to the consumer."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import ODD_SHAPES, fingerprint, random_tensors, read_file, write_folder

import expo
import expo.tensors.streaming
from expo.demo import ALIGNED, SFT
from expo.execution.engines import Engine, choose
from expo.tensors.streaming import AHEAD

Pair = tuple[Path, Path]
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    **{dtype: (dtype, (19, 7)) for dtype in ("BF16", "F16", "F32", "F64")},
    **ODD_SHAPES,
}
TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "BOOL": torch.bool, "U8": torch.uint8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def leaves_nothing_open(frozen_heap: None, tmp_path: Path) -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # frees the objects that an exception still refers to
    assert workers() == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    sft = write_folder(tmp_path / "sft", random_tensors(SHAPES, 1), 2)
    aligned = write_folder(tmp_path / "aligned", random_tensors(SHAPES, 2), 3)
    before = fingerprint(sft, aligned)
    yield sft, aligned
    assert fingerprint(sft, aligned) == before


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expo")]


def raw(tensor: Any) -> bytes:
    """Return the bytes of a torch tensor or NumPy array."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes(tensor.tobytes())


def merged(pair: Pair, out: Path, **options: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the tensors that merge() writes, by name."""
    expo.merge(*pair, 0.3, out, **options)
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in read_file(path).items()}


@pytest.mark.parametrize("engine", ["numpy", "cpu"])
@pytest.mark.parametrize("chunk", [64, expo.tensors.streaming.CHUNK])
def test_torch_tensors_are_what_merge_writes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, chunk: int
) -> None:
    monkeypatch.setattr(expo.tensors.streaming, "CHUNK", chunk)
    written = merged(pair, tmp_path / "out")
    found = dict(expo.stream(*pair, 0.3, engine=engine))
    assert found.keys() == written.keys()
    for name, (dtype, shape, data) in written.items():
        assert (found[name].dtype, tuple(found[name].shape)) == (TORCH[dtype], shape)
        assert found[name].device.type == "cpu"
        assert raw(found[name]) == data, name


def test_numpy_arrays_are_what_merge_writes(pair: Pair, tmp_path: Path) -> None:
    import ml_dtypes

    kinds: dict[str, Any] = {
        "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64,
        "BOOL": np.bool_, "U8": np.uint8,
    }  # fmt: skip
    written = merged(pair, tmp_path / "out")
    found = dict(expo.stream(*pair, 0.3, framework="numpy"))
    assert found.keys() == written.keys()
    for name, (dtype, shape, data) in written.items():
        assert isinstance(found[name], np.ndarray)
        assert (found[name].dtype, found[name].shape) == (np.dtype(kinds[dtype]), shape)
        assert raw(found[name]) == data, name


def test_the_order_is_that_of_aligneds_files(pair: Pair) -> None:
    files = sorted(pair[1].glob("*.safetensors"))
    assert [name for name, _ in expo.stream(*pair, 0.3)] == [name for path in files for name in read_file(path)]


def test_rules_and_policies_mean_what_they_mean_for_merge(tmp_path: Path) -> None:
    sft = write_folder(tmp_path / "sft", random_tensors({**SHAPES, "long": ("BF16", (7,)), "gone": ("F32", (3,))}, 1))
    aligned = write_folder(tmp_path / "aligned", random_tensors({**SHAPES, "new": ("F32", (3,))}, 2))
    options = {"alpha_for": {"F": 0.7, "F64": 0.0}, "on_unpaired": "aligned", "on_mismatch": "aligned"}
    with pytest.warns(UserWarning, match="97% of the floating-point bytes are copied from aligned"):
        found = {name: raw(tensor) for name, tensor in expo.stream(sft, aligned, 0.3, **options)}  # type: ignore[arg-type]
    assert found == {name: data for name, (_, _, data) in merged((sft, aligned), tmp_path / "out", **options).items()}


def test_each_tensor_is_the_consumers_own(pair: Pair, tmp_path: Path) -> None:
    written = merged(pair, tmp_path / "out")
    held: dict[str, Any] = {}
    for name, tensor in expo.stream(*pair, 0.3):
        assert raw(tensor) == written[name][2]
        tensor.fill_(1)  # the tensor is writable, and shares no memory with the others
        held[name] = tensor
    assert all(bool((tensor == 1).all()) for tensor in held.values())
    arrays = [array for _, array in expo.stream(*pair, 0.3, framework="numpy")]
    assert all(array.flags.writeable for array in arrays)
    assert not any(np.shares_memory(x, y) for x in arrays for y in arrays if x is not y)


def test_tensors_outlive_the_stream(pair: Pair, tmp_path: Path) -> None:
    stream = expo.stream(*pair, 0.3)
    name, tensor = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert raw(tensor) == merged(pair, tmp_path / "out")[name][2]


def slow_engine(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Make every call of the engine take so many seconds, and return a list that gets an entry for each call."""
    real, calls = choose(), []

    def run(*arguments: Any) -> Any:
        calls.append(time.monotonic())
        time.sleep(seconds)
        return real.run(*arguments)

    monkeypatch.setattr(expo.tensors.streaming, "choose", lambda *_: Engine("slow", run, "a test"))
    return calls


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_stops_the_work(pair: Pair, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(expo.tensors.streaming, "CHUNK", 1024)
    calls = slow_engine(monkeypatch, 0.005)
    stream = expo.stream(*pair, 0.3)
    for _ in range(taken):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert workers() == []
    count = len(calls)
    time.sleep(0.03)
    assert len(calls) == count < 60  # the long tensor alone has 66 chunks


def test_a_stream_that_is_let_go_of_stops_too(pair: Pair) -> None:
    for _ in expo.stream(*pair, 0.3):
        break
    assert workers() == []


def test_an_exception_in_the_consumer_stops_the_work(pair: Pair) -> None:
    def consume() -> None:
        for _ in expo.stream(*pair, 0.3):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        consume()
    assert workers() == []


def test_at_most_a_few_tensors_are_computed_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {f"w{i}": ("BF16", (8,)) for i in range(20)}
    pair = [write_folder(tmp_path / name, random_tensors(shapes, 1)) for name in ("sft", "aligned")]
    calls = slow_engine(monkeypatch, 0)
    for consumed, _ in enumerate(expo.stream(*pair, 0.3), 1):
        time.sleep(0.01)
        assert consumed <= len(calls) <= consumed + AHEAD
    assert AHEAD <= 2  # the docstring promises this number


def test_nothing_is_opened_or_computed_before_the_first_tensor_is_asked_for(pair: Pair) -> None:
    before = len(os.listdir("/proc/self/fd"))
    stream = expo.stream(*pair, 0.3)
    assert workers() == []
    assert len(os.listdir("/proc/self/fd")) == before
    del stream


def test_a_model_takes_the_stream_as_its_state(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(ALIGNED, local_files_only=True)
    state = dict(expo.stream(SFT, ALIGNED, 0.3))
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters(), strict=True))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framework": "jax"}, "framework must be torch or numpy, got 'jax'"),
        ({"alpha": float("nan")}, "alpha must be a number that is finite in float32, got nan"),
        ({"alpha": [0.3, 0.3]}, "alphas must be 1 to 64 different numbers"),
        ({"alpha": "much"}, "alpha must be a number or several, got 'much'"),
        ({"engine": "gpu"}, "`engine` must be one of"),
        ({"device": "tpu"}, "`device` must be"),
        ({"alpha_for": {"(": 1.0}}, "is not a regular expression"),
        ({"on_unpaired": "sft"}, "`on_unpaired` must be one of"),
    ],
)
def test_arguments_that_make_no_sense_are_reported_by_the_call(
    pair: Pair, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(expo.UsageError, match=message):
        expo.stream(*pair, **{"alpha": 0.3, **options})


def test_inputs_that_cannot_be_merged_are_reported_by_the_call(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(expo.CheckpointError, match="no such file or folder"):
        expo.stream(tmp_path / "nowhere", pair[1], 0.3)
    other = write_folder(tmp_path / "other", random_tensors({"x": ("F32", (3,))}, 1))
    with pytest.raises(expo.PlanError, match=r"x \(aligned only\)"):
        expo.stream(pair[0], other, 0.3)


@pytest.mark.parametrize("taken", [0, 2])
def test_an_engines_refusal_reaches_the_consumer(pair: Pair, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    real, calls = choose(), []

    def refuse(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > taken:
            raise RuntimeError("this thread's floating-point mode flushes subnormals")
        return real.run(*arguments)

    monkeypatch.setattr(expo.tensors.streaming, "choose", lambda *_: Engine("numpy", refuse, "a test"))
    with pytest.raises(expo.EngineError, match=r"`engine='numpy'` failed on .*: this thread's floating-point mode"):
        list(expo.stream(*pair, 0.3))


def test_an_input_that_shrinks_before_it_is_read_is_noticed(tmp_path: Path) -> None:
    pair = [write_folder(tmp_path / name, random_tensors(SHAPES, 1)) for name in ("sft", "aligned")]
    stream = expo.stream(*pair, 0.3)
    file = pair[0] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(expo.CheckpointError, match=f"{file}: .* it is being changed"):
        list(stream)


@pytest.mark.parametrize("which", ["sft", "aligned"])
def test_an_input_that_is_written_to_between_two_tensors_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr("expo.checkpoints.reader.LOCAL", set())  # the stream takes no lease on the files
    for name in ("sft", "aligned"):
        write_folder(tmp_path / name, random_tensors(SHAPES, 1))
    stream = expo.stream(tmp_path / "sft", tmp_path / "aligned", 0.3)
    next(stream)
    file = tmp_path / which / "model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(expo.CheckpointError, match=f"{file}: it was changed while it was read"):
        list(stream)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_is_not_mapped_gives_the_same_tensors(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    written = merged(pair, tmp_path / "out")
    if not mapped:
        monkeypatch.setattr("expo.checkpoints.reader.LOCAL", set())
    assert {name: raw(tensor) for name, tensor in expo.stream(*pair, 0.3)} == {n: t[2] for n, t in written.items()}


# --- several alphas, devices, and consumers of an iterator ------------------------------------------------------------


def test_an_alpha_in_text_is_one(pair: Pair) -> None:
    text: Any = "0.3"
    for (name, found), (_, wanted) in zip(expo.stream(*pair, text), expo.stream(*pair, 0.3), strict=True):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_several_alphas_are_those_of_as_many_streams_from_one_read(pair: Pair, framework: str) -> None:
    alphas = [0.3, 0.0, -1.5]
    singles = [dict(expo.stream(*pair, alpha, framework=framework)) for alpha in alphas]
    found = dict(expo.stream(*pair, iter(alphas), framework=framework))
    assert list(found) == list(singles[0])
    for name, tensors in found.items():
        assert isinstance(tensors, tuple)
        assert [raw(tensor) for tensor in tensors] == [raw(single[name]) for single in singles]


def test_one_alpha_in_a_list_is_a_tuple_of_one(pair: Pair) -> None:
    name, tensors = next(expo.stream(*pair, [0.3]))
    assert raw(tensors[0]) == raw(dict(expo.stream(*pair, 0.3))[name])
    gc.collect()


def test_to_a_device(pair: Pair) -> None:
    """Tensors can go to another device; the test uses "meta", which every machine has."""
    shapes = {name: tensor.shape for name, tensor in expo.stream(*pair, 0.3)}
    found = dict(expo.stream(*pair, 0.3, to="meta"))
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


@pytest.mark.parametrize("to", ["moon", "cuda:99", 1.5])
def test_a_device_that_is_not_there(pair: Pair, to: Any) -> None:
    with pytest.raises(expo.UsageError, match="is no device that torch has here"):
        expo.stream(*pair, 0.3, to=to)


def test_arrays_go_to_no_device(pair: Pair) -> None:
    with pytest.raises(expo.UsageError, match="framework is 'numpy'"):
        expo.stream(*pair, 0.3, framework="numpy", to="cpu")


def test_a_serving_engine_loads_it() -> None:
    """A function like `load_weights` of serving engines takes the stream and copies each tensor into a parameter."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(ALIGNED))
    parameters = dict(model.named_parameters())

    def load_weights(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)
            loaded.add(name)
        return loaded

    assert load_weights(expo.stream(SFT, ALIGNED, 0.5)) == set(parameters)
    expected = dict(expo.stream(SFT, ALIGNED, 0.5))
    assert all(torch.equal(parameters[name], tensor.to(parameters[name].dtype)) for name, tensor in expected.items())
