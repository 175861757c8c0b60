"""The result of a search, and the files that hold it: summary.json, plot.png and AlpacaEval's."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cli import print_message
from ..errors import OutputError
from ..text import alpha_text
from .plots import plot
from .ranking import AlphaResult, Ranking, rank
from .replies import Reply, ReplyStore
from .settings import SearchOptions

SUMMARY, PLOT = "summary.json", "plot.png"


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        best: The alpha with the highest mean reward; 0 if none is better than aligned.
        equals: The alphas whose difference from the best one is within the noise.
        rows: One result for each alpha, in ascending order.
        warnings: Sentences for the user.
        verdict: The best alpha in words, with its interval.
        path: The folder with replies.jsonl, summary.json and plot.png.
        command: The command that merges at the best alpha; "" if that is 0.
        digests: Digests of the weights that were judged at the best alpha, for check_merge(). They are empty if they
            were not asked for, or if the best alpha is 0.
    """

    best: float
    equals: tuple[float, ...]
    rows: tuple[AlphaResult, ...]
    warnings: tuple[str, ...]
    verdict: str
    path: str
    command: str
    digests: Mapping[str, str] = field(default_factory=dict)


def write_results(
    store: ReplyStore,
    replies: Mapping[float, Sequence[Reply]],
    settings: Mapping[str, Any],
    names: tuple[str, str],
    model_name: str,
    options: SearchOptions,
) -> SearchResult:
    """Rank the alphas and write all files beside the replies.

    Args:
        store: The folder.
        replies: For every alpha, the replies to all prompts in their order; alpha 0 is among them.
        settings: The settings of the replies, for the summary.
        names: The user's names for sft and aligned.
        model_name: The name of aligned's model.
        options: The options of the search.

    Raises:
        OutputError: A file could not be written.
    """
    ranking = rank(replies)
    command = _merge_command(ranking.best, names, options)
    verdict = ranking.verdict()
    result = SearchResult(ranking.best, ranking.equals, ranking.rows, ranking.notes, verdict, store.folder, command)
    summary = {name: value for name, value in asdict(result).items() if name != "digests"}
    store.write_json(SUMMARY, {**summary, "settings": settings})
    if options.alpacaeval:
        for alpha, each in replies.items():
            store.write_json(f"alpacaeval-{alpha_text(alpha)}.json", _alpacaeval_rows(alpha, each, model_name))
    _write_plot(ranking, os.path.join(store.folder, PLOT), options.quiet)
    return result


def _write_plot(ranking: Ranking, path: str, quiet: bool) -> None:
    """Draw the search, or print how to get the picture if matplotlib is missing."""
    try:
        plot(ranking, path)
    except ImportError:
        print_message("no plot.png: pip install matplotlib, then the same command draws it", quiet)
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}; free some space, then repeat the same command"
        ) from error


def _alpacaeval_rows(alpha: float, replies: Sequence[Reply], model_name: str) -> list[dict[str, str]]:
    """Return the replies as AlpacaEval reads them."""
    generator = f"{model_name}-expo-{alpha_text(alpha)}" if alpha else model_name
    return [{"instruction": each.prompt, "output": each.reply, "generator": generator} for each in replies]


def _merge_command(alpha: float, names: tuple[str, str], options: SearchOptions) -> str:
    """Return the command that merges at an alpha; at alpha 0 there is nothing to merge."""
    if alpha == 0:
        return ""
    words = ["python", "-m", "expo.fast", "--sft", names[0], "--aligned", names[1], "--alpha", alpha_text(alpha)]
    for option in ("on_unpaired", "on_mismatch"):
        if getattr(options, option) != "error":
            words += [f"--{option.replace('_', '-')}", getattr(options, option)]
    return shlex.join(words)
