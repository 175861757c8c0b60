"""The option --resume: an interrupted or killed merge continues, and gives the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import (
    MIXED_SHAPES,
    contents,
    fingerprint,
    kept,
    mixed_pair,
    random_tensors,
    staging_folder,
    write_folder,
)
from interrupting import Stop, interrupted

import expo
from expo.cli import with_options
from expo.fast import main
from expo.merging import merge as merge_module
from expo.merging import rank_worker
from expo.output import journal
from expo.output.journal import Journal, journal_path, read_journal
from expo.output.staging import JOURNAL

ROOT = Path(__file__).parents[2]
ALPHAS = (0.3, 1.0)
Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many chunks, and record each at once."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 8 << 10)
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    monkeypatch.setattr("expo.execution.worker_pool.TICK", 0.001)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    return mixed_pair(folder)


@pytest.fixture
def whole(pair: Pair, tmp_path: Path) -> dict[str, bytes]:
    """Return the digests of the output of an undisturbed merge."""
    expo.merge(*pair, 0.3, tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("chunks", [0, 1, 5, 20, 33])
def test_the_same_bytes_and_the_same_report(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, whole: dict[str, bytes], chunks: int
) -> None:
    out = tmp_path / "out"
    message = interrupted(
        monkeypatch, chunks, expo.OutputError("the disk is full"), lambda: expo.merge(*pair, 0.3, out)
    )
    assert message == f"the disk is full; {kept(out)}"
    assert not out.exists()
    written = read_journal(journal_path(str(staging_folder(out))))
    assert written is not None
    resumed = expo.merge(*pair, 0.3, out, resume=True)
    assert resumed.resumed == sum(stop - start for (_, start), (stop, _) in written.done.items())
    assert (resumed.resumed > 0) is (chunks > 0)
    assert contents(out) == whole
    assert not staging_folder(out).exists()
    plain = expo.merge(*pair, 0.3, tmp_path / "again")
    for name in ("outputs", "relative_distance", "max_abs_difference", "extrapolated", "copied"):
        resumed_value, plain_value = getattr(resumed, name), getattr(plain, name)
        if name == "outputs":
            resumed_value, plain_value = (
                [each.__dict__ | {"path": ""} for each in resumed_value],
                [each.__dict__ | {"path": ""} for each in plain_value],
            )
        assert resumed_value == plain_value


def test_without_resume_what_is_left_is_named_and_kept(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, 5, Stop(), lambda: expo.merge(*pair, 0.3, out))
    before = contents(staging_folder(out))
    with pytest.raises(expo.OutputError) as caught:
        expo.merge(*pair, 0.3, out)
    assert str(caught.value) == (
        f"{staging_folder(out)} was left by an interrupted merge: `resume=True` continues it, `overwrite=True` starts "
        "anew"
    )
    assert contents(staging_folder(out)) == before
    assert expo.merge(*pair, 0.3, out, overwrite=True).resumed == 0
    assert contents(out) == whole


def test_resume_where_nothing_was_left_starts_anew(pair: Pair, tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert expo.merge(*pair, 0.3, tmp_path / "out", resume=True).resumed == 0
    assert contents(tmp_path / "out") == whole
    with pytest.raises(expo.OutputError, match="exists; choose another `out`"):
        expo.merge(*pair, 0.3, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.5}, r"--alpha was \[0.3\], is \[0.5\]"),
        ({"alpha_for": {"half": 0.1}}, r"--alpha-for was \[\], is \[\[\"half\", 0.1\]\]"),
        ({"on_unpaired": "aligned"}, r"--on-unpaired was \"error\", is \"aligned\""),
        ({"on_mismatch": "aligned"}, r"--on-mismatch was \"error\", is \"aligned\""),
    ],
)
def test_another_merge_is_refused_and_the_difference_named(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, whole: dict[str, bytes], change: Any, message: str
) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, 5, Stop(), lambda: expo.merge(*pair, 0.3, out))
    before = contents(staging_folder(out))
    with pytest.raises(
        expo.OutputError, match=rf"holds another merge \({message}\): choose another `out`, or `overwrite=True`"
    ):
        expo.merge(*pair, **{"alpha": 0.3, **change}, out=out, resume=True)
    assert contents(staging_folder(out)) == before
    expo.merge(*pair, 0.3, out, resume=True)
    assert contents(out) == whole


def test_the_order_of_rules_is_part_of_a_merge(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    one, other = {"f": 0.1, "l": 0.9}, {"l": 0.9, "f": 0.1}  # both match "half" and "full", and the last one counts
    interrupted(monkeypatch, 20, Stop(), lambda: expo.merge(*pair, 0.3, tmp_path / "out", alpha_for=one))
    with pytest.raises(expo.OutputError, match=r'--alpha-for was \[\["f", 0.1\], \["l", 0.9\]\], is \[\["l"'):
        expo.merge(*pair, 0.3, tmp_path / "out", alpha_for=other, resume=True)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_config_says_of_a_tie_is_part_of_a_merge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tied: bool
) -> None:
    shapes = {"model.embed_tokens.weight": ("BF16", (301, 97)), "lm_head.weight": ("BF16", (301, 97))}
    tensors = random_tensors(shapes, 1)
    aligned = write_folder(tmp_path / "aligned", random_tensors(shapes, 2))
    del tensors["lm_head.weight"]  # the counterpart of the head is the embedding, unless the config says otherwise
    sft = write_folder(tmp_path / "sft", tensors, config={"tie_word_embeddings": tied})
    work = (sft, aligned, 0.3, tmp_path / "out")
    interrupted(monkeypatch, 5, Stop(), lambda: expo.merge(*work, on_unpaired="aligned"))
    (sft / "config.json").write_text(json.dumps({"tie_word_embeddings": not tied}))
    with pytest.raises(expo.OutputError, match=r"holds another merge \(tie_word_embeddings of sft and aligned was"):
        expo.merge(*work, on_unpaired="aligned", resume=True)


def test_another_input_is_refused(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    sft = write_folder(tmp_path / "sft", random_tensors(MIXED_SHAPES, 1), shards=2)
    interrupted(monkeypatch, 5, Stop(), lambda: expo.merge(sft, pair[1], 0.3, tmp_path / "out"))
    first = min(sft.glob("*.safetensors"))
    os.utime(first, (1, 1))
    with pytest.raises(expo.OutputError, match=rf"\(sft: another size, time of change or header of {first.name}\)"):
        expo.merge(sft, pair[1], 0.3, tmp_path / "out", resume=True)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    interrupted(monkeypatch, 5, Stop(), lambda: expo.merge(*pair, 0.3, tmp_path / "out"))
    monkeypatch.setattr("expo.merging.job.__version__", "99")
    with pytest.raises(expo.OutputError, match=r'version was "0.1.0", is "99"'):
        expo.merge(*pair, 0.3, tmp_path / "out", resume=True)


def test_a_file_and_over_an_old_output(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    aligned = write_folder(tmp_path / "one", random_tensors(MIXED_SHAPES, 2)) / "model.safetensors"
    sft = write_folder(tmp_path / "two", random_tensors(MIXED_SHAPES, 1)) / "model.safetensors"
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    expo.merge(sft, aligned, 0.3, plain)
    out.write_bytes(b"old")
    interrupted(monkeypatch, 5, Stop(), lambda: expo.merge(sft, aligned, 0.3, out, overwrite=True))
    assert out.read_bytes() == b"old"
    assert expo.merge(sft, aligned, 0.3, out, overwrite=True, resume=True).resumed > 0
    assert out.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("chunks", [1, 7, 50])
def test_several_outputs(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, chunks: int) -> None:
    work = lambda folder, **more: expo.merge(*pair, ALPHAS, str(tmp_path / folder / "{alpha}"), **more)  # noqa: E731
    work("plain")
    interrupted(monkeypatch, chunks, Stop(), lambda: work("out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".0.3.expo-staging", ".1.expo-staging"]
    assert work("out", resume=True, verify=True).verified
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_stop_between_two_commits(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    """The first output is in place and stays; a resumed merge puts the second in place and computes nothing."""
    work = lambda folder, **more: expo.merge(*pair, ALPHAS, str(tmp_path / folder / "{alpha}"), **more)  # noqa: E731
    work("plain")
    commit, calls = merge_module.Staging.commit, iter(range(10))

    def once(self: Any) -> list[str]:
        if next(calls):
            raise expo.OutputError("the disk is gone")
        return commit(self)

    with monkeypatch.context() as patch:
        patch.setattr(merge_module.Staging, "commit", once)
        with pytest.raises(
            expo.OutputError, match=r"already in place: .*/0\.3; the finished part is kept in .*\.1\.expo-staging"
        ):
            work("out")
    first = (tmp_path / "out" / "0.3").stat().st_ino
    report = work("out", resume=True)
    assert (tmp_path / "out" / "0.3").stat().st_ino == first
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert [Path(each.path).name for each in report.outputs] == ["0.3", "1"]


@pytest.mark.parametrize("left", [1, 2])
def test_a_stop_after_the_last_commit(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, left: int) -> None:
    """All outputs are in place, and one or both journals are left; a resumed merge only removes them."""
    work = lambda folder, **more: expo.merge(*pair, ALPHAS, str(tmp_path / folder / "{alpha}"), **more)  # noqa: E731
    plain = work("plain")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: [])
        work("out")
    journals = sorted((tmp_path / "out").glob(".*.expo-journal"))
    assert len(journals) == 2
    for path in journals[left:]:
        path.unlink()
    before = contents(tmp_path / "out" / "1")
    report = work("out", resume=True)
    assert report.resumed == report.bytes_written == plain.bytes_written
    assert [each.changed for each in report.outputs] == [each.changed for each in plain.outputs]
    assert contents(tmp_path / "out" / "1") == before
    assert not list((tmp_path / "out").glob(".*"))


def test_a_shard_that_has_gone_from_staging(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, 30, Stop(), lambda: expo.merge(*pair, 0.3, out))
    written = read_journal(journal_path(str(staging_folder(out))))
    assert written is not None
    name = next(iter(written.done))[0]
    (staging_folder(out) / name).unlink()
    with pytest.raises(expo.OutputError, match=rf"{name}: No such file"):
        expo.merge(*pair, 0.3, out, resume=True)
    (staging_folder(out) / name).write_bytes(b"short")
    with pytest.raises(
        expo.OutputError, match=rf"{name} is shorter than the interrupted merge left it: `overwrite=True` starts anew"
    ):
        expo.merge(*pair, 0.3, out, resume=True)


# Journals


def lines(folder: Path) -> list[bytes]:
    return (folder / JOURNAL).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage"])
def test_what_follows_a_damaged_line_counts_as_not_written(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, whole: dict[str, bytes], damage: str
) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, 30, Stop(), lambda: expo.merge(*pair, 0.3, out))
    good = lines(staging_folder(out))
    assert len(good) > 2
    last = {"torn": good[-1][:-3], "flipped": good[-1].replace(b"model", b"modem", 1), "garbage": b"\xff\0{[" * 9}
    (staging_folder(out) / JOURNAL).write_bytes(b"".join(good[:-1]) + last[damage])
    written = read_journal(journal_path(str(staging_folder(out))))
    assert written is not None
    assert len(written.done) < 30
    expo.merge(*pair, 0.3, out, resume=True)
    assert contents(out) == whole


@pytest.mark.parametrize("text", [b"", b"\n", b"00000000 {}\n", b"\xff" * 100])
def test_a_journal_without_a_first_line_is_as_none(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, whole: dict[str, bytes], text: bytes
) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, 30, Stop(), lambda: expo.merge(*pair, 0.3, out))
    (staging_folder(out) / JOURNAL).write_bytes(text)
    assert expo.merge(*pair, 0.3, out, resume=True).resumed == 0
    assert contents(out) == whole


def test_a_line_follows_the_sync_of_what_it_says(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    """When a line is written, all chunks that it names have been synced since their last write."""
    dirty: set[str] = set()
    write, sync, append = rank_worker.ShardWriter.write, rank_worker.ShardWriter.sync, Journal._append

    def writing(self: Any, offset: int, data: Any, length: int) -> None:
        write(self, offset, data, length)
        dirty.add(f"{os.path.basename(self.path)} {offset}")

    def syncing(self: Any) -> None:
        before = {each for each in dirty if each.startswith(os.path.basename(self.path))}
        sync(self)
        dirty.difference_update(before)

    recorded = []

    def appending(self: Any, record: Any) -> None:
        for name, start, *_ in record.get("done", []):
            recorded.append(f"{name} {start}")
            assert f"{name} {start}" not in dirty
        append(self, record)

    monkeypatch.setattr(rank_worker.ShardWriter, "write", writing)
    monkeypatch.setattr(rank_worker.ShardWriter, "sync", syncing)
    monkeypatch.setattr(Journal, "_append", appending)
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert len(recorded) > 5


def test_no_journal_in_the_output(pair: Pair, tmp_path: Path) -> None:
    expo.merge(*pair, 0.3, tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


# The command line, and killed processes

DRIVER = """
import sys
from expo import fast
from expo.output import journal
from expo.execution import worker_pool as work
work.CHUNK, work.TICK, journal.INTERVAL = 8 << 10, 0.0005, 0.0
sys.exit(fast.main(sys.argv[1:]))
"""


def command(pair: Pair, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", DRIVER, "--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3",
            "--out", str(out), "--quiet", *more]  # fmt: skip


# Python may run the handler between `open` and the `with` that would close the file: the file is collected, unclosed.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_a_resume_goes_on_with(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, whole: dict[str, bytes], number: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    sink, seen = rank_worker.RankWorker._write, iter(range(10**6))

    def signalling(self: Any, *arguments: Any) -> None:
        if next(seen) == 9:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # a busy machine may deliver the signal to the main thread late
        sink(self, *arguments)
        time.sleep(0.003)  # some reports of progress must happen before the end

    arguments = ["--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3", "--out", str(out), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(rank_worker.RankWorker, "_write", signalling)
        assert main(arguments) == 130
    assert capsys.readouterr().err == f"expo: interrupted; {with_options(kept(out))}\n"
    assert main([*arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] > 0
    assert contents(out) == whole


def killed(pair: Pair, out: Path, after: float) -> bool:
    """Start a merge, kill it after this many seconds, and return True if it was still running."""
    process = subprocess.Popen(command(pair, out, "--resume"), cwd=ROOT, stderr=subprocess.DEVNULL)
    began = time.perf_counter()
    while time.perf_counter() - began < after and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    return process.wait() == -signal.SIGKILL


def kill_at_random(pair: Pair, tmp_path: Path, whole: dict[str, bytes], times: int) -> None:
    """Kill a merge this many times at random moments, resume it each time, and check every output."""
    dice, before = random.Random(times), fingerprint(*pair)
    out, kills = tmp_path / "out", 0
    began = time.perf_counter()
    subprocess.run(command(pair, tmp_path / "timed"), cwd=ROOT, check=True)
    whole_time = time.perf_counter() - began
    while kills < times:
        if killed(pair, out, dice.uniform(0.3, 1.05) * whole_time):
            kills += 1
        if out.exists():
            assert contents(out) == whole
            out = tmp_path / f"out{kills}"
    subprocess.run(command(pair, out, "--resume"), cwd=ROOT, check=True)
    assert contents(out) == whole
    assert fingerprint(*pair) == before


def test_killed_at_any_moment(pair: Pair, tmp_path: Path, whole: dict[str, bytes]) -> None:
    kill_at_random(pair, tmp_path, whole, 5)


@pytest.mark.exhaustive
def test_killed_at_any_moment_many_times(pair: Pair, tmp_path: Path, whole: dict[str, bytes]) -> None:
    kill_at_random(pair, tmp_path, whole, 60)
