"""The picture: its formats, no overlapping labels, and life without matplotlib."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moved_pairs import llama_shapes, write_pair

from expo.demo import ALIGNED, SFT
from expo.diff import Comparison, compare, heatmap, report
from expo.diff.__main__ import main
from expo.errors import UsageError


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare(*write_pair(tmp_path, llama_shapes(1)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        heatmap.draw_heat_map(comparison, "png")
    monkeypatch.setattr(report, "_has_matplotlib", lambda: False)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        report.check_report("x.png")
    report.write_report(comparison, tmp_path / "x.json")


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures(suffix: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"report.{suffix}"
    out.write_bytes(b"old")
    assert main(["--sft", str(SFT), "--aligned", str(ALIGNED), "--quiet", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(begins)


def draw(comparison: Comparison) -> Any:
    figures, colors = pytest.importorskip("matplotlib.figure"), pytest.importorskip("matplotlib.colors")
    return heatmap.HeatMap(figures.Figure, colors, comparison, *heatmap.make_panels(comparison)).draw()


def test_no_label_overlaps_another(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    small, large = (compare(*write_pair(tmp_path / str(n), llama_shapes(n), but=r"layers\.0\.")) for n in (2, 80))
    modules = [f"{i}.layer.0.{m}.{q}" for i in range(12) for m in ("SelfAttention", "EncDecAttention") for q in "qkvo"]
    many = {f"{s}.block.{each}.weight": ("F32", (4, 4)) for s in ("encoder", "decoder") for each in modules}
    long = replace(small, sft="organisation/" + "a-long-name-" * 6, aligned="organisation/" + "$another$-" * 7)
    for comparison in (small, large, long, compare(*write_pair(tmp_path / "t5", many))):
        drawn = draw(comparison)
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        texts = [text for text in _texts(drawn) if text.get_text().strip()]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
        inside = drawn.bbox
        for i, (text, box) in enumerate(boxes):
            assert min(box.x0, box.y0) >= 0, text
            assert (box.x1 <= inside.x1, box.y1 <= inside.y1) == (True, True), text
            assert [other for other, at in boxes[:i] if box.overlaps(at)] == [], text


def _texts(drawn: Any) -> list[Any]:
    texts = list(drawn.texts)
    for axes in drawn.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    return [text for text in texts if text.get_visible()]


def test_nothing_to_colour(tmp_path: Path) -> None:
    """Neither equal models nor a model without layers have a value to colour."""
    pytest.importorskip("matplotlib")
    for k, shapes in enumerate((llama_shapes(1), {"x": ("F32", (3,))})):
        comparison = compare(*write_pair(tmp_path / str(k), shapes, but=""))
        assert heatmap.draw_heat_map(comparison, "png").startswith(b"\x89PNG")
