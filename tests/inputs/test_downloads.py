"""The weights of both repositories are downloaded at the same time, by a process that ends at once when it has to."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from checkpoint_files import random_tensors, read_folder, write_folder
from hub_client import Client
from hub_server import Hub, files_of

import expo

SHAPES = {f"layers.{number}.weight": ("BF16", (200, 100)) for number in range(4)}
ALPHA = "0.3"


@pytest.fixture
def pair(server: Hub, tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of two repositories of four shards, org/sft and org/aligned."""
    folders = []
    for seed, name in enumerate(("sft", "aligned")):
        folders.append(write_folder(tmp_path / name, random_tensors(SHAPES, seed), shards=4))
        server.add(f"org/{name}", files_of(folders[-1]))
    return folders[0], folders[1]


def words(out: Path, *more: str) -> list[str]:
    return [
        "-m",
        "expo.fast",
        "--sft",
        "org/sft",
        "--aligned",
        "org/aligned",
        "--alpha",
        ALPHA,
        "--out",
        str(out),
        *more,
    ]


def blobs(client: Client) -> dict[str, int]:
    """Return the sizes of the files in the cache's blobs, complete and partial ones."""
    return {path.name: path.stat().st_size for path in (client.home / "hf" / "hub").glob("models--*/blobs/*")}


def test_shards_of_both_arrive_together(server: Hub, client: Client, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """While one shard of each repository stalls, all others arrive: no file waits for another."""
    shard = "model-00002-of-00004.safetensors"
    server.stall[shard] = 1000
    with client.run(*words(tmp_path / "out")) as process:
        deadline = time.monotonic() + 30
        while len([name for name in server.asked() if name.startswith("model-")]) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        del server.stall[shard]
        server.release.set()  # the connections end, and the library continues
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    expo.merge(*pair, float(ALPHA), tmp_path / "expected")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "expected")
    assert re.search(r"expo: downloaded 8 weight files, [\d.]+ kB in [\d.]+ s", stderr)


@pytest.mark.usefixtures("own_signals")
def test_ctrl_c_leaves_no_partial_file(server: Hub, client: Client, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Complete files stay, and the message says how many bytes they are; the same command again fetches the others."""
    stalled = "model-00003-of-00004.safetensors"
    server.stall[stalled] = 20_000
    with client.run(*words(tmp_path / "out")) as process:
        assert server.stalled.wait(30)
        deadline = time.monotonic() + 30
        while sum(size >= 40_000 for size in blobs(client).values()) < 6:
            assert time.monotonic() < deadline, blobs(client)
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, stderr = process.communicate(timeout=8)
        assert time.monotonic() - began < 4  # a second on an idle machine
    assert process.returncode == 130
    assert not [name for name in blobs(client) if name.endswith(".incomplete")]
    assert re.search(
        r"the download is interrupted: [\d.]+ kB are complete, and [\d.]+ (bytes|kB) of files that are not", stderr
    )
    del server.stall[stalled]
    server.log.clear()
    with client.run(*words(tmp_path / "out")) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert {name for name in server.asked() if name.startswith("model-")} == {stalled}
    expo.merge(*pair, float(ALPHA), tmp_path / "expected")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "expected")


def test_the_downloading_process_does_not_outlive_its_owner(
    server: Hub, client: Client, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    server.stall["model-00001-of-00004.safetensors"] = 1000
    with client.run(*words(tmp_path / "out")) as process:
        assert server.stalled.wait(30)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.kill()
        process.communicate(timeout=10)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{children[0]}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{children[0]}")


def test_a_failure_in_one_repository_keeps_the_other(
    server: Hub, client: Client, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    server.status["model-00004-of-00004.safetensors"] = 403
    with client.run(*words(tmp_path / "out", "--json")) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert re.search(r"org/(sft|aligned)@main: .* forbids it", stderr)
    assert "Traceback" not in stderr
    assert stdout == ""
    server.status.clear()
    server.log.clear()
    with client.run(*words(tmp_path / "out", "--json")) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["outputs"]
    assert {name for name in server.asked() if name.startswith("model-")} == {"model-00004-of-00004.safetensors"}
