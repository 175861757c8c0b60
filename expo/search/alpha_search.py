"""Search for alpha as the paper does: sample replies at each alpha, score them, and take the highest mean reward.

The model is loaded once, and its alpha is changed in memory. Every scored reply is on the disk before the next batch is
sampled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..cli import Bar, print_message
from ..inputs.locations import StrPath
from .probing import BUDGET, next_probe
from .ranking import errors_from_best, has_collapsed
from .replies import Reply, ReplyStore
from .results import SearchResult, write_results
from .rewards import Reward, compute_rewards, reward_name
from .search_models import Inputs, SearchModels, open_search_inputs
from .settings import Sampling, SearchOptions, check_prompts, make_sampling, sort_alphas

if TYPE_CHECKING:
    from .sampling import Sampler


@dataclass(frozen=True)
class SearchTask:
    """The checked arguments of a search.

    Attributes:
        sft: The user's name for the sft checkpoint.
        aligned: The user's name for the aligned checkpoint.
        prompts: The prompts.
        reward: The reward, as load_reward() takes it.
        out: The folder of the results.
        sampling: The settings of the sampling.
        options: All other options.
    """

    sft: StrPath
    aligned: StrPath
    prompts: list[str]
    reward: Reward | str
    out: StrPath
    sampling: Sampling
    options: SearchOptions


def search_alpha(
    sft: StrPath,
    aligned: StrPath,
    prompts: Sequence[str],
    reward: Reward | str,
    alphas: Iterable[float] | str = (0.1, 0.2, 0.3, 0.4, 0.5),
    out: StrPath = "search",
    *,
    max_new_tokens: int = 2048,
    sampling: Mapping[str, float] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    keep: str = "device",
    budget: int = BUDGET,
    on_unpaired: str = "error",
    on_mismatch: str = "error",
    trust_remote_code: bool = False,
    alpacaeval: bool = False,
    digest: bool = False,
    quiet: bool = True,
) -> SearchResult:
    """Sample a reply to every prompt at every alpha, score all replies, and return the best alpha.

    The model that is judged at an alpha has the weights that the merge writes; where this is impossible, the search is
    refused before the first reply. An exception, also KeyboardInterrupt, leaves the replies that were scored.

    Args:
        sft: A folder or a hub id, as for merge().
        aligned: The same. Alpha 0, which is aligned itself, is always among the alphas that are compared.
        prompts: The prompts.
        reward: A function of a list of prompts and a list of replies that returns a list of numbers; "module:function";
            or the folder or hub id of a reward model, which is a sequence classifier with one output.
        alphas: Numbers, or "auto": ever larger alphas, then a shrinking interval around the best one.
        out: A folder. A search with the same settings continues with the replies in it, and compares their alphas too.
            batch_size, device and keep may differ, because they change replies by rounding only.
        max_new_tokens: The length of a reply at most.
        sampling: Settings other than the paper's temperature 0.7, top_p 0.9, top_k 50, presence_penalty 0.1 and
            frequency_penalty 0.1, by these names.
        batch_size: The number of replies that are sampled together.
        seed: The seed of the sampling. A reply is a function of the seed, the prompt and the model.
        device: "auto", "cpu" or "cuda[:index]".
        keep: The place of the original weights: "device", "host" or "disk", as for Live.
        budget: The number of alphas that "auto" tries at most.
        on_unpaired: As for merge().
        on_mismatch: As for merge().
        trust_remote_code: True if code that comes with the models may run.
        alpacaeval: True to write the files alpacaeval-ALPHA.json too.
        digest: True to return the digests with which check_merge() compares a merge with the judged model.
        quiet: False to print progress and messages to stderr.

    Raises:
        UsageError: An argument makes no sense.
        EngineError: The device is missing, or its memory is too small.
        CheckpointError: A checkpoint or a model cannot be read.
        PlanError: The checkpoints cannot be merged, or the merge cannot be judged in memory.
        OutputError: The folder cannot be written, or has other results.
    """
    options = SearchOptions(
        batch_size, seed, device, keep, budget, on_unpaired, on_mismatch, trust_remote_code, alpacaeval, quiet
    )
    options.check()
    checked_prompts, checked_sampling = check_prompts(prompts), make_sampling(max_new_tokens, sampling)
    chosen = None if alphas == "auto" else sort_alphas(alphas)
    task = SearchTask(sft, aligned, checked_prompts, reward, out, checked_sampling, options)
    with ExitStack() as stack:
        search = _AlphaSearch(stack, task)
        search.run(chosen)
        result = search.finish()
        return replace(result, digests=search.compute_digests(result.best)) if digest and result.best else result


class _AlphaSearch:
    """One search in its folder."""

    def __init__(self, stack: ExitStack, task: SearchTask) -> None:
        """Open the checkpoints and the folder; the stack closes them."""
        options = task.options
        self._task, self._quiet = task, options.quiet
        self._reward_name = reward_name(task.reward)
        self._inputs = open_search_inputs(stack, task.sft, task.aligned, options)
        self._models = SearchModels(stack, self._inputs, task.reward, task.sampling, options)
        self._settings = _settings_of(task, self._inputs)
        self._store = stack.enter_context(ReplyStore(task.out, self._settings))
        if len(self._store):
            print_message(f"continuing with {len(self._store)} replies in {task.out}", self._quiet)
        self._bar = None if self._quiet else _ReplyBar()

    def run(self, alphas: list[float] | None) -> None:
        """Sample and score all replies at these alphas, or at those that next_probe() chooses."""
        self._models.needs_alphas = alphas is None or any(alphas)
        try:
            if alphas is not None:
                for number, alpha in enumerate(alphas):
                    self._evaluate(alpha, number, len(alphas))
                return
            for number, alpha in enumerate(self._probes()):
                self._evaluate(alpha, number, 1 + self._task.options.budget)
        finally:
            self._close_bar()

    def _probes(self) -> Iterator[float]:
        """Yield alpha 0, then one alpha after another; the caller completes the replies at each before the next."""
        replies: dict[float, list[Reply]] = {}
        alpha: float | None = 0.0
        while alpha is not None:
            yield alpha
            replies[alpha] = self._replies_at(alpha)
            means = {tried: _mean_reward(each) for tried, each in replies.items()}
            collapsed = [tried for tried, each in replies.items() if has_collapsed(each, replies[0.0])]
            alpha = next_probe(means, errors_from_best(replies), collapsed, self._task.options.budget)

    def _evaluate(self, alpha: float, number: int, count: int) -> None:
        """Sample and score the missing replies at one alpha.

        A batch with a missing reply is sampled as a whole, because the rounding of a reply depends on its batch.

        Args:
            alpha: The alpha.
            number: The number of alphas before this one, for the progress bar.
            count: The number of all alphas, for the progress bar.
        """
        prompts = self._task.prompts
        if self._store.replies_to_all(alpha, len(prompts)) is not None:
            return
        judged, sampler, reward = self._models.load(prompts)
        start, done = time.monotonic(), 0
        for batch in sampler.batches:
            if not self._store.has_all(alpha, batch):
                if judged.alpha != alpha:
                    judged.alpha = alpha
                self._store.add(self._sample(alpha, batch, sampler, reward))
            done += len(batch)
            if self._bar is not None:
                self._bar(number * len(prompts) + done, count * len(prompts))
        self._close_bar()
        replies = self._replies_at(alpha)
        tokens = sum(reply.new_tokens for reply in replies) / len(replies)
        print_message(
            f"alpha {alpha:g}: mean reward {_mean_reward(replies):.4g}, {tokens:.0f} new tokens a reply, "
            f"{time.monotonic() - start:.0f} s",
            self._quiet,
        )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _replies_at(self, alpha: float) -> list[Reply]:
        """Return the replies to all prompts at an alpha for which they are complete."""
        replies = self._store.replies_to_all(alpha, len(self._task.prompts))
        assert replies is not None
        return replies

    def _sample(self, alpha: float, batch: list[int], sampler: Sampler, reward: Reward) -> list[Reply]:
        """Return the scored replies to a batch of prompts."""
        sampled = sampler(batch)
        prompts = [self._task.prompts[index] for index in batch]
        rewards = compute_rewards(reward, self._reward_name, prompts, [each.text for each in sampled])
        columns = zip(batch, prompts, sampled, rewards, strict=True)
        return [
            Reply(alpha, index, prompt, each.text, value, len(each.tokens), each.finished, each.repetition)
            for index, prompt, each, value in columns
        ]

    def compute_digests(self, alpha: float) -> dict[str, str]:
        """Return the digests of the judged model's weights at an alpha other than 0."""
        return self._models.compute_digests(alpha)

    def finish(self) -> SearchResult:
        """Compare every alpha in the folder whose replies are complete, write the results, and return them."""
        prompts = len(self._task.prompts)
        replies = {alpha: self._store.replies_to_all(alpha, prompts) for alpha in self._store.alphas}
        complete = {alpha: each for alpha, each in replies.items() if each is not None}
        incomplete = ", ".join(f"{alpha:g}" for alpha in replies if alpha not in complete)
        if incomplete:
            print_message(f"not compared, because an earlier search left them incomplete: {incomplete}", self._quiet)
        names, model_name = (os.fspath(self._task.sft), os.fspath(self._task.aligned)), self._inputs.aligned.name
        return write_results(self._store, complete, self._settings, names, model_name, self._task.options)


def _mean_reward(replies: Sequence[Reply]) -> float:
    """Return the mean reward; the sum is exact, so the mean does not depend on the order of the replies."""
    return math.fsum(reply.reward for reply in replies) / len(replies)


def _settings_of(task: SearchTask, inputs: Inputs) -> dict[str, Any]:
    """Return everything that replies depend on; a search continues in a folder only if its settings are the same."""
    options = task.options
    texts = json.dumps(task.prompts).encode()
    settings = {
        "sft": _identify(inputs.sft),
        "aligned": _identify(inputs.aligned),
        "reward": reward_name(task.reward),
        "seed": options.seed,
        "prompts": f"{len(task.prompts)}, SHA-256 {hashlib.sha256(texts).hexdigest()[:16]}",
        **asdict(task.sampling),
        "on_unpaired": options.on_unpaired,
        "on_mismatch": options.on_mismatch,
    }
    if options.on_unpaired == "aligned":
        # Searches of older versions, whose settings lack this entry, kept aligned's experts if memory has them fused.
        settings["judged"] = "exactly what the merge writes"
    return settings


def _identify(checkpoint: Checkpoint) -> str:
    """Return a text that differs between checkpoints: the hub's commit, or path, sizes and times of the files."""
    if checkpoint.origin is not None and checkpoint.origin.commit is not None:
        return f"{checkpoint.origin.name}@{checkpoint.origin.commit}"
    files = {name: [file.size, file.reader.identity.modified] for name, file in checkpoint.weight_files.items()}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    return f"{os.path.abspath(checkpoint.path)}, state {digest}"


class _ReplyBar(Bar):
    """A progress bar that counts replies."""

    def _text(self, done: int, total: int, now: float) -> str:
        return f"{done / total:4.0%}  {done} of up to {total} replies"
