"""Two adapters over one base: the SFT adapter and the DPO adapter of a run that never wrote a whole model.

Aligned's adapter was trained either on the base, as sft's was, or on the model that sft's adapter makes of the base.
The config of an adapter names the model that it was trained on; where this name decides nothing, the user must say.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from ..checkpoints.checkpoint import Checkpoint, CommonBase, Origin
from ..checkpoints.files import ADAPTER_CONFIG, load_json
from ..checkpoints.quantization import describe_problem
from ..checkpoints.wrappers import remove_wrapper
from ..errors import CheckpointError
from .adapted import open_adapted
from .hub_ids import parse_hub_id, snapshot_origin
from .locations import Location, StrPath, is_adapter_folder, open_location

LEAST_COSINE = 0.5  # of two lora_A, one of which was trained further
MERGED_IN_MEMORY = (
    "the training of aligned's adapter did not start from the numbers of sft's adapter, though its config names the "
    "base: if it started from the model that sft's adapter makes, merged in memory, add `adapter_over='sft'`; else "
    "`adapter_over='base'` says so"
)


class NeedsBase(CheckpointError):
    """An error for two adapters without a base.

    Attributes:
        known: The base that the config of sft's adapter names, if it can be used here; else None.
    """

    def __init__(self, message: str, known: str | None) -> None:
        """Keep the message and the base."""
        super().__init__(message)
        self.known = known


def check_inputs(base: StrPath | None, names: Sequence[StrPath], locations: Sequence[Location]) -> StrPath:
    """Return the base of two adapters.

    Args:
        base: The base that the user names; None without one.
        names: sft and aligned as the user names them.
        locations: The places of both.

    Raises:
        NeedsBase: There is no base.
        CheckpointError: An input is a whole model. Both messages have the fix.
    """
    sft, aligned = (os.fspath(name) for name in names)
    has_sft, has_aligned = (is_adapter_folder(location.path_to_open) for location in locations)
    if has_sft and has_aligned and base is not None:
        return base
    trained_on = _trained_on(locations[0]) if has_sft else None
    known = os.fspath(base) if base is not None else _usable(trained_on)
    if has_sft and not has_aligned:
        command = f"python -m expo.fast --sft {shlex.quote(known or 'BASE')} --aligned {shlex.quote(sft)} --alpha 0"
        raise CheckpointError(
            f"{sft}: a PEFT adapter, but aligned {aligned} is a whole model: make a whole model of the adapter first, "
            f"with {command} --out FOLDER, and give that folder as sft, without a base"
        )
    if not has_sft:
        raise CheckpointError(
            f"{sft}: no PEFT adapter, and `base` is for two adapters over one base: leave it out, and give as sft "
            "the checkpoint that aligned was trained from"
        )
    named = f": its config names {trained_on!r}" if trained_on else ""
    fix = f", so add `base={known!r}`" if known else ", which is not here" * bool(trained_on)
    raise NeedsBase(
        f"{sft}: a PEFT adapter, and so is aligned {aligned}; `base` must name the checkpoint that sft's adapter was "
        f"trained from{named}{fix}",
        known,
    )


def check_adapter(name: StrPath, location: Location) -> None:
    """Raise CheckpointError if the input with a base is no adapter."""
    if not is_adapter_folder(location.path_to_open):
        raise CheckpointError(f"{os.fspath(name)}: no PEFT adapter, so it has no `base`: leave that out")


@contextmanager
def open_two_adapters(
    name: str, location: Location, adapters: Sequence[Location], adapter_over: str | None
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Open sft and aligned as adapters over one base, for the time of the block.

    Args:
        name: The base as the user named it.
        location: The place of the base.
        adapters: The places of sft's adapter and of aligned's.
        adapter_over: "base" or "sft", the model that aligned's adapter was trained on; None to read its config.

    Raises:
        CheckpointError: An adapter cannot be read, or its config does not say which model it was trained on.
    """
    with ExitStack() as stack:
        base = stack.enter_context(closing(open_location(location)))
        problem = describe_problem("base", base)
        if problem is not None:
            raise CheckpointError(problem)
        base, has_data = remove_wrapper(base, base), location.stand_in is None
        over, reason = (adapter_over, "as `adapter_over` says") if adapter_over else _find_place(location, adapters)
        common = CommonBase(name, base.origin or Origin(base.name), over, reason)
        sft = stack.enter_context(closing(_open_over_base(base, name, adapters[0], has_data)))
        if over == "sft":
            aligned = open_adapted(sft, adapters[1], has_data and adapters[0].stand_in is None)
        else:
            aligned = _open_over_base(base, name, adapters[1], has_data, sft.adapters[0].unties)
        stack.callback(aligned.close)
        all_have_data = has_data and all(each.stand_in is None for each in adapters)
        if adapter_over is None and over == "base" and _started_apart(sft, aligned, all_have_data):
            aligned = replace(aligned, notes=(*aligned.notes, MERGED_IN_MEMORY))
        yield replace(sft, common_base=common), replace(aligned, common_base=common)


def _open_over_base(
    base: Checkpoint, name: str, adapter: Location, base_has_data: bool, unties: bool = False
) -> Checkpoint:
    """Open an adapter over the base; see `open_adapted`. Raises CheckpointError, whose message calls the base sft."""
    try:
        return open_adapted(base, adapter, base_has_data, unties)
    except CheckpointError as error:
        error.add_hints(f"sft is the base {name} in this message")
        raise


def _started_apart(sft: Checkpoint, aligned: Checkpoint, has_data: bool) -> bool:
    """Return True if the training of aligned's adapter did not start from the numbers of sft's.

    Such trainings keep the ranks and modules, and hardly change the direction of lora_A, which two adapters that start
    with random numbers do not share.
    """
    one, other = sft.adapters[0], aligned.adapters[0]
    shapes = [{name: (delta.left.shape, delta.right.shape) for name, delta in each.low_rank.items()}
              for each in (one, other)]  # fmt: skip
    if shapes[0] != shapes[1] or not has_data:
        return shapes[0] != shapes[1]
    from ..checkpoints.lora_data import read_factors

    name = next(iter(one.low_rank), None)
    if name is None:
        return False
    try:
        a, b = (read_factors(each.shard, each.low_rank[name])[1].astype(float).ravel() for each in (one, other))
    finally:
        for each in (one, other):
            each.shard.reader.close()  # an open reader keeps other processes from writing to the file
    return bool(abs(a @ b) < LEAST_COSINE * (a @ a) ** 0.5 * (b @ b) ** 0.5)


def _find_place(base: Location, adapters: Sequence[Location]) -> tuple[str, str]:
    """Return the model that aligned's adapter was trained on, "base" or "sft", and the reason.

    Raises:
        CheckpointError: The configs do not say.
    """
    sft, aligned = map(_trained_on, adapters)
    config = os.path.join(adapters[1].path, ADAPTER_CONFIG)
    key = _key(aligned) if aligned else None
    sft_key = _location_key(adapters[0])
    if key is not None and (key == sft_key or key.startswith(sft_key + os.sep)):
        return "sft", f"because its config names {aligned!r}, which is sft's adapter"
    if key is not None and key in (_key(sft) if sft else None, _location_key(base)):
        return "base", f"because its config names {aligned!r}" + ", as sft's does" * (aligned == sft)
    raise CheckpointError(
        f"{config}: base_model_name_or_path is {aligned!r}, which is neither sft's adapter nor its base "
        f"({sft!r} in its config), so it does not show on which model aligned's adapter was trained: add "
        "`adapter_over='base'` if that was the base without sft's adapter, or `adapter_over='sft'` if it was the model "
        "that sft's adapter makes of the base"
    )


def _trained_on(adapter: Location) -> str | None:
    """Return the model that an adapter's config names as its base; None if it names none."""
    name = load_json(os.path.join(adapter.path_to_open, ADAPTER_CONFIG)).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _usable(name: str | None) -> str | None:
    """Return a name in a config if it is that of a path here or may be a hub id; else None."""
    return name if name and (os.path.exists(name) or parse_hub_id(name)) else None


def _location_key(location: Location) -> str:
    return f"hub:{location.origin.name}" if location.origin else os.path.realpath(location.path)


def _key(name: str) -> str:
    """Return a text that is the same for all names of one model: the repository's id, or the path without links."""
    if os.path.exists(name):
        found = snapshot_origin(name)
        return f"hub:{found[0]}" if found else os.path.realpath(name)
    hub_id = parse_hub_id(name)
    return f"hub:{hub_id.repo}" if hub_id else os.path.realpath(name)
