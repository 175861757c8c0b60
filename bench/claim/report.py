"""Turn the replies into the result: JSON with every reward, tables, and a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .experiment import RepliesByRole
from .reward import Reading
from .settings import Settings
from .stages import Row
from .statistics import Rewards, summarize

COLOURS = {"early": "tab:blue", "full": "tab:orange"}
TICKS = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)  # of the axis of the alphas


def collect_rewards(replies: Sequence[RepliesByRole], role: str, replies_each: int, reading: Reading) -> Any:
    """Return the rewards by [seed, prompt, alpha]; the replies to one prompt count as one, with their mean reward."""
    seeds = [[[reading(row) for row in rows] for rows in by_role[role].values()] for by_role in replies]
    array = np.asarray(seeds)  # [seed, alpha, prompt and reply]
    return array.reshape(*array.shape[:2], -1, replies_each).mean(3).transpose(0, 2, 1)


def describe_lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean number of tokens, and the share of replies without an end token."""
    return {
        "new_tokens": round(float(np.mean([len(row["tokens"]) for row in rows])), 2),
        "unfinished": round(float(np.mean([not row["finished"] for row in rows])), 4),
    }


def read_rewards(settings: Settings, replies: Sequence[RepliesByRole], reading: Reading) -> Rewards:
    """Return the rewards of all replies by one reading."""
    sft, early, full = (
        collect_rewards(replies, role, settings.replies_each, reading) for role in ("sft", "early", "full")
    )
    return Rewards(sft[..., 0], early, full, settings.alphas_early, settings.alphas_full)


def make_result(
    settings: Settings,
    replies: Sequence[RepliesByRole],
    training: Sequence[dict[str, Any]],
    readings: Mapping[str, Reading],
) -> dict[str, Any]:
    """Return everything that the JSON of a run has.

    Args:
        settings: The settings of the run.
        replies: The replies of every seed, by role and alpha.
        training: The log of every seed's training.
        readings: Further rewards of the same replies, by name.
    """
    rewards = read_rewards(settings, replies, lambda row: float(row["reward"]))
    all_settings = {**dataclasses.asdict(settings), "sampling": dataclasses.asdict(settings.sampling())}
    result = {"settings": all_settings, "seeds": len(replies), "machine": describe_machine(), **summarize(rewards)}
    for role, curve in result["curves"].items():
        for point in curve:
            point |= describe_lengths([row for by_role in replies for row in by_role[role][point["alpha"]]])
    result["sft"] |= describe_lengths([row for by_role in replies for row in by_role["sft"][0]])
    result["readings"] = {
        name: summarize(read_rewards(settings, replies, reading)) for name, reading in readings.items()
    }
    result["training"] = list(training)
    result["examples"] = choose_examples(replies[0])
    arrays = {"sft": rewards.sft[..., None], "early": rewards.early, "full": rewards.full}
    result["rewards"] = {role: np.moveaxis(array, 2, 1).round(4).tolist() for role, array in arrays.items()}
    return result


def choose_examples(replies: RepliesByRole) -> dict[str, Any]:
    """Return the replies of one seed to the first prompt, by role and alpha."""
    by_role = {
        role: {f"{alpha:g}": rows[0]["reply"] for alpha, rows in by_alpha.items()} for role, by_alpha in replies.items()
    }
    return {"prompt": replies["sft"][0][0]["prompt"], **by_role}


def describe_machine() -> dict[str, Any]:
    """Return the cores, the versions and the date of a run, but no name of the machine."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        "date": str(date.today()),
    }


def format_json(result: dict[str, Any]) -> str:
    """Return the result as JSON with a line for each part, so that a difference between two runs can be read."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def format_tables(result: dict[str, Any]) -> str:
    """Return the claims and the curves in Markdown."""
    lines = _claim_rows(result)
    for name, reading in result["readings"].items():
        lines += ["", f"{name}:", "", *_claim_rows(reading)]
    for role, curve in result["curves"].items():
        best = result["best_alpha"][role]
        lines += [f"\n{role}: best alpha {_format_interval(best)}, by seed {best['by_seed']}", ""]
        lines += ["| alpha | reward (95% interval) | tokens | unfinished |", "|---|---|---|---|"]
        lines += [f"| {point['alpha']:g} | {_format_interval(point)} | {_format_lengths(point)} |" for point in curve]
    return "\n".join([*lines, f"\nsft: reward {_format_interval(result['sft'])}"])


def _claim_rows(summary: dict[str, Any]) -> list[str]:
    claims = summary["claims"].values()
    rows = [f"| {claim['what']} | {_format_interval(claim)} | {claim['holds']} |" for claim in claims]
    return ["| what | value (95% interval) | more than 0 |", "|---|---|---|", *rows]


def _format_interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def _format_lengths(point: dict[str, float]) -> str:
    return f"{point['new_tokens']:.1f} | {point['unfinished']:.0%}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw reward against alpha for both checkpoints with bands, the same by the first words, and the lengths."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    first_reading = next(iter(result["readings"]))
    early_share = result["settings"]["early"]
    figure, (whole, first_words, tokens, unfinished) = pyplot.subplots(
        4, 1, figsize=(7, 10), sharex=True, height_ratios=[3, 2.2, 1, 1], layout="constrained"
    )
    _draw_rewards(whole, result, early_share)
    whole.set_ylabel(f"mean reward ({result['settings']['reward'].replace('_', ' ')})")
    whole.legend(fontsize="small")
    _draw_rewards(first_words, result["readings"][first_reading], early_share)
    first_words.set_ylabel("mean reward")
    first_words.set_title(f"judged by {first_reading}", fontsize="small")
    for role, curve in result["curves"].items():
        alphas = [point["alpha"] for point in curve]
        for axes, field in ((tokens, "new_tokens"), (unfinished, "unfinished")):
            axes.plot(alphas, [point[field] for point in curve], "o-", color=COLOURS[role], markersize=4)
    tokens.set_ylabel("tokens in a reply")
    unfinished.set_ylabel("unfinished")
    unfinished.set_ylim(-0.03, 1.03)
    unfinished.set_xlabel("alpha")
    _scale_alphas(unfinished, result)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _draw_rewards(axes: Any, summary: dict[str, Any], early_share: float) -> None:
    """Draw the curves of both checkpoints with their bands, and lines for the rewards without extrapolation."""
    names = {"early": f"DPO stopped at {early_share:.0%} of the steps", "full": "DPO, all steps"}
    for role, curve in summary["curves"].items():
        column = {key: [point[key] for point in curve] for key in ("alpha", "value", "low", "high")}
        axes.plot(column["alpha"], column["value"], "o-", color=COLOURS[role], label=names[role], markersize=4)
        axes.fill_between(column["alpha"], column["low"], column["high"], color=COLOURS[role], alpha=0.2, linewidth=0)
    full_at_zero = next(point["value"] for point in summary["curves"]["full"] if point["alpha"] == 0)
    axes.axhline(full_at_zero, color=COLOURS["full"], linestyle="--", label="DPO, all steps, not extrapolated")
    axes.axhline(summary["sft"]["value"], color="gray", linestyle=":", label="before DPO")


def _scale_alphas(axes: Any, result: dict[str, Any]) -> None:
    """Scale the axis of the alphas: logarithmic, and linear between 0 and 0.5."""
    largest = max(point["alpha"] for curve in result["curves"].values() for point in curve)
    ticks = [tick for tick in TICKS if tick <= largest]
    axes.set_xscale("symlog", linthresh=0.5, base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(-0.02, largest * 1.1)
