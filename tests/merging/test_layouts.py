"""Merges of a published checkpoint, with a tensor for each expert, and a state dict from memory, with fused experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import read_folder, write_folder

import expo
from expo.checkpoints.safetensors_header import TensorInfo
from expo.diff import compare
from expo.inputs.resolve import open_inputs
from expo.options import MergeOptions
from expo.planning.matching import match_tensors

ALPHA, EXPERTS, INNER, HIDDEN = 0.3, 4, 6, 5
LAYER = "model.layers.0.mlp."
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS}


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def published(seed: int) -> Tensors:
    """Return a router and the three matrices of each expert, in fp32."""
    tensors: Tensors = {f"{LAYER}gate.weight": ("F32", (EXPERTS, HIDDEN), numbers(seed, EXPERTS, HIDDEN).tobytes())}
    for expert in range(EXPERTS):
        for number, (name, shape) in enumerate(
            [("gate_proj", (INNER, HIDDEN)), ("up_proj", (INNER, HIDDEN)), ("down_proj", (HIDDEN, INNER))]
        ):
            data = numbers(seed + 10 * expert + number, *shape).tobytes()
            tensors[f"{LAYER}experts.{expert}.{name}.weight"] = ("F32", shape, data)
    return tensors


def fused(tensors: Tensors) -> Tensors:
    """Return the same tensors as a model has them in memory."""
    parts: list[list[bytes]] = [[], []]
    for expert in range(EXPERTS):
        gate, up, down = (tensors[f"{LAYER}experts.{expert}.{each}_proj.weight"][2] for each in ("gate", "up", "down"))
        parts[0] += [gate, up]
        parts[1] += [down]
    return {
        f"{LAYER}gate.weight": tensors[f"{LAYER}gate.weight"],
        f"{LAYER}experts.gate_up_proj": ("F32", (EXPERTS, 2 * INNER, HIDDEN), b"".join(parts[0])),
        f"{LAYER}experts.down_proj": ("F32", (EXPERTS, HIDDEN, INNER), b"".join(parts[1])),
    }


def write(folder: Path, tensors: Tensors, shards: int = 1, **config: object) -> Path:
    write_folder(folder, tensors, shards=shards)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def merged(sft: Tensors, aligned: Tensors) -> Tensors:
    """Return the formula's result for tensors of one layout."""
    results: Tensors = {}
    for name, (dtype, shape, data) in aligned.items():
        a, s = np.frombuffer(data, np.float32), np.frombuffer(sft[name][2], np.float32)
        results[name] = (dtype, shape, (a + np.float32(ALPHA) * (a - s)).tobytes())
    return results


def test_published_sft_and_fused_aligned(tmp_path: Path) -> None:
    """The output has aligned's layout; the shards of the two sides differ, and a chunk ends inside of an expert."""
    sft, aligned = published(1), published(500)
    pair = write(tmp_path / "sft", sft, 3), write(tmp_path / "aligned", fused(aligned), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expo.execution.worker_pool.CHUNK", 4096)
        done = expo.merge(*pair, ALPHA, tmp_path / "out", quiet=True, verify=True)
    assert read_folder(tmp_path / "out") == fused(merged(sft, aligned))
    assert done.extrapolated == 3
    assert dict(done.noted) == {
        f"{LAYER}experts.{name}": f"sft has it as tensors like {LAYER}experts.0.{first}.weight"
        for name, first in (("gate_up_proj", "gate_proj"), ("down_proj", "down_proj"))
    }


def test_fused_sft_and_published_aligned(tmp_path: Path) -> None:
    sft, aligned = published(1), published(500)
    pair = write(tmp_path / "sft", fused(sft), 2), write(tmp_path / "aligned", aligned, 3)
    done = expo.merge(*pair, [ALPHA, 0.0], tmp_path / "out-{alpha}", quiet=True)
    assert [read_folder(Path(out.path)) for out in done.outputs] == [merged(sft, aligned), aligned]
    reasons = dict(done.noted)
    assert reasons[f"{LAYER}experts.1.up_proj.weight"] == f"sft has it in {LAYER}experts.gate_up_proj"
    streamed = {name: tensor.numpy().tobytes() for name, tensor in expo.stream(*pair, ALPHA)}
    assert streamed == {name: data for name, (_, _, data) in merged(sft, aligned).items()}


def test_equal_models_in_two_layouts_do_not_differ(tmp_path: Path) -> None:
    tensors = published(1)
    found = compare(write(tmp_path / "sft", tensors), write(tmp_path / "aligned", fused(tensors)))
    assert found.totals.changed == 0
    assert {(each.name, each.shape) for each in found.tensors} == {
        (name, shape) for name, (_, shape, _) in fused(tensors).items()
    }
    note = next(each.note for each in found.tensors if each.name.endswith("down_proj"))
    assert note == f"sft has it as tensors like {LAYER}experts.0.down_proj.weight"


Change = Callable[[Tensors], None]


def lose(tensors: Tensors) -> None:
    del tensors[f"{LAYER}experts.2.up_proj.weight"]


def widen(tensors: Tensors) -> None:
    name = f"{LAYER}experts.2.up_proj.weight"
    tensors[name] = ("F32", (INNER + 1, HIDDEN), bytes(4 * (INNER + 1) * HIDDEN))


def add(tensors: Tensors) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{LAYER}experts.{EXPERTS}.{name}.weight"] = tensors[f"{LAYER}experts.0.{name}.weight"]


def repeat(tensors: Tensors) -> None:
    tensors[f"{LAYER}experts.02.up_proj.weight"] = tensors[f"{LAYER}experts.0.up_proj.weight"]


def test_two_tensors_for_one_expert_are_not_paired(tmp_path: Path) -> None:
    """Neither is chosen, and no option copies the fused tensor in their place."""
    tensors, aligned = published(1), fused(published(2))
    repeat(tensors)
    pair = write(tmp_path / "sft", tensors), write(tmp_path / "aligned", aligned)
    with pytest.raises(expo.PlanError, match="the same weights in two layouts, but their numbers or shapes"):
        expo.merge(*pair, ALPHA, tmp_path / "out", quiet=True, on_unpaired="aligned")


@pytest.mark.parametrize("change", [lose, widen, add, repeat])
@pytest.mark.parametrize("fused_side", ["sft", "aligned"])
def test_experts_that_do_not_fit_are_refused(tmp_path: Path, change: Change, fused_side: str) -> None:
    tensors = published(1)
    whole = write(tmp_path / "fused", fused(tensors))
    change(tensors)
    other = write(tmp_path / "published", tensors)
    pair = (whole, other) if fused_side == "sft" else (other, whole)
    with pytest.raises(expo.PlanError, match=r"experts") as caught:
        expo.merge(*pair, ALPHA, tmp_path / "out", quiet=True)
    assert len(str(caught.value).splitlines()) <= 40


def test_a_model_that_the_table_does_not_have_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "of_a_test", "architectures": ["OfATest"]}
    pair = write(tmp_path / "sft", published(1), **config), write(tmp_path / "aligned", fused(published(2)), **config)
    with pytest.raises(expo.PlanError, match=r"gate_up_proj"):
        expo.merge(*pair, ALPHA, tmp_path / "out", quiet=True)


def test_the_runs_cover_each_tensor_once(tmp_path: Path) -> None:
    """The steps of a fused tensor follow each other in its bytes, and each reads another tensor of sft."""
    pair = write(tmp_path / "sft", published(1)), write(tmp_path / "aligned", fused(published(2)))
    with open_inputs(*pair) as (sft, aligned):
        steps = match_tensors(sft, aligned, MergeOptions(alphas=(ALPHA,))).steps
        own = [step for step in steps if step.name.endswith("gate_up_proj")]
        ends = [aligned.tensors[own[0].name].start, *(step.aligned.stop for step in own)]
        assert [step.aligned.start for step in own] == ends[:-1]
        assert ends[-1] == aligned.tensors[own[0].name].stop
        names = [step.sft.name for step in own if isinstance(step.sft, TensorInfo)]
    assert names == [f"{LAYER}experts.{e}.{each}_proj.weight" for e in range(EXPERTS) for each in ("gate", "up")]


# Tensors that are transposed under one name


TRANSPOSED = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}


def in_memory(seed: int, hidden: int, inner: int) -> Tensors:
    """Return the experts of a model of Qwen3-VL MoE as it has them in memory, and a norm."""
    shapes = {"gate_up_proj": (2, 2 * inner, hidden), "down_proj": (2, hidden, inner), "norm.weight": (hidden,)}
    return {
        f"{LAYER}experts.{name}": ("F32", shape, numbers(seed + number, *shape).tobytes())
        for number, (name, shape) in enumerate(shapes.items())
    }


def in_files(tensors: Tensors) -> Tensors:
    """Return the same tensors as files have them: the experts are transposed."""
    results = {}
    for name, (dtype, shape, data) in tensors.items():
        array = np.frombuffer(data, np.float32).reshape(shape)
        array = array.transpose(0, 2, 1) if len(shape) == 3 else array
        results[name] = (dtype, array.shape, np.ascontiguousarray(array).tobytes())
    return results


@pytest.mark.parametrize(("hidden", "inner"), [(24, 20), (32, 16), (16, 16), (1, 3)])
@pytest.mark.parametrize("chunk", [4096, 1 << 22])
def test_transposed_experts(
    tmp_path: Path, hidden: int, inner: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A square tensor has one shape in both forms; the form of its neighbour, which is not square, is its own too."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", chunk)
    sft, aligned = in_memory(1, hidden, inner), in_memory(50, hidden, inner)
    results = merged(sft, aligned)
    folders = {
        name: write(tmp_path / name, tensors, **TRANSPOSED)
        for name, tensors in {
            "memory": aligned,
            "files": in_files(aligned),
            "sft": sft,
            "sft files": in_files(sft),
        }.items()
    }
    for first, second, expected in (
        ("sft files", "memory", results),
        ("sft", "files", in_files(results)),
        ("sft files", "files", in_files(results)),
        ("sft", "memory", results),
    ):
        out = tmp_path / f"out {first} {second}"
        done = expo.merge(folders[first], folders[second], ALPHA, out, on_mismatch="aligned", on_unpaired="aligned")
        assert read_folder(out) == expected
        said = [note for note in done.warnings if "2 tensors transposed" in note]
        assert bool(said) is ((first == "sft") is not (second == "memory"))
    assert compare(folders["sft files"], folders["memory"]).totals.difference_norm == pytest.approx(
        compare(folders["sft"], folders["memory"]).totals.difference_norm
    )


def test_live_over_transposed_experts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    sft, aligned = in_memory(1, 32, 16), in_memory(50, 32, 16)
    write(tmp_path / "sft", in_files(sft), **TRANSPOSED)
    root = torch.nn.Module()
    root.config = type("Config", (), {"to_dict": lambda self: TRANSPOSED})()
    for name, (_, shape, data) in aligned.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(
            leaf, torch.nn.Parameter(torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape))
        )
    with pytest.warns(UserWarning, match="2 tensors transposed"):
        live = expo.Live(root, tmp_path / "sft")
    with live:
        live.alpha = ALPHA
        found = {name: tensor.numpy().tobytes() for name, tensor in root.state_dict().items()}
    assert found == {name: data for name, (_, _, data) in merged(sft, aligned).items()}


@pytest.mark.parametrize("side", ["sft", "aligned"])
def test_a_missing_expert_is_named(tmp_path: Path, side: str) -> None:
    """No option copies the fused tensor when an expert is missing on the other side."""
    tensors = published(1)
    del tensors[f"{LAYER}experts.2.up_proj.weight"]
    other = "aligned" if side == "sft" else "sft"
    write(tmp_path / side, tensors)
    write(tmp_path / other, fused(published(500)))
    with pytest.raises(expo.PlanError, match=r"in two layouts, but expert 2 of up_proj is missing"):
        expo.merge(tmp_path / "sft", tmp_path / "aligned", ALPHA, tmp_path / "out", on_unpaired="aligned")


# Experts that are stacked in the files already


STACKED = {"model_type": "step3p7"}


def stacked(tensors: Tensors) -> Tensors:
    """Return the tensors of `published` with one tensor for the gates of all experts, and so on, as in Step 3.7."""
    found: Tensors = {f"{LAYER}gate.weight": tensors[f"{LAYER}gate.weight"]}
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts = [tensors[f"{LAYER}experts.{expert}.{name}.weight"] for expert in range(EXPERTS)]
        where = LAYER.replace("mlp.", f"moe.{name}.weight")
        found[where] = ("F32", (EXPERTS, *parts[0][1]), b"".join(data for _, _, data in parts))
    return found


@pytest.mark.parametrize("chunk", [4096, 1 << 22])
def test_experts_that_are_stacked_and_not_fused(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate of an expert and its up-projection follow each other in memory, and lie in two tensors of the files."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", chunk)
    sft, aligned = published(1), published(500)
    results = merged(sft, aligned)
    for first, second, expected in (
        (fused(sft), stacked(aligned), stacked(results)), (stacked(sft), fused(aligned), fused(results)),
    ):  # fmt: skip
        expo.merge(write(tmp_path / "sft", first, **STACKED), write(tmp_path / "aligned", second, **STACKED), ALPHA,
                   tmp_path / "out", overwrite=True)  # fmt: skip
        assert read_folder(tmp_path / "out") == expected
