"""The picture of a search: reward over alpha, and beside it what gives away an alpha that is too large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ranking import Ranking, Row

BLUE, RED, GREY = "#1f5fa8", "#c2452d", "#6b6b6b"


def plot(found: Ranking, path: str) -> None:
    """Write a PNG. Raises ImportError where matplotlib is missing, and OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _scale(axes, [row.alpha for row in found.rows])
        axes.set_xlabel("alpha")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _rewards(left, found)
    _lengths(right, found.rows)
    figure.savefig(path, dpi=130)


def _rewards(axes: Any, found: Ranking) -> None:
    alphas = [row.alpha for row in found.rows]
    rewards = [row.reward for row in found.rows]
    base = next(row for row in found.rows if row.alpha == 0)
    # The interval is the difference's, so that a bar across the baseline means: perhaps no better than aligned.
    bars = [[row.gain - row.low for row in found.rows], [row.high - row.gain for row in found.rows]]
    axes.axhline(base.reward, color=GREY, linestyle="--", linewidth=1.2, label=f"aligned, alpha 0: {base.reward:.4g}")
    axes.errorbar(
        alphas, rewards, bars, color=BLUE, marker="o", markersize=5, capsize=3, linewidth=1.5,
        label="mean, 95% interval of the gain over aligned",
    )  # fmt: skip
    best = found.best_row
    axes.plot(
        best.alpha, best.reward, marker="o", markersize=12, markerfacecolor="none", markeredgecolor=RED,
        markeredgewidth=2, linestyle="none", label=f"best, alpha {best.alpha:g}: {best.reward:.4g}",
    )  # fmt: skip
    axes.set_ylabel("mean reward")
    axes.set_title(f"Reward of {base.replies} replies per alpha", fontsize=11)
    _legend(axes, *axes.get_legend_handles_labels())


def _lengths(axes: Any, rows: Sequence[Row]) -> None:
    alphas = [row.alpha for row in rows]
    lines = axes.plot(alphas, [row.tokens for row in rows], color=BLUE, marker="o", markersize=5, label="new tokens")
    axes.set_ylabel("mean new tokens of a reply", color=BLUE)
    axes.set_ylim(0, 1.15 * max(row.tokens for row in rows))
    shares = axes.twinx()
    shares.spines["top"].set_visible(False)
    lines += shares.plot(
        alphas,
        [row.unfinished for row in rows],
        color=RED,
        marker="s",
        markersize=4,
        clip_on=False,
        label="share without an end",
    )
    lines += shares.plot(
        alphas, [row.repetition for row in rows], color=RED, marker="^", markersize=4, linestyle=":", alpha=0.8,
        label="share of repeated 4-grams",
    )  # fmt: skip
    shares.set_ylim(0, 1.05)
    shares.set_ylabel("share", color=RED)
    axes.set_title("Length and signs of an alpha that is too large", fontsize=11)
    _legend(axes, lines, [line.get_label() for line in lines])


def _legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axes, where no curve goes."""
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False,
        markerscale=0.8,
    )  # fmt: skip


def _scale(axes: Any, alphas: Sequence[float]) -> None:
    """Wide probes need a logarithm, on which 0 has no place: straight up to the smallest alpha."""
    sizes = [abs(alpha) for alpha in alphas if alpha]
    if sizes and max(sizes) > 10 * min(sizes):
        axes.set_xscale("symlog", linthresh=min(sizes))
        ratio = (max(sizes) / min(sizes)) ** 0.06
        axes.set_xlim(min(0.0, *alphas) - 0.15 * min(sizes), max(alphas) * ratio)
    if len(alphas) <= 14:
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas], fontsize=8, rotation=60 if len(alphas) > 6 else 0)
        axes.minorticks_off()
