"""Several processes that make one merge: they give the bytes of one process, and survive the failure of any rank.

The ranks are threads of one process in most tests, and processes under torchrun in the last ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import MIXED_SHAPES, contents, kept, mixed_pair, random_tensors, staging_folder, write_folder
from hypothesis import given
from hypothesis import strategies as st

import expo
from expo.cli import with_options
from expo.errors import RankError
from expo.merging import rank_worker
from expo.merging.launcher import join
from expo.merging.process_group import ProcessGroup
from expo.merging.rank_worker import Corrupt
from expo.merging.result import Merged
from expo.output import journal
from expo.output.journal import read_journal
from expo.output.staging import JOURNAL, journals_of_ranks
from expo.planning.shards import OutputShard, cut, portion

dist: Any = pytest.importorskip("torch.distributed")

Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many chunks, record each at once, and exchange heartbeats quickly."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 8 << 10)
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    monkeypatch.setattr("expo.execution.worker_pool.TICK", 0.001)
    monkeypatch.setattr("expo.merging.process_group.HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr("expo.merging.process_group.POLL_SECONDS", 0.002)
    monkeypatch.setattr("expo.merging.process_group.GRACE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    return mixed_pair(folder)


class Host:
    """Ranks that are threads of one process, and their store."""

    def __init__(self, world: int, **options: Any) -> None:
        self.store, self.world = dist.HashStore(), world
        self._table: dict[int, list[Any]] = {}
        self._lock = threading.Lock()
        self.ranks = [ProcessGroup(self.store, self._exchange(rank), rank, world, **options) for rank in range(world)]

    def _exchange(self, rank: int) -> Callable[[Any], list[Any]]:
        turns = iter(range(1000))

        def exchange(value: Any) -> list[Any]:
            turn = next(turns)
            with self._lock:
                self._table.setdefault(turn, [...] * self.world)[rank] = value
            deadline = time.monotonic() + 20
            while ... in self._table[turn]:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            return self._table[turn]

        return exchange

    def run(self, work: Callable[[ProcessGroup], Any]) -> list[Any]:
        """Run the work on every rank, and return the result or the exception of each, by rank."""
        results: list[Any] = [None] * self.world

        def one(ranks: ProcessGroup) -> None:
            try:
                results[ranks.rank] = work(ranks)
            except BaseException as error:
                results[ranks.rank] = error

        threads = [threading.Thread(target=one, args=(ranks,)) for ranks in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ranks in self.ranks:
            ranks.close()
        return results


def merge_by(world: int, pair: Pair, alpha: Any, out: Path, **options: Any) -> Merged:
    """Merge with this many ranks, check that all return the same result, and return it."""
    first, *others = Host(world).run(lambda ranks: expo.merge(*pair, alpha, out, ranks=ranks, **options))
    if isinstance(first, BaseException):
        raise first
    assert all(other == first for other in others)
    assert first.ranks == world
    return first  # type: ignore[no-any-return]


def report(merged: Merged) -> Merged:
    """Return the result of a merge without the time, the path and the processes."""
    outputs = tuple(replace(output, path="") for output in merged.outputs)
    return replace(merged, outputs=outputs, seconds=0.0, workers=0, ranks=0, resumed=0, shares={})


# The division into ranges.


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 9), st.data())
def test_every_chunk_is_one_ranks_and_all_have_the_same_bytes(sizes: list[int], world: int, data: Any) -> None:
    shards = tuple(OutputShard(f"{k}", b"", size, ()) for k, size in enumerate(sizes))
    chunks = list(cut(shards, 4))
    gone = data.draw(st.sets(st.sampled_from(range(len(chunks)))))
    done = {(chunks[k].shard.name, chunks[k].start): (chunks[k].stop, None) for k in gone}
    parts = [list(portion(shards, 4, done, rank, world)) for rank in range(world)]
    assert [chunk for part in parts for chunk in part] == [each for k, each in enumerate(chunks) if k not in gone]
    bytes_of = [sum(chunk.stop - chunk.start for chunk in part) for part in parts]
    assert all(abs(size - sum(bytes_of) / world) <= 4 for size in bytes_of)


# Threads as ranks.


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_bytes_and_the_report_of_one_process(pair: Pair, tmp_path: Path, world: int) -> None:
    alone = expo.merge(*pair, [0.3, 1.0], tmp_path / "one-{alpha}", digest=True)
    together = merge_by(world, pair, [0.3, 1.0], tmp_path / "all-{alpha}", digest=True)
    for alpha in ("0.3", "1"):
        assert contents(tmp_path / f"one-{alpha}") == contents(tmp_path / f"all-{alpha}")
    assert report(alone) == report(together)
    assert sum(together.shares.values()) == together.bytes_written
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_more_ranks_than_chunks(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 1 << 20)
    expo.merge(*pair, 0.3, tmp_path / "one")
    merge_by(6, pair, 0.3, tmp_path / "all", verify=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "all")


def test_a_bare_file_and_a_replaced_output(pair: Pair, tmp_path: Path) -> None:
    single = tuple(
        write_folder(tmp_path / name, random_tensors(MIXED_SHAPES, seed)) / "model.safetensors"
        for seed, name in enumerate(("sft", "aligned"))
    )
    expo.merge(*single, 0.3, tmp_path / "one.safetensors")
    merge_by(3, single, 0.1, tmp_path / "all.safetensors")  # type: ignore[arg-type]
    merge_by(3, single, 0.3, tmp_path / "all.safetensors", overwrite=True)  # type: ignore[arg-type]
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()


def test_every_rank_does_its_part(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, by = rank_worker.RankWorker._write, {}

    def counting(self: Any, k: int, chunk: Any, data: memoryview) -> None:
        real(self, k, chunk, data)
        by.setdefault(self._job.ranks.rank, []).append(chunk.stop - chunk.start)

    monkeypatch.setattr(rank_worker.RankWorker, "_write", counting)
    together = merge_by(3, pair, 0.3, tmp_path / "all")
    sizes = [sum(by[rank]) for rank in range(3)]
    assert sum(sizes) == together.bytes_written
    assert max(sizes) - min(sizes) <= 2 * (8 << 10)


HOLDING = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
input()
"""


class Stop(Exception):
    """The exception with which a test interrupts a rank."""


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, rank: int, chunks: int, error: BaseException) -> Iterator[None]:
    """Let a rank fail after this many chunks, and slow the other ranks down so that they can notice."""
    sink, seen = rank_worker.RankWorker._write, iter(range(10**6))

    def sinking(self: Any, *arguments: Any) -> None:
        if self._job.ranks.rank == rank and next(seen) >= chunks:
            raise error
        sink(self, *arguments)
        time.sleep(0.02)

    with monkeypatch.context() as patch:
        patch.setattr(rank_worker.RankWorker, "_write", sinking)
        yield


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("again", [1, 2, 4])
def test_a_rank_that_fails_stops_the_others_and_any_number_of_ranks_go_on(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, rank: int, again: int
) -> None:
    out = tmp_path / "out"
    expo.merge(*pair, 0.3, tmp_path / "one")
    with failing(monkeypatch, rank, 3, Stop("the lights went out")):
        results = Host(3).run(lambda ranks: expo.merge(*pair, 0.3, out, ranks=ranks))
    assert isinstance(results[rank], Stop)
    for other in {0, 1, 2} - {rank}:
        assert isinstance(results[other], RankError)
        assert re.match(
            rf"rank {rank} of 3 on .+ failed: Stop: the lights went out; rank {other} of 3 has stopped too",
            str(results[other]),
        )
    if rank:
        assert str(results[0]).endswith(kept(out))
    assert not out.exists()
    assert journals_of_ranks(str(staging_folder(out))) == [f"{JOURNAL}.1", f"{JOURNAL}.2"]
    written = [read_journal(str(staging_folder(out) / name)) for name in (JOURNAL, f"{JOURNAL}.1", f"{JOURNAL}.2")]
    left = sum(stop - start for each in written if each for (_, start), (stop, _) in each.done.items())
    assert left >= 3 * 8 << 10
    resumed = merge_by(again, pair, 0.3, out, resume=True) if again > 1 else expo.merge(*pair, 0.3, out, resume=True)
    assert resumed.resumed == left
    assert contents(out) == contents(tmp_path / "one")
    assert report(resumed) == report(expo.merge(*pair, 0.3, tmp_path / "two"))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_what_ranks_left_is_not_touched_while_one_is_still_writing(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with failing(monkeypatch, 1, 3, Stop()):
        Host(2).run(lambda ranks: expo.merge(*pair, 0.3, out, ranks=ranks))
    before = contents(staging_folder(out))
    command = [sys.executable, "-c", HOLDING, str(staging_folder(out) / f"{JOURNAL}.1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for option in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(expo.OutputError, match="are still stopping: try again"):
                expo.merge(*pair, 0.3, out, **option)  # type: ignore[arg-type]
        assert contents(staging_folder(out)) == before
        process.communicate(b"\n")
    expo.merge(*pair, 0.3, out, overwrite=True)


def test_a_journal_of_another_merge_and_a_damaged_one_do_not_count(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    expo.merge(*pair, 0.3, tmp_path / "one")
    with failing(monkeypatch, 1, 3, Stop()):
        Host(2).run(lambda ranks: expo.merge(*pair, 0.3, out, ranks=ranks))
    own = read_journal(str(staging_folder(out) / JOURNAL))
    assert own is not None
    other = (staging_folder(out) / f"{JOURNAL}.1").read_bytes()
    (staging_folder(out) / f"{JOURNAL}.1").write_bytes(b"junk " + other)
    (staging_folder(out) / f"{JOURNAL}.7").write_bytes(journal.encode({"merge": {}, "chunk": own.chunk_size}) + other)
    resumed = expo.merge(*pair, 0.3, out, resume=True)
    assert resumed.resumed == sum(stop - start for (_, start), (stop, _) in own.done.items())
    assert contents(out) == contents(tmp_path / "one")


def test_a_rank_whose_journal_is_lost_at_the_end_is_no_silent_gap(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    collect = journal.Journal.collect

    def losing(self: Any, size: int) -> Any:
        for name in journals_of_ranks(self._folders[0]):
            os.unlink(os.path.join(self._folders[0], name))
        return collect(self, size)

    monkeypatch.setattr(journal.Journal, "collect", losing)
    results = Host(2).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks))
    assert isinstance(results[0], expo.OutputError)
    assert "a rank's journal cannot be read" in str(results[0])
    assert not (tmp_path / "out").exists()


def test_ranks_that_see_other_inputs_name_the_difference(pair: Pair, tmp_path: Path) -> None:
    for k in (0, 1):
        shutil.copytree(pair[1], tmp_path / f"host{k}")
    shard = next(iter(sorted((tmp_path / "host1").glob("*.safetensors"))))
    os.utime(shard, ns=(1, 1))
    results = Host(2).run(
        lambda ranks: expo.merge(pair[0], tmp_path / f"host{ranks.rank}", 0.3, tmp_path / "out", ranks=ranks)
    )
    assert [type(each) for each in results] == [RankError, RankError]
    assert f"do not see the same merge: for 1, aligned: another size, time of change or header of {shard.name}" in str(
        results[0]
    )
    results = Host(2).run(lambda ranks: expo.merge(*pair, 0.3 + ranks.rank, tmp_path / "out", ranks=ranks))
    assert "do not see the same merge: for 0, --alpha was [0.3], is [1.3]" in str(results[1])
    assert list(tmp_path.glob("*out*")) == []


def test_an_error_before_the_start_is_told_to_all(pair: Pair, tmp_path: Path) -> None:
    places = (pair[0], tmp_path / "nothing")
    results = Host(2).run(lambda ranks: expo.merge(places[ranks.rank], pair[1], 0.3, tmp_path / "out", ranks=ranks))
    assert isinstance(results[1], expo.CheckpointError)
    assert re.match(r"rank 1 of 2 on .* failed: .*nothing: no such file", str(results[0]))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_finds_damage_has_the_output_discarded(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    real = rank_worker.read_back

    def spoiled(path: str, start: int, memory: memoryview) -> int:
        count = real(path, start, memory)
        if threading.current_thread().name and path.endswith("model-00003-of-00003.safetensors"):
            memory[count - 1] ^= 1
        return count

    monkeypatch.setattr(rank_worker, "read_back", spoiled)
    results = Host(3).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", verify=True, ranks=ranks))
    assert sum(isinstance(each, Corrupt) for each in results) >= 1
    assert all(isinstance(each, Corrupt | RankError) for each in results)
    assert list(tmp_path.iterdir()) == []


def test_damage_that_a_rank_finds_is_not_gone_on_with_by_whoever_was_not_told(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    """Rank 0 is interrupted before it learns of the damage, as by a launcher that stops all ranks."""
    write, compare = rank_worker.ShardWriter.write, rank_worker.RankWorker._compare

    def damaging(self: Any, offset: int, data: memoryview, length: int) -> None:
        data[0] ^= 1 if self.path.endswith("00003.safetensors") else 0
        write(self, offset, data, length)

    def comparing(self: Any, *arguments: Any) -> None:
        if self._job.ranks.rank == 0:
            time.sleep(0.2)
            raise KeyboardInterrupt
        compare(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rank_worker.ShardWriter, "write", damaging)
        patch.setattr(rank_worker.RankWorker, "_compare", comparing)
        patch.setattr(ProcessGroup, "report_failure", lambda *_: None)
        results = Host(2).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", verify=True, ranks=ranks))
    assert isinstance(results[0], KeyboardInterrupt)
    assert isinstance(results[1], Corrupt)
    assert expo.merge(*pair, 0.3, tmp_path / "out", resume=True).resumed == 0
    expo.merge(*pair, 0.3, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_an_interrupt_is_explained_by_the_failure_behind_it(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    def sinking(self: Any, *arguments: Any) -> None:
        if self._job.ranks.rank == 1:
            raise expo.OutputError("the disk of rank 1 is full")
        time.sleep(0.05)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rank_worker.RankWorker, "_write", sinking)
        results = Host(2).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks))
    assert "failed: the disk of rank 1 is full; rank 0 of 2 has stopped too; the finished part is kept" in str(
        results[0]
    )
    assert expo.merge(*pair, 0.3, tmp_path / "out", resume=True).resumed == 0


def test_an_error_is_told_and_raised_though_the_launcher_stops_its_rank_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    (ranks, other) = Host(2).ranks
    with monkeypatch.context() as patch:
        patch.setattr(expo.merging.process_group.time, "sleep", interrupted)
        with pytest.raises(Stop, match="the real one"), ranks.together():
            raise Stop("the real one")
    with pytest.raises(RankError, match="failed: Stop: the real one"):
        other.gather(None)
    for each in (ranks, other):
        each.close()


def test_overwrite_starts_anew_where_going_on_is_not_possible(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    """A launcher that restarts ranks implies --resume, so --overwrite must still work with it."""
    with failing(monkeypatch, 1, 3, Stop()):
        Host(2).run(lambda ranks: expo.merge(*pair, 0.1, tmp_path / "out", ranks=ranks))
    with pytest.raises(expo.OutputError, match="holds another merge"):
        expo.merge(*pair, 0.3, tmp_path / "out", resume=True)
    assert merge_by(2, pair, 0.3, tmp_path / "out", resume=True, overwrite=True).resumed == 0
    expo.merge(*pair, 0.3, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("restarts", [True, False])
def test_a_rank_lost_after_the_commit_takes_nothing_away(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, restarts: bool
) -> None:
    commit, follow = expo.merging.coordinator.Coordinator.commit, expo.merging.merge._follow

    def late(self: Any) -> Any:
        """Commit, and wait until the other rank has failed."""
        warnings = commit(self)
        deadline = time.monotonic() + 10
        while self._job.ranks._watcher.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return warnings

    def losing(job: Any, fill: Callable[[Any], Any]) -> Any:
        def filled(worker: Any) -> None:
            fill(worker)
            raise Stop

        return follow(job, filled)

    with monkeypatch.context() as patch:
        patch.setattr(expo.merging.coordinator.Coordinator, "commit", late)
        patch.setattr(expo.merging.merge, "_follow", losing)
        results = Host(2, restarts=restarts).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks))
    assert isinstance(results[0], Merged)
    assert isinstance(results[1], Stop)
    assert [path.name for path in tmp_path.glob(".*")] == ([".out.expo-journal"] if restarts else [])
    if restarts:  # the next attempt finds every output in place
        again = merge_by(2, pair, 0.3, tmp_path / "out", resume=True)
        assert again.resumed == again.bytes_written
        assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_rank_that_cannot_begin_lets_go_of_its_journal(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    append = journal.Journal._append

    def full(self: Any, record: Any) -> None:
        if self._rank:
            raise expo.OutputError("the disk is full")
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "_append", full)
        results = Host(2).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks))
    assert all(isinstance(each, expo.OutputError | RankError) for each in results)
    expo.merge(*pair, 0.3, tmp_path / "out", resume=True)


def test_a_journal_that_is_late_is_waited_for_and_another_merges_is_not_joined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ".out.expo-staging"

    def later() -> None:
        time.sleep(0.15)
        folder.mkdir()
        journal.Journal([str(folder)], {"alpha": 1}).begin(4096)

    thread = threading.Thread(target=later)
    thread.start()
    with contextlib.closing(journal.Journal([str(folder)], {"alpha": 1}, 3)) as mine:
        mine.join(4096)
    thread.join()
    written = read_journal(str(folder / f"{JOURNAL}.3"))
    assert written is not None
    assert (written.merge, written.chunk_size, written.done) == ({"alpha": 1}, 4096, {})
    monkeypatch.setattr(journal, "JOIN_TIMEOUT", 0.0)
    with (
        contextlib.closing(journal.Journal([str(folder)], {"alpha": 2}, 4)) as other,
        pytest.raises(expo.OutputError, match="rank 4 cannot read rank 0's journal of this merge"),
    ):
        other.join(4096)


def test_a_rank_that_begins_late_divides_the_work_as_the_others_do(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path
) -> None:
    """Rank 0 has recorded much of its own part before the others begin."""
    real = journal.Journal.join

    def late(self: Any, size: int) -> None:
        time.sleep(0.2)
        real(self, size)

    monkeypatch.setattr(journal.Journal, "join", late)
    merge_by(3, pair, 0.3, tmp_path / "all")
    expo.merge(*pair, 0.3, tmp_path / "one")
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


def test_cancel_ends_the_waiting_for_others(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    cancel = threading.Event()
    sink = rank_worker.RankWorker._write

    def slow(self: Any, *arguments: Any) -> None:
        if self._job.ranks.rank == 1:
            time.sleep(0.05)
        sink(self, *arguments)

    def fill(*arguments: Any, **named: Any) -> Any:
        threading.Timer(0.4, cancel.set).start()  # rank 0 has finished its part before
        return filled(*arguments, **{**named, "cancel": None})

    filled = expo.merging.merge._fill
    monkeypatch.setattr(rank_worker.RankWorker, "_write", slow)
    monkeypatch.setattr(expo.merging.merge, "_fill", fill)
    results = Host(2).run(
        lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks, cancel=None if ranks.rank else cancel)
    )
    assert isinstance(results[0], expo.Cancelled)
    assert isinstance(results[1], RankError)
    assert not (tmp_path / "out").exists()


def test_a_store_that_does_not_answer_is_not_waited_for(pair: Pair, tmp_path: Path) -> None:
    release = threading.Event()

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: release.wait(20)

    ranks = ProcessGroup(Silent(), lambda value: [value], 1, 2, timeout=0.2)
    try:
        with pytest.raises(RankError, match="the store of the ranks has not answered rank 1 of 2"):
            expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks)
        interrupt = KeyboardInterrupt()
        assert ranks.find_cause(interrupt) is interrupt  # no rank has reported a failure
    finally:
        release.set()
        ranks.close()


@pytest.mark.parametrize(("rank", "world"), [("5", "2"), ("-1", "2"), ("x", "2"), ("0", "two")])
def test_what_no_launcher_sets_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(expo.UsageError, match="not what a launcher sets; unset"), join():
        pass


@pytest.mark.alone
def test_ranks_that_do_not_come_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expo.merging.launcher.START_TIMEOUT_SECONDS", 0.3)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"not all ranks have started .*to merge alone .* unset WORLD_SIZE"), join():
        pass


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_does_not_answer_counts_as_dead(pair: Pair, tmp_path: Path, silent: int) -> None:
    host = Host(3, timeout=0.3)

    def work(ranks: ProcessGroup) -> Any:
        if ranks.rank == silent:
            ranks.close()
            return None
        return expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks)

    for rank, error in enumerate(host.run(work)):
        if rank != silent:
            assert isinstance(error, RankError)
            assert f"rank {silent} of 3 has not answered for 0 s; rank {rank} of 3 has stopped too" in str(error)


def test_a_store_that_is_gone_is_said(pair: Pair, tmp_path: Path) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fails(*_: Any) -> Any:
                raise RuntimeError("Connection reset by peer")

            return fails

    ranks = ProcessGroup(Gone(), lambda value: [value], 1, 2)
    with contextlib.closing(ranks), pytest.raises(RankError, match="Connection reset by peer"):
        expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks)


def test_an_interrupt_says_who_was_told_to_stop(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    with failing(monkeypatch, 1, 2, KeyboardInterrupt()):
        results = Host(2).run(lambda ranks: expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks))
    assert isinstance(results[1], KeyboardInterrupt)
    assert str(results[1]) == (
        "rank 1 of 2 on " + socket.gethostname() + " was stopped by Ctrl-C or by the launcher, which stops every rank "
        "when another rank has died"
    )
    assert isinstance(results[0], RankError)


@pytest.mark.parametrize(
    ("options", "visible", "device"),
    [
        ({"device": "cuda"}, 8, "cuda:3"),
        ({"device": "cuda"}, 2, "cuda:1"),
        ({"device": "cuda"}, 1, "cuda:0"),
        ({"device": "cuda"}, 0, "cuda:0"),
        ({"engine": "triton"}, 4, "cuda:3"),
        ({"engine": "triton"}, 1, "cuda:0"),
        ({"device": "cuda:0"}, 4, "cuda:0"),
        ({"device": "cpu"}, 4, "cpu"),
        ({}, 4, "auto"),
    ],
)
def test_each_rank_takes_the_gpu_of_its_local_rank_and_its_share_of_the_processors(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, options: dict[str, str], visible: int, device: str
) -> None:
    """The local rank counts the GPUs that the rank sees, and CUDA_VISIBLE_DEVICES may leave one for each rank."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)

    def engines(engine: str, device: str, processes: int) -> Any:
        asked.append((device, processes))
        raise expo.EngineError("no GPU here")

    monkeypatch.setattr(expo.merging.job, "engines_for", engines)
    ranks = ProcessGroup(dist.HashStore(), lambda value: [value], 7, 8, local_rank=3, local_world=4)
    with contextlib.closing(ranks), pytest.raises(expo.EngineError):
        expo.merge(*pair, 0.3, tmp_path / "out", ranks=ranks, **options)  # type: ignore[arg-type]
    assert asked == [(device, 4)]


def test_progress_of_rank_0_is_that_of_all(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    with failing(monkeypatch, 9, 0, Stop()):  # no rank fails, because rank 9 does not exist, but all are slow
        Host(3).run(
            lambda ranks: expo.merge(
                *pair, 0.3, tmp_path / "out", ranks=ranks, progress=lambda *at: seen[ranks.rank].append(at)
            )
        )
    total = seen[0][-1][1]
    assert max(done for done, _ in seen[0]) > 0.7 * total
    assert all(done <= total for done, _ in seen[0])


# Processes as ranks.

ROOT = Path(__file__).parents[2]
SLOW = """
import os, signal, sys, time
from pathlib import Path
from expo import fast
from expo.merging import rank_worker
from expo.output import journal
from expo.execution import worker_pool as work
work.CHUNK, journal.INTERVAL = 8 << 10, 0.0
sink, seen = rank_worker.RankWorker._write, iter(range(10**6))
doomed, flag = sys.argv.pop(1), Path(sys.argv.pop(1))

def sinking(self, *arguments):
    sink(self, *arguments)
    time.sleep(0.02)
    if os.environ["RANK"] == doomed and next(seen) == 5 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)

rank_worker.RankWorker._write = sinking
sys.exit(fast.main())
"""


def torchrun(*options: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *map(str, options)]


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def inputs(pair: Pair, out: Path) -> list[str]:
    return ["--sft", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.3", "--out", str(out)]


@pytest.fixture(scope="module")
def whole(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the digests of the output of a merge in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    expo.merge(*pair, 0.3, out)
    return contents(out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    """Write a program that merges slowly and whose rank 2 is killed once in the middle; return its command."""
    (tmp_path / "slow.py").write_text(SLOW)
    return [str(tmp_path / "slow.py"), "2", str(tmp_path / "killed")]


def test_two_processes_under_torchrun_make_the_same_bytes(pair: Pair, tmp_path: Path, whole: dict[str, bytes]) -> None:
    command = torchrun("--standalone", "--nproc-per-node", 2, "-m", "expo.fast")
    done = run([*command, *inputs(pair, tmp_path / "out"), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2  # only rank 0 prints
    assert contents(tmp_path / "out") == whole
    planned = run([*command, *inputs(pair, tmp_path / "new"), "--plan", "--json"])
    assert json.loads(planned.stdout)["outputs"] == [str(tmp_path / "new")]


@pytest.mark.exhaustive  # four processes start
def test_a_killed_process_of_four_stops_all_and_resume_goes_on(
    pair: Pair, tmp_path: Path, whole: dict[str, bytes], slow: list[str]
) -> None:
    out, four = tmp_path / "out", torchrun("--standalone", "--nproc-per-node", 4)
    done = run([*four, *slow, *inputs(pair, out), "--quiet"])
    assert done.returncode == 1
    assert (tmp_path / "killed").exists()
    assert "when another rank has died" in done.stderr
    assert with_options(kept(out)) in done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed")[0]
    assert not out.exists()
    resumed = run([*four, *slow, *inputs(pair, out), "--resume", "--json"])
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed"] > 0
    assert contents(out) == whole


@pytest.mark.exhaustive
def test_torchrun_starts_again_and_goes_on_by_itself(
    pair: Pair, tmp_path: Path, whole: dict[str, bytes], slow: list[str]
) -> None:
    command = torchrun("--standalone", "--nproc-per-node", 3, "--max-restarts", 1)
    done = run([*command, *slow, *inputs(pair, tmp_path / "out"), "--json"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert json.loads(done.stdout)["resumed"] > 0
    assert contents(tmp_path / "out") == whole


def two_hosts(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Run two launchers at the same time, and return the exit code and stderr of each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(each, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) for each in commands
    ]
    try:
        return [(process.wait(120), process.stderr.read() if process.stderr else "") for process in running]
    finally:
        for process in running:
            process.kill()
            if process.stderr:
                process.stderr.close()


@pytest.mark.alone
def test_two_hosts_by_two_loopback_addresses(pair: Pair, tmp_path: Path, whole: dict[str, bytes]) -> None:
    port = free_port()
    commands = [
        [*torchrun("--nnodes", 2, "--node-rank", k, "--nproc-per-node", 2, "--master-addr", "127.0.0.1",
                   "--master-port", port, "--local-addr", f"127.0.0.{k + 1}", "-m", "expo.fast"),
         *inputs(pair, tmp_path / "out"), "--quiet"]
        for k in range(2)
    ]  # fmt: skip
    assert [code for code, _ in two_hosts(commands)] == [0, 0]
    assert contents(tmp_path / "out") == whole


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Yield two network namespaces with a link between them, 10.77.0.1 and 10.77.0.2, which act as two hosts."""
    names = [f"expo{os.getpid()}{end}" for end in "ab"]
    made = ["ip netns add {0}", "ip netns add {1}", "ip -n {0} link add wire type veth peer name wire netns {1}"]
    for k in (0, 1):
        for what in (f"address add 10.77.0.{k + 1}/24 dev wire", "link set wire up", "link set lo up"):
            made.append(f"ip -n {{{k}}} {what}")
    try:
        for command in made:
            done = subprocess.run(command.format(*names).split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: ip (iproute2) is not installed")
    finally:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.exhaustive  # two launchers start
def test_two_hosts_by_two_network_namespaces(
    pair: Pair, tmp_path: Path, whole: dict[str, bytes], namespaces: list[str]
) -> None:
    commands = [
        ["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=wire",
         *torchrun("--nnodes", 2, "--node-rank", k, "--nproc-per-node", 1, "--master-addr", "10.77.0.1",
                   "--master-port", 29500, "-m", "expo.fast"),
         *inputs(pair, tmp_path / "out"), "--quiet"]
        for k, name in enumerate(namespaces)
    ]  # fmt: skip
    assert [code for code, _ in two_hosts(commands)] == [0, 0]
    assert contents(tmp_path / "out") == whole
