"""The models of one search, which are loaded when the first reply is missing, and not before."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..cli import print_message
from ..errors import CheckpointError
from ..inputs.resolve import StrPath, open_inputs
from ..inputs.two_adapters import NeedsBase
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from .rewards import Reward, load_reward
from .settings import Sampling, SearchOptions

if TYPE_CHECKING:
    from .judged_model import JudgedModel
    from .sampling import Sampler


class Inputs(NamedTuple):
    """The two checkpoints of a search, opened, and the steps of their merge."""

    sft: Checkpoint
    aligned: Checkpoint
    matched: Matched


def open_search_inputs(stack: ExitStack, sft: StrPath, aligned: StrPath, options: SearchOptions) -> Inputs:
    """Open both checkpoints and match their tensors, before any weights are loaded. The stack closes them.

    Raises:
        CheckpointError: A checkpoint cannot be read, or aligned is not a whole model with its config and tokenizer.
        PlanError: The checkpoints cannot be merged.
    """
    try:
        sft_input, aligned_input = stack.enter_context(open_inputs(sft, aligned, options.quiet))
    except NeedsBase as error:
        raise CheckpointError(_explain_adapters(os.fspath(sft), os.fspath(aligned), error.known or "BASE")) from error
    if aligned_input.adapters:
        raise CheckpointError(
            f"{aligned_input.path} is an adapter: make a whole model of it first, with python -m expo.fast --alpha 0, "
            "and give that model as aligned"
        )
    if aligned_input.folder is None:
        raise CheckpointError(f"{aligned_input.path} is a file: give the folder with its config and tokenizer")
    if aligned_input.in_parts:
        raise CheckpointError(
            f"{aligned_input.path} has the parts that a training's processes saved: make a whole model of them first, "
            "with python -m expo.fast --alpha 0, and give that model as aligned"
        )
    if aligned_input.dequantized:
        raise CheckpointError(
            f"{aligned_input.path} has quantised weights, and a search rewrites the weights of a model in bf16: make "
            "that model first, with python -m expo.fast --alpha 0, and give it as aligned"
        )
    merge_options = MergeOptions(on_unpaired=options.on_unpaired, on_mismatch=options.on_mismatch)
    matched = match_tensors(sft_input, aligned_input, merge_options)
    matched.check()
    return Inputs(sft_input, aligned_input, matched)


def _explain_adapters(sft: str, aligned: str, base: str) -> str:
    """Return the message about two adapters over one base, with the commands that make whole models of them."""
    command, words = "python -m expo.fast", [shlex.quote(each) for each in (base, sft, aligned)]
    return (
        f"{sft} and {aligned} are adapters, and a search loads whole models: make them with "
        f"{command} --sft {words[0]} --aligned {words[1]} --alpha 0 --out SFT and "
        f"{command} --base {words[0]} --sft {words[1]} --aligned {words[2]} --alpha 0 --out ALIGNED, and search with "
        "--sft SFT --aligned ALIGNED"
    )


class SearchModels:
    """Loads the judged model, its sampler and the reward at their first use."""

    def __init__(
        self, stack: ExitStack, inputs: Inputs, reward: Reward | str, sampling: Sampling, options: SearchOptions
    ) -> None:
        """Keep the arguments; the stack closes the judged model."""
        self._stack, self._inputs, self._options = stack, inputs, options
        self._reward_source, self._sampling = reward, sampling
        self.needs_alphas = True  # False if only alpha 0 is judged: then no originals are kept
        self._judged: tuple[JudgedModel, Any] | None = None
        self._sampler: tuple[JudgedModel, Sampler, Reward] | None = None

    def load(self, prompts: list[str]) -> tuple[JudgedModel, Sampler, Reward]:
        """Return the judged model, the sampler of its replies to the prompts, and the reward."""
        if self._sampler is None:
            from .sampling import Sampler

            options = self._options
            reward = load_reward(self._reward_source, options.device, options.trust_remote_code)
            judged, tokenizer = self._load_judged()
            sampler = Sampler(judged.model, tokenizer, prompts, self._sampling, options.seed, options.batch_size)
            for note in sampler.notes:
                print_message(note, options.quiet)
            self._sampler = judged, sampler, reward
        return self._sampler

    def _load_judged(self) -> tuple[JudgedModel, Any]:
        """Return the judged model and its tokenizer."""
        if self._judged is None:
            from .judged_model import JudgedModel, open_judged_model
            from .models import choose_device, generating_class, load_model_and_tokenizer

            options, (sft, aligned, matched) = self._options, self._inputs
            model, tokenizer = load_model_and_tokenizer(
                generating_class(aligned.config), aligned.path, choose_device(options.device), options.trust_remote_code
            )
            if self.needs_alphas:
                judged, note = open_judged_model(model, sft, aligned, matched, options)
                self._stack.callback(judged.close)
                if note:
                    print_message(note, options.quiet)
            else:
                judged = JudgedModel(model, None, {})
            self._judged = judged, tokenizer
        return self._judged

    def compute_digests(self, alpha: float) -> dict[str, str]:
        """Return the digests of the judged model's weights at an alpha other than 0."""
        from .merge_check import weight_digests

        if self._judged is None:
            print_message("the model is loaded once more, to compare the merge with it", self._options.quiet)
        elif not self.needs_alphas:  # the model was loaded for alpha 0 alone
            self._judged = self._sampler = None
        self.needs_alphas = True
        judged, _ = self._load_judged()
        judged.alpha = alpha
        return weight_digests(judged.model)
