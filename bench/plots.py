"""Draw the pictures of docs/performance.md: python -m bench.plots FIGURES.json

The command writes FIGURES-throughput.png, FIGURES-time.png and FIGURES-memory.png beside the JSON. Bars and points are
medians. Without matplotlib the command draws nothing and prints a message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.report import SYNCED, Row, select_rivals, select_rows

EXPO_COLOUR, RIVAL_COLOUR, MEMCPY_COLOUR = "#1f6fb4", "#b0b7bf", "#d1495b"
LABELS = {
    "cp": "cat + cp",
    "dd_direct": "cat + dd direct",
    "short_without_import": "short PyTorch program, import not counted",
    "short": "short PyTorch program",
    "loop": "safetensors + torch loop",
    "paper": "paper's script",
    "mergekit": "mergekit",
}
STYLES = {  # each line's colour and marker
    "expo": (EXPO_COLOUR, "o"),
    LABELS["cp"]: ("#333333", "s"),
    LABELS["dd_direct"]: ("#9a9a9a", "^"),
    LABELS["short"]: ("#2a9d5c", "D"),
    LABELS["short_without_import"]: ("#8fd0a8", "v"),
    LABELS["loop"]: ("#e08a1e", "P"),
    LABELS["paper"]: ("#d1495b", "X"),
    LABELS["mergekit"]: ("#8a63b8", "h"),
}
KERNELS = {
    "cpu": "expo, compiled",
    "cpu_with_statistics": "expo, compiled, with statistics",
    "numpy": "expo, NumPy",
    "torch_lerp": "torch.lerp (rounds otherwise)",
    "papers_expression": "a + alpha * (a - s) in torch, bf16",
    "torch_in_fp32": "torch sub, mul, add in fp32",
}

Curves = dict[str, dict[float, float]]  # values by label and GB of a checkpoint


def merge_times(rows: dict[str, Row]) -> Curves:
    """Return the median seconds of synced merges with cached inputs; expo is the first label."""
    curves: Curves = {"expo": {}}
    for row in select_rows(rows, r"test_warm"):
        curves["expo"][row["checkpoint_bytes"] / 1e9] = row["median"]
    for row in select_rows(rows, r"test_warm(_slow)?"):
        for name, rival in select_rivals(row, SYNCED).items():
            curves.setdefault(LABELS[name], {})[row["checkpoint_bytes"] / 1e9] = rival["median"]
    return curves


def memory_peaks(rows: dict[str, Row]) -> Curves:
    """Return the peaks of resident memory in MB; expo is the first label."""
    tests = {"expo": ("test_peak_memory", "")}
    tests |= {LABELS[name]: ("test_memory_of_programs", f"{name}-") for name in ("paper", "loop", "short")}
    return {
        label: {row["checkpoint_bytes"] / 1e9: row["resident_mb"] for row in select_rows(rows, *test)}
        for label, test in tests.items()
    }


def draw_throughput(figure: Any, rows: dict[str, Row]) -> None:
    """Draw the kernels beside memcpy, and the merges of the middle size beside copying."""
    above, below = figure.subplots(2, 1)
    kernels = {label: rows.get(f"test_kernel[{name}-BF16]") for name, label in KERNELS.items()}
    rates = {label: row["gb_per_s"] for label, row in kernels.items() if row}
    memcpy_rates = sorted(row["memcpy_gb_per_s"] for row in kernels.values() if row)
    if rates:
        title = "Kernel, bf16, one thread, memory to memory"
        _draw_bars(above, rates, title, "GB moved per second (two reads and a write)")
        memcpy = memcpy_rates[len(memcpy_rates) // 2]
        above.axvline(memcpy, color=MEMCPY_COLOUR, linestyle="--")
        above.text(memcpy, 1.01, "memcpy", color=MEMCPY_COLOUR, ha="center", transform=above.get_xaxis_transform())
        above.set_xlim(0, 1.12 * max(memcpy, *rates.values()))
    times = merge_times(rows)
    sizes = sorted(times["expo"])
    if sizes:
        size = sizes[len(sizes) // 2]
        rates = {label: 3 * size / curve[size] for label, curve in times.items() if size in curve}
        title = f"Merge of files, checkpoints of {size:.2g} GB, inputs cached, synced to the disk"
        _draw_bars(below, rates, title, "GB moved per second (two checkpoints read, one written)")


def _draw_bars(axes: Any, rates: dict[str, float], title: str, unit: str) -> None:
    ordered = sorted(rates, key=lambda label: rates[label])
    colours = [EXPO_COLOUR if label.startswith("expo") else RIVAL_COLOUR for label in ordered]
    bars = axes.barh(ordered, [rates[label] for label in ordered], color=colours)
    axes.bar_label(bars, fmt=lambda value: f"{value:.1f}" if value >= 1 else f"{value:.2f}", padding=3)
    axes.set_title(title, loc="left", pad=16)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.12 * max(rates.values()))
    axes.spines[["top", "right"]].set_visible(False)


def draw_times(figure: Any, rows: dict[str, Row]) -> None:
    """Draw the time of a merge against the size of a checkpoint."""
    title = "Time of a merge, inputs cached, synced to the disk"
    _draw_curves(figure.subplots(), merge_times(rows), title, "seconds")


def draw_memory(figure: Any, rows: dict[str, Row]) -> None:
    """Draw the peak memory of a merge against the size of a checkpoint."""
    title = "Peak resident memory of a merge, mapped pages included"
    _draw_curves(figure.subplots(), memory_peaks(rows), title, "MB")


def _draw_curves(axes: Any, curves: Curves, title: str, unit: str) -> None:
    """Draw a line for each label that has points; both axes are logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title(title, loc="left")
    if not any(curves.values()):
        axes.text(0.5, 0.5, "not measured", ha="center")
        return
    for label, points in filter(lambda item: item[1], curves.items()):
        colour, marker = STYLES[label]
        xs, width = sorted(points), 2.5 if label == "expo" else 1.2
        axes.plot(xs, [points[x] for x in xs], marker=marker, label=label, color=colour, linewidth=width)
    axes.set(xscale="log", yscale="log", xlabel="size of one checkpoint, GB", ylabel=unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")


def make_caption(figures: dict[str, Any]) -> str:
    """Return the machine, the versions and the date of the figures."""
    m = figures["machine"]
    machine = f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['disk']}, {m['filesystem']}"
    versions = f"Linux {m['kernel']}, Python {m['python']}, torch {m['torch']}, expo {m['expo']}"
    return f"{machine}\n{versions}, {figures['date']}; medians"


# The function that draws a picture, and its size in inches.
PICTURES: dict[str, tuple[Callable[[Any, dict[str, Row]], None], tuple[float, float]]] = {
    "throughput": (draw_throughput, (9, 7)),
    "time": (draw_times, (9, 5)),
    "memory": (draw_memory, (9, 5)),
}


def draw_pictures(figures: dict[str, Any], stem: Path) -> list[Path]:
    """Write the pictures to stem-NAME.png, and return their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    paths = []
    for name, (draw, inches) in PICTURES.items():
        figure = Figure(figsize=inches, layout=ConstrainedLayoutEngine(hspace=0.1))
        FigureCanvasAgg(figure)
        draw(figure, figures["benchmarks"])
        figure.supxlabel(make_caption(figures), fontsize=7, color="#555555", x=0.01, ha="left")
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(paths[-1], dpi=140)
    return paths


if __name__ == "__main__":
    path = Path(sys.argv[1])
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there are no pictures")
    else:
        print(*draw_pictures(json.loads(path.read_text()), path.with_suffix("")), sep="\n")
