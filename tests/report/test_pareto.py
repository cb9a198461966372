import math
import random
from pathlib import Path

import numpy as np
from PIL import Image

from qexp.report.annotate import Box, Label, boxes_of_line, place_labels
from qexp.report.pareto import Point, pareto_front, pareto_png, points_of
from qexp.report.table import rows_of_sweep
from tests.report.factory import GENERATE, ROUNDTRIP, config, job, manifest, run_folder, sweep_of_six

PSNR, SQNR = "quality/psnr_db", "roundtrip/sqnr_db_mean"


def point(memory: float, quality: float) -> Point:
    return Point(memory, quality, ("x",), ("none",), "x")


def test_front_is_what_nothing_dominates() -> None:
    random.seed(0)
    points = [point(memory, memory // 3 + random.randrange(4)) for memory in random.choices(range(30), k=100)]

    def dominates(a: Point, b: Point) -> bool:  # the definition, pair by pair
        return (
            a.memory_mib <= b.memory_mib
            and a.quality >= b.quality
            and (a.memory_mib, a.quality) != (b.memory_mib, b.quality)
        )

    expected = {p for p in points if not any(dominates(q, p) for q in points)}
    assert set(pareto_front(points)) == expected
    assert 3 < len(expected) < 50


def test_offload_strategies_that_share_a_point_share_a_label(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    quantized, none = points_of(rows, PSNR)
    assert (quantized.memory_mib, quantized.quality, quantized.names) == (4.1, 24.5, ("bitsandbytes nf4",))  # 0.004 GiB
    assert quantized.offloads == ("none", "leaf→disk")
    assert (none.memory_mib, none.quality, none.names) == (16.38, math.inf, ("none",))
    assert quantized.label(quantized.offloads) == "bitsandbytes nf4"
    assert quantized.label(()) == "bitsandbytes nf4 (none, leaf→disk)"


def test_backends_that_share_a_point_are_all_named(tmp_path: Path) -> None:
    for key, label in (("a", "int8"), ("b", "float8")):
        run_folder(tmp_path, key, config("quanto", label), GENERATE)
    manifest(tmp_path, "first", [job(0, "a", ["backend=quanto"]), job(1, "b", ["backend=quanto_float8"])])
    (shared,) = points_of(rows_of_sweep(tmp_path, "first"), PSNR)
    assert shared.label(()) == "quanto int8 / quanto float8 (none)"


def picture(data: bytes | None, path: Path) -> np.ndarray:
    assert data is not None
    path.write_bytes(data)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_plot_shows_its_points(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    pixels = picture(pareto_png(rows, PSNR, "title"), tmp_path / "plot.png")
    assert min(pixels.shape[:2]) >= 600
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of the two libraries
        assert (abs(pixels - color).sum(-1) < 10).sum() > 200
    fewer = picture(pareto_png(rows[2:4], PSNR, "title"), tmp_path / "fewer.png")
    assert (abs(fewer - (0xD5, 0x5E, 0x00)).sum(-1) < 10).sum() == 0


def test_the_same_sweep_gives_the_same_file(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    assert pareto_png(rows, PSNR, "title") == pareto_png(rows, PSNR, "title")


def test_one_point_no_point_and_only_infinite_points_are_drawn(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    rows = rows_of_sweep(tmp_path, "first")
    assert pareto_png(rows, SQNR, "title") is None
    assert pareto_png(rows[4:], PSNR, "title") is None
    assert pareto_png(rows[2:3], PSNR, "title") is not None
    assert pareto_png(rows[:2], PSNR, "title") is not None
    run_folder(tmp_path, "r", config(task="roundtrip"), ROUNDTRIP)
    manifest(tmp_path, "second", [job(0, "r", [])])
    assert pareto_png(rows_of_sweep(tmp_path, "second"), SQNR, "title") is not None
    lossless = ROUNDTRIP | {SQNR: None, "roundtrip/layers": 2, "roundtrip/exact_layers": 2}
    run_folder(tmp_path, "s", config("none", task="roundtrip"), lossless)
    manifest(tmp_path, "third", [job(0, "s", []), job(1, "r", [])])
    assert {p.quality for p in points_of(rows_of_sweep(tmp_path, "third"), SQNR)} == {math.inf, 20.7}


def test_labels_cover_neither_points_nor_lines_nor_each_other() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    figure.canvas.draw()
    places = [(5, 5), (5.1, 5.05), (5.2, 4.9), (5, 5.4), (9.8, 5), (0.1, 9.9)]
    labels = [Label(f"backend number {i}", place, {"color": "black", "fontsize": 9}) for i, place in enumerate(places)]
    line = boxes_of_line(axes, [5.0, 5.0, 9.0], [0.0, 8.0, 8.0])
    boxes = place_labels(axes, labels, line)
    markers = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in (axes.transData.transform(place) for place in places)]
    frame = Box(*axes.bbox.extents)
    for i, box in enumerate(boxes):
        assert sum(box.overlap(other) for other in boxes[:i] + boxes[i + 1 :] + markers + line) == 0
        assert box.overlap(frame) == box.area()
    drawn = [text.get_window_extent() for text in axes.texts]
    assert [[round(v) for v in text.extents] for text in drawn] == [[round(v) for v in box] for box in boxes]
