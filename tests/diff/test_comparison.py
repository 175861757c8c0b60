"""compare(): its numbers against an evaluation in fp64, its inputs, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import ODD_SHAPES, random_tensors, safetensors_bytes, sparse_file, write_folder
from moved_pairs import MODULES, llama_shapes, move, write_pair
from torch_files import wide, write_bin

import expo.checkpoints.reader
from expo.demo import ALIGNED, SFT
from expo.diff import Part, compare, distance, measurement
from expo.errors import CheckpointError, EngineError, PlanError, UsageError
from expo.kernels import convert

ROOT = Path(__file__).parents[2]
FLOATS = ("BF16", "F16", "F32", "F64")


def evaluate(sft: list[Any], aligned: list[Any]) -> dict[str, float]:
    """Return the numbers of a part, by the definition, in extended precision."""
    s, a = (np.concatenate(each).astype(np.longdouble) for each in (sft, aligned))
    d = a - s
    norms = [np.sqrt((x * x).sum()) for x in (d, s, a)]
    return {
        "difference_norm": float(norms[0]), "sft_norm": float(norms[1]), "aligned_norm": float(norms[2]),
        "relative_norm": float(norms[0] / norms[2]), "changed": int((d != 0).sum()), "elements": s.size,
        "one_minus_cosine": float(1 - (a * s).sum() / (norms[1] * norms[2])),
        "max_abs_difference": float(np.abs(d).max()),
    }  # fmt: skip


def check(part: Part, sft: list[Any], aligned: list[Any], tolerance: float = 1e-6) -> None:
    for field, value in evaluate(sft, aligned).items():
        assert getattr(part, field) == pytest.approx(value, rel=tolerance, abs=1e-17), (part.name, field)
    assert part.cosine == 1 - part.one_minus_cosine
    assert part.changed_share == part.changed / part.elements


# Numbers.


@pytest.mark.parametrize("a", FLOATS)
@pytest.mark.parametrize("s", FLOATS)
def test_every_number_of_a_tensor(a: str, s: str, tmp_path: Path) -> None:
    sft = random_tensors({"x": (s, (301, 777))}, 1)
    aligned = random_tensors({"x": (a, (301, 777))}, 2)
    if a == s == "BF16" or a == s == "F32":
        aligned = move(sft, 1e-5)
    comparison = compare(write_folder(tmp_path / "s", sft), write_folder(tmp_path / "a", aligned))
    (tensor,) = comparison.tensors
    check(tensor, [wide(sft["x"][2], s)], [wide(aligned["x"][2], a)])
    assert (tensor.shape, tensor.dtype, tensor.sft_dtype) == ((301, 777), a, s)
    assert asdict(comparison.totals) | {"name": "x", "kind": "other"} == {
        k: v for k, v in asdict(tensor).items() if k in asdict(comparison.totals)
    }


def test_layers_cells_and_totals(tmp_path: Path) -> None:
    shapes = llama_shapes(3, "F32")
    sft_folder, aligned_folder = write_pair(tmp_path, shapes)
    comparison = compare(sft_folder, aligned_folder)
    sft = random_tensors(shapes, 1)
    values = [{name: wide(data, "F32") for name, (_, _, data) in each.items()} for each in (sft, move(sft))]

    def matching(pattern: str) -> list[list[Any]]:
        return [[v for n, v in values[k].items() if re.search(pattern, n)] for k in (0, 1)]

    check(comparison.totals, *matching(""))
    assert [part.name for part in comparison.layers] == [
        *(f"model.layers.{i}" for i in range(3)),
        "embeddings",
        "head",
        "norms",
    ]
    for i in range(3):
        check(comparison.layers[i], *matching(rf"layers\.{i}\."))
    check(comparison.layers[3], *matching("embed"))
    check(comparison.layers[4], *matching("lm_head"))
    assert [part.kind for part in comparison.cells[:8]] == [*MODULES, "norms"]
    check(comparison.cells[8], *matching(r"layers\.1.*q_proj"))
    check(comparison.cells[7], *matching(r"layers\.0.*norm"))
    assert len(comparison.cells) == 24
    assert len(comparison.tensors) == len(shapes)
    assert comparison.bytes_read == sum(v.nbytes for v in values[0].values())
    assert comparison.warnings == ()


@pytest.mark.parametrize("by", [1e-2, 1e-4, 1e-6, 1e-7])
def test_the_angle_between_nearly_equal_tensors(by: float, tmp_path: Path) -> None:
    """1 - cosine has six digits even at 1e-14, where 1 - s.a / |s| |a| in fp64 has none."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(50_000).astype("<f4")
    y = (x + by * rng.standard_normal(x.size)).astype("<f4")
    for folder, values in (("s", x), ("a", y)):
        write_folder(tmp_path / folder, {"x": ("F32", values.shape, values.tobytes())})
    (tensor,) = compare(tmp_path / "s", tmp_path / "a").tensors
    s, a = (each.astype(np.longdouble) for each in (x, y))
    across = (a - s) - a * (((a - s) * a).sum() / (a * a).sum())  # the component of d that is orthogonal to a
    sine = math.sqrt(float((across * across).sum() / (s * s).sum()))
    assert tensor.one_minus_cosine == pytest.approx(2 * math.sin(math.asin(sine) / 2) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("s", "a", "one_minus_cosine", "relative"),
    [
        (2.0, 1.0, 0.0, 1.0),
        (-1.0, 1.0, 2.0, 2.0),
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 0.0, math.nan, math.inf),
        (0.0, 1.0, math.nan, 1.0),
    ],
)  # fmt: skip
def test_ends_of_the_scale(s: float, a: float, one_minus_cosine: float, relative: float, tmp_path: Path) -> None:
    for folder, value in (("s", s), ("a", a)):
        write_folder(tmp_path / folder, {"x": ("F32", (300,), np.full(300, value, "<f4").tobytes())})
    total = compare(tmp_path / "s", tmp_path / "a").totals
    assert total.one_minus_cosine == pytest.approx(one_minus_cosine, abs=1e-15, nan_ok=True)
    assert total.relative_norm == relative


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_squares_that_fp32_cannot_represent(scale: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = [(rng.standard_normal(9000) * scale).astype("<f4") for _ in range(2)]
    for folder, x in zip("sa", values, strict=True):
        write_folder(tmp_path / folder, {"x": ("F32", x.shape, x.tobytes())})
    part = compare(tmp_path / "s", tmp_path / "a").totals
    for field, value in evaluate(values[:1], values[1:]).items():
        assert getattr(part, field) == pytest.approx(value, rel=1e-6, abs=0), field


def test_the_same_bits_on_every_way_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped or not, with one thread or several, widened by C or by NumPy: the comparison is the same."""
    sft_folder, aligned_folder = write_pair(
        tmp_path, {"long": ("BF16", (3001, 1777)), "short": ("F32", (70_001,)), **llama_shapes(2)}
    )
    first = compare(sft_folder, aligned_folder)
    assert first == compare(sft_folder, aligned_folder)
    monkeypatch.setattr(measurement, "cpu_count", lambda: 5)
    assert compare(sft_folder, aligned_folder) == first
    monkeypatch.setattr(expo.checkpoints.reader, "LOCAL", set())
    assert compare(sft_folder, aligned_folder) == first
    monkeypatch.setattr(convert, "_cpu", None)
    assert compare(sft_folder, aligned_folder) == first


def test_the_demo_is_as_far_apart_as_a_merge_says(tmp_path: Path) -> None:
    merged = expo.merge(SFT, ALIGNED, 0.5, tmp_path / "out")
    total = compare(SFT, ALIGNED).totals
    assert total.relative_norm == pytest.approx(merged.relative_distance, rel=1e-5)
    assert total.max_abs_difference == merged.max_abs_difference


# Inputs.


def test_pickles_compare_as_safetensors_do(tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, llama_shapes(1))
    tensors = random_tensors(llama_shapes(1), 1)
    comparison = compare(write_bin(tmp_path / "bin" / "sft", tensors), aligned_folder)
    assert sorted(map(str, comparison.tensors)) == sorted(map(str, compare(sft_folder, aligned_folder).tensors))


def test_an_adapter_is_its_base_and_its_delta_unrounded(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{m}.weight" for i in (0, 1) for m in ("q_proj", "k_proj")]
    base = random_tensors(dict.fromkeys(names, ("BF16", (96, 64))), 1)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = random_tensors({name.format("A"): ("F32", (4, 64)), name.format("B"): ("F32", (96, 4))}, 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(factors))
    comparison = compare(write_folder(tmp_path / "base", base), adapter)
    (changed,) = [tensor for tensor in comparison.tensors if tensor.changed]
    a, b = (wide(factors[name.format(each)][2], "F32").reshape(factors[name.format(each)][1]) for each in "AB")
    delta = 2 * (b @ a).reshape(-1)
    x = wide(base[changed.name][2], "BF16")
    assert changed.difference_norm == pytest.approx(np.sqrt((delta**2).sum()), rel=1e-5)
    assert changed.aligned_norm == pytest.approx(np.sqrt(((x + delta) ** 2).sum()), rel=1e-6)
    assert len(comparison.tensors) == 4
    assert comparison.not_compared == ()
    assert comparison.warnings == ("only part of the model was trained: the same in both are layers 1 of model.layers",)


def test_integers_and_odd_shapes(tmp_path: Path) -> None:
    comparison = compare(*(write_folder(tmp_path / str(k), random_tensors(ODD_SHAPES, k)) for k in (1, 2)))
    assert {tensor.name for tensor in comparison.tensors} == {"scalar", "empty", "hollow", "long"}
    assert {name for name, _ in comparison.not_compared} == {"count", "mask", "bytes"}


def test_the_same_nan_in_both_is_no_change(tmp_path: Path) -> None:
    data = np.array([1, np.nan, np.inf, 0], "<f4").tobytes()
    for folder in "sa":
        write_folder(tmp_path / folder, {"x": ("F32", (4,), data)})
    comparison = compare(tmp_path / "s", tmp_path / "a")
    assert (comparison.totals.changed, comparison.totals.non_finite_sft) == (0, 2)
    assert comparison.warnings[0].startswith("sft and aligned are equal")


# Refusals, stops and memory.


def test_what_is_refused(tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, llama_shapes(1))
    with pytest.raises(UsageError, match="`aligned` must be given"):
        compare(sft_folder)
    with pytest.raises(CheckpointError, match="no such file"):
        compare(sft_folder, tmp_path / "nothing")
    other = write_folder(tmp_path / "other", random_tensors({"else": ("F32", (3,))}, 1))
    with pytest.raises(PlanError, match="nothing to compare"):
        compare(sft_folder, other)
    (aligned_folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PlanError, match="different architectures"):
        compare(sft_folder, aligned_folder)


def test_progress_and_a_stop(tmp_path: Path) -> None:
    sft_folder, aligned_folder = write_pair(tmp_path, llama_shapes(1))
    reports: list[tuple[int, int]] = []
    comparison = compare(sft_folder, aligned_folder, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (comparison.bytes_read, comparison.bytes_read)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(sft_folder, aligned_folder, progress=stop)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The two checkpoints have 216 MiB each, most of it in one tensor."""
    for folder in "sa":
        sparse_file(tmp_path / f"{folder}.safetensors", {"x": ("BF16", (90, 1 << 20)), "y": ("F32", (9, 1 << 20))})
    code = (
        "import sys; from expo.diff import compare; compare('s.safetensors', 'a.safetensors');"
        "assert 'torch' not in sys.modules;"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120_000


def test_a_bug_of_a_worker_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[None]:
        raise RuntimeError("no")

    monkeypatch.setattr(distance.DistanceMeter, "measure", fails)
    with pytest.raises(EngineError, match="no"):
        compare(*write_pair(tmp_path, llama_shapes(1)))
