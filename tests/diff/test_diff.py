"""What training changed: numbers against an evaluation in fp64, warnings, the table, the picture, the command line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import ODD_SHAPES, Tensors, random_tensors, safetensors_bytes, sparse_file, write_folder
from torch_files import wide, write_bin

import expo.checkpoints.reader
from expo.demo import ALIGNED, SFT
from expo.diff import Comparison, Part, compare, comparing, distance, heatmap, measuring, report
from expo.diff.__main__ import main
from expo.diff.places import place
from expo.diff.table import table
from expo.errors import CheckpointError, EngineError, OutputError, PlanError, UsageError
from expo.kernels import convert

ROOT = Path(__file__).parents[2]
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def llama(layers: int, dtype: str = "BF16", width: int = 16) -> Shapes:
    found: Shapes = {"model.embed_tokens.weight": (dtype, (40, width)), "lm_head.weight": (dtype, (40, width))}
    for i in range(layers):
        found |= {f"model.layers.{i}.{module}.weight": (dtype, (width, width)) for module in MODULES}
        found |= {
            f"model.layers.{i}.{kind}_layernorm.weight": (dtype, (width,)) for kind in ("input", "post_attention")
        }
    return {**found, "model.norm.weight": (dtype, (width,))}


def moved(tensors: Tensors, by: float = 1e-3, but: str = "^$") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors of BF16 or F32 that are a little elsewhere, but for those whose names match."""
    found = dict(tensors)
    for k, (name, (dtype, shape, data)) in enumerate(tensors.items()):
        if dtype in ("BF16", "F32") and not re.search(but, name):
            values = (
                wide(data, dtype)
                + np.random.default_rng(k).standard_normal(len(data) // (2 if dtype == "BF16" else 4)) * by
            )
            bits = values.astype("<f4")
            found[name] = (
                dtype,
                shape,
                (bits.view("<u4") >> 16).astype("<u2").tobytes() if dtype == "BF16" else bits.tobytes(),
            )
    return found


def pair(folder: Path, shapes: Shapes, by: float = 1e-3, but: str = "^$") -> tuple[Path, Path]:
    """(sft, aligned)"""
    sft = random_tensors(shapes, 1)
    return write_folder(folder / "sft", sft), write_folder(folder / "aligned", moved(sft, by, but))


def evaluated(sft: list[Any], aligned: list[Any]) -> dict[str, float]:
    """Of values in fp64; 1 - cosine in extended precision, as the definition has it."""
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
    for field, value in evaluated(sft, aligned).items():
        assert getattr(part, field) == pytest.approx(value, rel=tolerance, abs=1e-17), (part.name, field)
    assert part.cosine == 1 - part.one_minus_cosine
    assert part.changed_share == part.changed / part.elements


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", FLOATS)
@pytest.mark.parametrize("s", FLOATS)
def test_every_number_of_a_tensor(a: str, s: str, tmp_path: Path) -> None:
    sft = random_tensors({"x": (s, (301, 777))}, 1)
    aligned = random_tensors({"x": (a, (301, 777))}, 2)
    if a == s == "BF16" or a == s == "F32":
        aligned = moved(sft, 1e-5)
    found = compare(write_folder(tmp_path / "s", sft), write_folder(tmp_path / "a", aligned))
    (tensor,) = found.tensors
    check(tensor, [wide(sft["x"][2], s)], [wide(aligned["x"][2], a)])
    assert (tensor.shape, tensor.dtype, tensor.sft_dtype) == ((301, 777), a, s)
    assert asdict(found.totals) | {"name": "x", "kind": "other"} == {
        k: v for k, v in asdict(tensor).items() if k in asdict(found.totals)
    }


def test_layers_cells_and_totals(tmp_path: Path) -> None:
    shapes = llama(3, "F32")
    weak, strong = pair(tmp_path, shapes)
    found = compare(weak, strong)
    sft = random_tensors(shapes, 1)
    values = [{name: wide(data, "F32") for name, (_, _, data) in each.items()} for each in (sft, moved(sft))]

    def of(pattern: str) -> list[list[Any]]:
        return [[v for n, v in values[k].items() if re.search(pattern, n)] for k in (0, 1)]

    check(found.totals, *of(""))
    assert [part.name for part in found.layers] == [
        *(f"model.layers.{i}" for i in range(3)),
        "embeddings",
        "head",
        "norms",
    ]
    for i in range(3):
        check(found.layers[i], *of(rf"layers\.{i}\."))
    check(found.layers[3], *of("embed"))
    check(found.layers[4], *of("lm_head"))
    assert [part.kind for part in found.cells[:8]] == [*MODULES, "norms"]
    check(found.cells[8], *of(r"layers\.1.*q_proj"))
    check(found.cells[7], *of(r"layers\.0.*norm"))
    assert len(found.cells) == 24
    assert len(found.tensors) == len(shapes)
    assert found.bytes_read == sum(v.nbytes for v in values[0].values())
    assert found.warnings == ()


@pytest.mark.parametrize("by", [1e-2, 1e-4, 1e-6, 1e-7])
def test_the_angle_between_nearly_equal_tensors(by: float, tmp_path: Path) -> None:
    """1 - cosine of 1e-14 and less has six digits still, where 1 - s.a / |s| |a| in doubles has none."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(50_000).astype("<f4")
    y = (x + by * rng.standard_normal(x.size)).astype("<f4")
    for folder, values in (("s", x), ("a", y)):
        write_folder(tmp_path / folder, {"x": ("F32", values.shape, values.tobytes())})
    (tensor,) = compare(tmp_path / "s", tmp_path / "a").tensors
    s, a = (each.astype(np.longdouble) for each in (x, y))
    across = (a - s) - a * (((a - s) * a).sum() / (a * a).sum())  # what of d is not along a
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
def test_squares_that_fp32_cannot_hold(scale: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = [(rng.standard_normal(9000) * scale).astype("<f4") for _ in range(2)]
    for folder, x in zip("sa", values, strict=True):
        write_folder(tmp_path / folder, {"x": ("F32", x.shape, x.tobytes())})
    part = compare(tmp_path / "s", tmp_path / "a").totals
    for field, value in evaluated(values[:1], values[1:]).items():
        assert getattr(part, field) == pytest.approx(value, rel=1e-6, abs=0), field


def test_the_same_bits_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped or not, by one thread or several, widened by C or by NumPy."""
    weak, strong = pair(tmp_path, {"long": ("BF16", (3001, 1777)), "short": ("F32", (70_001,)), **llama(2)})
    first = compare(weak, strong)
    assert first == compare(weak, strong)
    monkeypatch.setattr(measuring, "cpu_count", lambda: 5)
    assert compare(weak, strong) == first
    monkeypatch.setattr(expo.checkpoints.reader, "LOCAL", set())
    assert compare(weak, strong) == first
    monkeypatch.setattr(convert, "_cpu", None)
    assert compare(weak, strong) == first


def test_the_demo_is_as_far_apart_as_a_merge_says(tmp_path: Path) -> None:
    merged = expo.merge(SFT, ALIGNED, 0.5, tmp_path / "out")
    total = compare(SFT, ALIGNED).totals
    assert total.relative_norm == pytest.approx(merged.relative_distance, rel=1e-5)
    assert total.max_abs_difference == merged.max_abs_difference


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_pickles_compare_as_safetensors_do(tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, llama(1))
    tensors = random_tensors(llama(1), 1)
    found = compare(write_bin(tmp_path / "bin" / "sft", tensors), strong)
    assert sorted(map(str, found.tensors)) == sorted(map(str, compare(weak, strong).tensors))


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
    found = compare(write_folder(tmp_path / "base", base), adapter)
    (changed,) = [tensor for tensor in found.tensors if tensor.changed]
    a, b = (wide(factors[name.format(each)][2], "F32").reshape(factors[name.format(each)][1]) for each in "AB")
    delta = 2 * (b @ a).reshape(-1)
    x = wide(base[changed.name][2], "BF16")
    assert changed.difference_norm == pytest.approx(np.sqrt((delta**2).sum()), rel=1e-5)
    assert changed.aligned_norm == pytest.approx(np.sqrt(((x + delta) ** 2).sum()), rel=1e-6)
    assert len(found.tensors) == 4
    assert found.not_compared == ()
    assert found.warnings == ("only part of the model was trained: the same in both are layers 1 of model.layers",)


def test_integers_and_odd_shapes(tmp_path: Path) -> None:
    found = compare(*(write_folder(tmp_path / str(k), random_tensors(ODD_SHAPES, k)) for k in (1, 2)))
    assert {tensor.name for tensor in found.tensors} == {"scalar", "empty", "hollow", "long"}
    assert {name for name, _ in found.not_compared} == {"count", "mask", "bytes"}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12, "self_attn.q_proj")),
        ("model.layers.12.self_attn.q_proj.bias", ("model.layers", 12, "self_attn.q_proj")),
        ("transformer.h.0.ln_1.weight", ("transformer.h", 0, "norms")),
        ("h.3.attn.c_attn.weight", ("h", 3, "attn.c_attn")),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", ("encoder.block", 1, "SelfAttention.q")),
        ("bert.encoder.layer.7.attention.output.LayerNorm.gamma", ("bert.encoder.layer", 7, "norms")),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", ("model.layers", 2, "block_sparse_moe.experts.w1")),
        ("vision_tower.encoder.layers.4.mlp.fc1.bias", ("vision_tower.encoder.layers", 4, "mlp.fc1")),
        ("model.embed_tokens.weight", ("", None, "embeddings")),
        ("transformer.wpe.weight", ("", None, "embeddings")),
        ("lm_head.weight", ("", None, "head")),
        ("output.weight", ("", None, "head")),
        ("score.weight", ("", None, "head")),
        ("model.norm.weight", ("", None, "norms")),
        ("transformer.ln_f.bias", ("", None, "norms")),
        ("something.0.odd", ("", None, "other")),
    ],
)
def test_where_a_tensor_stands(name: str, where: tuple[str, int | None, str]) -> None:
    assert tuple(place(name)) == where


# --- warnings ---------------------------------------------------------------------------------------------------------


def warned(found: Comparison) -> str:
    assert len(found.warnings) == 1, found.warnings
    return found.warnings[0]


def test_equal_models(tmp_path: Path) -> None:
    found = compare(*pair(tmp_path, llama(1), but=""))
    assert warned(found) == "sft and aligned are equal in all that was compared: is one of the two paths wrong?"
    assert found.totals.relative_norm == found.totals.one_minus_cosine == 0


def test_unrelated_models(tmp_path: Path) -> None:
    found = compare(*(write_folder(tmp_path / str(k), random_tensors(llama(1), k)) for k in (1, 2)))
    assert warned(found).endswith(
        "for a model and the one it was trained from it is below 0.1: are these two unrelated?"
    )


def test_layers_that_were_not_trained(tmp_path: Path) -> None:
    found = compare(*pair(tmp_path, llama(9), but=r"layers\.[0-3]\.|layers\.7\.|embed|norm"))
    assert warned(found) == (
        "only part of the model was trained: the same in both are layers 0-3, 7 of model.layers, embeddings"
    )


def test_elements_that_are_not_finite(tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, {"x": ("F32", (100,)), "y": ("F32", (100,))}, by=1e-4)
    for folder, name, values in ((weak, "x", [np.inf]), (strong, "y", [np.nan, -np.inf])):
        tensors = random_tensors({"x": ("F32", (100,)), "y": ("F32", (100,))}, 1)
        tensors = dict(moved(tensors, 1e-4) if folder == strong else tensors)
        data = np.frombuffer(tensors[name][2], "<f4").copy()
        data[: len(values)] = values
        tensors[name] = "F32", (100,), data.tobytes()
        write_folder(folder, tensors)
    found = compare(weak, strong)
    assert found.warnings == (
        "sft has 1 elements that are inf or NaN, which no norm counts: x",
        "aligned has 2 elements that are inf or NaN, which no norm counts: y",
    )
    assert (found.totals.non_finite_sft, found.totals.non_finite_aligned) == (1, 2)
    assert found.totals.relative_norm < 0.1


def test_the_same_nan_in_both_is_no_change(tmp_path: Path) -> None:
    data = np.array([1, np.nan, np.inf, 0], "<f4").tobytes()
    for folder in "sa":
        write_folder(tmp_path / folder, {"x": ("F32", (4,), data)})
    found = compare(tmp_path / "s", tmp_path / "a")
    assert (found.totals.changed, found.totals.non_finite_sft) == (0, 2)
    assert found.warnings[0].startswith("sft and aligned are equal")


def test_tensors_of_one_model_alone_and_of_other_shapes(tmp_path: Path) -> None:
    common = {"x": ("F32", (50, 4)), "model.embed_tokens.weight": ("F32", (40, 16)), "turned": ("F32", (3, 4))}
    sft = random_tensors({**common, "old": ("F32", (3,))}, 1)
    aligned = moved({name: sft[name] for name in common}, 1e-4)
    more = random_tensors({"rows": ("F32", (2, 16)), "new": ("F32", (3,))}, 5)
    aligned["model.embed_tokens.weight"] = "F32", (42, 16), aligned["model.embed_tokens.weight"][2] + more["rows"][2]
    aligned["turned"] = "F32", (4, 3), aligned["turned"][2]
    aligned["new"] = more["new"]
    weak, strong = write_folder(tmp_path / "s", sft), write_folder(tmp_path / "a", aligned)
    found = compare(weak, strong)
    assert found.warnings == (
        "1 tensor in sft alone: old",
        "1 tensor in aligned alone: new",
        "3 tensors of another shape in sft: model.embed_tokens.weight[40:42] (sft has F32 [40, 16]), "
        "turned (sft has F32 [3, 4]), model.embed_tokens.weight (rows 0 to 39; sft has F32 [40, 16])",
    )
    assert found.unpaired == (("new", "only in aligned"), ("old", "only in sft"))
    assert [tensor.elements for tensor in found.tensors] == [200, 640]
    assert [t.name for t in compare(weak, strong, on_mismatch="aligned").tensors] == ["x"]
    for option in ("on_unpaired", "on_mismatch"):
        with pytest.raises(PlanError):
            compare(weak, strong, **{option: "error"})


def test_dtypes_that_differ(tmp_path: Path) -> None:
    weak = write_folder(tmp_path / "s", random_tensors({"x": ("F32", (99,))}, 1))
    found = compare(weak, write_folder(tmp_path / "a", random_tensors({"x": ("BF16", (99,))}, 1)))
    assert warned(found) == "dtypes differ (F32 in sft and BF16 in aligned): what rounding changed counts as changed"


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, llama(1))
    for folder, tokens in ((weak, {"a": 0, "b": 1}), (strong, {"a": 1, "b": 0})):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    assert warned(compare(weak, strong)) == (
        "the tokenizers differ in 2 token ids (0 is 'a' in sft and 'b' in aligned; 1 is 'b' in sft and 'a' in "
        "aligned); rows of the embeddings are compared by id"
    )


@pytest.mark.parametrize(
    ("sft", "aligned", "says"),
    [
        ("mistral-dpo", "mistral-sft", "sft is called mistral-dpo and aligned mistral-sft"),
        ("Llama-3-8B-Instruct", "Llama-3-8B-base", "sft is called Llama-3-8B-Instruct and aligned Llama-3-8B-base"),
        ("sft", "dpo", ""),
        ("base", "base-chat", ""),
        ("x-Instruct", "x-Instruct-SimPO", ""),
        ("italian", "baseline", ""),
    ],
)
def test_names_that_speak_of_a_swap(sft: str, aligned: str, says: str, tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, llama(1))
    found = compare(weak.rename(tmp_path / sft), strong.rename(tmp_path / f"{aligned}_"))
    expected = f"the two may be swapped: {says}_. The weights alone cannot tell"
    assert found.warnings == ((expected,) if says else ())


@pytest.mark.parametrize("where", ["config", "card", "list"])
def test_files_that_speak_of_a_swap(where: str, tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, llama(1))
    (tmp_path / "org").mkdir()
    weak, strong = weak.rename(tmp_path / "two"), strong.rename(tmp_path / "org" / "one")
    if where == "config":
        (weak / "config.json").write_text(json.dumps({"_name_or_path": str(strong)}))
    else:
        text = "org/one" if where == "card" else "\n- org/one"
        (weak / "README.md").write_text(f"---\ntags: [x]\nbase_model: {text}\nlicense: mit\n---\n")
    assert warned(compare(weak, strong)).startswith(
        "the two may be swapped: sft's own files say that it was made from "
    )
    assert compare(strong, weak).warnings == ()


# --- what cannot be compared ------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, llama(1))
    with pytest.raises(UsageError, match="--aligned must be given"):
        compare(weak)
    with pytest.raises(CheckpointError, match="no such file"):
        compare(weak, tmp_path / "nothing")
    other = write_folder(tmp_path / "other", random_tensors({"else": ("F32", (3,))}, 1))
    with pytest.raises(PlanError, match="nothing to compare"):
        compare(weak, other)
    (strong / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PlanError, match="different architectures"):
        compare(weak, strong)


def test_progress_and_a_stop(tmp_path: Path) -> None:
    weak, strong = pair(tmp_path, llama(1))
    said: list[tuple[int, int]] = []
    found = compare(weak, strong, progress=lambda done, total: said.append((done, total)))
    assert said[-1] == (found.bytes_read, found.bytes_read)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(weak, strong, progress=stop)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A pair of 2 x 216 MiB, most of it one tensor."""
    for folder in "sa":
        sparse_file(tmp_path / f"{folder}.safetensors", {"x": ("BF16", (90, 1 << 20)), "y": ("F32", (9, 1 << 20))})
    code = (
        "import sys; from expo.diff import compare; compare('s.safetensors', 'a.safetensors');"
        "assert 'torch' not in sys.modules;"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120_000


# --- the command line -------------------------------------------------------------------------------------------------


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def run(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "expo.diff", *map(str, arguments)],
        env=env(),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


TABLE = """\
sft -> aligned
relative norm |aligned - sft| / |aligned|:
layers   q_proj   k_proj   v_proj   o_proj  gate_proj  up_proj  down_proj    norms      all
0        6.1e-3   6.7e-3   1.8e-2   1.9e-2     9.4e-3   9.6e-3     9.7e-3   1.6e-3   9.0e-3
1        8.6e-3   8.7e-3   1.1e-2   1.1e-2     9.2e-3   9.8e-3     9.9e-3   6.4e-4   9.4e-3
2        8.8e-3   8.8e-3   1.3e-2   1.2e-2     9.1e-3   9.8e-3     1.0e-2   1.1e-3   9.6e-3
3        9.2e-3   9.4e-3   1.2e-2   1.1e-2     8.6e-3   9.1e-3     9.4e-3   1.1e-3   9.1e-3
outside of layers: embeddings 6.3e-3, norms 0
most changed tensors:
  model.layers.0.self_attn.o_proj.weight   1.9e-2  1-cos  1.8e-4   91.4% changed
  model.layers.0.self_attn.v_proj.weight   1.8e-2  1-cos  1.6e-4   90.7% changed
  model.layers.2.self_attn.v_proj.weight   1.3e-2  1-cos  8.3e-5   87.5% changed
  model.layers.3.self_attn.v_proj.weight   1.2e-2  1-cos  7.6e-5   87.5% changed
  model.layers.2.self_attn.o_proj.weight   1.2e-2  1-cos  6.9e-5   86.0% changed
  model.layers.1.self_attn.v_proj.weight   1.1e-2  1-cos  6.3e-5   85.5% changed
in all: 38 tensors, 82.0% of 1,000,576 elements changed, max |difference| 0.00391
        relative norm 0.008283, cosine 0.999965698, 1-cos 3.43e-05, angle 0.475 degrees
        1 tensor the same in both, 0 in one alone, 0 not compared, 0 elements not finite
4.0 MB read in SECONDS
"""


def test_the_table_of_the_demo() -> None:
    code, out, err = run("--sft", SFT, "--aligned", ALIGNED)
    assert (code, err) == (0, "")
    assert re.sub(r"read in .*", "read in SECONDS", out) == TABLE


def test_json_on_stdout_and_in_a_file_is_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weak, strong = pair(tmp_path, {"x": ("F32", (9,)), "zero": ("F32", (3,))})
    write_folder(strong, {**random_tensors({"x": ("F32", (9,))}, 2), "zero": ("F32", (3,), bytes(12))})
    out = tmp_path / "report.json"
    assert main(["--sft", str(weak), "--aligned", str(strong), "--json", "--quiet", "--out", str(out)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out, parse_constant=lambda constant: pytest.fail(constant))
    assert found == json.loads(out.read_text())
    assert found["tensors"][1]["relative_norm"] is None
    assert found["tensors"][0]["relative_norm"] == compare(weak, strong).tensors[0].relative_norm
    assert "expo: warning: aligned - sft is" in said.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(*pair(tmp_path, llama(1)))
    (tmp_path / "x.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        report.write(found, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "sft", "x.json"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_large_model_fits_a_screen(width: int, tmp_path: Path) -> None:
    lines = list(table(compare(*pair(tmp_path, llama(80))), width))
    assert len(lines) <= 45
    assert max(map(len, lines[:19])) <= width
    assert lines[3].startswith("0-4 ")
    assert ("others" in lines[2]) == (width < 100)


def test_each_stack_has_a_table_of_its_own(tmp_path: Path) -> None:
    names = [f"{s}.block.{i}.layer.0.{s}Attention.q.weight" for s in ("encoder", "decoder") for i in range(2)]
    shapes: Shapes = dict.fromkeys(names, ("F32", (8, 8)))
    lines = list(table(compare(*pair(tmp_path, shapes)), 80))
    assert [line.split() for line in (lines[2], lines[5])] == [
        ["encoder.block", "q", "all"],
        ["decoder.block", "q", "all"],
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--sft and --aligned must be given"),
        (["--sft", SFT, "--aligned", "/no/such/place"], 3, "no such file"),
        (["--sft", SFT, "--aligned", ALIGNED, "--out", "x.gif"], 2, "ends in .png, .svg, .pdf, .json"),
        (["--sft", SFT, "--aligned", ALIGNED, "--out", "/no/such/x.json"], 4, "there is no folder /no/such"),
        (["--sft", SFT, "--aligned", ALIGNED, "--out", f"{ALIGNED}/config.json"], 4, "inside, the input"),
    ],
)
def test_errors(arguments: list[object], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(map(str, arguments))) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("expo: error: ")
    assert says in said.err


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> Comparison:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "compare", interrupted)
    assert main(["--sft", str(SFT), "--aligned", str(ALIGNED)]) == 130
    assert capsys.readouterr().err.endswith("expo: interrupted; nothing was left behind\n")


def test_a_bug_of_a_worker_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[None]:
        raise RuntimeError("no")

    monkeypatch.setattr(distance.Meter, "blocks", fails)
    with pytest.raises(EngineError, match="no"):
        compare(*pair(tmp_path, llama(1)))


def test_help_is_light() -> None:
    code = (
        "import sys; from expo.diff.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'numpy', 'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env(), capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


# --- the picture ------------------------------------------------------------------------------------------------------


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(*pair(tmp_path, llama(1)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        heatmap.heat_map(found, "png")
    monkeypatch.setattr(report, "_has_matplotlib", lambda: False)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        report.check_report("x.png")
    report.write(found, tmp_path / "x.json")


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures(suffix: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"report.{suffix}"
    out.write_bytes(b"old")
    assert main(["--sft", str(SFT), "--aligned", str(ALIGNED), "--quiet", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(begins)


def figure(found: Comparison) -> Any:
    figures, colors = pytest.importorskip("matplotlib.figure"), pytest.importorskip("matplotlib.colors")
    return heatmap._Sheet(figures.Figure, colors, found, *heatmap._panels(found)).draw()


def test_no_label_overlaps_another(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    small, large = (compare(*pair(tmp_path / str(n), llama(n), but=r"layers\.0\.")) for n in (2, 80))
    modules = [f"{i}.layer.0.{m}.{q}" for i in range(12) for m in ("SelfAttention", "EncDecAttention") for q in "qkvo"]
    many = {f"{s}.block.{each}.weight": ("F32", (4, 4)) for s in ("encoder", "decoder") for each in modules}
    long = replace(small, sft="organisation/" + "a-long-name-" * 6, aligned="organisation/" + "$another$-" * 7)
    for found in (small, large, long, compare(*pair(tmp_path / "t5", many))):
        drawn = figure(found)
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        texts = [text for text in _texts(drawn) if text.get_text().strip()]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
        inside = drawn.bbox
        for i, (text, box) in enumerate(boxes):
            assert min(box.x0, box.y0) >= 0, text
            assert (box.x1 <= inside.x1, box.y1 <= inside.y1) == (True, True), text
            assert [other for other, at in boxes[:i] if box.overlaps(at)] == [], text


def _texts(drawn: Any) -> list[Any]:
    found = list(drawn.texts)
    for axes in drawn.axes:
        found += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        found += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    return [text for text in found if text.get_visible()]


def test_nothing_to_colour(tmp_path: Path) -> None:
    """Equal models, and one without layers."""
    pytest.importorskip("matplotlib")
    for k, shapes in enumerate((llama(1), {"x": ("F32", (3,))})):
        found = compare(*pair(tmp_path / str(k), shapes, but=""))
        assert heatmap.heat_map(found, "png").startswith(b"\x89PNG")
