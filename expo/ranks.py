"""The processes of one merge, its ranks: one alone, or those that torchrun has started, on one host or several.

They meet in a store of torch.distributed and exchange what they must agree on through gloo. Each posts a beat to the
store, so that the others notice when it stops; one that fails says why there before it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .errors import ExpoError, RankError, UsageError

BEAT = 0.5  # seconds between two looks at the others
PATIENCE = 30.0  # seconds without a beat after which a rank counts as dead
POLL = 0.02  # seconds between two looks at who has arrived
MEET = 300.0  # seconds in which all ranks must have started
LINGER = 2.0  # seconds that a rank that failed stays for the others to read why: the store may be its own
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what launchers set
Exchange = Callable[[Any], "list[Any]"]  # a value to those of all ranks, by rank


class Alone:
    """The one process of an ordinary merge; `Ranks` has the same methods for several, and says what they do."""

    rank, world, local_rank, local_world, restarts = 0, 1, 0, 1, False

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def report(self, done: int) -> int:
        return done

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        yield


class Ranks(Alone):
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
        self._store, self._exchange, self._patience = store, exchange, patience
        self._phase = self._done = 0
        self._others: dict[int, int] = {}  # bytes that the ranks watched have reported in this phase
        self._failure: tuple[str, str] | None = None  # what has happened elsewhere, and the name of its exception
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="expo-ranks", daemon=True)
        self._watcher.start()

    def gather(self, value: Any) -> list[Any]:
        """Wait for all ranks; the values of all, by rank. Raises RankError."""
        name = f"arrived/{self._phase}"
        try:
            self._store.add(name, 1)
            while self._store.add(name, 0) < self.world:
                self._check()
                time.sleep(POLL)
            found = self._exchange(value)
        except RuntimeError as error:  # of the store or of gloo: whoever is gone may have said why
            time.sleep(2 * BEAT)
            self._check()
            raise RankError(f"{self._name()} has lost the others: {error}") from error
        self._phase, self._done, self._others = self._phase + 1, 0, {}
        return found

    def report(self, done: int) -> int:
        """done: bytes, by this rank, since all were together last; returns those of the ranks that it watches too.

        Rank 0 watches all, others watch rank 0. Call it now and then. Raises RankError where a rank has failed.
        """
        self._check()
        self._done = done
        return done + sum(self._others.values())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done in it fails on all ranks or on none."""
        try:
            yield
        except RankError:
            raise
        except KeyboardInterrupt as interrupt:
            self._tell("was told to stop", "KeyboardInterrupt")
            why = "was told to stop, by Ctrl-C or by the launcher, which does so when another rank has died"
            raise KeyboardInterrupt("; ".join(filter(None, (f"{self._name()} {why}", str(interrupt))))) from None
        except BaseException as error:
            what = str(error) if isinstance(error, ExpoError) else f"{type(error).__name__}: {error}"
            self._tell(f"failed: {what}", type(error).__name__)
            raise

    def close(self) -> None:
        """Stop watching the others, and being watched."""
        self._closed.set()
        self._watcher.join()

    def _name(self) -> str:
        return f"rank {self.rank} of {self.world} on {os.uname().nodename}"

    def _check(self) -> None:
        if self._failure is not None:
            what, kind = self._failure
            raise RankError(f"{what}; rank {self.rank} of {self.world} has stopped too", kind)

    def _tell(self, what: str, kind: str) -> None:
        """Leave the reason in the store, unless another rank has left one, and stay until it may have been read."""
        with contextlib.suppress(RuntimeError):
            self._post_failure(f"{self._name()} {what}", kind)
            if self.rank == 0:
                time.sleep(LINGER)

    def _post_failure(self, what: str, kind: str) -> None:
        self._store.compare_set("failed", "", json.dumps([what, kind]))

    def _watch(self) -> None:
        """Rank 0 watches all the others, and they watch rank 0: one that it finds dead has failed for all."""
        watched = range(1, self.world) if self.rank == 0 else (0,)
        seen = {rank: (b"", time.monotonic()) for rank in watched}
        beats = 0
        while not self._closed.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{self._phase} {self._done} {beats}")
                if self._store.check(["failed"]):
                    self._failure = tuple(json.loads(self._store.get("failed")))
                    return
                for rank in watched:
                    self._look(rank, seen)
            except RuntimeError as error:
                self._failure = f"the host of the ranks' store cannot be reached: {error}", type(error).__name__
                return

    def _look(self, rank: int, seen: dict[int, tuple[bytes, float]]) -> None:
        now, key = time.monotonic(), f"beat/{rank}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        before, since = seen[rank]
        if beat != before:
            seen[rank] = beat, now
            phase, done, _ = map(int, beat.split())
            self._others[rank] = done if phase == self._phase else 0
        elif now - since > self._patience:
            self._post_failure(f"rank {rank} of {self.world} has not answered for {self._patience:.0f} s", "")


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in NAMES) and os.environ["WORLD_SIZE"] != "1"


@contextlib.contextmanager
def join() -> Iterator[Alone]:
    """The ranks that a launcher has started: torchrun, or another that sets `NAMES`.

    Alone in a process that was not started so. Raises UsageError, and RankError where the others do not come.
    """
    if not launched():
        yield Alone()
        return
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = {name.lower(): int(os.environ.get(name, default)) for name, default in
                 (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}  # fmt: skip
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE and the like are not what a launcher sets: {error}") from error
    with _met(rank, world) as (store, exchange):
        ranks = Ranks(store, exchange, rank, world, local["local_rank"], local["local_world_size"], restarts)
        try:
            yield ranks
        finally:
            ranks.close()


@contextlib.contextmanager
def _met(rank: int, world: int) -> Iterator[tuple[Any, Exchange]]:
    """The store and gloo, once all ranks are there. A process group that the program has is left alone."""
    from datetime import timedelta

    import torch
    from torch.distributed.rendezvous import rendezvous

    dist: Any = torch.distributed
    timeout = timedelta(seconds=MEET)
    own = not dist.is_initialized()
    try:
        shared, _, _ = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"expo/{_token(shared, rank, world)}", shared)
        if own:
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=world, timeout=timeout
            )
        group = None if own else dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(f"rank {rank} of {world} could not meet the others at {where}: {error}") from error

    def exchange(value: Any) -> list[Any]:
        found: list[Any] = [None] * world
        dist.all_gather_object(found, value, group=group)
        return found

    try:
        yield store, exchange
    finally:
        dist.destroy_process_group(group)


def _token(store: Any, rank: int, world: int) -> str:
    """A word that these ranks share and no earlier ones had: a launcher's store may outlive the processes it restarts.

    Each says hello with a word of its own, and rank 0 answers to that word. Raises RankError where some do not come.
    """
    import uuid

    own, began = uuid.uuid4().hex, time.monotonic()
    store.set(f"expo/hello/{rank}", own)
    while time.monotonic() - began < MEET:
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
    raise RankError(f"rank {rank} of {world}: not all ranks have come within {MEET:.0f} s")
