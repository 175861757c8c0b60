"""Merges and streams of unusual checkpoints: .bin files, resized vocabularies, other dtypes, ties and new shards.

The tests compute the expected tensors in NumPy, from the formula alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    ODD_SHAPES,
    Tensors,
    contents,
    fingerprint,
    random_tensors,
    read_file,
    read_folder,
    write_folder,
)
from torch_files import STORAGE, TORCH, wide, write_bin

import expo
import expo.execution.worker_pool
import expo.tensors.streaming
from expo.merging import rank_worker
from expo.output import journal

ROOT = Path(__file__).parents[2]
FLOATS = ("BF16", "F16", "F32", "F64")
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
Pair = tuple[Path, Path]
Made = dict[str, tuple[str, tuple[int, ...], bytes]]
Shapes = dict[str, tuple[str, tuple[int, ...]]]


# --- expected tensors -------------------------------------------------------------------------------------------------


def rounded(values: Any, dtype: str) -> bytes:
    """Round float64 once to the nearest value of a dtype, ties to even, in whole steps of each value's binade."""
    bits, least, most = {
        "BF16": (8, -126, 127),
        "F16": (11, -14, 15),
        "F32": (24, -126, 127),
        "F64": (53, -1022, 1023),
    }[dtype]
    _, exponent = np.frexp(values)
    step = np.maximum(exponent - 1, least) - (bits - 1)
    with np.errstate(over="ignore"):
        near = np.ldexp(np.rint(np.ldexp(values, -step)), step) if dtype != "F64" else values
    if dtype != "F64":
        near = np.where(np.abs(near) >= 2.0 ** (most + 1), np.copysign(np.inf, near), near)
    if dtype == "BF16":
        return bytes((near.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())
    return bytes(near.astype(STORAGE[dtype]).tobytes())


def evaluated(sft: bytes, s: str, aligned: bytes, a: str, alpha: float, to: str) -> bytes:
    """Return aligned + alpha * (aligned - sft), each operation in fp32, or in fp64 if an input is fp64."""
    work: Any = np.float64 if "F64" in (s, a) else np.float32
    if not alpha:
        return aligned if a == to else rounded(wide(aligned, a), to)
    x, y = (wide(data, dtype).astype(work) for data, dtype in ((aligned, a), (sft, s)))
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded((x + work(alpha) * (x - y)).astype(np.float64), to)


def expected(sft: Tensors, aligned: Tensors, alpha: float, dtype: str | None = None) -> Made:
    """Return the expected output; of tensors with different numbers of rows, the common rows are extrapolated."""
    tensors: Made = {}
    for name, (kind, shape, data) in aligned.items():
        to = DTYPES[dtype] if dtype and kind in FLOATS else kind
        if kind not in FLOATS:
            tensors[name] = kind, shape, data
            continue
        other, counterpart_shape, counterpart = sft[name]
        rows = shape[0] if shape else 1
        both = min(rows, counterpart_shape[0]) if shape else 1
        cut, end = (
            len(d) // max(n, 1) * both for d, n in ((counterpart, counterpart_shape[0] if shape else 1), (data, rows))
        )
        parts = [evaluated(counterpart[:cut], other, data[:end], kind, alpha, to)]
        parts.append(data[end:] if kind == to else rounded(wide(data[end:], kind), to))
        tensors[name] = to, shape, b"".join(parts)
    return tensors


def raw(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Return a streamed tensor in the form of `expected`."""
    dtype = next(name for name, kind in TORCH.items() if kind == tensor.dtype)
    return dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def streamed(*arguments: Any, **options: Any) -> Made:
    return {name: raw(tensor) for name, tensor in expo.stream(*arguments, **options)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small chunks everywhere, and record each at once."""
    monkeypatch.setattr(expo.execution.worker_pool, "CHUNK", 4096)
    monkeypatch.setattr(expo.tensors.streaming, "CHUNK", 1032)
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    monkeypatch.setattr(expo.execution.worker_pool, "TICK", 0.001)


# --- .bin files -------------------------------------------------------------------------------------------------------

MIXED: Shapes = {
    **{f"{a}.{s}": (a, (13, 11)) for a in FLOATS for s in FLOATS}, **ODD_SHAPES, "shared": ("BF16", (9, 8)),
    "cut": ("F32", (40, 7)), "deep": ("F16", (5, 6, 7)),
}  # fmt: skip


def write(folder: Path, tensors: Tensors, form: str) -> Path:
    kind, _, shards = form.partition(" ")
    if kind == "safetensors":
        return write_folder(folder, tensors, int(shards or 0))
    return write_bin(folder, tensors, int(shards or 0), kind == "zip")


def mixed(seed: int) -> Tensors:
    """Return sft's tensors for the seed 1, with the second dtype of each name, and aligned's for another seed."""
    counterparts = {
        name: (name.partition(".")[2] or kind if seed == 1 else kind, shape) for name, (kind, shape) in MIXED.items()
    }
    tensors = dict(random_tensors(counterparts, seed))
    tensors["shared.too"] = tensors["shared"]
    return tensors


WEIGHTS = {
    "": {"model.safetensors"},
    "2": {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
}


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
@pytest.mark.parametrize(
    "forms",
    [
        ("zip", "zip"), ("zip", "safetensors 2"), ("safetensors", "zip 2"), ("legacy", "legacy 2"),
        ("legacy 3", "safetensors"), ("zip 3", "legacy"),
    ],
    ids=" and ".join,
)  # fmt: skip
def test_bin_files(tmp_path: Path, small: None, forms: tuple[str, str], engine: str) -> None:
    sft, aligned = mixed(1), mixed(2)
    pair = write(tmp_path / "sft", sft, forms[0]), write(tmp_path / "aligned", aligned, forms[1])
    before = fingerprint(*pair)
    merged = expo.merge(*pair, [0.3, 0.0], tmp_path / "out{alpha}", engine=engine, verify=True, digest=True)
    for alpha in (0.3, 0.0):
        out = tmp_path / f"out{alpha:g}"
        assert read_folder(out) == expected(sft, aligned, alpha)
        assert streamed(*pair, alpha, engine=engine) == expected(sft, aligned, alpha)
        weights = WEIGHTS[forms[1].partition(" ")[2]]
        assert set(os.listdir(out)) == {"config.json", "README.md", "SHA256SUMS", *weights}
        for line in (out / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split("  ")
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        if len(weights) > 1:
            index = json.loads((out / "model.safetensors.index.json").read_text())
            files = {name: file for file in weights if file.startswith("model-") for name in read_file(out / file)}
            assert index["weight_map"] == files
            assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in aligned.values())
    assert merged.bytes_written == sum(path.stat().st_size for path in tmp_path.glob("out*/*.safetensors"))
    assert fingerprint(*pair) == before


def test_what_does_not_lie_in_one_piece_is_read_as_numpy_streams_it(tmp_path: Path) -> None:
    sft, aligned = mixed(1), mixed(2)
    pair = write(tmp_path / "sft", sft, "zip"), write(tmp_path / "aligned", aligned, "legacy")
    arrays = dict(expo.stream(*pair, 0.3, framework="numpy"))
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: data for name, (_, _, data) in expected(sft, aligned, 0.3).items()
    }


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_bare_bin_file_gives_a_bare_safetensors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    sft, aligned = mixed(1), mixed(2)
    files = [
        (write(tmp_path / name, tensors, "zip") / "pytorch_model.bin").rename(tmp_path / f"{name}-7b{suffix}")
        for name, tensors in (("sft", sft), ("aligned", aligned))
    ]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merged = expo.merge(*files, 0.3)
    assert merged.outputs[0].path == "aligned-7b-expo-0.3.safetensors"
    assert os.listdir() == ["aligned-7b-expo-0.3.safetensors"]
    assert read_file(Path(merged.outputs[0].path)) == expected(sft, aligned, 0.3) == streamed(*files, 0.3)
    with pytest.raises(
        expo.UsageError, match=f"^`max_shard_size='1MB'` makes shards, but aligned {files[1]} is one bare"
    ):
        expo.merge(*files, 0.3, max_shard_size="1MB")


def test_safetensors_come_before_bin_and_bin_files_stay_behind(tmp_path: Path) -> None:
    sft, aligned, other = mixed(1), mixed(2), mixed(3)
    pair = write(tmp_path / "sft", sft, "zip"), write(tmp_path / "aligned", other, "zip")
    write_folder(pair[1], aligned)
    merged = expo.merge(*pair, 0.3, tmp_path / "out")
    assert read_folder(tmp_path / "out") == expected(sft, aligned, 0.3) == streamed(*pair, 0.3)
    assert merged.left_out == (("pytorch_model.bin", "weights in another form, or training state"),)


# This program prints how much more memory merges and streams take for .bin files of 400 MB than for tiny ones.
PEAKS = """
import sys
import expo

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

def work(folder):
    expo.merge(f"{folder}/sft.bin", f"{folder}/aligned.bin", [0.3, 0.5], f"{folder}/out{{alpha}}", dtype=sys.argv[2])
    return peak(), sum(tensor.nbytes for _, tensor in expo.stream(
        f"{folder}/sft.bin", f"{folder}/aligned.bin", 0.3, framework="numpy"))

work(sys.argv[1] + "/tiny")
before = peak()
merged, total = work(sys.argv[1] + "/huge")
print(before, merged - before, peak() - before, total)
"""


@pytest.mark.skipif(not hasattr(torch.serialization, "skip_data"), reason="torch before 2.6")
def test_memory_does_not_grow_with_a_bin_file(tmp_path: Path) -> None:
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    for place, rows in (("tiny", 8), ("huge", 2048)):
        (tmp_path / place).mkdir()
        for name in ("sft", "aligned"):
            with fake.FakeTensorMode():
                state = {f"w{i}": torch.empty((rows, 2560), dtype=torch.bfloat16) for i in range(40)}
            state["turned"] = state["w0"].t() if name == "sft" else state["w0"].view(2560, rows)
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(state, tmp_path / place / f"{name}.bin")
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, tmp_path, "fp16"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, merged, both, total = map(int, done.stdout.split())
    for path in tmp_path.glob("huge/*"):
        path.unlink()
    assert total > 400e6
    assert 20e6 < before < 150e6
    assert merged < 100e6, "of the merge"
    assert both < 150e6, "of the stream too"


# --- a vocabulary that was resized ------------------------------------------------------------------------------------

ROWS_ALIGNED: Shapes = {
    "grown": ("BF16", (12, 4)), "shrunk": ("BF16", (10, 4)), "bias": ("F32", (9,)), "body": ("F16", (6, 5)),
    "wide.grown": ("BF16", (300, 37)), "wide.shrunk": ("F32", (211, 37)), "cube": ("F16", (70, 9, 8)),
    "count": ("I64", (5,)),
}  # fmt: skip
ROWS_SFT: Shapes = {
    **ROWS_ALIGNED, "grown": ("BF16", (10, 4)), "shrunk": ("BF16", (12, 4)), "bias": ("F32", (5,)),
    "wide.grown": ("BF16", (211, 37)), "wide.shrunk": ("F16", (300, 37)), "cube": ("F64", (33, 9, 8)),
}  # fmt: skip
NOTED = {
    "grown[0:10]": "sft has BF16 [10, 4]", "shrunk": "sft has BF16 [12, 4]", "bias[0:5]": "sft has F32 [5]",
    "wide.grown[0:211]": "sft has BF16 [211, 37]", "wide.shrunk": "sft has F16 [300, 37]",
    "cube[0:33]": "sft has F64 [33, 9, 8]",
}  # fmt: skip
COPIED = {
    "grown[10:12]": "sft has BF16 [10, 4]", "bias[5:9]": "sft has F32 [5]",
    "wide.grown[211:300]": "sft has BF16 [211, 37]", "cube[33:70]": "sft has F64 [33, 9, 8]",
    "count": "I64 is not a floating-point dtype",
}  # fmt: skip


def in_common() -> dict[str, int]:
    """Return the number of elements of each floating-point tensor in the common rows."""
    return {
        name: math.prod((min(shape[0], ROWS_SFT[name][1][0]), *shape[1:]))
        for name, (kind, shape) in ROWS_ALIGNED.items()
        if kind in FLOATS
    }


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("resized")
    sft = write_folder(folder / "sft", random_tensors(ROWS_SFT, 1), 2, pad=1)
    return sft, write_folder(folder / "aligned", random_tensors(ROWS_ALIGNED, 2), 3)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
@pytest.mark.parametrize("engine", ["cpu", "numpy"])
def test_the_rows_that_both_have_are_extrapolated(
    tmp_path: Path, small: None, resized: Pair, engine: str, dtype: str | None
) -> None:
    sft, aligned = map(read_folder, resized)
    options: dict[str, Any] = {"on_mismatch": "rows", "engine": engine, "dtype": dtype}
    merged = expo.merge(*resized, [0.3, -1.5, 0], tmp_path / "{alpha}", verify=True, digest=True, **options)
    for alpha in (0.3, -1.5, 0):
        out = read_folder(tmp_path / f"{alpha:g}")
        assert out == expected(sft, aligned, alpha, dtype)
        if dtype is None:
            assert all(out[name][2][-row:] == aligned[name][2][-row:] for name, row in (("grown", 16), ("bias", 16)))
        assert streamed(*resized, alpha, **options) == out
        listed = [line.split("  ")[1] for line in (tmp_path / f"{alpha:g}" / "SHA256SUMS").read_text().splitlines()]
        assert set(listed) == set(os.listdir(tmp_path / f"{alpha:g}")) - {"SHA256SUMS"}
    assert dict(merged.noted) == NOTED
    assert dict(merged.copied) == COPIED
    assert merged.extrapolated == len(ROWS_ALIGNED) - 1
    counterparts = sum(np.dtype(STORAGE[ROWS_SFT[name][0]]).itemsize * n for name, n in in_common().items())
    assert merged.bytes_read == sum(len(data) for _, _, data in aligned.values()) + counterparts


def test_statistics_are_those_of_the_rows_that_both_have(tmp_path: Path, small: None, resized: Pair) -> None:
    merged = expo.merge(*resized, 0.3, tmp_path / "out", on_mismatch="rows")
    sft, aligned, out = map(read_folder, (*resized, tmp_path / "out"))
    a, s, o = [], [], []
    for name, n in in_common().items():
        for into, place in ((a, aligned), (s, sft), (o, out)):
            into.append(wide(place[name][2], place[name][0])[:n])
    x, y, z = map(np.concatenate, (a, s, o))
    assert merged.outputs[0].changed == pytest.approx(np.count_nonzero(z != x) / x.size, rel=1e-12)
    assert merged.relative_distance == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-5)
    assert merged.max_abs_difference == pytest.approx(np.abs(x - y).max(), rel=1e-6)


def test_other_ways_to_treat_rows(tmp_path: Path, resized: Pair) -> None:
    sft, aligned = map(read_folder, resized)
    kept = {name for name, (_, shape, _) in aligned.items() if sft[name][1] != shape}
    options: dict[str, Any] = {"on_mismatch": "aligned"}
    merged = expo.merge(*resized, 0.3, tmp_path / "out", **options)
    assert merged.warnings[0].startswith(
        "100% of the floating-point bytes are copied from aligned and not extrapolated"
    )
    found = read_folder(tmp_path / "out")
    with pytest.warns(UserWarning, match="100% of the floating-point bytes are copied"):
        assert found == streamed(*resized, 0.3, **options)
    assert {name for name in found if found[name] == aligned[name]} == kept | {"count"}
    for work in (lambda: expo.merge(*resized, 0.3, tmp_path / "new"), lambda: expo.stream(*resized, 0.3)):
        with pytest.raises(expo.PlanError) as caught:
            work()
        first, *rest = str(caught.value).splitlines()
        assert first == (
            "6 tensors whose counterpart has another shape; they are most of the model: sft and aligned look like "
            "models of different sizes:"
        )
        assert len(rest) == 6
        assert "  grown: sft BF16 [10, 4], aligned BF16 [12, 4]" in rest
    rules = {"wide": 0.0, "grown": 0.9, "bias": 0.0}
    options = {"on_mismatch": "rows", "alpha_for": rules}
    expo.merge(*resized, 0.3, tmp_path / "ruled", **options)
    found = read_folder(tmp_path / "ruled")
    assert found == streamed(*resized, 0.3, **options)
    assert found["grown"] == expected(sft, aligned, 0.9)["grown"]
    assert found["wide.grown"] == expected(sft, aligned, 0.9)["wide.grown"]
    assert (found["wide.shrunk"], found["bias"]) == (aligned["wide.shrunk"], aligned["bias"])


def test_rows_are_of_no_help_where_something_else_differs(tmp_path: Path) -> None:
    body: Shapes = {"w": ("BF16", (30, 3))}
    sft = write_folder(tmp_path / "sft", random_tensors({**body, "e": ("BF16", (4, 5)), "i": ("I64", (3,))}, 1))
    aligned = write_folder(tmp_path / "aligned", random_tensors({**body, "e": ("BF16", (4, 6)), "i": ("I64", (4,))}, 2))
    for work in (expo.stream, lambda *pair, **more: expo.merge(*pair, tmp_path / "out", **more)):
        with pytest.raises(expo.PlanError) as caught:
            work(sft, aligned, 0.3, on_mismatch="rows")
        assert str(caught.value).splitlines() == [
            "2 tensors whose counterpart has another shape; `on_mismatch='aligned'` keeps aligned's tensors:",
            "  e: sft BF16 [4, 5], aligned BF16 [4, 6]",
            "  i: sft I64 [3], aligned I64 [4]",
        ]


# --- resume -----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The exception with which a test interrupts a merge."""


def interrupted(monkeypatch: pytest.MonkeyPatch, chunks: int, *arguments: Any, **options: Any) -> None:
    """Start a merge, and interrupt it after this many written chunks."""
    sink, seen = rank_worker.RankWorker._write, iter(range(10**6))

    def failing(self: Any, *chunk: Any) -> None:
        if next(seen) >= chunks:
            raise Stop
        sink(self, *chunk)

    with monkeypatch.context() as patch:
        patch.setattr(rank_worker.RankWorker, "_write", failing)
        with pytest.raises(Stop):
            expo.merge(*arguments, **options)


CHANGES: list[dict[str, Any]] = [
    {"on_mismatch": "rows"},
    {"on_mismatch": "rows", "dtype": "fp16"},
    {"on_mismatch": "rows", "max_shard_size": "9KB"},
    {"on_mismatch": "rows", "dtype": "bf16", "max_shard_size": 12000},
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
@pytest.mark.parametrize("chunks", [12, 20])  # two outputs and at most 8 workers: some chunks are complete in both
def test_resume_makes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, resized: Pair, options: dict[str, Any], chunks: int
) -> None:
    work = (*resized, [0.3, 1], tmp_path / "{alpha}")
    interrupted(monkeypatch, chunks, *work, **options)
    resumed = expo.merge(*work, **options, resume=True, verify=True)
    assert resumed.resumed > 0
    plain = expo.merge(*resized, [0.3, 1], tmp_path / "plain" / "{alpha}", **options)
    for alpha in ("0.3", "1"):
        assert contents(tmp_path / alpha) == contents(tmp_path / "plain" / alpha)
    assert [each.changed for each in resumed.outputs] == [each.changed for each in plain.outputs]
    assert resumed.relative_distance == plain.relative_distance


def test_resume_from_bin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    pair = write(tmp_path / "sft", mixed(1), "legacy"), write(tmp_path / "aligned", mixed(2), "zip 2")
    interrupted(monkeypatch, 5, *pair, 0.3, tmp_path / "out")
    assert expo.merge(*pair, 0.3, tmp_path / "out", resume=True).resumed > 0
    assert read_folder(tmp_path / "out") == expected(mixed(1), mixed(2), 0.3)
    interrupted(monkeypatch, 5, *pair, 0.3, tmp_path / "new")
    os.utime(pair[1] / "pytorch_model-00002-of-00002.bin", (1, 1))
    message = r"aligned: another size, time of change or header of pytorch_model-00002-of-00002\.bin\): choose"
    with pytest.raises(expo.OutputError, match=message):
        expo.merge(*pair, 0.3, tmp_path / "new", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp16"}, '--dtype was null, is "fp16"'),
        ({"max_shard_size": "9KB"}, '--max-shard-size was null, is "9KB"'),
        ({"on_mismatch": "aligned"}, '--on-mismatch was "rows", is "aligned"'),
    ],
)
def test_a_merge_with_another_option_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, resized: Pair, change: dict[str, Any], message: str
) -> None:
    interrupted(monkeypatch, 5, *resized, 0.3, tmp_path / "out", on_mismatch="rows")
    before = fingerprint(tmp_path)
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(*resized, 0.3, tmp_path / "out", **{"on_mismatch": "rows", **change}, resume=True)
    assert f"holds another merge ({message}" in str(caught.value)
    assert str(caught.value).endswith("choose another `out`, or `overwrite=True` starts anew")
    assert fingerprint(tmp_path) == before


# --- dtypes -----------------------------------------------------------------------------------------------------------

DTYPE_SHAPES: Shapes = {**{f"{a}.{s}": (a, (29, 17)) for a in FLOATS for s in FLOATS}, **ODD_SHAPES}
# Ties, subnormal numbers of each dtype, and the limits of their ranges.
EDGES = (
    1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12, 1 + 3 * 2**-12, 1 + 2**-9 + 2**-40, 65504, 65519.9, 65520, 1e-7, 6e-8, 2.9e-8,
    2.0**-133, 2.0**-134, 1.5 * 2**-133, 1e-40, 3.3e38, 3.39e38, -0.0, 0.0, 1e30,
)  # fmt: skip


def odd_numbers(seed: int) -> Tensors:
    """Return normal weights that begin with numbers at which a conversion could go wrong."""
    counterparts = {
        name: (name.partition(".")[2] or kind if seed == 1 else kind, shape)
        for name, (kind, shape) in DTYPE_SHAPES.items()
    }
    tensors = dict(random_tensors(counterparts, seed))
    for name, (kind, shape, data) in tensors.items():
        if kind in FLOATS and len(data) > 800:
            values = wide(data, kind).copy()
            edges = np.array(EDGES) * (1 if seed == 2 else 0.875)
            values[: 2 * len(edges)] = [*edges, *-edges]
            if kind == "F16":
                values = np.clip(values, -65504, 65504)
            tensors[name] = kind, shape, rounded(values, kind)
    return tensors


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("odd")
    config = {
        "model_type": "llama",
        "torch_dtype": "float64",
        "text_config": {"dtype": "float64", "n": 1},
        "dtypes": "x",
    }
    sft = write_folder(folder / "sft", odd_numbers(1), 2)
    return sft, write_folder(folder / "aligned", odd_numbers(2), 3, config)


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_every_dtype_is_rounded_once(tmp_path: Path, small: None, odd: Pair, dtype: str | None, engine: str) -> None:
    sft, aligned = map(read_folder, odd)
    alphas = [0.3, -0.25, 0.0]
    merged = expo.merge(*odd, alphas, tmp_path / "{alpha}", dtype=dtype, engine=engine, verify=True)
    for alpha, output in zip(alphas, merged.outputs, strict=True):
        out, tensors = read_folder(Path(output.path)), expected(sft, aligned, alpha, dtype)
        assert out.keys() == tensors.keys()
        assert [name for name in out if out[name] != tensors[name]] == []
        assert streamed(*odd, alpha, dtype=dtype, engine=engine) == tensors
        config = json.loads((Path(output.path) / "config.json").read_text())
        name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", None: "float64"}[dtype]
        assert config == {
            "model_type": "llama", "torch_dtype": name, "text_config": {"dtype": name, "n": 1}, "dtypes": "x",
        }  # fmt: skip
        if not alpha:
            continue
        floats = [each for each, (kind, _, _) in aligned.items() if kind in FLOATS]
        written = expected(sft, aligned, 0.0, dtype)  # `changed` does not count the conversion's changes
        a = np.concatenate([wide(written[each][2], written[each][0]) for each in floats])
        o = np.concatenate([wide(out[each][2], out[each][0]) for each in floats])
        assert output.changed == pytest.approx(np.count_nonzero(o != a) / a.size, rel=1e-12)
        assert output.non_finite == np.count_nonzero(~np.isfinite(o))
        assert output.non_finite > 0 or dtype != "fp16"


def test_overflow_of_a_conversion_is_counted_and_warned_of(tmp_path: Path) -> None:
    numbers = np.array([1e5, -7e4, 65519, 1, np.nan, np.inf, 0, 2], "<f4").tobytes()
    aligned = write_folder(tmp_path / "aligned", {"w": ("F32", (8,), numbers), "n": ("I64", (1,), b"\xff" * 8)})
    sft = write_folder(tmp_path / "sft", {"w": ("F32", (8,), numbers), "n": ("I64", (1,), bytes(8))})
    merged = expo.merge(sft, aligned, 0.5, tmp_path / "out", dtype="fp16")
    out = read_folder(tmp_path / "out")
    values = np.frombuffer(out["w"][2], "<f2")
    assert values[[0, 1, 2, 3, 5, 6, 7]].tolist()[:4] == [np.inf, -np.inf, 65504, 1]
    assert np.isnan(values[[4, 5]]).all()  # inf - inf
    assert out["n"] == ("I64", (1,), b"\xff" * 8)
    assert merged.outputs[0].non_finite == 4
    assert merged.warnings[-1] == "4 elements of an output are inf or NaN"


def test_dtype_of_a_model_without_a_config_or_without_a_dtype_in_it(tmp_path: Path) -> None:
    shapes: Shapes = {"w": ("BF16", (4, 4))}
    sft = write_folder(tmp_path / "sft", random_tensors(shapes, 1))
    aligned = write_folder(tmp_path / "aligned", random_tensors(shapes, 2), config={"a": [1]})
    expo.merge(sft, aligned, 0.3, tmp_path / "out", dtype="fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": [1], "torch_dtype": "float32"}
    (aligned / "config.json").unlink()
    expo.merge(sft, aligned, 0.3, tmp_path / "bare", dtype="fp32")
    assert set(os.listdir(tmp_path / "bare")) == {"README.md", "model.safetensors"}


@pytest.mark.parametrize("dtype", ["BF16", "float16", "int8", ""])
def test_a_dtype_that_is_none(tmp_path: Path, odd: Pair, dtype: str) -> None:
    for work in (expo.stream, lambda *pair, **more: expo.merge(*pair, tmp_path / "out", **more)):
        with pytest.raises(expo.UsageError, match=f"^`dtype` must be one of bf16, fp16, fp32, got '{dtype}'$"):
            work(*odd, 0.3, dtype=dtype)


# --- with transformers ------------------------------------------------------------------------------------------------

LLAMA = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
}  # fmt: skip


def llama(seed: int, tied: bool = False) -> Any:
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save_bin(model: Any, folder: Path, drop: Sequence[str] = (), shards: int = 1) -> Path:
    """Save a model as transformers did before it supported safetensors."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in drop}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        weight_map |= dict.fromkeys(list(state)[i::shards], file)
        torch.save({name: state[name] for name in list(state)[i::shards]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries warn
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def in_memory(sft: Any, aligned: Any, alpha: float, tied: bool = False) -> Any:
    """Return a third model with the weights aligned + alpha * (aligned - sft)."""
    model = llama(0, tied)
    with torch.no_grad():
        for out, s, a in zip(model.parameters(), sft.parameters(), aligned.parameters(), strict=True):
            out.copy_(torch.from_numpy(a.numpy() + np.float32(alpha) * (a.numpy() - s.numpy())))
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Save a tiny Llama as .bin, sft in one file and aligned in three."""
    folder = tmp_path_factory.mktemp("models")
    sft, aligned = llama(1), llama(2)
    save_bin(sft, folder / "sft")
    save_bin(aligned, folder / "aligned", shards=3)
    return folder, sft, aligned


def test_transformers_loads_what_was_made_of_bin_files(tmp_path: Path, models: tuple[Path, Any, Any]) -> None:
    folder, sft, aligned = models
    expo.merge(folder / "sft", folder / "aligned", 0.3, tmp_path / "out")
    assert not list(tmp_path.rglob("*.bin*"))
    expected_model = in_memory(sft, aligned, 0.3)
    model = load(tmp_path / "out", dtype="auto")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), expected_model.parameters(), strict=True))
    assert torch.equal(logits(model), logits(expected_model))
    state = dict(expo.stream(folder / "sft", folder / "aligned", 0.3))
    model = llama(5)
    model.load_state_dict(state, strict=True)
    assert torch.equal(logits(model), logits(expected_model))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_transformers_takes_the_dtype_from_the_config(
    tmp_path: Path, models: tuple[Path, Any, Any], dtype: str
) -> None:
    folder, sft, aligned = models
    expo.merge(folder / "sft", folder / "aligned", 0.3, tmp_path / "out", dtype=dtype, max_shard_size="20KB")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model, expected_model = load(tmp_path / "out", dtype="auto"), in_memory(sft, aligned, 0.3).to(kind)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), expected_model.parameters(), strict=True))
    found = dict(expo.stream(folder / "sft", folder / "aligned", 0.3, dtype=dtype))
    assert {tensor.dtype for tensor in found.values()} == {kind}
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("most", ["9KB", 1, "1GB"])
def test_transformers_loads_new_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, models: tuple[Path, Any, Any], most: str | int
) -> None:
    folder, sft, aligned = models
    work = (folder / "sft", folder / "aligned", [0.3, 1], tmp_path / "{alpha}")
    interrupted(monkeypatch, 20, *work, max_shard_size=most)
    assert expo.merge(*work, max_shard_size=most, resume=True).resumed > 0
    for alpha in ("0.3", "1"):
        out = tmp_path / alpha
        files = sorted(path.name for path in out.glob("*.safetensors"))
        tensors = len(sft.state_dict())
        if most == "1GB":
            assert files == ["model.safetensors"]
            assert not (out / "model.safetensors.index.json").exists()
        else:
            assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
            assert len(files) == tensors if most == 1 else 3 < len(files) < tensors
            found = [read_file(out / name) for name in files]
            sizes = [sum(len(data) for _, _, data in each.values()) for each in found]
            assert all(size <= 9000 or len(each) == 1 for size, each in zip(sizes, found, strict=True))
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(sizes)
            assert set(index["weight_map"].values()) == set(files)
        wanted = in_memory(sft, aligned, float(alpha))
        model = load(out)
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("most", ["", "0", "5 GBs", "-1", -1, 0, "GB", "1e3", "nan", True])
def test_a_shard_size_that_is_none(tmp_path: Path, models: tuple[Path, Any, Any], most: Any) -> None:
    with pytest.raises(expo.UsageError) as caught:
        expo.merge(models[0] / "sft", models[0] / "aligned", 0.3, tmp_path / "out", max_shard_size=most)
    assert str(caught.value) == f"`max_shard_size` takes bytes, or a size such as 5GB or 500MiB, got {most!r}"


HEAD = "lm_head.weight"


@pytest.mark.parametrize("lacking", [(), ("sft",), ("aligned",), ("sft", "aligned")], ids=" ".join)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_tied_head_may_be_there_or_not(tmp_path: Path, lacking: tuple[str, ...], form: str) -> None:
    made = {"sft": llama(1, tied=True), "aligned": llama(2, tied=True)}
    for name, model in made.items():
        drop = [HEAD] if name in lacking else []
        save_bin(model, tmp_path / name, drop)
        if form == "safetensors":
            from safetensors.torch import save_file

            state = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in drop}
            save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
            (tmp_path / name / "pytorch_model.bin").unlink()
    merged = expo.merge(tmp_path / "sft", tmp_path / "aligned", 0.3, tmp_path / "out")
    expected_model = in_memory(made["sft"], made["aligned"], 0.3, tied=True)
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(expected_model))
    tensors = read_folder(tmp_path / "out")
    assert (HEAD in tensors) is ("aligned" not in lacking)
    if HEAD in tensors:
        assert tensors[HEAD] == tensors["model.embed_tokens.weight"]
    assert tensors == streamed(tmp_path / "sft", tmp_path / "aligned", 0.3)
    tie = "ties it to model.embed_tokens.weight"
    assert merged.dropped == (((HEAD, f"aligned {tie}"),) if lacking == ("aligned",) else ())
    assert merged.noted == (((HEAD, f"sft {tie}"),) if lacking == ("sft",) else ())


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer(*tokens: str) -> str:
    added = [{"id": len(tokens), "content": "<end>"}]
    return json.dumps({"model": {"vocab": {token: i for i, token in enumerate(tokens)}}, "added_tokens": added})


DIFFER = (
    "the tokenizers differ in 3 token ids (1 is 'b' in sft and 'x' in aligned; 3 is '<end>' in sft and 'd' in aligned; "
    "1 in aligned alone, the first of them 4 '<end>'): rows of the embeddings are extrapolated by id"
)


@pytest.fixture
def tokens(tmp_path: Path) -> Pair:
    """Write a pair whose tokenizers differ."""
    shapes: Shapes = {"w": ("BF16", (4, 4))}
    sft = write_folder(tmp_path / "sft", random_tensors(shapes, 1))
    aligned = write_folder(tmp_path / "aligned", random_tensors(shapes, 2))
    (sft / "tokenizer.json").write_text(tokenizer("a", "b", "c"))
    (aligned / "tokenizer.json").write_text(tokenizer("a", "x", "c", "d"))
    return sft, aligned


def test_tokens_that_differ_are_a_warning(tmp_path: Path, tokens: Pair) -> None:
    merged = expo.merge(*tokens, 0.3, tmp_path / "out")
    assert merged.warnings[0] == DIFFER
    with pytest.warns(UserWarning, match="the tokenizers differ") as caught:
        found = list(expo.stream(*tokens, 0.3))
    assert [str(each.message) for each in caught] == [DIFFER]
    assert caught[0].filename == __file__  # the warning names the caller's line
    assert [name for name, _ in found] == ["w"]


def test_a_warning_of_a_stream_that_is_an_error_leaves_nothing_open(tokens: Pair) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the tokenizers differ"):
            expo.stream(*tokens, 0.3)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_same_tokens_in_other_words_are_no_warning(tmp_path: Path, tokens: Pair) -> None:
    (tokens[1] / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer("a", "b", "c")), indent=1))
    merged = expo.merge(*tokens, 0.3, tmp_path / "out")
    assert not any("token" in warning for warning in merged.warnings)
    assert list(expo.stream(*tokens, 0.3))
    (tokens[1] / "tokenizer.json").write_text("[")
    merged = expo.merge(*tokens, 0.3, tmp_path / "damaged")
    assert merged.warnings[0].startswith(f"token ids were not compared: {tokens[1]}/tokenizer.json: not JSON (")


def test_what_overflows_in_a_converted_copy_is_counted_and_told(tmp_path: Path) -> None:
    """The largest fp16 is 65504, so a tensor that is only converted can become inf."""
    big = np.array([1e5, 1.0, -1e6, 2.0], np.float32)
    for role in ("sft", "aligned"):
        write_folder(tmp_path / role, {"w": ("F32", (4,), big.tobytes()), "v": ("F32", (4,), big.tobytes())})
    merged = expo.merge(
        tmp_path / "sft", tmp_path / "aligned", [0.0, 0.5], tmp_path / "out-{alpha}", alpha_for={"v": 0}, dtype="fp16"
    )
    assert [output.non_finite for output in merged.outputs] == [4, 4]
    assert any("inf or NaN" in warning for warning in merged.warnings)
    assert [output.changed for output in merged.outputs] == [0.0, 0.0]
