"""Every kind of bad input on the command line: the exit code, one message with place and values, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoint_files import contents, fingerprint, random_tensors, safetensors_bytes, write_folder

import expo.fast
import expo.merging.merge
import expo.output.direct_io

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("BF16", (8, 8)), "b": ("F32", (5,)), "c": ("BF16", (3,))}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


class World(NamedTuple):
    """A good pair in a folder of its own, and the path for --out; a case may change both."""

    root: Path
    sft: Path
    aligned: Path
    out: Path


Prepare = Callable[[World, pytest.MonkeyPatch], "World | None"]


class Case(NamedTuple):
    """A change of a good pair, the exit code, texts in the message, and the files left; {root} is the folder."""

    prepare: Prepare
    code: int
    says: tuple[str, ...]
    options: tuple[str, ...] = ()
    leaves: str = ""  # the staging folder that the message names for --resume


def noise(count: int, seed: int = 7) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return dict(random_tensors({f"x{i}": ("BF16", (4, 4)) for i in range(count)}, seed))


def rewrite_index(folder: Path, **weight_map: str | None) -> None:
    """Change entries of the weight_map; None removes an entry."""
    index = json.loads((folder / INDEX).read_text())
    merged = {**index["weight_map"], **weight_map}
    index["weight_map"] = {name: file for name, file in merged.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def rewrite_header(file: Path, **entry: Any) -> None:
    """Replace the header by one of the same length with another entry for the first tensor."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[next(name for name in header if name != "__metadata__")].update(entry)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def missing_folder(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(sft=world.root / "nowhere")


def missing_file(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(aligned=world.root / "nowhere.safetensors")


def empty_folder(world: World, _: pytest.MonkeyPatch) -> World:
    (world.root / "empty").mkdir()
    return world._replace(sft=world.root / "empty")


def pickled(world: World, _: pytest.MonkeyPatch) -> World:
    (world.root / "old").mkdir()
    (world.root / "old" / "pytorch_model.bin").write_bytes(b"PK")
    return world._replace(sft=world.root / "old")


def adapter(world: World, _: pytest.MonkeyPatch) -> World:
    (world.root / "lora").mkdir()
    (world.root / "lora" / "adapter_config.json").write_text("{}")
    return world._replace(sft=world.root / "lora")


def empty_shard(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / FIRST).write_bytes(b"")


def truncated_header(world: World, _: pytest.MonkeyPatch) -> None:
    os.truncate(world.sft / FIRST, 40)


def truncated_data(world: World, _: pytest.MonkeyPatch) -> None:
    os.truncate(world.aligned / FIRST, (world.aligned / FIRST).stat().st_size - 3)


def too_long(world: World, _: pytest.MonkeyPatch) -> None:
    with open(world.aligned / FIRST, "ab") as file:
        file.write(b"12345")


def lfs_pointer(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def web_page(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / SECOND).write_text("<!doctype html><title>Sign in</title>")


def lying_shape(world: World, _: pytest.MonkeyPatch) -> None:
    rewrite_header(world.sft / FIRST, shape=[8, 9])


def lying_offsets(world: World, _: pytest.MonkeyPatch) -> None:
    rewrite_header(world.sft / FIRST, data_offsets=[2, 130])


def unknown_dtype(world: World, _: pytest.MonkeyPatch) -> None:
    rewrite_header(world.sft / FIRST, dtype="BF17")


def no_json(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / FIRST).write_bytes((5).to_bytes(8, "little") + b"{'a':")


def index_names_absent_shard(world: World, _: pytest.MonkeyPatch) -> None:
    (world.aligned / SECOND).unlink()


def index_names_replaced_copy(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / SECOND).write_bytes(safetensors_bytes(random_tensors(SHAPES, seed=8)))


def index_leaves_the_folder(world: World, _: pytest.MonkeyPatch) -> None:
    rewrite_index(world.sft, a=f"../aligned/{FIRST}")


def index_is_no_json(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / INDEX).write_text("{")


def index_without_a_map(world: World, _: pytest.MonkeyPatch) -> None:
    (world.sft / INDEX).write_text('{"metadata": {}}')


def config_is_no_json(world: World, _: pytest.MonkeyPatch) -> None:
    (world.aligned / "config.json").write_text("model_type: llama")


def other_architecture(world: World, _: pytest.MonkeyPatch) -> None:
    (world.aligned / "config.json").write_text('{"model_type": "mistral"}')


def other_tensors(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(sft=write_folder(world.root / "other", noise(3)))


def other_shapes(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(sft=write_folder(world.root / "other", random_tensors({**SHAPES, "b": ("F32", (6,))}, 1)))


def quantised(world: World, _: pytest.MonkeyPatch) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    shutil.rmtree(world.sft)
    codes = {"layer.qweight": ("I32", (1, 4), bytes(16))}
    write_folder(world.sft, {**random_tensors(SHAPES, 1), **codes}, config=config)


def eight_bit_floats(world: World, _: pytest.MonkeyPatch) -> World:
    file = world.root / "fp8.safetensors"
    file.write_bytes(safetensors_bytes({"a": ("F8_E4M3", (4,), b"abcd")}))
    return world._replace(sft=file, aligned=file)


def out_is_an_input(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(out=world.aligned)


def out_is_inside_an_input(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(out=world.sft / "merged")


def out_contains_an_input(world: World, _: pytest.MonkeyPatch) -> World:
    return world._replace(out=world.root)


def out_exists(world: World, _: pytest.MonkeyPatch) -> None:
    world.out.mkdir()


def out_is_no_model(world: World, _: pytest.MonkeyPatch) -> None:
    world.out.mkdir()
    (world.out / "thesis.tex").write_text("years of work")


def out_is_under_a_file(world: World, _: pytest.MonkeyPatch) -> World:
    (world.out.parent / "note").write_text("")
    return world._replace(out=world.out.parent / "note" / "out")


def no_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expo.merging.output_paths, "free_bytes", lambda _: 4321)


def no_room_after_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(expo.output.direct_io, "allocate", fail)


def refused_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir

    def mkdir(path: Any, *rest: Any, **named: Any) -> None:
        if "expo-staging" in str(path):
            raise PermissionError(13, "Permission denied")
        real(path, *rest, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)


KEPT = "the finished part is kept in {root}/to/.out.expo-staging: repeat the merge with --resume to continue"

CASES = {
    "missing folder": Case(missing_folder, 3, ("{root}/nowhere: no such file or folder",)),
    "missing file": Case(missing_file, 3, ("{root}/nowhere.safetensors: no such file or folder",)),
    "empty folder": Case(empty_folder, 3, ("{root}/empty", "model.safetensors", INDEX)),
    "pickled": Case(pickled, 3, ("{root}/old/pytorch_model.bin: 2 bytes", "nothing that torch.save writes")),
    "adapter": Case(adapter, 3, ("{root}/lora: a PEFT adapter, but aligned {root}/aligned is", "--alpha 0")),
    "empty shard": Case(empty_shard, 3, (f"{{root}}/sft/{FIRST}: 0 bytes", "at least 8", "download it again")),
    "truncated header": Case(truncated_header, 3, (f"{{root}}/sft/{FIRST}", "has 40", "truncated; download it again")),
    "truncated data": Case(truncated_data, 3, (f"{{root}}/aligned/{FIRST}", "ends at byte", "truncated")),
    "too long": Case(too_long, 3, (f"{{root}}/aligned/{FIRST}", "ends at byte", "bytes that belong to no tensor")),
    "LFS pointer": Case(lfs_pointer, 3, (f"{{root}}/sft/{SECOND}", "Git LFS pointer", "git lfs pull")),
    "web page": Case(web_page, 3, (f"{{root}}/sft/{SECOND}", "at most 100000000", "not a safetensors file?")),
    "lying shape": Case(lying_shape, 3, (f"{{root}}/sft/{FIRST}: tensor 'a'", "[8, 9]", "144 bytes", "span 128")),
    "lying offsets": Case(lying_offsets, 3, (f"{{root}}/sft/{FIRST}: tensor 'a' starts at byte", "ends at")),
    "unknown dtype": Case(unknown_dtype, 3, (f"{{root}}/sft/{FIRST}: tensor 'a'", "'BF17'", "BF16")),
    "no JSON": Case(no_json, 3, (f"{{root}}/sft/{FIRST}: the header is not JSON",)),
    "absent shard": Case(index_names_absent_shard, 3, (f"{{root}}/aligned/{INDEX}", SECOND, "download it again")),
    "replaced copy": Case(index_names_replaced_copy, 3, (f"{{root}}/sft/{INDEX}: tensor 'a'", FIRST, SECOND)),
    "index leaves folder": Case(index_leaves_the_folder, 3, (f"{{root}}/sft/{INDEX}: tensor 'a'", "'../aligned/model")),
    "index no JSON": Case(index_is_no_json, 3, (f"{{root}}/sft/{INDEX}: not JSON",)),
    "index without map": Case(index_without_a_map, 3, (f"{{root}}/sft/{INDEX}: no weight_map",)),
    "config no JSON": Case(config_is_no_json, 3, ("{root}/aligned/config.json: not JSON",)),
    "other architecture": Case(other_architecture, 3, ("{root}/sft is 'llama', aligned {root}/aligned is 'mistral'",)),
    "other tensors": Case(other_tensors, 3, ("6 tensors without a counterpart", "a (aligned only)", "x0 (sft only)")),
    "other shapes": Case(other_shapes, 3, ("b: sft F32 [6], aligned F32 [5]", "--on-mismatch aligned")),
    "quantised": Case(quantised, 3, ("sft {root}/sft is quantised (quant_method gptq)", "was quantised from")),
    "8-bit floats": Case(eight_bit_floats, 3, ("sft's a (F8_E4M3)", "aligned's a (F8_E4M3)", "quantised?")),
    "out is input": Case(out_is_an_input, 4, ("{root}/aligned is, contains or lies inside the input",)),
    "out inside input": Case(out_is_inside_an_input, 4, ("{root}/sft/merged is, contains or lies in",)),
    "out contains input": Case(out_contains_an_input, 4, ("{root} is, contains or lies inside",), ("--overwrite",)),
    "out exists": Case(out_exists, 4, ("{root}/to/out exists; choose another --out, or --overwrite replaces it",)),
    "out is no model": Case(out_is_no_model, 4, ("{root}/to/out is a folder without a model",), ("--overwrite",)),
    "out under a file": Case(out_is_under_a_file, 4, ("{root}/to/note",)),
    "no room": Case(no_room, 4, ("{root}/to/out: ", "are needed", "are free", "choose another --out")),
    "no room after all": Case(
        no_room_after_all, 4, ("{root}/to/.out.expo-staging/model", "No space left on", KEPT),
        leaves="to/.out.expo-staging",
    ),
    "refused folder": Case(refused_folder, 4, ("{root}/to/.out.expo-staging: Permission denied; choose",)),
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "to").mkdir()
    shards = (("a", "c"), ("b",))
    sft = write_folder(tmp_path / "sft", random_tensors(SHAPES, 1, 1.0), shards)
    aligned = write_folder(tmp_path / "aligned", random_tensors(SHAPES, 1, 1.01), shards)
    return World(tmp_path, sft, aligned, tmp_path / "to" / "out")


def arguments(world: World, *more: str) -> list[str]:
    return ["--sft", str(world.sft), "--aligned", str(world.aligned), "--alpha", "0.3", "--out", str(world.out), *more]


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    world = case.prepare(world, monkeypatch) or world
    before = fingerprint(world.root)
    folders = {path for path in world.root.rglob("*") if path.is_dir()}
    assert expo.fast.main(arguments(world, *case.options)) == case.code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("expo: error: ")
    assert err.count("expo:") == 1
    assert "Traceback" not in err
    assert "Errno" not in err
    for text in case.says:
        assert text.replace("{root}", str(world.root)) in err
    kept = {path for path in world.root.rglob("*") if case.leaves and path.is_relative_to(world.root / case.leaves)}
    assert bool(kept) == bool(case.leaves)
    assert {name: digest for name, digest in fingerprint(world.root).items() if Path(name) not in kept} == before
    assert {path for path in world.root.rglob("*") if path.is_dir()} - kept == folders
    if kept:
        monkeypatch.undo()
        assert expo.fast.main(arguments(world, *case.options, "--resume", "--quiet")) == 0
        assert capsys.readouterr() == ("", "")
        assert os.listdir(world.out.parent) == ["out"]
        expo.merge(world.sft, world.aligned, 0.3, world.root / "plain")
        assert contents(world.out) == contents(world.root / "plain")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.code == 3])
def test_a_plan_finds_it_too(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    world = case.prepare(world, monkeypatch) or world
    assert expo.fast.main(arguments(world, *case.options, "--plan", "--quiet")) == case.code
    out, err = capsys.readouterr()
    assert out == ""
    assert all(text.replace("{root}", str(world.root)) in err for text in case.says)


def test_the_pair_itself_is_good(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert expo.fast.main(arguments(world, "--quiet")) == 0
    assert capsys.readouterr() == ("", "")
    assert world.out.is_dir()


def test_unrelated_models_are_merged_with_a_warning(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(world.aligned, random_tensors(SHAPES, 2, 1.0), (("a", "c"), ("b",)))
    assert expo.fast.main(arguments(world, "--quiet")) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("expo: warning: aligned - sft is ")
    assert err.endswith("are the two models unrelated?\n")
    assert err.count("\n") == 1


def test_all_problems_are_listed_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised(world, monkeypatch)
    (world.aligned / "config.json").write_text('{"model_type": "mistral"}')
    assert expo.fast.main(arguments(world, "--alpha-for", "lm_heads=0")) == 3
    err = capsys.readouterr().err
    for text in ("is quantised", "different architectures", "--alpha-for 'lm_heads' matches no tensor"):
        assert text in err


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that nobody may write to, not even the superuser; skip if this process may not mount one."""
    place = tmp_path / "read-only"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this process may not mount a filesystem: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_target(world: World, read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expo.fast.main(arguments(world._replace(out=read_only / "out"))) == 4
    out, err = capsys.readouterr()
    assert out == ""
    fix = "the filesystem is read-only: choose another --out"
    assert err == f"expo: error: {read_only}/.out.expo-staging: Read-only file system; {fix}\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write to any folder")
def test_a_folder_without_the_right_to_write(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.out.parent.chmod(0o555)
    assert expo.fast.main(arguments(world)) == 4
    assert "Permission denied; choose an --out that you may write to" in capsys.readouterr().err
    world.out.parent.chmod(0o755)
