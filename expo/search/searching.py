"""Choosing alpha as the paper does: sample replies at each alpha, score them, take the highest mean reward.

The model is loaded once and its alpha changed in memory. Every scored reply is on the disk before the next are made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..cli import Bar
from ..errors import CheckpointError, OutputError
from ..inputs.resolve import StrPath, open_inputs
from ..options import MergeOptions
from ..planning.matching import Matched, match_tensors
from ..text import alpha_text
from .plots import plot
from .probing import BUDGET, next_probe
from .ranking import Ranking, Row, collapsed, errors_from_best, rank
from .replies import Replies, Reply
from .rewards import Reward, load_reward, name_of, rewards_of
from .settings import Options, Sampling, ascending, sampling_of, texts_of

if TYPE_CHECKING:
    from .judging import Judged
    from .sampling import Sampler

SUMMARY, PLOT = "summary.json", "plot.png"


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    best: the alpha of the highest mean reward, 0 where none beats aligned. equals: alphas whose difference from it is
    within the noise. rows: one for each alpha, ascending. verdict: all that in words. path: the folder with
    replies.jsonl, summary.json and plot.png. command: the one that merges at the best alpha. digests: of the weights
    that were judged at the best alpha, for check_merge(); empty unless they were asked for, and at alpha 0.
    """

    best: float
    equals: tuple[float, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    verdict: str
    path: str
    command: str
    digests: Mapping[str, str] = field(default_factory=dict)


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
    """Sample a reply to every prompt at every alpha, score them all, and say which alpha is best.

    The model that is judged at an alpha is the one that the merge writes, or the search is refused before it begins.

    sft, aligned: folders or hub ids, as for merge(). Alpha 0, aligned itself, is always among those compared.
    reward: a function of prompts and replies to a list of numbers; "module:function"; or a reward model's folder or hub
        id: a sequence classifier of Hugging Face's with one output.
    alphas: numbers, or "auto": wide probes, then a shrinking interval, `budget` alphas at most.
    out: a folder. A search of the same settings goes on with the replies in it; its other alphas are compared too.
        batch_size, device and keep may differ then: they change replies by rounding only.
    max_new_tokens: of a reply. sampling: others than the paper's temperature 0.7, top_p 0.9, top_k 50,
        presence_penalty 0.1, frequency_penalty 0.1, by these names.
    seed: replies are a function of it, the prompt and the model. device: "auto", "cpu" or
        "cuda[:index]". keep: where Live keeps the original weights.
    on_unpaired, on_mismatch: as for merge().
    trust_remote_code: run code that comes with the models. alpacaeval: write alpacaeval-ALPHA.json files too.
    digest: give the digests with which check_merge() compares a merge at the best alpha with what was judged.
    quiet: False prints progress and messages to stderr.

    An exception, KeyboardInterrupt too, leaves the replies that were scored.
    Raises UsageError, EngineError, CheckpointError, PlanError and OutputError.
    """
    options = Options(
        batch_size, seed, device, keep, budget, on_unpaired, on_mismatch, trust_remote_code, alpacaeval, quiet
    )
    options.check()
    texts, how = texts_of(prompts), sampling_of(max_new_tokens, sampling)
    given = None if alphas == "auto" else ascending(alphas)
    with ExitStack() as stack:
        search = _Search(stack, sft, aligned, texts, reward, out, how, options)
        search.run(given)
        result = search.finish()
        return replace(result, digests=search.digests(result.best)) if digest and result.best else result


class _Search:
    """One search: its models are loaded when a reply is missing, and not before."""

    def __init__(
        self,
        stack: ExitStack,
        sft: StrPath,
        aligned: StrPath,
        prompts: list[str],
        reward: Reward | str,
        out: StrPath,
        sampling: Sampling,
        options: Options,
    ) -> None:
        self._stack, self._prompts, self._sampling, self._options = stack, prompts, sampling, options
        self._names = (os.fspath(sft), os.fspath(aligned))
        self._given, self._reward_name = reward, name_of(reward)
        self._weak, self._strong = stack.enter_context(open_inputs(sft, aligned, options.quiet))
        self._plan = _check_pair(self._weak, self._strong, options)
        self._replies = stack.enter_context(Replies(out, self._settings()))
        if len(self._replies):
            self._say(f"going on with {len(self._replies)} replies in {out}")
        self._bar = None if options.quiet else _Bar()
        self._moves = True  # alphas other than 0 are asked for
        self._judged: tuple[Judged, Any] | None = None
        self._ready: tuple[Judged, Sampler, Reward] | None = None

    def _settings(self) -> dict[str, Any]:
        texts = json.dumps(self._prompts).encode()
        return {
            "sft": _identity(self._weak),
            "aligned": _identity(self._strong),
            "reward": self._reward_name,
            "seed": self._options.seed,
            "prompts": f"{len(self._prompts)}, SHA-256 {hashlib.sha256(texts).hexdigest()[:16]}",
            **asdict(self._sampling),
            "on_unpaired": self._options.on_unpaired,
            "on_mismatch": self._options.on_mismatch,
            # Before this was so, experts that are fused in memory did not move where this option was given.
            **({"judged": "exactly what the merge writes"} if self._options.on_unpaired == "aligned" else {}),
        }

    def run(self, alphas: list[float] | None) -> None:
        """Evaluate alpha 0 and these, or those that next_probe() names."""
        self._moves = alphas is None or any(alphas)
        try:
            if alphas is not None:
                for number, alpha in enumerate(alphas):
                    self._evaluate(alpha, number, len(alphas))
                return
            for number, alpha in enumerate(self._probes()):
                self._evaluate(alpha, number, 1 + self._options.budget)
        finally:
            if self._bar is not None:
                self._bar.close()

    def _probes(self) -> Iterator[float]:
        found: dict[float, list[Reply]] = {}
        alpha: float | None = 0.0
        while alpha is not None:
            yield alpha
            found[alpha] = self._of(alpha)
            means = {of: math.fsum(reply.reward for reply in each) / len(each) for of, each in found.items()}
            broken = [of for of, each in found.items() if collapsed(each, found[0.0])]
            alpha = next_probe(means, errors_from_best(found), broken, self._options.budget)

    def _evaluate(self, alpha: float, number: int, of: int) -> None:
        """Have a reply to every prompt at this alpha. A batch of which some are there is made anew as a whole."""
        count = len(self._prompts)
        if self._replies.of(alpha, count) is None:
            judged, sampler, reward = self._loaded()
            began, done = time.monotonic(), 0
            for batch in sampler.batches:
                if not self._replies.has(alpha, batch):
                    if judged.alpha != alpha:
                        judged.alpha = alpha
                    self._replies.add(self._scored(alpha, batch, sampler, reward))
                done += len(batch)
                if self._bar is not None:
                    self._bar(number * count + done, of * count)
            if self._bar is not None:
                self._bar.close()
            replies = self._of(alpha)
            mean = math.fsum(reply.reward for reply in replies) / count
            tokens = sum(reply.new_tokens for reply in replies) / count
            seconds = time.monotonic() - began
            self._say(f"alpha {alpha:g}: mean reward {mean:.4g}, {tokens:.0f} new tokens a reply, {seconds:.0f} s")

    def _of(self, alpha: float) -> list[Reply]:
        found = self._replies.of(alpha, len(self._prompts))
        assert found is not None
        return found

    def _scored(self, alpha: float, batch: list[int], sampler: Sampler, reward: Reward) -> list[Reply]:
        sampled = sampler(batch)
        prompts = [self._prompts[index] for index in batch]
        rewards = rewards_of(reward, self._reward_name, prompts, [each.text for each in sampled])
        columns = zip(batch, prompts, sampled, rewards, strict=True)
        return [
            Reply(alpha, index, prompt, each.text, value, len(each.tokens), each.finished, each.repetition)
            for index, prompt, each, value in columns
        ]

    def _loaded(self) -> tuple[Judged, Sampler, Reward]:
        """Return the model whose alpha can be set, what samples from it, and the reward."""
        if self._ready is None:
            from .sampling import Sampler

            options = self._options
            reward = load_reward(self._given, options.device, options.trust_remote_code)
            judged, tokenizer = self._model()
            sampler = Sampler(judged.model, tokenizer, self._prompts, self._sampling, options.seed, options.batch_size)
            for note in sampler.notes:
                self._say(note)
            self._ready = judged, sampler, reward
        return self._ready

    def _model(self) -> tuple[Judged, Any]:
        """Return the model whose alpha can be set, and its tokenizer."""
        if self._judged is None:
            from transformers import AutoModelForCausalLM

            from .judging import Judged, open_judged
            from .models import device_of, load

            options = self._options
            model, tokenizer = load(
                AutoModelForCausalLM, self._strong.path, device_of(options.device), options.trust_remote_code
            )
            if self._moves:
                judged, note = open_judged(model, self._weak, self._strong, self._plan, options)
                self._stack.callback(judged.close)
                if note:
                    self._say(note)
            else:
                judged = Judged(model, None, {})
            self._judged = judged, tokenizer
        return self._judged

    def digests(self, alpha: float) -> dict[str, str]:
        """Return the digests of the judged model's weights at this alpha, which is not 0."""
        from .judging import digests

        if self._judged is None:
            self._say("the model is loaded once more, to compare the merge with it")
        elif not self._moves:  # an earlier search found this alpha
            self._judged = self._ready = None
        self._moves = True
        judged, _ = self._model()
        judged.alpha = alpha
        return digests(judged.model)

    def _say(self, text: str) -> None:
        if not self._options.quiet:
            print(f"expo: {text}", file=sys.stderr, flush=True)

    def finish(self) -> SearchResult:
        """Compare every alpha in the folder that is complete, and write it all down."""
        of = {alpha: self._replies.of(alpha, len(self._prompts)) for alpha in self._replies.alphas}
        found = {alpha: replies for alpha, replies in of.items() if replies is not None}
        left = [alpha for alpha in of if alpha not in found]
        if left:
            self._say(f"not compared, as an earlier search left them incomplete: {', '.join(f'{a:g}' for a in left)}")
        ranking = rank(found)
        folder = self._replies.folder
        command = self._command(ranking)
        verdict = ranking.verdict()
        result = SearchResult(ranking.best, ranking.equals, ranking.rows, ranking.notes, verdict, folder, command)
        summary = {name: value for name, value in asdict(result).items() if name != "digests"}
        self._replies.write(SUMMARY, {**summary, "settings": self._settings()})
        if self._options.alpacaeval:
            for alpha, replies in found.items():
                self._replies.write(f"alpacaeval-{alpha_text(alpha)}.json", self._alpacaeval(alpha, replies))
        self._plot(ranking)
        return result

    def _plot(self, ranking: Ranking) -> None:
        path = os.path.join(self._replies.folder, PLOT)
        try:
            plot(ranking, path)
        except ImportError:
            self._say("no plot.png: pip install matplotlib, and the same command again draws it")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}; make room, and the same command again") from error

    def _alpacaeval(self, alpha: float, replies: Sequence[Reply]) -> list[dict[str, str]]:
        generator = f"{self._strong.name}-expo-{alpha_text(alpha)}" if alpha else self._strong.name
        return [{"instruction": each.prompt, "output": each.reply, "generator": generator} for each in replies]

    def _command(self, ranking: Ranking) -> str:
        """The merge at the best alpha; at 0 there is nothing to merge."""
        if ranking.best == 0:
            return ""
        words = ["python", "-m", "expo.fast", "--sft", self._names[0], "--aligned", self._names[1]]
        words += ["--alpha", alpha_text(ranking.best)]
        for option in ("on_unpaired", "on_mismatch"):
            if getattr(self._options, option) != "error":
                words += [f"--{option.replace('_', '-')}", getattr(self._options, option)]
        return shlex.join(words)


class _Bar(Bar):
    """The same bar, over replies."""

    def _text(self, done: int, total: int, now: float) -> str:
        return f"{done / total:4.0%}  {done} of up to {total} replies"


def _check_pair(weak: Checkpoint, strong: Checkpoint, options: Options) -> Matched:
    """Return the fates of the merge's tensors, before gigabytes are loaded. Raises CheckpointError and PlanError."""
    if strong.adapter is not None:
        raise CheckpointError(
            f"{strong.path} is an adapter: make a whole model of it first, with python -m expo.fast --alpha 0, "
            "and give that as aligned"
        )
    if strong.folder is None:
        raise CheckpointError(f"{strong.path} is a file: give the folder with its config and tokenizer")
    chosen = MergeOptions(on_unpaired=options.on_unpaired, on_mismatch=options.on_mismatch)
    matched = match_tensors(weak, strong, chosen)
    matched.check()
    return matched


def _identity(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint from another: the hub's commit, or the path, sizes and times of its files."""
    if checkpoint.origin is not None and checkpoint.origin.commit is not None:
        return f"{checkpoint.origin.name}@{checkpoint.origin.commit}"
    files = {name: [file.size, file.reader.identity.modified] for name, file in checkpoint.weight_files.items()}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    return f"{os.path.abspath(checkpoint.path)}, state {digest}"
