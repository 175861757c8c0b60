"""The judged model: a live one whose every weight is, at each alpha, what the merge writes; and the check of a merge.

Names in memory may differ from those in the files, as transformers fuses the experts of a mixture into one tensor. So
Live's plan is compared with the plan of the files before anything is sampled. Where the two do not agree by name, sft
is loaded as a model too: then both sides have the names of memory, and what a loader does to files it does to both.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.model_tensors import ModelTensors
from ..checkpoints.safetensors_header import TensorInfo, element_count
from ..dtypes import ITEMSIZE, torch_dtypes
from ..errors import CheckpointError, EngineError, PlanError
from ..inputs.resolve import StrPath
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..planning.pairing import pair
from ..planning.steps import Action, Step
from ..tensors.live import Live, described, saved
from .models import load_model
from .settings import Options

SHOWN = 20  # names in a message
SAMPLE = 1024  # elements at either end of a tensor by which memory and file are told to be the same


class Judged:
    """A model whose alpha can be set; without `live` it stays at alpha 0.

    rounded: weights that the loader keeps in a wider dtype than the files, and the files': a merge rounds to that.
    """

    def __init__(self, model: Any, live: Live | None, rounded: Mapping[str, torch.dtype]) -> None:
        weights = saved(model)
        self.model = model
        self._live = live
        self._rounded = [(weights[name], dtype) for name, dtype in rounded.items()]

    @property
    def alpha(self) -> float | None:
        return 0.0 if self._live is None else self._live.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        assert self._live is not None
        self._live.alpha = value
        with torch.no_grad():
            for tensor, dtype in self._rounded:
                tensor.copy_(tensor.to(dtype))

    def close(self) -> None:
        """Restore aligned and let go of the originals."""
        if self._live is not None:
            self._live.close()


class Comparison(NamedTuple):
    """How Live's plan differs from the files'.

    wrong: weights in memory and what differs. rounded: see Judged. elements: of the wrong ones, and of all.
    """

    wrong: dict[str, str]
    rounded: dict[str, torch.dtype]
    elements: tuple[int, int]


def open_judged(
    model: Any, weak: Checkpoint, strong: Checkpoint, files: Matched, options: Options
) -> tuple[Judged, str]:
    """Return the model made alive, and a note for the user where there is something to say.

    files: the plan of the merge. Raises PlanError where no way of making it alive gives the merge's weights.
    """
    memory = described(model, "model")
    names = _names(strong, memory, saved(model))
    how: dict[str, Any] = {"on_unpaired": "aligned", "on_mismatch": options.on_mismatch}
    pairing_options = MergeOptions(**how)
    plan = match_tensors(weak, memory, pairing_options)
    found = compare(files, plan, names, by_files=True)
    if not found.wrong and not plan.problems:
        return Judged(model, Live(model, weak.path, keep=options.keep, **how), found.rounded), ""
    where = model.device if options.keep == "device" else torch.device("cpu")
    try:
        sft = load_model(AutoModelForCausalLM, weak.path, where, options.trust_remote_code)
    except CheckpointError as error:
        raise PlanError(_refusal(found, f"sft cannot be loaded as a model, which might do: {error}")) from error
    except EngineError as error:
        raise EngineError(f"{error}, or --keep host or disk, with which sft is loaded on the CPU") from error
    plan = match_tensors(described(sft, "sft"), memory, pairing_options)
    found = compare(files, plan, names, by_files=False)
    if found.wrong or plan.problems:
        raise PlanError(_refusal(found, "\n".join(plan.problems)))
    live = Live(model, sft, keep=options.keep, **how)
    del sft
    gc.collect()  # a model may refer to itself, and its memory is needed
    note = "weights have other names in memory than in the files, so sft is loaded as a model too"
    return Judged(model, live, found.rounded), note


def _names(strong: Checkpoint, memory: ModelTensors, weights: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Return which of aligned's tensors in files each weight in memory is, where it is one as it stands."""
    pairs = pair(strong, memory)
    twins = {name: twin.tensor for name, twin in pairs.counterparts.items()}
    twins |= {name: strong.tensors[name] for name in pairs.kept if name in strong.tensors}
    return {name: tensor for name, tensor in twins.items() if _same(strong, tensor, weights[name])}


def _same(strong: Checkpoint, tensor: TensorInfo, weight: torch.Tensor) -> bool:
    """Return whether a file's tensor has the shape and both ends of a weight: a transposed one may have its shape."""
    if tuple(weight.shape) != tensor.shape:
        return False
    if tensor.dtype not in torch_dtypes() or not tensor.nbytes:
        return True
    flat, item = weight.detach().reshape(-1), ITEMSIZE[tensor.dtype]
    count = min(SAMPLE, len(flat))
    for start in (0, len(flat) - count):
        raw = bytearray(count * item)
        strong.reader(tensor.name).read(tensor.start + start * item, memoryview(raw))
        here = flat[start : start + count].cpu()
        there = torch.frombuffer(raw, dtype=torch_dtypes()[tensor.dtype]).to(here.dtype)
        if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
            return False
    return True


def compare(files: Matched, live: Matched, names: Mapping[str, TensorInfo], by_files: bool) -> Comparison:
    """Compare what Live will change with what the merge changes.

    names: which tensor of aligned's files each weight in memory is. by_files: Live reads sft's files, by their names.
    A weight that is no one tensor of the files must be extrapolated with a twin from memory, and so must every tensor
    of the files that is no one weight; a loader rearranges both sides in the same way.
    """
    of_files, of_live = _by_name(files), _by_name(live)
    whole = {each.name for each in names.values()}
    rest = [steps for name, steps in of_files.items() if name not in whole and not _kept(steps)]
    wrong: dict[str, str] = {}
    rounded: dict[str, torch.dtype] = {}
    for name, steps in of_live.items():
        twin = of_files.get(names[name].name) if name in names else None
        if twin is not None:
            text, dtype = _difference(twin, steps, by_files)
        elif not rest:
            continue  # the files have nothing to set it from
        else:
            text, dtype = _difference_of_parts(rest, steps, by_files)
        if text:
            wrong[name] = text
        elif dtype is not None:
            rounded[name] = dtype
    sizes = {name: sum(element_count(step.shape) for step in steps) for name, steps in of_live.items()}
    return Comparison(wrong, rounded, (sum(sizes[name] for name in wrong), sum(sizes.values())))


def _by_name(plan: Matched) -> dict[str, list[Step]]:
    """Return the steps of each floating-point tensor; others are copied by everybody."""
    found: dict[str, list[Step]] = {}
    for step in plan.steps:
        if step.aligned.dtype in ITEMSIZE:
            found.setdefault(step.name, []).append(step)
    return found


def _kept(steps: Iterable[Step]) -> bool:
    """Return whether it is a buffer that the model computes, and its files hold all the same."""
    return all(step.reason.startswith("a buffer") for step in steps)


def _difference(files: list[Step], live: list[Step], by_files: bool) -> tuple[str, torch.dtype | None]:
    """Return how one weight's fate differs, "" where it does not, and the dtype to round to."""
    fates = [
        [(step.action, step.rows, step.sft.name if step.sft and by_files else "") for step in steps]
        for steps in (files, live)
    ]
    if fates[0] != fates[1]:
        return f"the merge {_fate(files)}, the judged model {_fate(live)}", None
    for theirs, ours in zip(files, live, strict=True):
        if ours.sft is not None and theirs.sft is not None:
            text, dtype = _dtype(theirs.aligned.dtype, ours.aligned.dtype, theirs.sft.dtype, ours.sft.dtype)
            if text or dtype is not None:
                return text, dtype
    return "", None


def _fate(steps: list[Step]) -> str:
    said = []
    for step in steps:
        what = "extrapolates" if step.action is Action.EXTRAPOLATE else f"copies aligned's ({step.reason})"
        said.append(what if step.rows is None else f"{what} in rows {step.rows[0]} to {step.rows[1]}")
    return " and ".join(said)


def _difference_of_parts(rest: list[list[Step]], live: list[Step], by_files: bool) -> tuple[str, torch.dtype | None]:
    """Return the same of a weight that is made of some of the files' tensors, which are among `rest`."""
    if by_files or len(live) > 1 or live[0].sft is None:
        return f"no tensor of aligned's files is this one, and the judged model {_fate(live)}", None
    left = next((steps for steps in rest if len(steps) > 1 or steps[0].sft is None), None)
    if left is not None:
        return f"it is made of several tensors of the files, of which the merge {_fate(left)} {left[0].name}", None
    ours = live[0].aligned.dtype, live[0].sft.dtype
    theirs = {(steps[0].aligned.dtype, steps[0].sft.dtype) for steps in rest if steps[0].sft}
    if len(theirs) > 1:  # which is whose is not known
        return ("" if ours in theirs else f"aligned and sft are {ours} in memory, {sorted(theirs)} in the files"), None
    ((aligned, sft),) = theirs
    return _dtype(aligned, ours[0], sft, ours[1])


def _dtype(file: str, memory: str, sft_file: str, sft_memory: str) -> tuple[str, torch.dtype | None]:
    """Return what is wrong with the dtypes, and the one to round to.

    In a wider dtype than the files' the formula gives the number that the merge rounds; in a narrower one another.
    """
    for role, theirs, ours in (("aligned", file, memory), ("sft", sft_file, sft_memory)):
        if theirs != ours and (ITEMSIZE[theirs], ours) != (2, "F32"):
            return f"{role} is {theirs} in the files and {ours} in memory", None
    if file == memory:
        return "", None
    if sft_file == "F64":
        return f"{file} in the files, {memory} in memory, sft is F64", None
    return "", torch_dtypes()[file]


def _refusal(found: Comparison, more: str) -> str:
    """Return the message: what differs, how much of the model it is, and what can be done."""
    wrong, all_ = found.elements
    lines = [
        f"the model that would be judged is not the one that the merge writes: {len(found.wrong)} weights, "
        f"{wrong / max(all_, 1):.1%} of the elements, differ:",
        *[f"  {name}: {text}" for name, text in list(found.wrong.items())[:SHOWN]],
    ]
    if len(found.wrong) > SHOWN:
        lines.append(f"  and {len(found.wrong) - SHOWN} more")
    lines += more.splitlines()[: SHOWN // 2]
    lines.append(
        "What works: merge at an alpha with python -m expo.fast, and judge the folder that it writes: the same search "
        "with that folder as --aligned, --alphas 0 and an --out of its own"
    )
    return "\n".join(lines)


def digests(model: Any) -> dict[str, str]:
    """Return the SHA-256 of each weight of a model, over its dtype, its shape and its bytes."""
    found = {}
    for name, tensor in saved(model).items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def check_merge(folder: StrPath, judged: Mapping[str, str], trust_remote_code: bool = False) -> None:
    """Load a merged model as the search loads aligned, and compare its weights with those that were judged, by digests.

    Raises CheckpointError where it cannot be loaded, and where it is another model.
    """
    gc.collect()  # the judged model may refer to itself, and is not held beside this one
    try:
        found = digests(load_model(AutoModelForCausalLM, str(folder), torch.device("cpu"), trust_remote_code))
    except CheckpointError as error:
        raise CheckpointError(
            f"the merge stands at {folder}, but it cannot be compared with the model that was judged: {error}"
        ) from error
    wrong = sorted(name for name in {*found, *judged} if found.get(name) != judged.get(name))
    if wrong:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        names = "".join(f"\n  {name}" for name in wrong[:SHOWN])
        raise CheckpointError(
            f"the merge stands at {folder}, but it is not the model that was judged: {len(wrong)} of {len(found)} "
            f"weights differ, so the search says nothing about it; judge it itself, as --aligned with --alphas 0:"
            f"{names}{more}"
        )
