"""Pictures of what is kept: python -m bench.plots KEPT.json

Writes KEPT-throughput.png, KEPT-time.png and KEPT-memory.png beside it; needs matplotlib, and says so without it.
Bars and points are medians.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.report import SYNCED, Row, named, rivals

OURS, OTHERS, ROOF = "#1f6fb4", "#b0b7bf", "#d1495b"
LABELS = {
    "cp": "cat + cp",
    "dd_direct": "cat + dd direct",
    "short_without_import": "short PyTorch program, import not counted",
    "short": "short PyTorch program",
    "loop": "safetensors + torch loop",
    "paper": "paper's script",
    "mergekit": "mergekit",
}
STYLES = {  # colour and marker of a line
    "expo": (OURS, "o"),
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


def merges(benches: dict[str, Row]) -> dict[str, dict[float, float]]:
    """Median seconds of synced merges, inputs cached, by label and GB of a checkpoint; ours first."""
    found: dict[str, dict[float, float]] = {"expo": {}}
    for row in named(benches, r"test_warm"):
        found["expo"][row["checkpoint_bytes"] / 1e9] = row["median"]
    for row in named(benches, r"test_warm(_slow)?"):
        for name, rival in rivals(row, SYNCED).items():
            found.setdefault(LABELS[name], {})[row["checkpoint_bytes"] / 1e9] = rival["median"]
    return found


def memory(benches: dict[str, Row]) -> dict[str, dict[float, float]]:
    """Peak of resident memory in MB, by label and GB of a checkpoint; ours first."""
    tests = {"expo": ("test_peak_memory", "")}
    tests |= {LABELS[name]: ("test_memory_of_programs", f"{name}-") for name in ("paper", "loop", "short")}
    return {
        label: {row["checkpoint_bytes"] / 1e9: row["resident_mb"] for row in named(benches, *test)}
        for label, test in tests.items()
    }


def throughput(figure: Any, benches: dict[str, Row]) -> None:
    """Kernels against memcpy, and file merges, of the middle size, against copying."""
    above, below = figure.subplots(2, 1)
    kernels = {label: benches.get(f"test_kernel[{name}-BF16]") for name, label in KERNELS.items()}
    rates = {label: row["gb_per_s"] for label, row in kernels.items() if row}
    roofs = sorted(row["memcpy_gb_per_s"] for row in kernels.values() if row)
    if rates:
        _bars(above, rates, "Kernel, bf16, one thread, memory to memory", "GB moved per second (two reads and a write)")
        roof = roofs[len(roofs) // 2]
        above.axvline(roof, color=ROOF, linestyle="--")
        above.text(roof, 1.01, "memcpy", color=ROOF, ha="center", transform=above.get_xaxis_transform())
        above.set_xlim(0, 1.12 * max(roof, *rates.values()))
    times = merges(benches)
    sizes = sorted(times["expo"])
    if sizes:
        size = sizes[len(sizes) // 2]
        rates = {label: 3 * size / at[size] for label, at in times.items() if size in at}
        title = f"Merge of files, checkpoints of {size:.2g} GB, inputs cached, synced to the disk"
        _bars(below, rates, title, "GB moved per second (two checkpoints read, one written)")


def _bars(axes: Any, rates: dict[str, float], title: str, unit: str) -> None:
    ordered = sorted(rates, key=lambda label: rates[label])
    colours = [OURS if label.startswith("expo") else OTHERS for label in ordered]
    bars = axes.barh(ordered, [rates[label] for label in ordered], color=colours)
    axes.bar_label(bars, fmt=lambda value: f"{value:.1f}" if value >= 1 else f"{value:.2f}", padding=3)
    axes.set_title(title, loc="left", pad=16)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.12 * max(rates.values()))
    axes.spines[["top", "right"]].set_visible(False)


def time_of_a_merge(figure: Any, benches: dict[str, Row]) -> None:
    _lines(figure.subplots(), merges(benches), "Time of a merge, inputs cached, synced to the disk", "seconds")


def memory_used(figure: Any, benches: dict[str, Row]) -> None:
    _lines(figure.subplots(), memory(benches), "Peak resident memory of a merge, mapped pages included", "MB")


def _lines(axes: Any, found: dict[str, dict[float, float]], title: str, unit: str) -> None:
    """A line for each label that has points, both axes logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title(title, loc="left")
    if not any(found.values()):
        axes.text(0.5, 0.5, "not measured", ha="center")
        return
    for label, points in filter(lambda item: item[1], found.items()):
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


def caption(kept: dict[str, Any]) -> str:
    m = kept["machine"]
    where = f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['disk']}, {m['filesystem']}"
    versions = f"Linux {m['kernel']}, Python {m['python']}, torch {m['torch']}, expo {m['expo']}"
    return f"{where}\n{versions}, {kept['date']}; medians"


PICTURES: dict[str, tuple[Callable[[Any, dict[str, Row]], None], tuple[float, float]]] = {
    "throughput": (throughput, (9, 7)),
    "time": (time_of_a_merge, (9, 5)),
    "memory": (memory_used, (9, 5)),
}


def draw(kept: dict[str, Any], stem: Path) -> list[Path]:
    """The files written: stem-NAME.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    written = []
    for name, (picture, inches) in PICTURES.items():
        figure = Figure(figsize=inches, layout=ConstrainedLayoutEngine(hspace=0.1))
        FigureCanvasAgg(figure)
        picture(figure, kept["benchmarks"])
        figure.supxlabel(caption(kept), fontsize=7, color="#555555", x=0.01, ha="left")
        written.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(written[-1], dpi=140)
    return written


if __name__ == "__main__":
    path = Path(sys.argv[1])
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
    else:
        print(*draw(json.loads(path.read_text()), path.with_suffix("")), sep="\n")
