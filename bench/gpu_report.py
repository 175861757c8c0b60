"""Put the figures of `make gpu` into the documentation: python -m bench.gpu_report GPU.json [ROOT] (`make gpu-report`).

The JSON goes to bench/results/, under the name of the card; its tables go to docs/gpu.md, between two markers, and with
matplotlib a plot of the rates stands beside the JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu import make_lines

BEGIN, END = "<!-- figures of make gpu -->", "<!-- end of the figures -->"
SOFTWARE = "in software"  # in the name of the device that the tests use


def make_name(device: str) -> str:
    """Return the name of a card as a file's name."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def make_section(results: dict[str, Any], name: str, has_plot: bool) -> Iterator[str]:
    """Yield the lines between the markers."""
    yield BEGIN
    yield f"\nThe figures below come from [{name}.json](../bench/results/{name}.json).\n"
    yield from make_lines(results)
    if has_plot:
        yield f"\n![The rate of each kernel and rival](../bench/results/{name}.png)"
    yield f"\n{END}"


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the rates of kernels and rivals. Return False, without a plot, if there are none or no matplotlib."""
    rows = results["benchmarks"].get("benchmarks", {})
    rates = {name[len("test_gpu[") : -1]: row["gb_per_s"] for name, row in rows.items() if "gb_per_s" in row}
    if not rates or find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.25 * len(rates)), layout="constrained")
    axes = figure.add_subplot()
    names = sorted(rates, key=lambda name: rates[name])
    axes.barh(names, [rates[name] for name in names], color="#1f6fb4")
    axes.set_xlabel("GB/s")
    axes.set_title(f"{results['device']}, driver {results['driver']}, torch {results['versions']['torch']}")
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
    return True


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0, or 1 if the figures are no GPU's."""
    source = Path(arguments[0])
    root = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).parents[1]
    results = json.loads(source.read_text())
    if SOFTWARE in results["device"]:
        print(f"{source}: {results['device']} gave these figures, and no GPU: run `make gpu` on a GPU", file=sys.stderr)
        return 1
    page, name = root / "docs" / "gpu.md", make_name(results["device"])
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    folder = root / "bench" / "results"
    section = "\n".join(make_section(results, name, draw(results, folder / f"{name}.png")))
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    page.write_text(before + section + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
