"""Open the two inputs of a merge by the names that a user types: folders, files, hub ids, adapters, a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import CONFIG, WHOLE_MODELS, find_other_files, find_strays, load_json
from ..checkpoints.transposed import transposed_like
from ..checkpoints.wrappers import remove_wrapper
from ..errors import CheckpointError, UsageError
from .locations import Location, complete_downloads, is_adapter_folder, locate, open_location
from .locations import StrPath as StrPath

if TYPE_CHECKING:
    from .downloads import Download

ADAPTER_OVER = ("base", "sft")


class PairRequest(NamedTuple):
    """The two checkpoints of a merge as the user names them, and its alphas.

    Attributes:
        sft: The checkpoint before alignment.
        aligned: The checkpoint after alignment.
        alphas: One alpha for each output.
        base: The checkpoint that both are adapters over; None for all other inputs.
        adapter_over: "base" or "sft", the model that aligned's adapter was trained on; None to read its config.
    """

    sft: StrPath
    aligned: StrPath
    alphas: tuple[float, ...]
    base: StrPath | None = None
    adapter_over: str | None = None


def complete_request(
    sft: StrPath | None,
    aligned: StrPath | None,
    alpha: float | Iterable[float] | None,
    recipe: str | None,
    base: StrPath | None = None,
    adapter_over: str | None = None,
) -> PairRequest:
    """Return the user's arguments, completed by a recipe's values for those that are None.

    Raises UsageError if there is no such recipe, if the recipe has no alpha and none is given, if an argument is still
    missing, if alpha is not a number, or if `adapter_over` makes no sense.
    """
    if recipe is not None:
        from .recipes import alpha_of
        from .recipes import recipe as find_recipe

        found = find_recipe(recipe)
        sft, aligned = found.sft if sft is None else sft, found.aligned if aligned is None else aligned
        alpha = alpha_of(found) if alpha is None else alpha
    if sft is None or aligned is None or alpha is None:
        arguments = (("`sft`", sft), ("`aligned`", aligned), ("`alpha`", alpha))
        *first, last = [name for name, value in arguments if value is None]
        missing = f"{', '.join(first)} and {last}" if first else last
        raise UsageError(f"{missing} must be given, or `recipe` gives all three")
    check_adapter_over(base, adapter_over)
    return PairRequest(sft, aligned, alphas_of(alpha), base, adapter_over)


def check_adapter_over(base: StrPath | None, adapter_over: str | None) -> None:
    """Raise UsageError if `adapter_over` has an unknown value, or is given without `base`."""
    if adapter_over is not None and adapter_over not in ADAPTER_OVER:
        raise UsageError(f"`adapter_over` must be one of {', '.join(ADAPTER_OVER)}, got {adapter_over!r}")
    if adapter_over is not None and base is None:
        raise UsageError("`adapter_over` is for two adapters over one `base`, which must be given too")


def alphas_of(alpha: float | Iterable[float]) -> tuple[float, ...]:
    """Return one number or several as a tuple of floats. Raises UsageError."""
    try:
        values = tuple(alpha) if isinstance(alpha, Iterable) and not isinstance(alpha, str) else (alpha,)
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"alpha must be a number or several, got {alpha!r}") from None


@contextmanager
def open_inputs(
    sft: StrPath,
    aligned: StrPath,
    quiet: bool = True,
    headers_only: bool = False,
    carry: Sequence[str] = (),
    base: StrPath | None = None,
    adapter_over: str | None = None,
    aligned_config: StrPath | None = None,
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Open both checkpoints for the time of the block. Hub ids are downloaded first; adapters are opened over a base.

    Args:
        sft: A folder, a file or a hub id; a LoRA adapter, if there is a base.
        aligned: The same, or a LoRA adapter over sft.
        quiet: Show no progress bars of downloads.
        headers_only: Download only the headers of weights that are not in the hub's cache; their data are then zeros.
        carry: Patterns of further files of aligned that the output takes over.
        base: The checkpoint that sft and aligned are adapters over; None for all other inputs.
        adapter_over: "base" or "sft", the model that aligned's adapter was trained on; None to read its config.
        aligned_config: The folder with the config and the files of an aligned that has none; None for those beside it.

    Yields:
        sft and aligned. aligned, and the base of an adapter, have the tensor names of models without a wrapper.

    Raises:
        CheckpointError: An input is missing, damaged, or of a kind that cannot be read.
    """
    with ExitStack() as stack:
        stand_ins = stack if headers_only else None
        later: list[Download] = []  # the weights of all inputs are downloaded at the same time
        aligned_location = locate(aligned, False, quiet, stand_ins, carry, later)
        has_adapter = is_adapter_folder(aligned_location.path_to_open)
        # The tokenizer and the config of an adapter's output may be those of its base, so all files of sft are needed.
        sft_location = locate(sft, not has_adapter, quiet, stand_ins, carry, later)
        if base is not None or is_adapter_folder(sft_location.path_to_open):
            from .two_adapters import check_inputs, open_two_adapters

            base = check_inputs(base, (sft, aligned), locations := (sft_location, aligned_location))
            base_location = locate(base, False, quiet, stand_ins, carry, later)
            complete_downloads(later, quiet)
            yield stack.enter_context(open_two_adapters(os.fspath(base), base_location, locations, adapter_over))
            return
        complete_downloads(later, quiet)
        yield _open_pair(stack, sft_location, aligned_location, has_adapter, aligned_config)


def _open_pair(
    stack: ExitStack, sft: Location, aligned: Location, has_adapter: bool, aligned_config: StrPath | None
) -> tuple[Checkpoint, Checkpoint]:
    """Open sft, and aligned as a whole model or as an adapter over sft, until the end of the stack."""
    opened_sft = stack.enter_context(closing(open_location(sft)))
    if has_adapter:
        from .adapted import open_adapted

        opened_sft = remove_wrapper(opened_sft, opened_sft)
        adapted = open_adapted(opened_sft, aligned, sft.stand_in is None)
        return opened_sft, stack.enter_context(closing(adapted))
    opened_aligned = stack.enter_context(closing(open_location(aligned)))
    if aligned_config is not None:
        opened_aligned = _with_config(opened_aligned, os.fspath(aligned_config))
    opened_aligned = remove_wrapper(opened_aligned, opened_sft)
    return transposed_like(opened_sft, opened_aligned), opened_aligned


def _with_config(aligned: Checkpoint, folder: str) -> Checkpoint:
    """Return aligned with the config and the files of a folder.

    Raises:
        UsageError: aligned has a config of its own.
        CheckpointError: The folder has no config.
    """
    if not aligned.in_parts:
        raise UsageError(
            f"`aligned_config` is for weights in the parts that a training's processes saved, and aligned "
            f"{aligned.path} has none: leave it out"
        )
    files = find_other_files(folder, {*aligned.shards, *WHOLE_MODELS})
    if CONFIG not in files:
        raise CheckpointError(f"{folder}: `aligned_config` needs a folder with {CONFIG}, and there is none in it")
    return replace(aligned, config=load_json(files[CONFIG]), files=files, strays=find_strays(folder, files))


@contextmanager
def open_one(path: StrPath, quiet: bool = True, base: StrPath | None = None) -> Iterator[Checkpoint]:
    """Open one checkpoint for the time of the block: a folder, a file or a hub id; an adapter, if there is a base.

    Raises CheckpointError.
    """
    with ExitStack() as stack:
        location = locate(path, base is None, quiet)
        if base is None:
            yield stack.enter_context(closing(open_location(location)))
            return
        from .adapted import open_adapted
        from .two_adapters import check_adapter

        check_adapter(path, location)
        opened_base = stack.enter_context(closing(open_location(locate(base, True, quiet))))
        opened_base = remove_wrapper(opened_base, opened_base)
        yield stack.enter_context(closing(open_adapted(opened_base, location, True)))
