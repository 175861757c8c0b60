"""The processes of one merge, its ranks: one alone, or those that a launcher has started, on one host or several.

They meet in a store of torch.distributed and exchange what they must agree on through gloo. A thread of each posts a
beat to the store, so that the others notice when it stops, and brings back why a rank has failed. No other thread uses
the store: a call to one whose host is silent does not return, and no signal is heard in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import Cancelled, ExpoError, RankError, UsageError

BEAT = 0.5  # seconds between two looks at the others
PATIENCE = 30.0  # seconds without a beat after which a rank counts as dead
POLL = 0.02  # seconds between two looks at who has arrived, while somebody waits for that
MEET = 300.0  # seconds in which all ranks must have started
EXCHANGE = 60.0  # seconds that gloo has, once all have arrived
LINGER = 2.0  # seconds that a rank that failed stays for the others to read why: the store may be its own
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what launchers set
Exchange = Callable[[Any], "list[Any]"]  # a value to those of all ranks, by rank


class SingleProcess:
    """The one process of an ordinary merge; `Ranks` has the same methods for several, and says what they do."""

    rank, world, local_rank, local_world, restarts = 0, 1, 0, 1, False

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def report(self, done: int) -> int:
        return done

    def cause(self, error: BaseException | None) -> BaseException | None:
        return error

    @contextlib.contextmanager
    def together(self, cancel: threading.Event | None = None) -> Iterator[None]:
        yield


class ProcessGroup(SingleProcess):
    """One of several processes that make one merge together.

    rank of world: this one, and how many there are; local_rank of local_world: likewise on this host. restarts:
    whether the launcher starts them again when one has failed.
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
        patience: float = PATIENCE,
    ) -> None:
        """store: of torch.distributed, with keys of these ranks alone. exchange: called once all have arrived."""
        self.rank, self.world = rank, world
        self.local_rank, self.local_world, self.restarts = local_rank, local_world, restarts
        self._exchange = exchange
        self._patience = patience
        self._phase = 0
        self._cancel: threading.Event | None = None
        self._watch = Watch(store, rank, world, patience)

    def gather(self, value: Any) -> list[Any]:
        """Wait for all ranks; the values of all, by rank. Raises RankError, and Cancelled as `together` says."""
        self._watch.arrive(self._phase)
        while not self._watch.all_arrived(self._phase):
            self._check()
            if self._cancel is not None and self._cancel.is_set():
                raise Cancelled("cancelled")
            time.sleep(POLL)
        try:
            found = self._exchange(value)
        except RuntimeError as error:  # of gloo: whoever is gone may have said why
            time.sleep(2 * BEAT)
            self._check()
            raise RankError(f"{self._name()} has lost the others: {error}") from error
        self._phase += 1
        self._watch.enter(self._phase)
        return found

    def report(self, done: int) -> int:
        """done: bytes, by this rank, since all were together last; returns those of the ranks that it watches too.

        Rank 0 watches all, others watch rank 0. Call it now and then. Raises RankError where a rank has failed.
        """
        self._check()
        self._watch.done = done
        return done + sum(self._watch.others.values())

    def cause(self, error: BaseException | None) -> BaseException | None:
        """The failure of another rank that lies behind an interrupt: a launcher stops all when one has failed."""
        if isinstance(error, KeyboardInterrupt):
            time.sleep(2 * BEAT)
            if self._watch.failure is not None:
                return self._error()
        return error

    @contextlib.contextmanager
    def together(self, cancel: threading.Event | None = None) -> Iterator[None]:
        """What is done in it fails on all ranks or on none. cancel: ends a rank's waiting for the others."""
        self._cancel = cancel
        try:
            yield
        except BaseException as error:
            self.tell(error)
            if not isinstance(error, KeyboardInterrupt):
                raise
            why = "was told to stop, by Ctrl-C or by the launcher, which does so when another rank has died"
            raise KeyboardInterrupt("; ".join(filter(None, (f"{self._name()} {why}", str(error))))) from None

    def tell(self, error: BaseException) -> None:
        """Have the others know of this rank's failure, unless it is another's, and stay until they may have read it."""
        if isinstance(error, RankError) or self._watch.told.is_set():
            return
        what = f"failed: {error}" if isinstance(error, ExpoError) else f"failed: {type(error).__name__}: {error}"
        what = "was told to stop" if isinstance(error, KeyboardInterrupt) else what
        with contextlib.suppress(KeyboardInterrupt):  # the error is what counts, and not that it is waited with it
            self._watch.tell(f"{self._name()} {what}", type(error).__name__)
            time.sleep(LINGER)

    def close(self) -> None:
        """Stop watching the others, and being watched."""
        self._watch.close()

    def _name(self) -> str:
        return f"rank {self.rank} of {self.world} on {os.uname().nodename}"

    def _error(self) -> RankError:
        assert self._watch.failure is not None
        what, kind = self._watch.failure
        return RankError(f"{what}; rank {self.rank} of {self.world} has stopped too", kind)

    def _check(self) -> None:
        if self._watch.failure is not None:
            raise self._error()
        if time.monotonic() - self._watch.looked > self._patience:
            raise RankError(f"the store of the ranks has not answered {self._name()} for {self._patience:.0f} s")


class Watch:
    """The thread that posts this rank's beats and looks at the others': rank 0 at all, the others at rank 0.

    looked: when it last came back from the store. failure: of any rank, and the name of its exception. others: bytes
    that the ranks it looks at have reported in this phase. done: this rank's. told: when a failure is in the store.
    """

    def __init__(self, store: Any, rank: int, world: int, patience: float) -> None:
        self.looked = time.monotonic()
        self.failure: tuple[str, str] | None = None
        self.others: dict[int, int] = {}
        self.done = 0
        self.told = threading.Event()
        self._store, self._rank, self._world, self._patience = store, rank, world, patience
        self._phase, self._awaited, self._complete = 0, -1, -1
        self._news: tuple[str, str] | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        watched = range(1, world) if rank == 0 else (0,)
        self._seen = dict.fromkeys(watched, (b"", self.looked))
        self._thread = threading.Thread(target=self._run, name="expo-ranks", daemon=True)
        self._thread.start()

    def arrive(self, phase: int) -> None:
        """Have it known that this rank waits for the others at the end of a phase."""
        self._awaited = phase
        self._wake.set()

    def all_arrived(self, phase: int) -> bool:
        return self._complete >= phase

    def enter(self, phase: int) -> None:
        self._phase, self.done, self.others = phase, 0, {}

    def tell(self, what: str, kind: str) -> None:
        """Leave a failure in the store, unless there is one; waits for that a little."""
        self._news = what, kind
        self._wake.set()
        self.told.wait(LINGER)

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join(LINGER)  # a store that does not answer holds the thread for good

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # the store's host is gone, or has other things in it
            self.failure = f"the store of the ranks cannot be reached: {error}", type(error).__name__

    def _loop(self) -> None:
        arrived = -1
        beats, next_beat = 0, 0.0
        while not self._closed.is_set():
            if self._news is not None:
                self._post(*self._news)
                self.told.set()
            if self._awaited > arrived:
                arrived = self._awaited
                self._store.add(f"arrived/{arrived}", 1)
            if self._complete < arrived and self._store.add(f"arrived/{arrived}", 0) >= self._world:
                self._complete = arrived
            if time.monotonic() >= next_beat:
                next_beat, beats = time.monotonic() + BEAT, beats + 1
                self._store.set(f"beat/{self._rank}", f"{self._phase} {self.done} {beats}")
                self._look()
            self.looked = time.monotonic()
            self._wake.wait(POLL if self._complete < arrived else BEAT)
            self._wake.clear()

    def _look(self) -> None:
        if self._store.check(["failed"]):
            what, kind = json.loads(self._store.get("failed"))
            self.failure = str(what), str(kind)
            self.told.set()
            return
        for rank, (before, since) in self._seen.items():
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != before:
                self._seen[rank] = beat, time.monotonic()
                phase, done, _ = map(int, beat.split())
                self.others[rank] = done if phase == self._phase else 0
            elif time.monotonic() - since > self._patience:
                self._post(f"rank {rank} of {self._world} has not answered for {self._patience:.0f} s", "")

    def _post(self, what: str, kind: str) -> None:
        self._store.compare_set("failed", "", json.dumps([what, kind]))


def launched() -> bool:
    """Return True if a launcher has started this process as one of several."""
    return all(name in os.environ for name in NAMES) and os.environ["WORLD_SIZE"] != "1"


def launched_rank() -> int:
    """Return the rank that a launcher gave this process; 0 for a process that none started. Raises UsageError."""
    return _number("RANK", 0) if launched() else 0


@contextlib.contextmanager
def join() -> Iterator[SingleProcess]:
    """The ranks that a launcher has started: torchrun, or another that sets `NAMES`.

    A process that no launcher started is a SingleProcess. Raises UsageError, and RankError if the others do not come.
    """
    if not launched():
        yield SingleProcess()
        return
    rank, world, local_rank, local_world = (
        _number(name, default)
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if not 0 <= rank < world or local_world < 1:
        raise UsageError(f"RANK={rank} and WORLD_SIZE={world} are not what a launcher sets; unset them to merge alone")
    restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0
    with _met(rank, world) as (store, exchange):
        ranks = ProcessGroup(store, exchange, rank, world, local_rank, local_world, restarts)
        try:
            yield ranks
        except BaseException as error:
            ranks.tell(error)
            raise
        finally:
            ranks.close()


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError as error:
        raise UsageError(f"{name}={os.environ[name]!r} is not what a launcher sets; unset it to merge alone") from error


@contextlib.contextmanager
def _met(rank: int, world: int) -> Iterator[tuple[Any, Exchange]]:
    """The store and gloo, once all ranks are there. A process group that the program has is left alone."""
    from datetime import timedelta

    import torch

    dist: Any = torch.distributed
    own, timeout = not dist.is_initialized(), timedelta(seconds=EXCHANGE)
    deadline = time.monotonic() + MEET
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        shared = _store(dist, rank, deadline)
        store = dist.PrefixStore(f"expo/{_token(shared, rank, world, deadline)}", shared)
        if own:
            gloo = dist.PrefixStore("gloo", store)
            dist.init_process_group("gloo", store=gloo, rank=rank, world_size=world, timeout=timeout)
        group = None if own else dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {world} could not meet the others at {where}: {error}; "
            "to merge alone in a process that a launcher has started, unset WORLD_SIZE"
        ) from error

    def exchange(value: Any) -> list[Any]:
        found: list[Any] = [None] * world
        dist.all_gather_object(found, value, group=group)
        return found

    try:
        yield store, exchange
    finally:
        dist.destroy_process_group(group)


def _store(dist: Any, rank: int, deadline: float) -> Any:
    """The store at MASTER_ADDR: torchrun's, or rank 0's own. In short tries, between which signals are heard."""
    from datetime import timedelta

    host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while True:
        try:
            return dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=host,
                timeout=timedelta(seconds=2), wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except RuntimeError:  # nobody listens there yet; a host that cannot listen will not be able to later
            if host or time.monotonic() > deadline:
                raise
            time.sleep(BEAT)


def _token(store: Any, rank: int, world: int, deadline: float) -> str:
    """A word that these ranks share and no earlier ones had: a launcher's store may outlive the processes it restarts.

    Each says hello with a word of its own, and rank 0 answers to that word. Raises RuntimeError where some do not come.
    """
    import uuid

    own = uuid.uuid4().hex
    store.set(f"expo/hello/{rank}", own)
    while time.monotonic() < deadline:
        if rank:
            if store.check([f"expo/welcome/{own}"]):
                token = store.get(f"expo/welcome/{own}").decode()
                store.add(f"expo/met/{token}", 1)
                return str(token)
        elif store.add(f"expo/met/{own}", 0) == world - 1:
            return own
        else:
            for other in (f"expo/hello/{each}" for each in range(1, world)):
                if store.check([other]):
                    store.set(f"expo/welcome/{store.get(other).decode()}", own)
        time.sleep(POLL)
    raise RuntimeError(f"not all ranks have come within {MEET:.0f} s")
