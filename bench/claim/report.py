"""From the replies to what is kept: JSON with every reward, a table in words, a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Row
from .experiment import ByRole
from .settings import Settings
from .statistics import Sweeps, summary

COLOURS = {"early": "tab:blue", "full": "tab:orange"}
Reading = Callable[[Row], float]  # what a reply is worth


def rewards(found: Sequence[ByRole], role: str, replies_each: int, reading: Reading) -> Any:
    """By seed, prompt and alpha; the replies to one prompt count as one."""
    seeds = [[[reading(row) for row in rows] for rows in by_role[role].values()] for by_role in found]
    array = np.asarray(seeds)  # seed, alpha, prompt and reply
    return array.reshape(*array.shape[:2], -1, replies_each).mean(3).transpose(0, 2, 1)


def lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Mean number of tokens, and the share of replies that did not end by themselves."""
    return {
        "new_tokens": round(float(np.mean([len(row["tokens"]) for row in rows])), 2),
        "unfinished": round(float(np.mean([not row["finished"] for row in rows])), 4),
    }


def judged(settings: Settings, found: Sequence[ByRole], reading: Reading) -> Sweeps:
    """All replies, each worth what a reading says."""
    sft, early, full = (rewards(found, role, settings.replies_each, reading) for role in ("sft", "early", "full"))
    return Sweeps(sft[..., 0], early, full, settings.alphas_early, settings.alphas_full)


def result(
    settings: Settings,
    found: Sequence[ByRole],
    training: Sequence[dict[str, Any]],
    readings: Mapping[str, Reading],
) -> dict[str, Any]:
    """All that is kept of a run; readings: other ways to judge the same replies than by their reward, by name."""
    sweeps = judged(settings, found, lambda row: float(row["reward"]))
    described = {**dataclasses.asdict(settings), "sampling": dataclasses.asdict(settings.sampling())}
    kept = {"settings": described, "seeds": len(found), "machine": machine(), **summary(sweeps)}
    for role, curve in kept["curves"].items():
        for point in curve:
            point |= lengths([row for by_role in found for row in by_role[role][point["alpha"]]])
    kept["sft"] |= lengths([row for by_role in found for row in by_role["sft"][0]])
    kept["readings"] = {name: summary(judged(settings, found, reading)) for name, reading in readings.items()}
    kept["training"] = list(training)
    kept["examples"] = examples(found[0])
    arrays = {"sft": sweeps.sft[..., None], "early": sweeps.early, "full": sweeps.full}
    kept["rewards"] = {role: np.moveaxis(array, 2, 1).round(4).tolist() for role, array in arrays.items()}
    return kept


def examples(found: ByRole) -> dict[str, Any]:
    """The reply to the first prompt, by model and alpha, of the first seed."""
    return {
        "prompt": found["sft"][0][0]["prompt"],
        **{role: {f"{alpha:g}": rows[0]["reply"] for alpha, rows in by.items()} for role, by in found.items()},
    }


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure, and no name of a machine."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        "date": str(date.today()),
    }


def text(kept: dict[str, Any]) -> str:
    """The result as JSON, a line for each part, so that a difference can be read."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def tables(kept: dict[str, Any]) -> str:
    """Markdown: what was to be shown, and the curves."""
    lines = _claims(kept)
    for name, reading in kept["readings"].items():
        lines += ["", f"{name}:", "", *_claims(reading)]
    for role, curve in kept["curves"].items():
        best = kept["best_alpha"][role]
        lines += [f"\n{role}: best alpha {_with_interval(best)}, by seed {best['by_seed']}", ""]
        lines += ["| alpha | reward (95% interval) | tokens | unfinished |", "|---|---|---|---|"]
        lines += [f"| {at['alpha']:g} | {_with_interval(at)} | {_lengths(at)} |" for at in curve]
    return "\n".join([*lines, f"\nsft: reward {_with_interval(kept['sft'])}"])


def _claims(summary: dict[str, Any]) -> list[str]:
    rows = [f"| {claim['what']} | {_with_interval(claim)} | {claim['holds']} |" for claim in summary["claims"].values()]
    return ["| what | value (95% interval) | more than 0 |", "|---|---|---|", *rows]


def _with_interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def _lengths(point: dict[str, float]) -> str:
    return f"{point['new_tokens']:.1f} | {point['unfinished']:.0%}"


def plot(kept: dict[str, Any], path: Path) -> None:
    """Reward against alpha for both checkpoints, with bands; the same by the first words; the length of replies."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    first = next(iter(kept["readings"]))
    figure, (top, words, tokens, ends) = pyplot.subplots(
        4, 1, figsize=(7, 10), sharex=True, height_ratios=[3, 2.2, 1, 1], layout="constrained"
    )
    _rewards(top, kept, kept["settings"]["early"])
    top.set_ylabel(f"mean reward ({kept['settings']['reward'].replace('_', ' ')})")
    top.legend(fontsize="small")
    _rewards(words, kept["readings"][first], kept["settings"]["early"])
    words.set_ylabel("mean reward")
    words.set_title(f"judged by {first}", fontsize="small")
    for role, curve in kept["curves"].items():
        alphas = [point["alpha"] for point in curve]
        for axis, what in ((tokens, "new_tokens"), (ends, "unfinished")):
            axis.plot(alphas, [point[what] for point in curve], "o-", color=COLOURS[role], markersize=4)
    tokens.set_ylabel("tokens in a reply")
    ends.set_ylabel("unfinished")
    ends.set_ylim(-0.03, 1.03)
    ends.set_xlabel("alpha")
    _scaled(ends, kept)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _rewards(axis: Any, summary: dict[str, Any], share: float) -> None:
    """Both checkpoints' curves with their bands, and the rewards without extrapolation."""
    names = {"early": f"DPO stopped at {share:.0%} of the steps", "full": "DPO, all steps"}
    for role, curve in summary["curves"].items():
        column = {key: [point[key] for point in curve] for key in ("alpha", "value", "low", "high")}
        axis.plot(column["alpha"], column["value"], "o-", color=COLOURS[role], label=names[role], markersize=4)
        axis.fill_between(column["alpha"], column["low"], column["high"], color=COLOURS[role], alpha=0.2, linewidth=0)
    own = next(point["value"] for point in summary["curves"]["full"] if point["alpha"] == 0)
    axis.axhline(own, color=COLOURS["full"], linestyle="--", label="DPO, all steps, not extrapolated")
    axis.axhline(summary["sft"]["value"], color="gray", linestyle=":", label="before DPO")


def _scaled(axis: Any, kept: dict[str, Any]) -> None:
    """Alphas from tenths to tens, and 0."""
    most = max(point["alpha"] for curve in kept["curves"].values() for point in curve)
    ticks = [tick for tick in (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= most]
    axis.set_xscale("symlog", linthresh=0.5, base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlim(-0.02, most * 1.1)
