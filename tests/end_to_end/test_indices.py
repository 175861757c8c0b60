"""Indices that do not agree with their shards: a merge takes the weights that transformers takes, or refuses.

Each layout is a list of files with the tensors in each, and an index that differs from them in one way. The tensors
that transformers 5.24 loads were found by running it; the last test repeats that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkpoint_files import read_folder, safetensors_bytes, write_folder

import expo
from expo.checkpoints.checkpoint import open_checkpoint
from expo.errors import CheckpointError

A, B, OVERLAY = "model-00001-of-00002", "model-00002-of-00002", "model-overlay"
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
ALPHA = 0.3
rng = np.random.default_rng(11)
SFT, ALIGNED = ({name: rng.standard_normal((3, 5), np.float32) for name in ("a", "b", "c", "d")} for _ in range(2))
OTHER = {name: values + 1 for name, values in ALIGNED.items()}


class Layout(NamedTuple):
    """The tensors of each file, the index's changes, and the result.

    Attributes:
        files: Values by name, for each file's stem.
        index: Changes to the index; None removes an entry.
        loaded: The values that transformers loads, where they are not those of ALIGNED.
        note: A part of the note; None if there is no note.
    """

    files: Mapping[str, Mapping[str, Any]]
    index: Mapping[str, str | None]
    loaded: Mapping[str, Any]
    note: str | None


HALVES = {A: {name: ALIGNED[name] for name in "ab"}, B: {name: ALIGNED[name] for name in "cd"}}
CHANGED = {**HALVES, B: {**HALVES[B], "a": OTHER["a"]}}
LAYOUTS = {
    "agrees": Layout(HALVES, {}, {}, None),
    "names too many": Layout(HALVES, {"mtp.fc": B}, {}, "'mtp.fc' is in the index and in no shard"),
    "names too few": Layout(HALVES, {"d": None}, {}, "'d' is in a shard and not in the index"),
    "another shard": Layout(HALVES, {"a": B, "b": B, "c": A}, {}, "'a' is in another shard than the index says; the "),
    "later copy": Layout(CHANGED, {"a": B}, {"a": OTHER["a"]}, "'a' is in several shards; the one in "),
    "copy that no entry names": Layout(CHANGED, {"a": None}, {"a": OTHER["a"]}, "'a' is in several shards; the one in"),
    "overlay": Layout(
        {**HALVES, OVERLAY: OTHER}, dict.fromkeys("abcd", OVERLAY) | {"x": A, "y": B}, OTHER, "(4 tensors are like that"
    ),
    "equal copies": Layout({**HALVES, B: {**HALVES[B], "a": ALIGNED["a"]}}, {}, {}, "'a' is in several shards with"),
    "unlisted shard": Layout({**HALVES, OVERLAY: OTHER}, dict.fromkeys(("x",), A), {}, "'x' is in the index and in no"),
}  # fmt: skip


def write(folder: Path, layout: Layout, kind: str = "safetensors", config: Mapping[str, Any] | None = None) -> Path:
    """Write the files of a layout with its index, and return the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    names = {
        stem: f"{stem.replace('model', 'pytorch_model') if kind == 'bin' else stem}.{kind}" for stem in layout.files
    }
    weight_map: dict[str, str | None] = {name: stem for stem, tensors in HALVES.items() for name in tensors}
    weight_map |= {name: stem for stem, tensors in layout.files.items() if stem != OVERLAY for name in tensors
                   if name not in weight_map}  # fmt: skip
    weight_map |= layout.index
    for stem, tensors in layout.files.items():
        if kind == "bin":
            import torch

            torch.save({name: torch.from_numpy(values) for name, values in tensors.items()}, folder / names[stem])
        else:
            (folder / names[stem]).write_bytes(as_file(tensors))
    named = {name: names.get(stem, stem) for name, stem in weight_map.items() if stem}
    (folder / INDEX[kind]).write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return folder


def as_file(tensors: Mapping[str, Any]) -> bytes:
    return safetensors_bytes({name: ("F32", x.shape, x.tobytes()) for name, x in tensors.items()}, {"format": "pt"})


def sft(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sft", {name: ("F32", x.shape, x.tobytes()) for name, x in SFT.items()})


def oracle(s: Any, a: Any) -> bytes:
    return bytes((a + np.float32(ALPHA) * (a - s)).tobytes())


def merge(tmp_path: Path, aligned: Path) -> tuple[dict[str, bytes], list[str]]:
    """Return the bytes of the merge's tensors, and the warnings about aligned."""
    merged = expo.merge(sft(tmp_path), aligned, ALPHA, tmp_path / "out")
    tensors = {name: data for name, (_, _, data) in read_folder(tmp_path / "out").items()}
    return tensors, [warning for warning in merged.warnings if str(aligned) in warning]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "safetensors") for name in LAYOUTS),
        *((name, "bin") for name in ("names too few", "another shard", "overlay")),
    ],
)
def test_a_merge_takes_the_weights_that_transformers_takes(name: str, kind: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    aligned = write(tmp_path / "aligned", layout, kind)
    expected = {each: oracle(SFT[each], value) for each, value in {**ALIGNED, **layout.loaded}.items()}
    tensors, notes = merge(tmp_path, aligned)
    assert tensors == expected
    assert (layout.note is None) is (not notes)
    assert layout.note is None or any(layout.note in note for note in notes)
    index = json.loads((tmp_path / "out" / INDEX["safetensors"]).read_text())["weight_map"]
    assert set(index) == set(expected)
    assert set(index.values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}


@pytest.mark.parametrize("side", ["last", "named"])
@pytest.mark.parametrize("kind", INDEX)
def test_copies_that_differ_are_refused_and_both_ways_out_are_right(kind: str, side: str, tmp_path: Path) -> None:
    aligned = write(tmp_path / "aligned", Layout(CHANGED, {}, {}, None), kind)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(aligned)
    message = str(caught.value)
    assert message.startswith(f"{aligned / INDEX[kind]}: tensor 'a' is said to be in ")
    assert "other bytes" in message
    if side == "last":  # the message says: name that file in the index
        last = message.partition("name ")[2].partition(" in the index")[0]
        index = json.loads((aligned / INDEX[kind]).read_text())
        index["weight_map"]["a"] = last
        (aligned / INDEX[kind]).write_text(json.dumps(index))
    else:  # else remove the tensor from the last file
        shutil.rmtree(aligned)
        write(aligned, LAYOUTS["agrees"], kind)
    assert merge(tmp_path, aligned)[0]["a"] == oracle(SFT["a"], (OTHER if side == "last" else ALIGNED)["a"])


def test_copies_that_differ_in_shape_are_refused(tmp_path: Path) -> None:
    files = {**HALVES, B: {**HALVES[B], "a": ALIGNED["a"].reshape(5, 3)}}
    aligned = write(tmp_path / "aligned", Layout(files, {}, {}, None))
    with pytest.raises(CheckpointError, match="other bytes"):
        open_checkpoint(aligned)


def test_a_plan_of_headers_alone_does_not_claim_that_copies_are_equal(tmp_path: Path) -> None:
    aligned = write(tmp_path / "aligned", LAYOUTS["equal copies"])
    (note,) = open_checkpoint(aligned, has_data=False).notes
    assert "a merge refuses them if the bytes differ" in note


def test_a_shard_that_the_index_names_and_that_is_missing(tmp_path: Path) -> None:
    aligned = write(tmp_path / "aligned", Layout(HALVES, {"x": "gone.safetensors"}, {}, None))
    with pytest.raises(CheckpointError, match=r"it names gone\.safetensors, which is not in the folder"):
        open_checkpoint(aligned)


def test_a_stale_index_beside_a_single_file(tmp_path: Path) -> None:
    aligned = write(tmp_path / "aligned", LAYOUTS["overlay"])
    (aligned / "model.safetensors").write_bytes(as_file(ALIGNED))
    tensors, (note,) = merge(tmp_path, aligned)
    assert tensors == {name: oracle(SFT[name], value) for name, value in ALIGNED.items()}
    assert note == (
        f"{aligned}: model.safetensors and {INDEX['safetensors']} are in it; model.safetensors counts, as for "
        "transformers"
    )


# Dtypes that are only copied.

COPIED = {
    "layers.0.freqs_cis": ("C64", (2, 3), np.arange(12, dtype=np.float32).tobytes()),
    "freqs_cis": ("F8_E4M3", (3,), bytes([1, 0x7F, 0x80])), "layers.0.rotary_emb.inv_freq": ("F8_E5M2", (), b"\x01"),
    "ids": ("I64", (2,), np.arange(2).tobytes()), "mask": ("BOOL", (3,), b"\1\0\1"), "bytes": ("U8", (0, 4), b""),
    "wide": ("U32", (1,), b"\1\2\3\4"),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    made = []
    for role, values in (("sft", SFT), ("aligned", ALIGNED)):
        tensors = {name: ("F32", x.shape, x.tobytes()) for name, x in values.items()}
        made.append(write_folder(tmp_path / role, {**tensors, **COPIED}))
    return made[0], made[1]


def test_copied_dtypes_go_through_merge_and_diff(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expo.merge(*pair, ALPHA, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert {name: found[name] for name in COPIED} == COPIED
    assert found["a"][2] == oracle(SFT["a"], ALIGNED["a"])
    from expo.diff import compare

    assert set(dict(compare(*pair).not_compared)) == set(COPIED)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_copied_dtypes_go_through_a_stream(pair: tuple[Path, Path], framework: str) -> None:
    torch = pytest.importorskip("torch")
    found = dict(expo.stream(*pair, ALPHA, framework=framework))
    kinds = {"C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "BOOL": "bool",
             "U8": "uint8", "U32": "uint32"}  # fmt: skip
    for name, (dtype, shape, data) in COPIED.items():
        assert str(found[name].dtype).removeprefix("torch.") == kinds[dtype]
        assert tuple(found[name].shape) == shape
        raw = (
            found[name].tobytes()
            if framework == "numpy"
            else found[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        assert raw == data
    assert np.asarray(found["a"]).tobytes() == oracle(SFT["a"], ALIGNED["a"])


@pytest.mark.parametrize("by_files", [True, False])
def test_copied_dtypes_stay_as_they_are_in_a_live_model(by_files: bool, pair: tuple[Path, Path]) -> None:
    torch = pytest.importorskip("torch")

    def model(values: Mapping[str, Any]) -> Any:
        made = torch.nn.Module()
        for name, value in values.items():
            made.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value.copy())))
        made.register_buffer("freqs_cis", torch.full((3,), 2 + 1j, dtype=torch.complex64))
        made.register_buffer("mask", torch.tensor([True]))
        return made

    aligned, other = model(ALIGNED), model(SFT)
    with expo.Live(aligned, pair[0] if by_files else other, on_unpaired="aligned" if by_files else "error",
                   on_mismatch="aligned") as live:  # fmt: skip
        live.alpha = ALPHA
        assert aligned.a.detach().numpy().tobytes() == oracle(SFT["a"], ALIGNED["a"])
        assert torch.equal(aligned.freqs_cis, torch.full((3,), 2 + 1j, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", ["C64", "F8_E4M3"])
def test_numbers_under_an_unknown_name_are_refused(dtype: str, tmp_path: Path) -> None:
    data = bytes({"C64": 8, "F8_E4M3": 1}[dtype] * 2)
    paths = [write_folder(tmp_path / role, {"w": (dtype, (2,), data)}) for role in ("sft", "aligned")]
    with pytest.raises(expo.PlanError, match="of a dtype that cannot be extrapolated"):
        expo.merge(*paths, ALPHA, tmp_path / "out")


# transformers itself.


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_takes_these_weights(name: str, kind: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers import modeling_utils

    layout = LAYOUTS[name]
    aligned = write(tmp_path / "aligned", layout, kind)

    class Config(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
        model_type = "four_tensors"

    class Model(modeling_utils.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for each in ALIGNED:
                self.register_parameter(each, torch.nn.Parameter(torch.zeros(3, 5)))
            self.post_init()

    (aligned / "config.json").write_text("{}")
    model = Model.from_pretrained(aligned, config=Config(), weights_only=True)
    for each, value in {**ALIGNED, **layout.loaded}.items():
        assert getattr(model, each).detach().numpy().tobytes() == value.tobytes(), each
