"""The processes of one merge, called ranks: one process alone, or several that a launcher started on one or more hosts.

The ranks share a key-value store of torch.distributed and exchange values through gloo. In each rank one thread, the
`HeartbeatWatcher`, writes heartbeats into the store, reads those of other ranks, and reads why a rank has failed. Only
this thread uses the store, because a call to a store whose server does not answer never returns, and Python handles no
signal during the call.

A merge has phases. Each phase ends with a call of `gather()`, in which a rank waits for all others, and each phase
counts its progress from 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import Cancelled, ExpoError, RankError

HEARTBEAT_SECONDS = 0.5  # the time between two heartbeats of a rank
DEAD_AFTER_SECONDS = 30.0  # the time without a heartbeat after which a rank counts as dead
POLL_SECONDS = 0.02  # the time between two reads of the store while a rank waits for the others
GRACE_SECONDS = 2.0  # the time that a failed rank waits for others to read its failure: it may serve the store
Exchange = Callable[[Any], "list[Any]"]  # takes this rank's value and returns the values of all ranks, by rank


class SingleProcess:
    """The only process of an ordinary merge, with the interface of `ProcessGroup`."""

    rank, world, local_rank, local_world, restarts = 0, 1, 0, 1, False

    def gather(self, value: Any) -> list[Any]:
        """Return the value in a list."""
        return [value]

    def report_progress(self, done: int) -> int:
        """Return the bytes that this process has done."""
        return done

    def find_cause(self, error: BaseException | None) -> BaseException | None:
        """Return the error itself."""
        return error

    @contextlib.contextmanager
    def together(self, cancel: threading.Event | None = None) -> Iterator[None]:
        """Run the body of the with statement."""
        yield


class ProcessGroup(SingleProcess):
    """One of several processes that make one merge together.

    Attributes:
        rank: The number of this process, from 0.
        world: The number of all processes.
        local_rank: The number of this process on its host, from 0.
        local_world: The number of processes on this host.
        restarts: True if the launcher starts the processes again after one has failed.
    """

    def __init__(
        self,
        store: Any,
        exchange: Exchange,
        rank: int,
        world: int,
        local_rank: int = 0,
        local_world: int = 1,
        restarts: bool = False,
        timeout: float = DEAD_AFTER_SECONDS,
    ) -> None:
        """Start to send heartbeats.

        Args:
            store: A store of torch.distributed into which only these processes write.
            exchange: Returns the values of all ranks, by rank; every rank calls it at the same time.
            rank, world, local_rank, local_world, restarts: See the attributes.
            timeout: Seconds without a heartbeat after which a rank counts as dead.
        """
        self.rank, self.world = rank, world
        self.local_rank, self.local_world, self.restarts = local_rank, local_world, restarts
        self._exchange = exchange
        self._timeout = timeout
        self._phase = 0  # the number of completed calls of gather()
        self._cancel: threading.Event | None = None
        self._watcher = HeartbeatWatcher(store, rank, world, timeout)

    def gather(self, value: Any) -> list[Any]:
        """Wait for all ranks and return their values, by rank.

        Raises:
            RankError: Another rank has failed or does not answer.
            Cancelled: The event that `together` was given is set.
        """
        self._watcher.arrive(self._phase)
        while not self._watcher.have_all_arrived(self._phase):
            self._check()
            if self._cancel is not None and self._cancel.is_set():
                raise Cancelled("cancelled")
            time.sleep(POLL_SECONDS)
        try:
            values = self._exchange(value)
        except RuntimeError as error:
            # gloo only says that a connection is lost. The rank that closed it may report the reason a little later.
            time.sleep(2 * HEARTBEAT_SECONDS)
            self._check()
            raise RankError(f"{self._name()} has lost the connection to the other ranks: {error}") from error
        self._phase += 1
        self._watcher.begin_phase(self._phase)
        return values

    def report_progress(self, done: int) -> int:
        """Send this rank's progress with its next heartbeat, and return the sum of the progress that this rank knows.

        Rank 0 knows the progress of all ranks. Each other rank knows its own progress and that of rank 0.

        Args:
            done: Bytes that this rank has done since the last `gather`.

        Raises:
            RankError: Another rank has failed, so a caller that reports often stops soon.
        """
        self._check()
        self._watcher.done = done
        return done + sum(self._watcher.others.values())

    def find_cause(self, error: BaseException | None) -> BaseException | None:
        """Return the other rank's failure that caused an interrupt, or else the error itself.

        A launcher interrupts all ranks when one has failed.
        """
        if isinstance(error, KeyboardInterrupt):
            time.sleep(2 * HEARTBEAT_SECONDS)
            if self._watcher.failure is not None:
                return self._error(self._watcher.failure)
        return error

    @contextlib.contextmanager
    def together(self, cancel: threading.Event | None = None) -> Iterator[None]:
        """Run the body of the with statement on all ranks: an error in it on one rank stops every rank.

        Args:
            cancel: Ends this rank's waiting for the others when any thread sets it.
        """
        self._cancel = cancel
        try:
            yield
        except BaseException as error:
            self.report_failure(error)
            if not isinstance(error, KeyboardInterrupt):
                raise
            reason = "was stopped by Ctrl-C or by the launcher, which stops every rank when another rank has died"
            raise KeyboardInterrupt("; ".join(filter(None, (f"{self._name()} {reason}", str(error))))) from None

    def report_failure(self, error: BaseException) -> None:
        """Report this rank's error to the other ranks, and wait until they can have read it.

        A RankError is another rank's failure, which is in the store already.
        """
        if isinstance(error, RankError) or self._watcher.failure_stored.is_set():
            return
        if isinstance(error, KeyboardInterrupt):
            text = "was stopped"
        else:
            text = f"failed: {error}" if isinstance(error, ExpoError) else f"failed: {type(error).__name__}: {error}"
        with contextlib.suppress(KeyboardInterrupt):  # an interrupt of this wait must not replace the error
            self._watcher.store_failure(Failure(f"{self._name()} {text}", type(error).__name__))
            time.sleep(GRACE_SECONDS)

    def close(self) -> None:
        """Stop the heartbeats and the watching of the other ranks."""
        self._watcher.close()

    def _name(self) -> str:
        return f"rank {self.rank} of {self.world} on {os.uname().nodename}"

    def _error(self, failure: Failure) -> RankError:
        return RankError(f"{failure.text}; rank {self.rank} of {self.world} has stopped too", failure.kind)

    def _check(self) -> None:
        """Raise RankError if a rank has failed or the store does not answer."""
        if self._watcher.failure is not None:
            raise self._error(self._watcher.failure)
        if time.monotonic() - self._watcher.last_answer > self._timeout:
            raise RankError(f"the store of the ranks has not answered {self._name()} for {self._timeout:.0f} s")


class Failure(NamedTuple):
    """The failure of a rank: a message that names the rank, and the name of the exception's class."""

    text: str
    kind: str


class HeartbeatWatcher:
    """The thread that writes this rank's heartbeats and reads those of other ranks.

    Rank 0 reads the heartbeats of all other ranks. Each other rank reads those of rank 0.

    Attributes:
        last_answer: The time (`time.monotonic`) of the store's last answer.
        failure: The first failure of any rank; None if no rank has failed.
        failure_stored: Set when a failure is in the store.
        done: Bytes that this rank has done in this phase.
        others: Bytes that the watched ranks have done in this phase, by rank.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        """Start the thread; see `ProcessGroup` for the arguments."""
        self.last_answer = time.monotonic()
        self.failure: Failure | None = None
        self.failure_stored = threading.Event()
        self.done = 0
        self.others: dict[int, int] = {}
        self._store, self._rank, self._world, self._timeout = store, rank, world, timeout
        # The current phase, the last phase that this rank has ended, and the last phase that all ranks have ended.
        self._phase, self._own_arrival, self._all_arrived = 0, -1, -1
        self._own_failure: Failure | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        watched = range(1, world) if rank == 0 else (0,)
        self._heartbeats = dict.fromkeys(watched, (b"", self.last_answer))  # the latest one and the time of its arrival
        self._thread = threading.Thread(target=self._run, name="expo-ranks", daemon=True)
        self._thread.start()

    def arrive(self, phase: int) -> None:
        """Announce that this rank waits for the others at the end of a phase."""
        self._own_arrival = phase
        self._wake.set()

    def have_all_arrived(self, phase: int) -> bool:
        """Return True if every rank waits at the end of this phase."""
        return self._all_arrived >= phase

    def begin_phase(self, phase: int) -> None:
        """Count progress from 0 again."""
        self._phase, self.done, self.others = phase, 0, {}

    def store_failure(self, failure: Failure) -> None:
        """Let the thread write a failure into the store, if it has none; wait for the thread at most GRACE_SECONDS."""
        self._own_failure = failure
        self._wake.set()
        self.failure_stored.wait(GRACE_SECONDS)

    def close(self) -> None:
        """Stop the thread, but do not wait for a call to a store that does not answer."""
        self._closed.set()
        self._wake.set()
        self._thread.join(GRACE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # the store's host is gone, or another program has written into the store
            self.failure = Failure(f"the store of the ranks cannot be reached: {error}", type(error).__name__)

    def _loop(self) -> None:
        arrival = -1  # the latest phase that this rank has announced in the store
        count, next_heartbeat = 0, 0.0
        while not self._closed.is_set():
            if self._own_failure is not None:
                self._put_failure(self._own_failure)
                self.failure_stored.set()
            if self._own_arrival > arrival:
                arrival = self._own_arrival
                self._store.add(f"arrived/{arrival}", 1)
            if self._all_arrived < arrival and self._store.add(f"arrived/{arrival}", 0) >= self._world:
                self._all_arrived = arrival
            if time.monotonic() >= next_heartbeat:
                next_heartbeat, count = time.monotonic() + HEARTBEAT_SECONDS, count + 1
                self._store.set(f"beat/{self._rank}", f"{self._phase} {self.done} {count}")
                self._read_heartbeats()
            self.last_answer = time.monotonic()
            self._wake.wait(POLL_SECONDS if self._all_arrived < arrival else HEARTBEAT_SECONDS)
            self._wake.clear()

    def _read_heartbeats(self) -> None:
        if self._store.check(["failed"]):
            text, kind = json.loads(self._store.get("failed"))
            self.failure = Failure(str(text), str(kind))
            self.failure_stored.set()
            return
        for rank, (previous, since) in self._heartbeats.items():
            key = f"beat/{rank}"
            heartbeat = self._store.get(key) if self._store.check([key]) else b""
            if heartbeat != previous:
                self._heartbeats[rank] = heartbeat, time.monotonic()
                phase, done, _ = map(int, heartbeat.split())
                self.others[rank] = done if phase == self._phase else 0
            elif time.monotonic() - since > self._timeout:
                text = f"rank {rank} of {self._world} has not answered for {self._timeout:.0f} s"
                self._put_failure(Failure(text, ""))

    def _put_failure(self, failure: Failure) -> None:
        """Write a failure into the store, unless the store has one: the first failure is the cause of later ones."""
        self._store.compare_set("failed", "", json.dumps(failure))
