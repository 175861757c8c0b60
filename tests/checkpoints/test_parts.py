"""Checkpoints in the parts that a training's processes saved are read as the whole model that they are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import quiet

pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="torch before 2.6 has no public fully_shard")
saved_parts = pytest.importorskip("saved_parts")

import expo  # noqa: E402
from expo.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from expo.checkpoints.piecewise_reader import Piece, PiecewiseReader, why_not_covered  # noqa: E402
from expo.diff import compare  # noqa: E402

ROOT = Path(__file__).parents[2]
ALPHA = 0.3


def run(folder: Path, world: int, *more: str) -> Path:
    """Let processes save a model in parts, and return the folder."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", saved_parts.__file__, str(folder / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), *more], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, errors
    saved_parts.save_whole(saved_parts.model(1), folder / "sft")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("saved"), 3)


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, Any]:
    """Return the tensors that a merge with the whole model writes."""
    return read(expo.merge(saved / "sft", saved / "whole", ALPHA, saved / "expected").outputs[0].path)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the saved folders, to be damaged."""
    shutil.copytree(saved, tmp_path / "copied")
    return tmp_path / "copied"


def read(folder: str | Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    loaded: dict[str, Any] = load_file(Path(folder) / "model.safetensors")
    return loaded


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


DISTRIBUTED = ("flat", "nested", "app")


def merge(saved: Path, aligned: str, out: Path, sft: str = "sft", **options: Any) -> Any:
    config = {} if aligned == "actor" or "aligned_config" in options else {"aligned_config": saved / "whole"}
    return expo.merge(saved / sft, saved / aligned, ALPHA, out, verify=True, **config, **options)


@pytest.mark.parametrize("aligned", ["actor", *DISTRIBUTED])
def test_as_aligned(saved: Path, expected: dict[str, Any], tmp_path: Path, aligned: str) -> None:
    """The output has the bits of a merge with the whole model, its config and its tokenizer; and it loads."""
    merge(saved, aligned, tmp_path / "out", check=True)
    assert_equal(read(tmp_path / "out"), expected)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (saved / "whole" / name).read_bytes()
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith((".pt", ".distcp", ".metadata"))]


@pytest.mark.parametrize("sft", ["actor", *DISTRIBUTED])
def test_as_sft(saved: Path, tmp_path: Path, sft: str) -> None:
    with quiet():
        merge(saved, "sft", tmp_path / "out", sft, aligned_config=None)
        merge(saved, "sft", tmp_path / "expected", "whole", aligned_config=None)
    assert_equal(read(tmp_path / "out"), read(tmp_path / "expected"))


def test_small_chunks(saved: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end inside of pieces, and both sides are in parts."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 4096)
    merge(saved, "actor", tmp_path / "out")
    assert_equal(read(tmp_path / "out"), expected)
    merge(saved, "actor", tmp_path / "same", "nested")
    assert_equal(read(tmp_path / "same"), read(saved / "whole"))


def test_stream_and_comparison(saved: Path, expected: dict[str, Any]) -> None:
    with quiet():
        assert_equal(dict(expo.stream(saved / "sft", saved / "actor", ALPHA)), expected)
    assert compare(saved / "whole", saved / "flat").totals.changed == 0
    found, wanted = (compare(saved / "sft", saved / name).totals for name in ("app", "whole"))
    assert found == wanted


def test_live_over_parts(saved: Path, expected: dict[str, Any]) -> None:
    with quiet():
        model = saved_parts.model(2)
        with expo.Live(model, saved / "sft") as live:
            live.alpha = ALPHA
            assert_equal(model.state_dict(), expected)
        with expo.Live(model, saved / "actor") as live:
            live.alpha = ALPHA
            assert_equal(model.state_dict(), read(saved / "whole"))


@pytest.mark.exhaustive  # four processes start
@pytest.mark.parametrize("world", [4])
def test_replicas_of_parts(tmp_path: Path, world: int) -> None:
    """With hybrid sharding each part is saved by several processes, and one of them is read."""
    folder = run(tmp_path / "saved", world, "hybrid")
    wanted = read(expo.merge(folder / "sft", folder / "whole", ALPHA, tmp_path / "expected").outputs[0].path)
    for name in ("actor", *DISTRIBUTED):
        merge(folder, name, tmp_path / name)
        assert_equal(read(tmp_path / name), wanted)


def test_the_command_plans_without_torch(saved: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    code = (
        "import sys, expo.fast\n"
        "code = expo.fast.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    words = ["--sft", saved / "sft", "--aligned", saved / "nested", "--alpha", "0.3", "--out", tmp_path / "out"]
    words += ["--aligned-config", saved / "actor" / "huggingface"]
    for more in (["--plan"], []):
        done = subprocess.run([sys.executable, "-c", code, *map(str, words), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_equal(read(tmp_path / "out"), expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--aligned nested --alpha 0.3 --aligned-config huggingface" in card


def test_the_config_of_the_folder_above(copied: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """accelerate puts the parts into a folder inside of the checkpoint."""
    shutil.move(copied / "nested", copied / "whole" / "pytorch_model_fsdp_0")
    os.remove(copied / "whole" / "model.safetensors")
    expo.merge(copied / "sft", copied / "whole" / "pytorch_model_fsdp_0", ALPHA, tmp_path / "out")
    assert_equal(read(tmp_path / "out"), expected)


def test_without_a_config_the_option_is_asked_for(saved: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(expo.PlanError, match="by `aligned_config`"):
        expo.merge(saved / "sft", saved / "flat", ALPHA, tmp_path / "out")
    expo.merge(saved / "sft", saved / "flat", ALPHA, tmp_path / "out", aligned_config=saved / "whole")
    assert_equal(read(tmp_path / "out"), expected)


def test_the_option_for_other_inputs(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(expo.UsageError, match="leave it out"):
        merge(saved, "whole", tmp_path / "out", aligned_config=saved / "whole")
    with pytest.raises(expo.CheckpointError, match=r"store: .*needs a folder with config.json"):
        merge(saved, "flat", tmp_path / "out", aligned_config=saved / "store")


def test_the_output_may_not_replace_the_config(saved: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(saved / "whole", config)
    for out in (config, tmp_path):
        with pytest.raises(expo.OutputError, match=r"is or contains .*config, which has aligned's config.json"):
            merge(saved, "flat", out, aligned_config=config, overwrite=True)
    merge(saved, "flat", config / "merged", aligned_config=config)


def test_large_outputs_are_divided(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expo.planning.plan.PARTS_SHARD_BYTES", 500)
    merge(saved, "actor", tmp_path / "out", check=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3


def test_a_search_asks_for_a_whole_model(saved: Path, tmp_path: Path) -> None:
    from expo.search import search_alpha

    with pytest.raises(expo.CheckpointError, match=r"make a whole model of them first.*--alpha 0"):
        search_alpha(saved / "sft", saved / "actor", ["hello"], lambda *_: [0.0])


# Damage


def rank(copied: Path, number: int) -> Path:
    return copied / "actor" / f"model_world_size_3_rank_{number}.pt"


def lose_a_rank(copied: Path) -> None:
    os.remove(rank(copied, 1))


def add_a_rank(copied: Path) -> None:
    shutil.copy(rank(copied, 1), rank(copied, 3))


def mix_two_trainings(copied: Path) -> None:
    shutil.copy(rank(copied, 1), copied / "actor" / "model_world_size_2_rank_1.pt")


def repeat_a_rank(copied: Path) -> None:
    shutil.copy(rank(copied, 0), rank(copied, 2))


def truncate_a_rank(copied: Path) -> None:
    os.truncate(rank(copied, 2), os.path.getsize(rank(copied, 2)) - 300)


def resave(copied: Path, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(rank(copied, number), weights_only=False)
    change(state)
    torch.save(state, rank(copied, number))


def lose_a_name(copied: Path) -> None:
    resave(copied, 1, lambda state: state.pop("model.layers.1.mlp.down_proj.weight"))


def shorten(copied: Path) -> None:
    resave(copied, 0, lambda state: state.update({"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3)}))


def lose_the_metadata(copied: Path) -> None:
    os.remove(copied / "flat" / ".metadata")


def lose_a_file(copied: Path) -> None:
    os.remove(copied / "flat" / "__1_0.distcp")


def truncate_a_file(copied: Path) -> None:
    os.truncate(copied / "flat" / "__1_0.distcp", 100)


def change_the_metadata(copied: Path, change: Callable[[Any], None]) -> None:
    where = copied / "flat" / ".metadata"
    metadata = pickle.loads(where.read_bytes())
    change(metadata)
    where.write_bytes(pickle.dumps(metadata))


def lose_a_chunk(copied: Path) -> None:
    change_the_metadata(copied, lambda metadata: metadata.state_dict_metadata["lm_head.weight"].chunks.pop())


def repeat_a_chunk(copied: Path) -> None:
    def change(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["model.layers.0.mlp.up_proj.weight"].chunks
        chunks[2] = chunks[1]

    change_the_metadata(copied, change)


def leave_the_folder(copied: Path) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../elsewhere"

    change_the_metadata(copied, change)


def replace_the_metadata(copied: Path) -> None:
    (copied / "flat" / ".metadata").write_bytes(pickle.dumps({"a": 1}))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a rank's file is missing": ("actor", lose_a_rank, r"model_world_size_3_rank_1.pt is missing"),
    "one file too many": ("actor", add_a_rank, r"rank_3.pt is one of too many"),
    "two trainings": ("actor", mix_two_trainings, r"with 2 and 3 processes: remove"),
    "a rank's file twice": ("actor", repeat_a_rank, r"a part of shape \[\d+.* where its placements give"),
    "a truncated file of a rank": ("actor", truncate_a_rank, r"rank_2.pt: .*cannot be read"),
    "a name that one rank lacks": ("actor", lose_a_name, r"rank_1.pt: 'model.layers.1.mlp.down_proj.weight' is not in"),
    "a tensor of two shapes": ("actor", shorten, r"another one in other files"),
    "no metadata": ("flat", lose_the_metadata, r"without its .metadata: copy that file too"),
    "a file is missing": ("flat", lose_a_file, r"__1_0.distcp: No such file or directory; copy it again"),
    "a truncated file": ("flat", truncate_a_file, r"__1_0.distcp: it ends inside of .*copy it again"),
    "a chunk is missing": ("flat", lose_a_chunk, r"'lm_head.weight' has the shape \[11, 10\], and its pieces have"),
    "a chunk twice": ("flat", repeat_a_chunk, r"up_proj.weight' has the shape \[7, 10\], and"),
    "a file elsewhere": ("flat", leave_the_folder, r"is said to be in '../elsewhere', which is no file of this folder"),
    "another pickle": ("flat", replace_the_metadata, r"a dict, and no metadata of a distributed checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(copied: Path, tmp_path: Path, damage: str) -> None:
    folder, change, text = DAMAGE[damage]
    with quiet():
        change(copied)
    with pytest.raises(expo.CheckpointError, match=text) as error:
        merge(copied, folder, tmp_path / "out")
    assert str(error.value).startswith(str(copied / folder))
    assert "\n" not in str(error.value)


class Hostile:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pickle_is_run(copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (copied / "flat" / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(expo.CheckpointError, match=r"(posix|nt).system, and no metadata"):
        merge(copied, "flat", tmp_path / "out")
    for number in range(3):
        with zipfile.ZipFile(rank(copied, number), "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": Hostile(mark)}, protocol=2))
    with pytest.raises(expo.CheckpointError, match=r"tensor 'a': it is (posix|nt).system, and no DTensor"):
        merge(copied, "actor", tmp_path / "out")
    assert not mark.exists()


def test_a_sum_over_processes_is_refused(copied: Path, tmp_path: Path) -> None:
    """A tensor that is Partial is a sum of what the processes have, and no file has it."""
    for number in range(3):
        path = rank(copied, number)
        entries = {}
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        (name,) = (name for name in entries if name.endswith("/data.pkl"))
        data = entries[name]
        entries[name] = data.replace(b"placement_types\nReplicate\n", b"placement_types\nPartial\n")
        assert entries[name] != data
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in entries.items():
                archive.writestr(each, content)
    with pytest.raises(expo.CheckpointError, match="its placement is Partial, and only Shard and Replicate are read"):
        merge(copied, "actor", tmp_path / "out")


# The reader of pieces


class Memory:
    """A reader of bytes in memory."""

    scattered = False

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, start: int, into: Any) -> None:
        into[:] = self.data[start : start + len(into)]

    def read_ahead(self, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= len(self.data)


def test_pieces_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(int(n) for n in rng.integers(1, 7, rng.integers(0, 5)))
        numbers = rng.integers(0, 2**16, shape, np.uint16)
        cuts = [sorted({0, n, *map(int, rng.integers(0, n + 1, rng.integers(0, 3)))}) for n in shape]
        pieces = []
        for box in product(*map(pairwise, cuts)):
            part = np.ascontiguousarray(numbers[tuple(slice(*each) for each in box)])
            offsets, sizes = tuple(low for low, _ in box), tuple(high - low for low, high in box)
            pieces.append(Piece(offsets, sizes, Memory(b"xyz" + part.tobytes()), 3))  # type: ignore[arg-type]
        rng.shuffle(pieces)  # type: ignore[arg-type]
        assert why_not_covered(shape, [piece[:2] for piece in pieces]) is None
        reader, whole = PiecewiseReader(shape, pieces, 2), numbers.tobytes()
        for start, stop in np.sort(rng.integers(0, len(whole) + 1, (5, 2))):
            found = bytearray(int(stop - start))
            reader.read(int(start), found)
            assert found == whole[start:stop]
            reader.read_ahead(int(start), int(stop))


def test_a_whole_piece_is_mapped(saved: Path) -> None:
    """Rows of one process lie in a row in its file, so an engine reads them where they are."""
    opened = open_checkpoint(saved / "actor")
    name = "model.embed_tokens.weight"  # 11 rows: 4, 4 and 3 of 20 bytes
    for start, stop, is_mapped in ((0, 80, True), (80, 160, True), (60, 100, False)):
        with opened.reader(name).mapped(start, stop) as view:
            found = bytearray(stop - start)
            opened.reader(name).read(start, found)
            assert view is None or view == found
            if not is_mapped:
                assert view is None
    opened.close()


def test_boxes_that_do_not_cover() -> None:
    assert why_not_covered((4,), [((0,), (2,)), ((3,), (1,))]) == "its pieces have 3 elements"
    assert "ends outside" in (why_not_covered((4,), [((2,), (3,))]) or "")
    assert "overlap" in (why_not_covered((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))]) or "")
    assert "2 dimensions" in (why_not_covered((4,), [((0, 0), (2, 2))]) or "")


def test_identity_covers_every_file(saved: Path) -> None:
    opened = open_checkpoint(saved / "actor")
    assert sorted(opened.weight_files) == [f"model_world_size_3_rank_{number}.pt" for number in range(3)]
    assert json.dumps({name: shard.digest for name, shard in opened.weight_files.items()})
    assert len({shard.digest for shard in opened.weight_files.values()}) == 3
    opened.close()
