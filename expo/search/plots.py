"""Draw a search: the reward against alpha, and beside it the length of the replies and the signs of a collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ranking import AlphaResult, Ranking

BLUE, RED, GREY = "#1f5fa8", "#c2452d", "#6b6b6b"
MOST_TICKS = 14  # with more alphas, matplotlib places the ticks


def plot(ranking: Ranking, path: str) -> None:
    """Write a PNG. Raises ImportError without matplotlib, and OSError if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _scale_alphas(axes, [row.alpha for row in ranking.rows])
        axes.set_xlabel("alpha")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_rewards(left, ranking)
    _draw_lengths(right, ranking.rows)
    figure.savefig(path, dpi=130)


def _draw_rewards(axes: Any, ranking: Ranking) -> None:
    """Draw the mean reward of every alpha, the baseline of aligned, and a circle around the best alpha."""
    rows, best = ranking.rows, ranking.best_row
    base = next(row for row in rows if row.alpha == 0)
    # The bars are the intervals of the gain, so a bar that crosses the baseline means: perhaps no better than aligned.
    bars = [[row.gain - row.low for row in rows], [row.high - row.gain for row in rows]]
    axes.axhline(base.reward, color=GREY, linestyle="--", linewidth=1.2, label=f"aligned, alpha 0: {base.reward:.4g}")
    axes.errorbar(
        [row.alpha for row in rows], [row.reward for row in rows], bars, color=BLUE, marker="o", markersize=5,
        capsize=3, linewidth=1.5, label="mean, 95% interval of the gain over aligned",
    )  # fmt: skip
    axes.plot(
        best.alpha, best.reward, marker="o", markersize=12, markerfacecolor="none", markeredgecolor=RED,
        markeredgewidth=2, linestyle="none", label=f"best, alpha {best.alpha:g}: {best.reward:.4g}",
    )  # fmt: skip
    axes.set_ylabel("mean reward")
    axes.set_title(f"Reward of {base.replies} replies per alpha", fontsize=11)
    _add_legend(axes, *axes.get_legend_handles_labels())


def _draw_lengths(axes: Any, rows: Sequence[AlphaResult]) -> None:
    """Draw the mean length of the replies, and the shares of unfinished replies and of repeated 4-grams."""
    alphas = [row.alpha for row in rows]
    lines = axes.plot(alphas, [row.tokens for row in rows], color=BLUE, marker="o", markersize=5, label="new tokens")
    axes.set_ylabel("mean new tokens of a reply", color=BLUE)
    axes.set_ylim(0, 1.15 * max(row.tokens for row in rows))
    shares = axes.twinx()
    shares.spines["top"].set_visible(False)
    lines += shares.plot(
        alphas, [row.unfinished for row in rows], color=RED, marker="s", markersize=4, clip_on=False,
        label="share without an end",
    )  # fmt: skip
    lines += shares.plot(
        alphas, [row.repetition for row in rows], color=RED, marker="^", markersize=4, linestyle=":", alpha=0.8,
        label="share of repeated 4-grams",
    )  # fmt: skip
    shares.set_ylim(0, 1.05)
    shares.set_ylabel("share", color=RED)
    axes.set_title("Length and signs of an alpha that is too large", fontsize=11)
    _add_legend(axes, lines, [line.get_label() for line in lines])


def _add_legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put the legend below the axes, where it covers no curve."""
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False,
        markerscale=0.8,
    )  # fmt: skip


def _scale_alphas(axes: Any, alphas: Sequence[float]) -> None:
    """Scale the axis of the alphas: logarithmic for wide ranges, and linear between 0 and the smallest alpha.

    A logarithmic axis has no place for 0, so the part below the smallest alpha has to be linear.
    """
    sizes = [abs(alpha) for alpha in alphas if alpha]
    if sizes and max(sizes) > 10 * min(sizes):
        axes.set_xscale("symlog", linthresh=min(sizes))
        ratio = (max(sizes) / min(sizes)) ** 0.06
        axes.set_xlim(min(0.0, *alphas) - 0.15 * min(sizes), max(alphas) * ratio)
    if len(alphas) <= MOST_TICKS:
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas], fontsize=8, rotation=60 if len(alphas) > 6 else 0)
        axes.minorticks_off()
