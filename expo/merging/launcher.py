"""The connection of ranks that a launcher such as torchrun has started: the store, gloo, and the process group."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from ..errors import RankError, UsageError
from .process_group import Exchange, ProcessGroup, SingleProcess

START_TIMEOUT_SECONDS = 300.0  # the longest time until all ranks have started
CONNECT_TIMEOUT_SECONDS = 2.0  # the longest time of one attempt to connect to the store
RETRY_SECONDS = 0.5  # the time between two attempts
POLL_SECONDS = 0.02  # the time between two reads of the store while a rank waits for the others
EXCHANGE_TIMEOUT_SECONDS = 60.0  # the longest time of a gloo operation, which starts when all ranks wait for it
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables


def launched() -> bool:
    """Return True if a launcher has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def launched_rank() -> int:
    """Return the rank that a launcher gave this process; 0 if no launcher started it. Raises UsageError."""
    return _number_from_launcher("RANK", 0) if launched() else 0


@contextlib.contextmanager
def join() -> Iterator[SingleProcess]:
    """Connect to the other ranks that a launcher has started, and yield the group of all of them.

    The launcher is torchrun, or another that sets LAUNCHER_VARIABLES. A process that no launcher started gets a
    `SingleProcess`.

    Raises:
        UsageError: The environment has values that no launcher sets.
        RankError: Not all ranks start within START_TIMEOUT_SECONDS.
    """
    if not launched():
        yield SingleProcess()
        return
    rank, world, local_rank, local_world = (
        _number_from_launcher(name, default)
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if not 0 <= rank < world or local_world < 1:
        raise UsageError(f"RANK={rank} and WORLD_SIZE={world} are not what a launcher sets; unset them to merge alone")
    restarts = _number_from_launcher("TORCHELASTIC_MAX_RESTARTS", 0) > 0
    with _connect(rank, world) as (store, exchange):
        group = ProcessGroup(store, exchange, rank, world, local_rank, local_world, restarts)
        try:
            yield group
        except BaseException as error:
            group.report_failure(error)
            raise
        finally:
            group.close()


def _number_from_launcher(name: str, default: int) -> int:
    """Return the number in a variable of the environment. Raises UsageError."""
    try:
        return int(os.environ.get(name, default))
    except ValueError as error:
        raise UsageError(f"{name}={os.environ[name]!r} is not what a launcher sets; unset it to merge alone") from error


@contextlib.contextmanager
def _connect(rank: int, world: int) -> Iterator[tuple[Any, Exchange]]:
    """Connect to the other ranks, and yield the store and the function that exchanges values through gloo.

    A process group of torch.distributed that the program has made already is neither changed nor closed.

    Raises:
        RankError: The store cannot be reached, or not all ranks have started in time.
    """
    from datetime import timedelta

    import torch

    dist: Any = torch.distributed
    makes_group, timeout = not dist.is_initialized(), timedelta(seconds=EXCHANGE_TIMEOUT_SECONDS)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        launcher_store = _open_store(dist, rank, deadline)
        store = dist.PrefixStore(f"expo/{_agree_on_token(launcher_store, rank, world, deadline)}", launcher_store)
        if makes_group:
            gloo_store = dist.PrefixStore("gloo", store)
            dist.init_process_group("gloo", store=gloo_store, rank=rank, world_size=world, timeout=timeout)
        group = None if makes_group else dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {world} could not connect to the other ranks at {address}: {error}; "
            "to merge alone in a process that a launcher has started, unset WORLD_SIZE"
        ) from error

    def exchange(value: Any) -> list[Any]:
        """Return the values of all ranks, by rank; every rank makes this call."""
        values: list[Any] = [None] * world
        dist.all_gather_object(values, value, group=group)
        return values

    try:
        yield store, exchange
    finally:
        dist.destroy_process_group(group)


def _open_store(dist: Any, rank: int, deadline: float) -> Any:
    """Return the key-value store at MASTER_ADDR, which the process of torchrun serves, or rank 0 without torchrun.

    Python handles a signal only between two attempts, so each attempt takes at most CONNECT_TIMEOUT_SECONDS.

    Raises:
        RuntimeError: This rank cannot serve the store, or cannot reach it before the deadline.
    """
    from datetime import timedelta

    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while True:
        try:
            return dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_server,
                timeout=timedelta(seconds=CONNECT_TIMEOUT_SECONDS), wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except RuntimeError:  # the server may not have started yet, but a server that cannot start would fail again
            if is_server or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)


def _agree_on_token(store: Any, rank: int, world: int, deadline: float) -> str:
    """Return the token of these ranks: a random word that the ranks of an earlier start do not have.

    The token is needed because a launcher may restart the ranks and keep the store with the keys of earlier ranks. Each
    rank writes a random word into the store. The word of rank 0 is the token. Rank 0 reads the word w of each other
    rank and writes the token under the key expo/token/w, which only the rank with the word w reads.

    Raises:
        RuntimeError: Not all ranks have started before the deadline.
    """
    import uuid

    own = uuid.uuid4().hex
    store.set(f"expo/word/{rank}", own)
    while time.monotonic() < deadline:
        if rank:
            if store.check([f"expo/token/{own}"]):
                token = store.get(f"expo/token/{own}").decode()
                store.add(f"expo/joined/{token}", 1)
                return str(token)
        elif store.add(f"expo/joined/{own}", 0) == world - 1:
            return own
        else:
            for key in (f"expo/word/{other}" for other in range(1, world)):
                if store.check([key]):
                    store.set(f"expo/token/{store.get(key).decode()}", own)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"not all ranks have started within {START_TIMEOUT_SECONDS:.0f} s")
