"""expo.merge() from files to files: the bits, the other files of the folder, and the state after an error."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    ITEMSIZE,
    ODD_SHAPES,
    Tensors,
    contents,
    fingerprint,
    kept,
    random_tensors,
    read_file,
    read_folder,
    sparse_file,
    staging_folder,
    write_folder,
)
from engine_calls import run_engine

import expo
import expo.execution.worker_pool
import expo.merging.merge
import expo.output.staging
from expo.demo import ALIGNED, SFT
from expo.execution.engines import Engine, choose
from expo.kernels import numerics
from expo.kernels.contract import Statistics, working_alpha

FLOATS = ("BF16", "F16", "F32", "F64")
ALPHAS = (0.3, -0.25, 1.0, 0.0)
SHARD = "model-00001-of-00002.safetensors"
Pair = tuple[Path, Path]

# Every pair of floating dtypes, and tensors that are unusual in other ways.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"{a}.{s}": (a, (37, 11)) for a in FLOATS for s in FLOATS},
    **ODD_SHAPES,
}


@pytest.fixture(autouse=True)
def leaves_nothing_open(frozen_heap: None, tmp_path: Path) -> Iterator[None]:
    """Check that no worker thread, descriptor or mapping of a file outlives a merge, however the merge ended."""
    yield
    gc.collect()  # a pending exception may refer to open files
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("expo")] == []
    assert [target for target in open_files() if target.startswith(str(tmp_path))] == []
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Yield small sharded checkpoints of all dtypes, and check that their files stay the same."""
    made = make_pair(tmp_path)
    before = fingerprint(*made)
    yield made
    assert fingerprint(*made) == before


def make_pair(
    folder: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]] = SHAPES,
    shards: tuple[int, int] = (3, 2),
    pad: int = 0,
) -> Pair:
    """Write sft and aligned with different shards; the counterpart of "A.S" has dtype S."""
    counterparts = {name: (name.partition(".")[2] or dtype, shape) for name, (dtype, shape) in shapes.items()}
    sft, aligned = random_tensors(counterparts, 1), random_tensors(shapes, 2)
    return (
        write_folder(folder / "sft", sft, shards[0], pad=pad),
        write_folder(folder / "aligned", aligned, shards[1], pad=pad),
    )


def open_files() -> list[str]:
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own descriptor is closed
            continue
    return targets


def expected(sft: Tensors, aligned: Tensors, alpha: float) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the tensors that the merge must give, from direct calls of the contract in NumPy."""
    return {
        name: (dtype, shape, _expected(sft[name], (dtype, shape, data), alpha))
        for name, (dtype, shape, data) in aligned.items()
    }


def _expected(
    sft: tuple[str, tuple[int, ...], bytes], aligned: tuple[str, tuple[int, ...], bytes], alpha: float
) -> bytes:
    dtype, _, data = aligned
    if dtype not in FLOATS or not alpha or not data:
        return data
    out = bytearray(len(data))
    run_engine(numerics.extrapolate, sft[2], data, (sft[0], dtype), [out], [working_alpha(alpha, dtype, sft[0])])
    return bytes(out)


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(os.listdir(folder)) == sorted(names)


def resumes(pair: Pair, folder: Path, *outs: Path, alpha: Any = 0.3, out: Path | None = None, **options: Any) -> bool:
    """Return True if a resumed merge gives an undisturbed one's outputs; check that only staging folders were left.

    Args:
        pair: The inputs.
        folder: The folder of the inputs and of the outputs, which may contain nothing else.
        outs: The paths of the outputs.
        alpha: The alpha or alphas.
        out: The template of the outputs' paths; None for a single output.
        options: Further options of the merge.
    """
    assert nothing_but(folder, "sft", "aligned", *(staging_folder(each).name for each in outs))
    template = out or outs[0]
    expo.merge(*pair, alpha, template, resume=True, **options)
    assert nothing_but(folder, "sft", "aligned", *(each.name for each in outs))
    plain = folder / "plain"
    expo.merge(*pair, alpha, plain / template.name)
    alike = [contents(each) == contents(plain / each.name) for each in outs]
    shutil.rmtree(plain)
    return all(alike)


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every call of the engine take this many seconds, so that a test can act in the meantime."""
    real = choose()

    def run(*arguments: Any) -> Statistics | None:
        time.sleep(seconds)
        return real.run(*arguments)

    monkeypatch.setattr(expo.merging.job, "engines_for", lambda *_: (Engine("slow", run, "a test"),) * 3)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("engine", ["numpy", "cpu"])
@pytest.mark.parametrize("chunk", [4096, 8192, expo.execution.worker_pool.CHUNK])
def test_every_tensor_has_the_bits_of_a_direct_call(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, engine: str, chunk: int
) -> None:
    monkeypatch.setattr(expo.execution.worker_pool, "CHUNK", chunk)
    expo.merge(*pair, alpha, tmp_path / "out", engine=engine)
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), alpha)


@pytest.mark.parametrize("pad", [0, 1, 2, 3, 5, 7])
def test_inputs_may_start_at_any_byte(tmp_path: Path, pad: int) -> None:
    pair = make_pair(tmp_path, pad=pad)
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)


@pytest.mark.parametrize("shards", list(itertools.product((0, 1, 4), repeat=2)))
def test_the_two_may_be_sharded_differently(tmp_path: Path, shards: tuple[int, int]) -> None:
    pair = make_pair(tmp_path, shards=shards)
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)
    weights = [path.name for path in pair[1].iterdir() if path.suffix == ".safetensors"]
    assert nothing_but(
        tmp_path / "out", "README.md", "config.json", *weights, *(["model.safetensors.index.json"] if shards[1] else [])
    )


def test_many_tiny_tensors_share_a_chunk(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {f"t{i}": (FLOATS[i % 4], (i % 5, 3)) for i in range(600)})
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)


def test_several_alphas_are_byte_for_byte_the_merges_of_each(pair: Pair, tmp_path: Path) -> None:
    together = expo.merge(*pair, ALPHAS, tmp_path / "all-{alpha}")
    for alpha, output in zip(ALPHAS, together.outputs, strict=True):
        alone = expo.merge(*pair, alpha, tmp_path / f"one-{alpha}")
        names = sorted(path.name for path in Path(output.path).iterdir())
        assert names == sorted(path.name for path in (tmp_path / f"one-{alpha}").iterdir())
        for name in names:
            assert (Path(output.path) / name).read_bytes() == (tmp_path / f"one-{alpha}" / name).read_bytes()
        assert output.alpha == alpha
        assert (output.changed, output.non_finite) == (alone.outputs[0].changed, alone.outputs[0].non_finite)
        assert output.relative_change == alone.outputs[0].relative_change


ODD_BITS = {
    "BF16": np.array([0x8000, 0x7FC1, 0xFFFF, 0x7F81, 0x0001, 0xFF80], "<u2"),
    "F16": np.array([0x8000, 0x7E01, 0xFFFF, 0x7C01, 0x0001, 0xFC00], "<u2"),
    "F32": np.array([0x80000000, 0x7FC00001, 0xFFFFFFFF, 0x7F800001, 1, 0xFF800000], "<u4"),
    "F64": np.array([1 << 63, 0x7FF8 << 48 | 1, 2**64 - 1, 0x7FF0 << 48 | 1, 1, 0xFFF0 << 48], "<u8"),
}


@pytest.mark.parametrize("alphas", [0.0, -0.0, (0.5, 0.0)])
def test_alpha_0_copies_every_bit(tmp_path: Path, alphas: float | tuple[float, ...]) -> None:
    odd = {dtype: (dtype, (6,), bits.tobytes()) for dtype, bits in ODD_BITS.items()}
    sft = write_folder(tmp_path / "sft", random_tensors({dtype: (dtype, (6,)) for dtype in odd}, 1))
    aligned = write_folder(tmp_path / "aligned", odd)
    merged = expo.merge(sft, aligned, alphas, tmp_path / "out{alpha}")
    assert read_folder(Path(merged.outputs[-1].path)) == {name: odd[name] for name in ("F64", "F32", "F16", "BF16")}


def test_nan_and_overflow_are_written_and_counted(tmp_path: Path) -> None:
    values = np.array([3e38, 1.0, np.nan, np.inf], "<f4")
    aligned = write_folder(tmp_path / "aligned", {"w": ("F32", (4,), values.tobytes())})
    sft = write_folder(tmp_path / "sft", {"w": ("F32", (4,), np.array([-3e38, 1, 1, 1], "<f4").tobytes())})
    merged = expo.merge(sft, aligned, 0.5, tmp_path / "out")
    out = np.frombuffer(read_folder(tmp_path / "out")["w"][2], "<f4")
    assert out[0] == np.inf
    assert out[1] == 1
    assert np.isnan(out[2])
    assert merged.outputs[0].non_finite == 3
    assert "3 elements of an output are inf or NaN" in merged.warnings


# --- rules ------------------------------------------------------------------------------------------------------------


def test_alpha_for_the_last_match_wins_and_0_keeps_aligned(pair: Pair, tmp_path: Path) -> None:
    merged = expo.merge(*pair, 0.3, tmp_path / "out", alpha_for={r"^BF16": 0.7, r"^BF16\.F": 0.0, r"long": -1.0})
    sft, aligned, out = (read_folder(place) for place in (*pair, tmp_path / "out"))
    assert out["BF16.BF16"] == expected(sft, aligned, 0.7)["BF16.BF16"]
    assert out["BF16.F32"] == aligned["BF16.F32"]
    assert out["long"] == expected(sft, aligned, -1.0)["long"]
    assert out["F16.F16"] == expected(sft, aligned, 0.3)["F16.F16"]
    assert ("BF16.F32", "alpha is 0") in merged.copied


def test_alpha_for_takes_numpys_numbers(pair: Pair, tmp_path: Path) -> None:
    rules: Any = {"long": np.float32(0.5)}
    expo.merge(*pair, 0.3, tmp_path / "out", alpha_for=rules)
    expo.merge(*pair, 0.3, tmp_path / "plain", alpha_for={"long": 0.5})
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_alpha_for_holds_in_every_output(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, [0.1, 0.2], tmp_path / "out{alpha}", alpha_for={"long": 0.9})
    first, second = (read_folder(tmp_path / f"out{alpha}") for alpha in (0.1, 0.2))
    assert first["long"] == second["long"] == expected(read_folder(pair[0]), read_folder(pair[1]), 0.9)["long"]
    assert first["F32.F32"] != second["F32.F32"]


def test_unpaired_and_reshaped_tensors_are_kept_only_on_the_users_word(tmp_path: Path) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "w": ("BF16", (4, 4)),
        "e": ("BF16", (5, 4)),
        "new": ("F32", (3,)),
    }
    counterparts: dict[str, tuple[str, tuple[int, ...]]] = {
        "w": ("BF16", (4, 4)),
        "e": ("BF16", (6, 4)),
        "old": ("F32", (3,)),
    }
    sft = write_folder(tmp_path / "sft", random_tensors(counterparts, 1))
    aligned = write_folder(tmp_path / "aligned", random_tensors(shapes, 2))
    with pytest.raises(expo.PlanError, match=r"new \(aligned only\)(.|\n)*old \(sft only\)(.|\n)*BF16 \[6, 4\]"):
        expo.merge(sft, aligned, 0.3, tmp_path / "out")
    merged = expo.merge(sft, aligned, 0.3, tmp_path / "out", on_unpaired="aligned", on_mismatch="aligned")
    assert merged.dropped == (("old", "only in sft"),)
    assert set(merged.copied) == {("new", "not in sft"), ("e", "sft has BF16 [6, 4]")}
    out, kept = read_folder(tmp_path / "out"), read_folder(aligned)
    assert (out["new"], out["e"]) == (kept["new"], kept["e"])
    assert out["w"] != kept["w"]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    expo.merge(SFT, ALIGNED, 0.3, out)
    return out


def test_safetensors_reads_the_output(demo: Path) -> None:
    from safetensors.torch import load_file

    loaded = {name: tensor for path in demo.glob("*.safetensors") for name, tensor in load_file(path).items()}
    aligned = read_folder(ALIGNED)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {n: t[1] for n, t in aligned.items()}


def test_transformers_loads_the_output_completely_and_generates(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(demo, output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(demo, local_files_only=True)
    prompt = tokenizer("Return the", return_tensors="pt")
    tokens = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=5, do_sample=False
    )
    assert tokens.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith("Return the")


def test_the_index_is_aligneds_with_the_true_total(pair: Pair, tmp_path: Path) -> None:
    index = json.loads((pair[1] / "model.safetensors.index.json").read_text())
    index["metadata"] = {"total_size": 1, "total_parameters": 7}
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    expo.merge(*pair, 0.3, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == index["weight_map"]
    total = sum(len(data) for _, _, data in read_folder(pair[1]).values())
    assert written["metadata"] == {"total_size": total, "total_parameters": 7}
    index["metadata"] = {"total_size": total}
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index))


def test_data_start_at_4096_and_transformers_format_is_stated(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, 0.3, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert 8 + length == 4096
        assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


CARRIED = [
    "config.json", "additional_chat_templates/tool.jinja", "chat_template.jinja", "modeling_own.py", "sub/code.py",
    "vocab.json",
]  # fmt: skip
LEFT_OUT = {
    "README.md": "describes aligned; the output has a card of its own",
    "SHA256SUMS": "digests of aligned's files, not of the merge's",
    ".gitattributes": "hidden",
    "optimizer.pt": "weights in another form, or training state",
    "pytorch_model.bin": "weights in another form, or training state",
    "stale-00001-of-00001.safetensors": "weights in another form, or training state",
    "trainer_state.json": "state of aligned's training",
    "sub/notes.txt": "in a subfolder, and not a file that a model is loaded with",
    "run.sh": "not a file that a model is loaded with",
    "train.py": "code that aligned's configs do not name",
}


def test_files_of_aligned_come_along_or_are_named(pair: Pair, tmp_path: Path) -> None:
    fixed = fingerprint(pair[1])
    extra = [pair[1] / name for name in (*CARRIED[1:], *LEFT_OUT)]
    for path in extra:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"this is {path.name}")
    config = pair[1] / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "auto_map": {"AutoModel": "modeling_own.Own"}}))
    (pair[1] / "modeling_own.py").write_text("from .sub.code import layer\n")
    merged = expo.merge(*pair, 0.3, tmp_path / "out")
    assert dict(merged.left_out) == LEFT_OUT
    out = tmp_path / "out"
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    weights = {path.name for path in pair[1].glob("model*")}
    assert found == {*CARRIED, *weights, "README.md"}
    assert (out / "README.md").read_text().startswith("---\nbase_model:\n- aligned\n- sft\n")
    assert all((out / name).read_bytes() == (pair[1] / name).read_bytes() for name in CARRIED)
    config.write_text(plain)
    for path in extra:
        path.unlink()
    for folder in ("sub", "additional_chat_templates"):
        (pair[1] / folder).rmdir()
    assert fingerprint(pair[1]) == fixed


def test_a_hub_cache_full_of_links_is_read_and_becomes_files(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    links, blobs = tmp_path / "hub" / "snapshots" / "4d7a", tmp_path / "hub" / "blobs"
    links.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(pair[1].iterdir())):
        shutil.copy(path, blobs / str(number))
        (links / path.name).symlink_to(f"../../blobs/{number}")
    expo.merge(pair[0], links, 0.3, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(pair: Pair, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        expo.merge(*pair, 0.3, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def test_a_bare_file_gives_a_bare_file(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, shards=(0, 0))
    sft, aligned = (folder / "model.safetensors" for folder in pair)
    expo.merge(sft, aligned, 0.3, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()
    assert read_file(tmp_path / "out.safetensors") == expected(read_file(sft), read_file(aligned), 0.3)
    assert nothing_but(tmp_path, "sft", "aligned", "out.safetensors")


@pytest.mark.parametrize(("alpha", "text"), [(0.3, "0.3"), (1, "1"), (1e-5, "1e-05"), (1 / 3, repr(1 / 3)), (-2, "-2")])
def test_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, text: str) -> None:
    pair = make_pair(tmp_path, {"w": ("F32", (3,))}, (0, 0))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert expo.merge(*pair, alpha).outputs[0].path == f"aligned-expo-{text}"
    expo.merge(pair[0], pair[1] / "model.safetensors", alpha)
    assert nothing_but(tmp_path / "here", f"aligned-expo-{text}", f"model-expo-{text}.safetensors")


def test_parents_of_the_output_are_made(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, 0.3, tmp_path / "new" / "deep" / "out")
    assert nothing_but(tmp_path / "new" / "deep", "out")
    assert nothing_but(tmp_path / "new", "deep")


# --- digests ----------------------------------------------------------------------------------------------------------


def sha256sum(sums: Path) -> list[str]:
    """Return the names of the files that `sha256sum -c` confirms; fail if a file has another digest."""
    done = subprocess.run(["sha256sum", "-c", "--strict", sums.name], cwd=sums.parent, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return [line.removesuffix(": OK") for line in os.fsdecode(done.stdout).splitlines()]


def test_digests_of_a_folder_are_what_sha256sum_checks(pair: Pair, tmp_path: Path) -> None:
    merged = expo.merge(*pair, [0.3, 0.5], tmp_path / "out{alpha}", digest=True)
    expo.merge(*pair, 0.3, tmp_path / "plain")
    for output in merged.outputs:
        names = sorted(["README.md", *(path.name for path in pair[1].iterdir())])
        assert nothing_but(Path(output.path), "SHA256SUMS", *names)
        assert sha256sum(Path(output.path) / "SHA256SUMS") == names
    (tmp_path / "out0.3" / "SHA256SUMS").unlink()
    assert contents(tmp_path / "out0.3") == contents(tmp_path / "plain")


def test_digests_of_aligned_are_not_taken_for_those_of_the_output(pair: Pair, tmp_path: Path) -> None:
    """aligned may itself be an output, with digests of its own."""
    expo.merge(*pair, 0.3, tmp_path / "first", digest=True)
    expo.merge(pair[0], tmp_path / "first", 0.3, tmp_path / "second")
    assert not (tmp_path / "second" / "SHA256SUMS").exists()
    expo.merge(pair[0], tmp_path / "first", 0.3, tmp_path / "third", digest=True)
    assert "SHA256SUMS" not in sha256sum(tmp_path / "third" / "SHA256SUMS")


@pytest.mark.parametrize("name", [b"out.safetensors", b"caf\xc3\xa9", b"\xff raw", b"back\\slash", b"two\nlines"])
def test_the_digest_of_a_bare_file_stands_beside_it(tmp_path: Path, name: bytes) -> None:
    pair = make_pair(tmp_path, shards=(0, 0))
    out = tmp_path / "to" / os.fsdecode(name)
    expo.merge(*(folder / "model.safetensors" for folder in pair), 0.3, out, digest=True)
    assert nothing_but(out.parent, out.name, f"{out.name}.sha256")
    assert len(sha256sum(out.with_name(f"{out.name}.sha256"))) == 1


def test_a_digest_that_is_there_is_replaced_only_on_the_users_word(tmp_path: Path) -> None:
    files = [folder / "model.safetensors" for folder in make_pair(tmp_path, shards=(0, 0))]
    out, beside = tmp_path / "out", tmp_path / "out.sha256"
    beside.write_text("years of work")
    fixes = "choose another `out`, or `overwrite=True` replaces it"
    for options in ({}, {"resume": True}):
        with pytest.raises(expo.OutputError, match=f"^{beside} exists; {fixes}; {kept(out)}$"):
            expo.merge(*files, 0.3, out, digest=True, **options)
        assert nothing_but(tmp_path, "sft", "aligned", "out.sha256", ".out.expo-staging")
        assert beside.read_text() == "years of work"
    merged = expo.merge(*files, 0.3, out, digest=True, overwrite=True, resume=True)
    assert merged.resumed == merged.bytes_written
    assert nothing_but(tmp_path, "sft", "aligned", "out", "out.sha256")
    assert sha256sum(beside) == ["out"]


def test_a_digest_that_cannot_be_put_beside_the_output_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [folder / "model.safetensors" for folder in make_pair(tmp_path, shards=(0, 0))]

    def replace(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", replace)
    out = tmp_path / "out"
    merged = expo.merge(*files, 0.3, out, digest=True)
    assert merged.warnings[-1] == f"{out} is complete, but {out}.sha256 could not be written: Input/output error"
    assert nothing_but(tmp_path, "sft", "aligned", "out")


def test_a_digest_does_not_outlive_a_merge_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [folder / "model.safetensors" for folder in make_pair(tmp_path, shards=(0, 0))]

    def link(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(expo.OutputError, match="Input/output error"):
            expo.merge(*files, 0.3, tmp_path / "out", digest=True)
    assert nothing_but(tmp_path, "sft", "aligned", ".out.expo-staging")
    expo.merge(*files, 0.3, tmp_path / "out", resume=True)  # a merge without --digest writes none
    assert nothing_but(tmp_path, "sft", "aligned", "out")


# --- overwriting ------------------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_refused_and_untouched(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, 0.3, tmp_path / "out")
    before = fingerprint(tmp_path / "out")
    with pytest.raises(expo.OutputError, match=f"{tmp_path}/out exists; choose another `out`, or `overwrite=True`"):
        expo.merge(*pair, 0.5, tmp_path / "out")
    assert fingerprint(tmp_path / "out") == before


def test_overwrite_swaps_the_folder_and_leaves_no_stale_shard(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model-00007-of-00009.safetensors", "old.json"):
        (out / name).write_text("stale")
    merged = expo.merge(*pair, 0.3, out, overwrite=True)
    assert not any("two steps" in warning for warning in merged.warnings)
    assert {path.name for path in out.iterdir()} == {"README.md", *(path.name for path in pair[1].iterdir())}
    assert nothing_but(tmp_path, "sft", "aligned", "out")


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, shards=(0, 0))
    sft, aligned = (folder / "model.safetensors" for folder in pair)
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    with pytest.raises(expo.OutputError, match="exists"):
        expo.merge(sft, aligned, 0.3, out)
    assert out.read_text() == "old"
    expo.merge(sft, aligned, 0.3, out, overwrite=True)
    assert read_file(out) == expected(read_file(sft), read_file(aligned), 0.3)
    assert nothing_but(tmp_path, "sft", "aligned", "out.safetensors")


def test_overwrite_refuses_a_folder_without_a_model(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(expo.OutputError, match="home is a folder without a model"):
        expo.merge(*pair, 0.3, tmp_path / "home", overwrite=True)
    assert nothing_but(tmp_path / "home", "thesis.tex")


@pytest.mark.parametrize("single", [False, True])
def test_overwrite_refuses_the_other_kind(pair: Pair, tmp_path: Path, single: bool) -> None:
    out = tmp_path / "out"
    if single:
        out.mkdir()
        pair = (pair[0], sorted(pair[1].glob("*.safetensors"))[0])
    else:
        out.write_text("a file")
    words = ("file", "folder") if single else ("folder", "file")
    with pytest.raises(expo.OutputError, match=f"out: a {words[0]} is to be written, but a {words[1]} is there"):
        expo.merge(*pair, 0.3, out, overwrite=True, on_unpaired="aligned")
    assert out.is_dir() == single


def test_overwrite_through_a_link_replaces_what_it_points_to(pair: Pair, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    expo.merge(*pair, 0.5, real)
    link.symlink_to(real)
    expo.merge(*pair, 0.3, link, overwrite=True)
    assert link.is_symlink()
    assert not real.is_symlink()
    assert read_folder(real) == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)
    assert nothing_but(tmp_path, "sft", "aligned", "real", "link")


def test_a_link_to_nothing_is_written_through(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    expo.merge(*pair, 0.5, tmp_path / "link")
    assert nothing_but(tmp_path, "sft", "aligned", "real", "link")
    assert read_folder(tmp_path / "real")


@pytest.mark.parametrize(
    "place", ["sft", "aligned", "aligned/out", "sft/a/b", ".", "aligned/../sft", "link", "link/out"]
)
def test_an_output_that_touches_an_input_is_refused(pair: Pair, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(pair[1])
    with pytest.raises(expo.OutputError, match="is, contains or lies inside the input"):
        expo.merge(*pair, 0.3, tmp_path / place, overwrite=True)
    assert nothing_but(tmp_path, "sft", "aligned", "link")


def test_a_folder_that_an_inputs_links_lead_into_is_not_overwritten(tmp_path: Path) -> None:
    store, links = make_pair(tmp_path / "store")[0], tmp_path / "sft"
    aligned = make_pair(tmp_path / "other")[1]
    links.mkdir()
    for path in store.iterdir():
        (links / path.name).symlink_to(path)
    before = fingerprint(store)
    with pytest.raises(expo.OutputError):
        expo.merge(links, aligned, 0.3, store, overwrite=True)
    assert fingerprint(store) == before


def test_an_empty_output_name_is_refused(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(folder)
    with pytest.raises((expo.OutputError, expo.UsageError)):
        expo.merge(*pair, 0.3, "")
    assert nothing_but(folder, "thesis.tex")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appears_at_out_during_a_merge_is_not_replaced(tmp_path: Path, kind: str) -> None:
    pair = make_pair(tmp_path, shards=(0, 0))
    sft, aligned = pair if kind == "folder" else (place / "model.safetensors" for place in pair)
    out = tmp_path / "out"

    def appear(done: int, total: int) -> None:
        if kind == "file":
            out.write_text("years of work")
        elif not out.exists():
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")

    with pytest.raises(expo.OutputError) as caught:
        expo.merge(sft, aligned, 0.3, out, progress=appear)
    reason = os.strerror(errno.EEXIST if kind == "file" else errno.ENOTEMPTY)
    assert str(caught.value) == f"{out}: {reason}; {kept(out)}"
    assert (out.read_text() == "years of work") if kind == "file" else nothing_but(out, "thesis.tex")
    assert nothing_but(tmp_path, "sft", "aligned", "out", staging_folder(out).name)
    out.rename(tmp_path / "saved")
    merged = expo.merge(sft, aligned, 0.3, out, resume=True)
    assert merged.resumed == merged.bytes_written
    assert nothing_but(tmp_path, "sft", "aligned", "out", "saved")
    expo.merge(sft, aligned, 0.3, tmp_path / "plain")
    if kind == "file":
        assert out.read_bytes() == (tmp_path / "plain").read_bytes()
    else:
        assert contents(out) == contents(tmp_path / "plain")


# --- progress, cancellation and merges side by side -------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_progress_grows_to_the_total_in_the_callers_thread(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    monkeypatch.setattr(expo.execution.worker_pool, "CHUNK", 4096)
    calls: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.current_thread())

    merged = expo.merge(*pair, [0.3, 0.5], tmp_path / "out{alpha}", progress=progress, verify=verify)
    dones = [done for done, _ in calls]
    work = merged.bytes_written  # with verify, writing is one half of the progress and reading back the other
    assert dones == sorted(dones)
    assert {total for _, total in calls} == {work}
    assert dones[-1] == work
    assert threads == {threading.current_thread()}
    size = sum(path.stat().st_size for path in tmp_path.glob("out*/*.safetensors"))
    assert size == merged.bytes_written


class Stop(Exception):
    """An exception of the test's callback."""


@pytest.mark.parametrize(("share", "verify"), [(0, False), (1, False), (0.5, True), (1, True)])
def test_an_exception_in_progress_aborts_and_what_is_done_is_left(
    pair: Pair, tmp_path: Path, share: float, verify: bool
) -> None:
    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise Stop

    with pytest.raises(Stop):
        expo.merge(*pair, [0.3, 0.5], tmp_path / "out{alpha}", progress=progress, verify=verify)
    outs = [tmp_path / "out0.3", tmp_path / "out0.5"]
    assert resumes(pair, tmp_path, *outs, alpha=[0.3, 0.5], out=tmp_path / "out{alpha}", verify=verify)


def test_cancel_in_the_middle(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.02)
    cancel = threading.Event()
    threading.Timer(0.1, cancel.set).start()
    with pytest.raises(expo.Cancelled) as caught:
        expo.merge(*pair, 0.3, tmp_path / "out", cancel=cancel)
    assert str(caught.value) == f"cancelled; {kept(tmp_path / 'out')}"
    assert resumes(pair, tmp_path, tmp_path / "out")


def test_cancel_that_was_set_before_is_heeded_however_small_the_model(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_and_finish(thread: threading.Thread) -> None:
        start(thread)
        thread.join()

    cancel = threading.Event()
    cancel.set()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_finish)
        with pytest.raises(expo.Cancelled) as caught:
            expo.merge(*pair, 0.3, tmp_path / "out", cancel=cancel)
    assert str(caught.value) == f"cancelled; {kept(tmp_path / 'out')}"
    assert resumes(pair, tmp_path, tmp_path / "out")


def test_works_from_another_thread(pair: Pair, tmp_path: Path) -> None:
    found: list[expo.Merged] = []
    thread = threading.Thread(target=lambda: found.append(expo.merge(*pair, 0.3, tmp_path / "out")))
    thread.start()
    thread.join()
    assert found[0].outputs[0].path == str(tmp_path / "out")
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_merges_to_one_output_the_second_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    slow(monkeypatch, 0.02)
    found: list[expo.Merged] = []
    first = threading.Thread(target=lambda: found.append(expo.merge(*pair, 0.3, tmp_path / "out")))
    first.start()
    while not (tmp_path / ".out.expo-staging").exists():
        time.sleep(0.001)
    time.sleep(0.01)
    with pytest.raises(expo.OutputError, match=r"another merge is writing it now, in .*\.out\.expo-staging"):
        expo.merge(*pair, 0.5, tmp_path / "out", overwrite=overwrite)
    first.join()
    assert len(found) == 1
    assert read_folder(tmp_path / "out") == expected(read_folder(pair[0]), read_folder(pair[1]), 0.3)
    assert nothing_but(tmp_path, "sft", "aligned", "out")


FIXES = "`resume=True` continues it, `overwrite=True` starts anew"


def test_a_leftover_without_room_beside_it_is_named_all_the_same(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staging folder takes the space that the output needs, so the message must not ask for more space."""

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        expo.merge(*pair, 0.3, tmp_path / "out", progress=stop)
    monkeypatch.setattr(expo.merging.output_paths, "free_bytes", lambda _: 0)
    with pytest.raises(expo.OutputError, match=f"was left by an interrupted merge: {FIXES}$"):
        expo.merge(*pair, 0.3, tmp_path / "out")
    with pytest.raises(expo.OutputError, match=r"other: .* are needed, but 0 bytes are free"):
        expo.merge(*pair, 0.3, tmp_path / "other")
    expo.merge(*pair, 0.3, tmp_path / "out", resume=True)
    assert nothing_but(tmp_path, "sft", "aligned", "out")


def test_what_another_merge_left_for_one_of_several_outputs_stays(pair: Pair, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        expo.merge(*pair, 0.3, tmp_path / "out{alpha}", progress=stop)
    staging = staging_folder(tmp_path / "out0.3")
    before = fingerprint(staging)
    message = rf"^{staging} holds another merge \(--alpha was \[0\.3\], is \[0\.1, 0\.3\]\): choose another `out`"
    with pytest.raises(expo.OutputError, match=message):
        expo.merge(*pair, [0.1, 0.3], tmp_path / "out{alpha}", resume=True)
    assert fingerprint(staging) == before
    assert resumes(pair, tmp_path, tmp_path / "out0.3")


@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_a_leftover_that_is_no_merges_is_named_and_then_emptied(pair: Pair, tmp_path: Path, option: str) -> None:
    staging = tmp_path / ".out.expo-staging"
    (staging / "sub").mkdir(parents=True)
    (staging / "junk.safetensors").write_text("half")
    with pytest.raises(expo.OutputError, match=f"^{staging} was left by an interrupted merge: {FIXES}$"):
        expo.merge(*pair, 0.3, tmp_path / "out")
    assert (staging / "junk.safetensors").read_text() == "half"
    assert expo.merge(*pair, 0.3, tmp_path / "out", **{option: True}).resumed == 0
    names = {path.name for path in pair[1].iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", *names}
    assert nothing_but(tmp_path, "sft", "aligned", "out")


def test_an_engines_refusal_reaches_the_caller(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("this thread's floating-point mode flushes subnormals")

    with monkeypatch.context() as patch:
        patch.setattr(expo.merging.job, "engines_for", lambda *_: (Engine("numpy", refuse, "a test"),) * 3)
        with pytest.raises(expo.EngineError) as caught:
            expo.merge(*pair, 0.3, tmp_path / "out")
    assert str(caught.value).startswith("`engine='numpy'` failed on ")
    assert str(caught.value).endswith(f"floating-point mode flushes subnormals; {kept(tmp_path / 'out')}")
    assert resumes(pair, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("which", ["sft", "aligned"])
@pytest.mark.parametrize("change", [1, -1])
def test_an_input_that_changes_under_the_merge_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, change: int
) -> None:
    pair = make_pair(tmp_path, shards=(0, 0))
    file, out = tmp_path / which / "model.safetensors", tmp_path / "out"
    before, data = file.stat(), file.read_bytes()
    size = before.st_size
    real = expo.merging.merge.Staging

    def staging(*arguments: Any) -> expo.output.staging.Staging:
        os.truncate(file, size + change)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(expo.merging.merge, "Staging", staging)
        with pytest.raises(expo.CheckpointError) as caught:
            expo.merge(*pair, 0.3, out)
    assert str(caught.value) == (
        f"{file}: {size + change} bytes now; it is being changed, and had {size} bytes when its "
        f"header was read: let no process change the file, and try again; {kept(out)}"
    )
    file.write_bytes(data)
    what = f"{which}: another size, time of change or header of model.safetensors"
    with pytest.raises(expo.OutputError, match=rf"^{staging_folder(out)} holds another merge \({what}\): choose"):
        expo.merge(*pair, 0.3, out, resume=True)  # with another time of change the contents may differ too
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resumes(pair, tmp_path, out)


@pytest.mark.parametrize("which", ["sft", "aligned"])
@pytest.mark.parametrize("verify", [False, True])
def test_what_was_computed_from_an_input_that_was_changed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, verify: bool
) -> None:
    """The test restores the bytes and the time of change afterwards, as a copying tool would do."""
    pair = make_pair(tmp_path, shards=(0, 0))
    # This process writes to the file itself, so it takes no lease.
    monkeypatch.setattr(expo.checkpoints.reader, "LOCAL", set())
    monkeypatch.setattr(expo.execution.worker_pool, "CHUNK", 4096)
    file, out = tmp_path / which / "model.safetensors", tmp_path / "out"
    before, data = file.stat(), file.read_bytes()

    def change(done: int, total: int) -> None:
        if file.stat().st_mtime_ns == before.st_mtime_ns:
            with file.open("r+b") as opened:
                opened.seek(size_of_header(data))
                opened.write(bytes(len(data) - size_of_header(data)))
            os.utime(file, ns=(0, 0))

    slow(monkeypatch, 0.001)
    with pytest.raises(expo.CheckpointError, match=f"^{file}: it was changed while it was read, .*; {kept(out)}$"):
        expo.merge(*pair, 0.3, out, progress=change, verify=verify)
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resumes(pair, tmp_path, out)


def size_of_header(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_carried_file_that_vanishes_is_named(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    config, out = pair[1] / "config.json", tmp_path / "out"
    text = config.read_text()
    with pytest.raises(expo.CheckpointError) as caught:
        expo.merge(*pair, 0.3, out, progress=lambda *_: config.unlink(missing_ok=True))
    assert str(caught.value) == f"{config}: No such file or directory; {kept(out)}"
    config.write_text(text)
    assert resumes(pair, tmp_path, out)


def test_a_file_that_is_not_carried_any_more_does_not_come_along_from_what_was_left(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    out = tmp_path / "out"
    for name in ("vocab.json", "additional_chat_templates/tool.jinja"):
        (pair[1] / name).parent.mkdir(exist_ok=True)
        (pair[1] / name).write_text("{}")

    def stop_at_the_index(staging: Any, name: str, parts: Any) -> None:
        if name == "model.safetensors.index.json":
            raise expo.OutputError("the disk is full")
        put(staging, name, parts)

    put = expo.output.staging.Staging.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.output.staging.Staging, "put", stop_at_the_index)
        with pytest.raises(expo.OutputError, match=f"^the disk is full; {kept(out)}$"):
            expo.merge(*pair, 0.3, out, digest=True)
    (pair[1] / "vocab.json").unlink()
    (pair[1] / "additional_chat_templates" / "tool.jinja").unlink()
    assert resumes(pair, tmp_path, out)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_a_direct_computation(pair: Pair, tmp_path: Path) -> None:
    merged = expo.merge(*pair, [0.3, -2.0, 0.0], tmp_path / "out{alpha}")
    sft, aligned = read_folder(pair[0]), read_folder(pair[1])
    names = [name for name, (dtype, _, _) in aligned.items() if dtype in FLOATS]
    a = np.concatenate([wide(aligned[name]) for name in names])
    d = a - np.concatenate([wide(sft[name]) for name in names])
    distance = np.linalg.norm(d) / np.linalg.norm(a)
    assert merged.relative_distance == pytest.approx(distance, rel=1e-5)
    for alpha, output in zip((0.3, -2.0, 0.0), merged.outputs, strict=True):
        out = np.concatenate([wide(read_folder(Path(output.path))[name]) for name in names])
        assert output.relative_change == pytest.approx(abs(alpha) * distance, rel=1e-5)
        assert output.changed == pytest.approx(np.count_nonzero(out != a) / a.size, rel=1e-12)
        assert output.non_finite == 0
    sizes = {place: sum(len(data) for _, _, data in read_folder(place).values()) for place in pair}
    copied = sum(len(data) for dtype, _, data in sft.values() if dtype not in FLOATS)
    assert merged.bytes_read == sum(sizes.values()) - copied
    assert (merged.extrapolated, len(merged.copied)) == (len(names), len(aligned) - len(names))
    assert merged.engine == choose().name
    assert merged.seconds > 0


def wide(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    dtype, _, data = tensor
    return numerics.widen(np.frombuffer(data, numerics.STORAGE[dtype]), dtype).astype(np.float64)


def test_unrelated_models_are_merged_with_a_warning(pair: Pair, tmp_path: Path) -> None:
    merged = expo.merge(*pair, 0.3, tmp_path / "out")
    assert merged.relative_distance > 1
    assert any("are the two models unrelated?" in warning for warning in merged.warnings)


def test_identical_models_are_merged_with_a_warning(pair: Pair, tmp_path: Path) -> None:
    merged = expo.merge(pair[1], pair[1], 0.3, tmp_path / "out")
    assert merged.warnings == ("sft and aligned are equal: the output is aligned; is one of the two paths wrong?",)
    assert (merged.relative_distance, merged.outputs[0].changed) == (0, 0)


def test_related_models_are_merged_without_a_warning(tmp_path: Path) -> None:
    assert expo.merge(SFT, ALIGNED, 0.3, tmp_path / "out").warnings == ()


# --- verify -----------------------------------------------------------------------------------------------------------


def corrupt(out: Path, change: Callable[[Path], None]) -> Callable[[int, int], None]:
    """Return a callback that changes a staged file at half the progress, when all is written and nothing read back."""
    calls = itertools.count()

    def progress(done: int, total: int) -> None:
        if 2 * done == total and next(calls) == 0:
            change(out.parent / f".{out.name}.expo-staging" / SHARD)

    return progress


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    return change


def test_verify_passes_on_what_was_written(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expo.execution.worker_pool, "CHUNK", 4096)
    merged = expo.merge(*pair, ALPHAS, tmp_path / "out{alpha}", verify=True)
    assert merged.verified
    assert not expo.merge(*pair, 0.3, tmp_path / "other").verified


@pytest.mark.parametrize("chunk", [4096, expo.execution.worker_pool.CHUNK])
def test_verify_names_the_tensor_and_the_byte(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(expo.execution.worker_pool, "CHUNK", chunk)
    order = expected(read_folder(pair[0]), read_file(pair[1] / SHARD), 0.3)
    starts = layout(order)
    for name, at in ((name, start + len(order[name][2]) - 1) for name, start in starts.items() if order[name][2]):
        progress = corrupt(tmp_path / "out0.3", flip(at))
        message = f"/{SHARD}: byte {at}, byte {at - starts[name]} of tensor {name}, does not read back"
        with pytest.raises(expo.OutputError, match=message):
            expo.merge(*pair, [0.1, 0.3], tmp_path / "out{alpha}", verify=True, progress=progress)
        assert nothing_but(tmp_path, "sft", "aligned")


def layout(tensors: Tensors) -> dict[str, int]:
    """Return the start of each tensor in an output file: the widest dtype first, then by name."""
    rank = ["I64", "F64", "F32", "BF16", "F16", "U8", "BOOL"]
    at, starts = 4096, {}
    for name in sorted(tensors, key=lambda name: (rank.index(tensors[name][0]), name)):
        starts[name] = at
        at += ITEMSIZE[tensors[name][0]] * math.prod(tensors[name][1])
    return starts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(20), "byte 20, in the header, does not read back"),
        (lambda path: os.truncate(path, 5000), r"byte 5000, byte \d+ of tensor .* does not read back"),
    ],
)
def test_verify_sees_the_header_and_a_short_file(
    pair: Pair, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(expo.OutputError, match=message):
        expo.merge(*pair, 0.3, out, verify=True, progress=corrupt(out, change))
    assert nothing_but(tmp_path, "sft", "aligned")


@pytest.mark.parametrize(
    ("writers", "verifier"),
    [(("cpu",), "numpy"), (("numpy",), "cpu"), (("triton",), "cpu"), (("triton", "cpu"), "numpy")],
)
def test_verify_computes_by_another_engine(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: tuple[str, ...], verifier: str
) -> None:
    """An engine that computes the same wrong bits twice is noticed."""
    pytest.importorskip("expo.kernels.cpu")

    def wrong(anchor: Any, terms: Any, outputs: Any, measure: bool) -> Any:
        measured = numerics.extrapolate(anchor, terms, outputs, measure)
        outputs[0][0] ^= 1
        return measured

    engines = tuple(Engine(name, wrong, "a test's") for name in writers)
    monkeypatch.setattr(expo.merging.job, "engines_for", lambda *_: engines)
    said = rf"byte 0 of tensor \S+, does not read back as `engine='{verifier}'` computes it again"
    with pytest.raises(expo.OutputError, match=said):
        expo.merge(*pair, 0.3, tmp_path / "out", verify=True)
    assert nothing_but(tmp_path, "sft", "aligned")
    assert len(expo.merge(*pair, 0.3, tmp_path / "out").outputs) == 1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alphas", [["0.3"], ["0.1", "0.3", "0.5"]])
def test_memory_stays_small_whatever_the_models_size(tmp_path: Path, alphas: list[str]) -> None:
    """The models have 0.75 GB each. Pages of the inputs count as this process's memory while they are mapped."""
    rows = 24000 if len(alphas) == 1 else 8000
    sft, aligned = (
        sparse_file(tmp_path / f"{name}.safetensors", {f"w{i}": ("BF16", (rows, 4096)) for i in range(4)})
        for name in ("sft", "aligned")
    )
    command = [sys.executable, "-m", "expo.fast", "--sft", str(sft), "--aligned", str(aligned), "--alpha", *alphas]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out-{alpha}"), "--quiet"], stderr=subprocess.DEVNULL)
    peaks = {"VmRSS": 0, "RssAnon": 0}
    while process.poll() is None:
        for key, value in memory(process.pid).items():
            peaks[key] = max(peaks[key], value)
        time.sleep(0.005)
    for path in tmp_path.glob("out-*"):
        path.unlink()
    assert process.returncode == 0
    assert 0 < peaks["RssAnon"] < 64e6, peaks
    assert peaks["VmRSS"] < 256e6, peaks


def memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmRSS", "RssAnon")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


# --- arguments --------------------------------------------------------------------------------------------------------


def repr_short(value: object) -> str:
    return repr(value)[:12]


@pytest.mark.parametrize(
    "alpha", [math.nan, math.inf, 1e39, 10**400, "much", None, [], [0.1, 0.1], [0.1, None]], ids=repr_short
)
def test_an_alpha_that_makes_no_sense_is_a_usage_error(pair: Pair, tmp_path: Path, alpha: Any) -> None:
    with pytest.raises(expo.UsageError, match="alpha"):
        expo.merge(*pair, alpha, tmp_path / "out-{alpha}")
    assert nothing_but(tmp_path, "sft", "aligned")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_for": {"(": 0.1}}, r"'\(' is not a regular expression"),
        ({"alpha_for": {"w": math.nan}}, "finite in float32, got nan"),
        ({"on_unpaired": "sft"}, "`on_unpaired` must be one of error, aligned, got 'sft'"),
        ({"on_mismatch": ""}, "`on_mismatch` must be one of error, rows, aligned, got ''"),
        ({"engine": "gpu"}, "`engine` must be one of auto, numpy, cpu, triton, got 'gpu'"),
        ({"device": "tpu"}, "`device` must be auto, cpu or cuda"),
        ({"engine": "cpu", "device": "cuda"}, "`engine='cpu'` computes on the CPU, but `device` is cuda"),
    ],
)
def test_an_option_that_makes_no_sense_is_a_usage_error(
    pair: Pair, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(expo.UsageError, match=message):
        expo.merge(*pair, 0.3, tmp_path / "out", **options)
    assert nothing_but(tmp_path, "sft", "aligned")


def test_several_alphas_need_a_place_each(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(expo.UsageError, match=r"2 alphas need an output each: put \{alpha\} into `out`, got '.*/out'"):
        expo.merge(*pair, [0.1, 0.2], tmp_path / "out")


def test_a_rule_that_matches_nothing_is_a_problem(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(expo.PlanError, match="`alpha_for` 'lm_heads' matches no tensor of"):
        expo.merge(*pair, 0.3, tmp_path / "out", alpha_for={"lm_heads": 0.1})
    assert nothing_but(tmp_path, "sft", "aligned")
