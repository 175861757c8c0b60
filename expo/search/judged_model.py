"""The judged model: at each alpha, every weight of it is the one that the merge writes.

The steps of the Live are compared with the steps of the merge before the first reply is sampled. If the tensors have
other names in memory than in the files, sft is loaded as a model too. Then sft and aligned both have the names of
memory, and the loader has rearranged both in the same way.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any, cast

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, EngineError, PlanError
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..tensors.live import Live
from ..tensors.model_weights import model_tensors, saved_weights
from .models import generating_class, load_model
from .settings import SearchOptions
from .step_comparison import StepComparison, compare_steps, find_file_tensors

MOST_WEIGHTS = 20  # weights that a message names
MOST_PROBLEMS = 10  # lines of problems in a message


class JudgedModel:
    """A model whose alpha can be set."""

    def __init__(self, model: Any, live: Live | None, rounded: Mapping[str, torch.dtype]) -> None:
        """Wrap a model.

        Args:
            model: The model, which has aligned's weights.
            live: The Live of the model; without it the model stays at alpha 0.
            rounded: The dtypes that some weights are rounded to after each change of alpha; see StepComparison.
        """
        weights = saved_weights(model)
        self.model = model
        self._live = live
        self._rounded = [(weights[name], dtype) for name, dtype in rounded.items()]

    @property
    def alpha(self) -> float | None:
        """The alpha that the model's weights have; None after an error while it was set."""
        return 0.0 if self._live is None else cast("float | None", self._live.alpha)  # `alpha` below sets numbers alone

    @alpha.setter
    def alpha(self, value: float) -> None:
        assert self._live is not None
        self._live.alpha = value
        with torch.no_grad():
            for tensor, dtype in self._rounded:
                tensor.copy_(tensor.to(dtype))

    def close(self) -> None:
        """Restore aligned's weights and release the memory of the originals."""
        if self._live is not None:
            self._live.close()


def open_judged_model(
    model: Any, sft: Checkpoint, aligned: Checkpoint, files: Matched, options: SearchOptions
) -> tuple[JudgedModel, str]:
    """Return the judged model of a loaded model, and a note for the user, which may be "".

    Args:
        model: The model that transformers loaded from aligned.
        sft: The checkpoint sft.
        aligned: The checkpoint aligned.
        files: The steps of the merge.
        options: The options of the search.

    Raises:
        PlanError: The weights would differ from the merge's.
        EngineError: The memory is too small for a second model.
    """
    memory = model_tensors(model, "model")
    file_tensors = find_file_tensors(aligned, memory, saved_weights(model))
    policies: dict[str, Any] = {"on_unpaired": "aligned", "on_mismatch": options.on_mismatch}
    merge_options = MergeOptions(**policies)
    matched = match_tensors(sft, memory, merge_options)
    comparison = compare_steps(files, matched, file_tensors, by_files=True)
    if not comparison.differences and not matched.problems:
        return JudgedModel(model, Live(model, sft.path, keep=options.keep, **policies), comparison.rounded), ""
    sft_model = _load_sft(model, sft, comparison, options)
    matched = match_tensors(model_tensors(sft_model, "sft"), memory, merge_options)
    comparison = compare_steps(files, matched, file_tensors, by_files=False)
    if comparison.differences or matched.problems:
        raise PlanError(_refusal(comparison, "\n".join(matched.problems)))
    live = Live(model, sft_model, keep=options.keep, **policies)
    del sft_model
    gc.collect()  # a model may refer to itself, and its memory is needed
    note = "weights have other names in memory than in the files, so sft is loaded as a model too"
    return JudgedModel(model, live, comparison.rounded), note


def _load_sft(model: Any, sft: Checkpoint, comparison: StepComparison, options: SearchOptions) -> Any:
    """Return sft as a model, on the judged model's device if the originals are kept there, else on the CPU."""
    device = model.device if options.keep == "device" else torch.device("cpu")
    try:
        return load_model(generating_class(sft.config), sft.path, device, options.trust_remote_code)
    except CheckpointError as error:
        reason = f"sft cannot be loaded as a model, which might help: {error}"
        raise PlanError(_refusal(comparison, reason)) from error
    except EngineError as error:
        error.add_hints("or `keep='host'` or `keep='disk'`, with which sft is loaded on the CPU")
        raise


def _refusal(comparison: StepComparison, reason: str) -> str:
    """Return the message of a refusal: the differences, their share of the model, the reason and the way out."""
    count = len(comparison.differences)
    lines = [
        f"the model that would be judged is not the one that the merge writes: {count} weights, "
        f"{comparison.wrong_elements / max(comparison.elements, 1):.1%} of the elements, differ:",
        *[f"  {name}: {text}" for name, text in list(comparison.differences.items())[:MOST_WEIGHTS]],
    ]
    if count > MOST_WEIGHTS:
        lines.append(f"  and {count - MOST_WEIGHTS} more")
    lines += reason.splitlines()[:MOST_PROBLEMS]
    lines.append(
        "The way out: merge at an alpha with python -m expo.fast, and judge the folder that it writes, by the same "
        "search with that folder as `aligned`, `alphas=[0]` and an `out` of its own"
    )
    return "\n".join(lines)
