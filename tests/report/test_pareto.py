import csv
import io
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qexp.metrics.registry import Metric, all_metrics
from qexp.report.pareto import Point, pareto_front, points_csv, points_of
from qexp.report.pareto_plot import PAPER, SCREEN, draw_pareto
from qexp.report.table import rows_of_sweep
from qexp.results.rows import Row
from tests.products import representatives
from tests.report.factory import GENERATE, ROUNDTRIP, config, job, manifest, run_folder, sweep_of_seeds, sweep_of_six

PSNR, SQNR = (all_metrics()[name] for name in ("quality/psnr_db", "roundtrip/sqnr_db_mean"))


def point(memory: float, quality: float) -> Point:
    return Point(memory, quality, ("x",), ("none",), "x")


def test_front_is_what_nothing_dominates() -> None:
    random.seed(0)
    points = [point(memory, memory // 3 + random.randrange(4)) for memory in random.choices(range(30), k=100)]

    def dominates(a: Point, b: Point) -> bool:  # the definition, pair by pair
        return (
            a.memory_gib <= b.memory_gib
            and a.quality >= b.quality
            and (a.memory_gib, a.quality) != (b.memory_gib, b.quality)
        )

    expected = {p for p in points if not any(dominates(q, p) for q in points)}
    assert set(pareto_front(points)) == expected
    assert 3 < len(expected) < 50


def test_offload_strategies_that_share_a_point_share_a_label(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    quantized, none = points_of(rows, PSNR)
    assert (quantized.memory_gib, quantized.quality, quantized.names) == (0.004, 24.5, ("bitsandbytes nf4",))
    assert quantized.offloads == ("none", "leaf→disk")
    assert (none.memory_gib, none.quality, none.names) == (0.016, math.inf, ("none",))
    assert quantized.label(quantized.offloads) == "bitsandbytes nf4"
    assert quantized.label(()) == "bitsandbytes nf4 (none, leaf→disk)"


def test_backends_that_share_a_point_are_all_named(tmp_path: Path) -> None:
    for key, label in (("a", "int8"), ("b", "float8")):
        run_folder(tmp_path, key, config("quanto", label), GENERATE)
    manifest(tmp_path, "first", [job(0, "a", ["backend=quanto"]), job(1, "b", ["backend=quanto_float8"])])
    (shared,) = points_of(rows_of_sweep(tmp_path, "first"), PSNR)
    assert shared.label(()) == "quanto int8 / quanto float8 (none)"


def drawn(rows: list[Row], metric: Metric = PSNR) -> bytes:
    return draw_pareto(points_of(rows, metric), metric, "title", SCREEN, "png")


def picture(data: bytes, path: Path) -> np.ndarray:
    path.write_bytes(data)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_plot_shows_its_points(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    pixels = picture(drawn(rows), tmp_path / "plot.png")
    assert min(pixels.shape[:2]) >= 600
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of the two libraries
        assert (abs(pixels - color).sum(-1) < 10).sum() > 200
    fewer = picture(drawn(rows[2:4]), tmp_path / "fewer.png")
    assert (abs(fewer - (0xD5, 0x5E, 0x00)).sum(-1) < 10).sum() == 0


def test_the_same_sweep_gives_the_same_file(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    assert drawn(rows) == drawn(rows)


def test_one_point_no_point_and_only_infinite_points_are_drawn(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    rows = rows_of_sweep(tmp_path, "first")
    assert points_of(rows, SQNR) == points_of(rows[4:], PSNR) == []
    assert drawn(rows[2:3]) and drawn(rows[:2])
    run_folder(tmp_path, "r", config(task="roundtrip"), ROUNDTRIP)
    manifest(tmp_path, "second", [job(0, "r", [])])
    assert drawn(rows_of_sweep(tmp_path, "second"), SQNR)
    lossless = ROUNDTRIP | {SQNR.name: None, "roundtrip/layers": 2, "roundtrip/exact_layers": 2}
    run_folder(tmp_path, "s", config("none", task="roundtrip"), lossless)
    manifest(tmp_path, "third", [job(0, "s", []), job(1, "r", [])])
    assert {p.quality for p in points_of(rows_of_sweep(tmp_path, "third"), SQNR)} == {math.inf, 20.7}


def test_points_differ_wherever_stored_values_do(tmp_path: Path) -> None:
    """0.9843 is not 0.98: points are merged only if both numbers are equal to the last bit."""
    for number, value in enumerate((0.9843, 0.98431, 0.9843)):
        metrics = GENERATE | {"quality/top1_agreement": value}
        run_folder(tmp_path, f"k{number}", config("quanto", f"int{number}"), metrics)
    manifest(tmp_path, "first", [job(number, f"k{number}", []) for number in range(3)])
    found = points_of(rows_of_sweep(tmp_path, "first"), all_metrics()["quality/top1_agreement"])
    shared, alone = ("quanto int0", "quanto int2"), ("quanto int1",)
    assert [(p.quality, p.names) for p in found] == [(0.9843, shared), (0.98431, alone)]


def test_mixed_backends_are_all_named(tmp_path: Path) -> None:
    mixed = config()
    mixed["components"]["text_encoder"] = config("quanto", "int8")["components"]["transformer"]
    mixed["components"]["vae"] = config("none", None)["components"]["transformer"]
    run_folder(tmp_path, "a", mixed, GENERATE)
    manifest(tmp_path, "first", [job(0, "a", [])])
    (found,) = points_of(rows_of_sweep(tmp_path, "first"), PSNR)
    assert found.names == ("quanto int8 + bitsandbytes nf4",) and found.family == "quanto + bitsandbytes"


def test_where_less_is_better_the_front_falls() -> None:
    points = [point(1, 3.0), point(2, 4.0), point(3, 1.0), point(4, 1.0)]
    assert pareto_front(points, is_higher_better=False) == [points[0], points[2]]


def test_seeds_are_one_point_at_their_mean(tmp_path: Path) -> None:
    sweep_of_seeds(tmp_path)
    nf4, int8 = points_of(rows_of_sweep(tmp_path, "seeds"), PSNR)
    # quanto is better with every seed but one: the best seed does not stand for bitsandbytes
    assert (nf4.quality, nf4.spread) == (pytest.approx(20.0), pytest.approx(10.0))
    assert (int8.quality, int8.names) == (25.0, ("quanto int8 seed=0",))
    assert nf4.names == ("bitsandbytes nf4 (3 seeds)",) and pareto_front([nf4, int8]) == [nf4, int8]


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_points_are_numbered_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that lie on one another share a place for their numbers; every point has its name in the legend."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    values = [(0.004, 20.0), (0.004, 20.001), (0.005, 30.0), (0.006, 25.0)]
    for number, (memory, quality) in enumerate(values):
        metrics = GENERATE | {"memory/weights_gib": memory, "quality/psnr_db": quality}
        run_folder(tmp_path, f"k{number}", config("quanto", f"t{number}"), metrics)
    manifest(tmp_path, "first", [job(number, f"k{number}", []) for number in range(4)])
    drawn(rows_of_sweep(tmp_path, "first"))
    (figure,) = figures
    assert {"1 2", "3", "4"} <= set(texts_of(figure))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "Pareto front", "1  quanto t0", "2  quanto t1", "3  quanto t2", "4  quanto t3",
    ]  # fmt: skip
    assert [text.get_fontweight() for text in legend.get_texts()[1:]] == ["normal", "bold", "bold", "normal"]
    assert figure.axes[0].get_xlabel() == "memory of the weights (MiB)"


@pytest.mark.parametrize(
    ("gib", "unit", "shown"), [(2e-5, "KiB", 20.97152), (0.004, "MiB", 4.096), (6.24, "GiB", 6.24)]
)
def test_the_axis_has_the_unit_of_its_values(
    gib: float, unit: str, shown: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    run_folder(tmp_path, "a", config(), GENERATE | {"memory/weights_gib": gib})
    manifest(tmp_path, "first", [job(0, "a", [])])
    drawn(rows_of_sweep(tmp_path, "first"))
    assert figures[0].axes[0].get_xlabel() == f"memory of the weights ({unit})"
    assert any(list(line.get_xdata()) == [pytest.approx(shown)] for line in figures[0].axes[0].lines)


@pytest.mark.parametrize(("width", "inches"), representatives([("1col", 3.3), ("2col", 7.0)], [("1col", 3.3)]))
def test_figures_for_papers_embed_their_fonts_and_have_the_width_of_a_column(
    width: str, inches: float, tmp_path: Path
) -> None:
    points = points_of(rows_of_sweep(tmp_path, sweep_of_seeds(tmp_path)), PSNR)
    pdf, svg = (draw_pareto(points, PSNR, "", PAPER[width], kind) for kind in ("pdf", "svg"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, in the file
    (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf)
    assert float(box) == pytest.approx(72 * inches)
    text = svg.decode()
    assert "<text" not in text and f'width="{72 * inches:g}pt"' in text  # outlines: no font is needed
    assert draw_pareto(points, PSNR, "", PAPER[width], "pdf") == pdf


def test_names_with_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config("quanto", "a$_b$^"), GENERATE)
    manifest(tmp_path, "first", [job(0, "a", [])])
    points = points_of(rows_of_sweep(tmp_path, "first"), PSNR)
    assert draw_pareto(points, PSNR, "costs $ and $x_", SCREEN, "svg").startswith(b"<?xml")


def test_csv_has_the_numbers_behind_the_plot(tmp_path: Path) -> None:
    points = points_of(rows_of_sweep(tmp_path, sweep_of_seeds(tmp_path)), PSNR)
    nf4, int8 = csv.DictReader(io.StringIO(points_csv(points, PSNR)))
    assert (nf4["name"], nf4["memory_weights_gib"], nf4["psnr_db"]) == ("bitsandbytes nf4 (3 seeds)", "0.004", "20.0")
    assert (nf4["low"], nf4["high"], nf4["bar"]) == ("10.0", "30.0", "standard deviation over seeds")
    assert (int8["number"], int8["on_front"], int8["low"], int8["bar"]) == ("2", "1", "", "")


def test_points_are_named_by_what_varies_in_their_own_plot(tmp_path: Path) -> None:
    """Of two models, one has this metric: the other one's text is not in the names, but the model is."""
    text = config(task="perplexity")
    text["model"] = {**text["model"], "source": "arithmetic"}
    for key, label in (("a", "int8"), ("b", "float8")):
        run_folder(tmp_path, key, config("quanto", label), GENERATE)
    run_folder(tmp_path, "c", text, {"memory/weights_gib": 0.1})
    common = ["seed=1"]
    jobs = [job(0, "a", ["backend=quanto", *common]), job(1, "b", ["backend=quanto_float8", *common])]
    manifest(tmp_path, "first", [*jobs, job(2, "c", ["task.text=/a/b.txt"])])
    assert [point.names for point in points_of(rows_of_sweep(tmp_path, "first"), PSNR)] == [
        ("digits quanto int8", "digits quanto float8")
    ]
