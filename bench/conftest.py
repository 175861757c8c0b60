"""A pair of random checkpoints to merge, and the machine they are merged on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo.header import emit

GIGABYTES = float(os.environ.get("EXPO_BENCH_GB", "2"))  # of one checkpoint
HIDDEN, INNER, VOCABULARY, SHARDS = 2048, 5632, 32000, 5
Shapes = dict[str, tuple[int, ...]]


def llama_shapes(hidden: int, inner: int, vocabulary: int, layers: int, keys: int | None = None) -> Shapes:
    """Tensor names and shapes of a Llama; keys: width of the key and value projections, hidden without grouping."""
    keys = keys or hidden
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_pair(folder: Path, shapes: Shapes, shards: int, sparse: bool = False) -> Path:
    """folder/sft and folder/aligned in bf16: random weights 2.5% apart, or sparse files that read as zeros."""
    rng = np.random.default_rng(0)
    for role in ("sft", "aligned"):
        (folder / role).mkdir(parents=True)
    names, weight_map = list(shapes), {}
    for k in range(shards):
        part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        header, placed = emit([(name, "BF16", shapes[name]) for name in part], {"format": "pt"})
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        weight_map.update(dict.fromkeys(part, file))
        with open(folder / "sft" / file, "wb") as sft, open(folder / "aligned" / file, "wb") as aligned:
            for out in (sft, aligned):
                out.write(header)
                out.truncate(max(tensor.stop for tensor in placed.values()))
            for name in () if sparse else placed:
                weights = rng.standard_normal(shapes[name], dtype=np.float32) * 0.02
                sft.write(_bf16(weights))
                aligned.write(_bf16(weights + rng.standard_normal(shapes[name], dtype=np.float32) * 0.0005))
    for role in ("sft", "aligned"):
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / role / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def _bf16(values: Any) -> Any:
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with sft/ and aligned/, of EXPO_BENCH_GB (2) each, in the page cache."""
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    layers = max(1, round((GIGABYTES * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / layer))
    folder = tmp_path_factory.mktemp("pair")
    yield write_pair(folder, llama_shapes(HIDDEN, INNER, VOCABULARY, layers), SHARDS)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def pair_70b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Llama-2-70B's names and shapes in 15 sparse shards: headers without data."""
    folder = tmp_path_factory.mktemp("pair70b")
    yield write_pair(folder, llama_shapes(8192, 28672, 32000, 80, keys=1024), 15, sparse=True)
    shutil.rmtree(folder)


def _filesystem(path: Path) -> str:
    """The type of the filesystem that a folder is on, ext4 say: that of the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(above)[1]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what a reader needs to judge a figure, and no name of a machine."""
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.processor()),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        kernel=platform.release(),
        filesystem=_filesystem(Path(tempfile.gettempdir())),
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch.__version__,
    )
