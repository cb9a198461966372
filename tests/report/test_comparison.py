"""Intervals and comparisons in a report, from the samples of made runs with planted differences."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qexp.errors import ConfigError
from qexp.metrics.registry import all_metrics
from qexp.report.__main__ import main
from qexp.report.comparison import comparison_notes, prepare_compared, read_all_samples
from qexp.report.pareto import points_of
from qexp.report.pareto_plot import SCREEN, draw_pareto
from qexp.report.results_csv import results_csv
from qexp.report.table import format_table
from qexp.results.rows import Row, rows_of_sweep
from qexp.results.samples import write_samples
from qexp.results.uncertainty import mean_interval
from tests.report.factory import GENERATE, config, job, manifest, run_folder

pytestmark = pytest.mark.usefixtures("drawn_once")

PSNR, PERPLEXITY, FRECHET = "quality/psnr_db", "quality/perplexity", "quality/frechet_distance"
HARD = np.random.default_rng(0).normal(30.0, 4.0, 40)  # dB: images differ more than formats do
BETTER = HARD + np.random.default_rng(1).normal(0.5, 0.3, 40)
TIE = HARD + np.random.default_rng(3).normal(0.0, 0.5, 40)


def made_run(
    outputs: Path, key: str, values: dict[str, Sequence[float]], seed: int = 0, label: str = "", **metrics: float
) -> dict[str, Any]:
    """A run with samples; its metrics are their means, as they are scored."""
    means = {
        name: math.exp(np.mean(each)) if name == PERPLEXITY else float(np.mean([v for v in each if v < math.inf] or 0))
        for name, each in values.items()
    }
    container = config("quanto", label or key) | {"seed": seed}
    others = {f"quality/{name}": value for name, value in metrics.items()}
    folder = run_folder(outputs, key, container, GENERATE | means | others)
    named = {name: {f"image {n}": (float(v), 1.0) for n, v in enumerate(each)} for name, each in values.items()}
    write_samples(folder, seed, named)
    return job(len(list((outputs / "runs").iterdir())), key, [f"backend={label or key}", f"seed={seed}"])


def compared(outputs: Path, jobs: list[dict[str, Any]], baseline: str | None = None) -> tuple[list[Row], list[Row]]:
    manifest(outputs, "first", jobs)
    rows = rows_of_sweep(outputs, "first")
    assert list(read_all_samples(rows)) == []
    return rows, prepare_compared(rows, baseline)


def by_key(rows: list[Row], metric: str) -> dict[str, str]:
    return {row["key"]: row["versus"].get(metric, "") for row in rows}


def test_rows_are_compared_with_the_baseline_on_the_same_samples(tmp_path: Path) -> None:
    values = {"base": HARD, "up": BETTER, "tie": TIE, "down": HARD - (BETTER - HARD)}
    jobs = [made_run(tmp_path, key, {PSNR: each, PERPLEXITY: each / 10}) for key, each in values.items()]
    _, prepared = compared(tmp_path, jobs, "quanto base")
    assert by_key(prepared, PSNR) == {"base": "baseline", "up": "better", "tie": "undecided", "down": "worse"}
    assert by_key(prepared, PERPLEXITY) == {"base": "baseline", "up": "worse", "tie": "undecided", "down": "better"}


def test_intervals_are_in_table_and_csv(tmp_path: Path) -> None:
    nll = [0.5, 0.7, 0.4, 0.9, 0.65]
    jobs = [made_run(tmp_path, "a", {PSNR: HARD, PERPLEXITY: nll}), made_run(tmp_path, "b", {PSNR: [5.0]})]
    rows, prepared = compared(tmp_path, jobs)
    low, high = mean_interval(HARD.tolist()) or (0, 0)
    assert f"[{low:.2f}, {high:.2f}]" in format_table(prepared)
    (line, other) = csv.DictReader(io.StringIO(results_csv(rows)))
    assert (float(line[f"{PSNR}_low"]), float(line[f"{PSNR}_high"])) == (low, high)
    of_mean = mean_interval(nll) or (0, 0)
    assert float(line[f"{PERPLEXITY}_low"]) == pytest.approx(math.exp(of_mean[0]))
    assert float(line[f"{PERPLEXITY}_low"]) < float(line[PERPLEXITY]) < float(line[f"{PERPLEXITY}_high"])
    assert other[f"{PSNR}_low"] == "" and f"{PSNR}_versus" not in other  # one sample, no baseline


def test_a_sample_of_several_seeds_is_one_sample(tmp_path: Path) -> None:
    """Three seeds of greedy text give the same values: no narrower interval than one of them."""
    jobs = [made_run(tmp_path, f"s{seed}", {PSNR: HARD}, seed=seed, label="nf4") for seed in range(3)]
    _, (row,) = compared(tmp_path, jobs)
    assert row["seeds"] == 3
    assert row["intervals"][PSNR] == pytest.approx(mean_interval(HARD.tolist()))


def test_settings_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    easy = HARD + 20  # of seed 1: only one of the settings has it
    jobs = [
        made_run(tmp_path, "a0", {PSNR: HARD}, seed=0, label="a"), made_run(tmp_path, "a1", {PSNR: easy}, 1, "a"),
        made_run(tmp_path, "b0", {PSNR: BETTER}, seed=0, label="b"), made_run(tmp_path, "c1", {PSNR: easy}, 1, "c"),
        made_run(tmp_path, "d2", {PSNR: easy}, seed=2, label="d"),
    ]  # fmt: skip
    rows, prepared = compared(tmp_path, jobs, "a1")
    verdicts = {"a0": "baseline", "b0": "better", "c1": "undecided", "d2": "other samples"}
    assert by_key(prepared, PSNR) == verdicts
    assert by_key(rows, PSNR) == verdicts | {"a1": "baseline"}  # each run has that of its row


def test_different_samples_are_not_compared(tmp_path: Path) -> None:
    jobs = [made_run(tmp_path, "a", {PSNR: HARD}), made_run(tmp_path, "b", {PSNR: HARD[:30]})]
    run_folder(tmp_path, "old", config(), GENERATE)  # of an earlier version, without samples
    _, prepared = compared(tmp_path, [*jobs, job(3, "old", [])], "a")
    assert by_key(prepared, PSNR) == {"a": "baseline", "b": "other samples", "old": "no samples"}


def test_values_that_depend_on_n_are_not_compared_across_it(tmp_path: Path) -> None:
    counts = {"a": 100, "b": 100, "c": 200}
    jobs = [made_run(tmp_path, key, {}, frechet_distance=1.5, images=n) for key, n in counts.items()]
    _, prepared = compared(tmp_path, jobs, "a")
    assert by_key(prepared, FRECHET) == {"a": "", "b": "", "c": "other n"}
    assert "Fréchet distance depends on n (100, 200): values of different n are not compared." in comparison_notes(
        prepared
    )
    assert not [note for note in comparison_notes(prepared[:2]) if "Fréchet" in note]


def test_images_identical_to_the_reference_beat_others(tmp_path: Path) -> None:
    jobs = [made_run(tmp_path, "a", {PSNR: HARD}), made_run(tmp_path, "b", {PSNR: [math.inf] * 40})]
    _, prepared = compared(tmp_path, jobs, "a")
    assert by_key(prepared, PSNR)["b"] == "better"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quanto nf5", "is none of these (did you mean quanto nf4?)"), ("quanto nf4", "names 2 rows; give a key: a"),
        ("failed", "has no result (failed)"),
    ],
)  # fmt: skip
def test_baseline_that_is_not_one_row_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    for key, offload in (("a", "none"), ("b", "leaf")):
        run_folder(tmp_path, key, config("quanto", "nf4", offload), GENERATE)
    run_folder(tmp_path, "failed", config(), None, "failed", "oom")
    with pytest.raises(ConfigError) as error:
        compared(tmp_path, [job(1, "a", []), job(2, "b", []), job(3, "failed", [], "failed")], name)
    assert f"--baseline '{name}' {message}" in str(error.value)


def test_plot_has_the_intervals_as_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bars: list[Any] = []
    original = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *args, **kw: (bars.append(kw["yerr"]), original(*args, **kw))[1])
    jobs = [made_run(tmp_path, "a", {PSNR: HARD}), made_run(tmp_path, "b", {PSNR: [5.0]})]
    _, prepared = compared(tmp_path, jobs)
    assert draw_pareto(points_of(prepared, all_metrics()[PSNR]), all_metrics()[PSNR], "title", SCREEN, "png")
    low, high = mean_interval(HARD.tolist()) or (0, 0)
    assert bars == [[[pytest.approx(HARD.mean() - low)], [pytest.approx(high - HARD.mean())]]]
    assert [point.bar is None for point in points_of(prepared, all_metrics()[PSNR])].count(False) == 1


def test_command_compares_and_says_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [made_run(tmp_path, key, {PSNR: each}) for key, each in (("a", HARD), ("b", BETTER), ("c", TIE))]
    manifest(tmp_path, "first", jobs)
    (tmp_path / "runs/c/samples.csv").write_text("seed,sample,metric,value,weight\n0,image 0,quality/psnr_db,high,1\n")
    assert main(["first", "--outputs", str(tmp_path), "--baseline", "quanto a"]) == 0
    printed = capsys.readouterr()
    assert "samples.csv: is damaged" in printed.err and printed.err.count("\n") == 1
    assert "vs: compared with quanto a none (a) on the same samples" in printed.out
    text = (tmp_path / "sweeps/first/report.md").read_text()
    assert "| PSNR dB 95% | PSNR dB vs |" in text and "| better |" in text and "| no samples |" in text
    assert main(["first", "--outputs", str(tmp_path), "--baseline", "x"]) == 1
    assert "\nerror: --baseline 'x' is none of these; use quanto a, quanto b or quanto c, or a key\n" in (
        capsys.readouterr().err
    )
