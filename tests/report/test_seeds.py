"""Experiments that differ in their seed alone: one row in the table, the mean with its spread; each run in the CSV."""

import csv
import io
import statistics
from pathlib import Path

import pytest

from qexp.report.results_csv import results_csv
from qexp.report.seeds import with_seeds_united
from qexp.report.table import format_table
from qexp.results.rows import rows_of_sweep
from tests.report.factory import GENERATE, config, job, manifest, run_folder, sweep_of_seeds


def test_seeds_are_one_row_with_mean_deviation_and_number(tmp_path: Path) -> None:
    united, alone = with_seeds_united(rows_of_sweep(tmp_path, sweep_of_seeds(tmp_path)))
    assert united["metrics"]["quality/psnr_db"] == 20 and united["spread"]["quality/psnr_db"] == pytest.approx(10)
    assert united["spread"]["time/step_ms"] == statistics.stdev([12.0, 13.0, 14.0])
    assert "memory/weights_gib" not in united["spread"]  # the same in every run
    assert united["seeds"] == 3  # the run that stands in the sweep twice counts once
    assert "spread" not in alone


def test_the_table_shows_the_spread(tmp_path: Path) -> None:
    lines = format_table(rows_of_sweep(tmp_path, sweep_of_seeds(tmp_path))).splitlines()
    assert len(lines) == 5
    assert "1-3, 5" in lines[3] and "20.00 ±10.00" in lines[3] and "13.0 ±1.0" in lines[3]
    assert lines[0].split().count("seeds") + lines[1].split().count("seeds") == 1


def test_the_csv_keeps_each_run_and_names_its_group(tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(results_csv(rows_of_sweep(tmp_path, sweep_of_seeds(tmp_path))))))
    assert [(line["key"], line["group"], line["quality/psnr_db"]) for line in lines] == [
        ("nf4-0", "nf4-0", "10.0"), ("nf4-1", "nf4-0", "20.0"), ("nf4-2", "nf4-0", "30.0"),
        ("int8-0", "", "25.0"), ("nf4-2", "nf4-0", "30.0"),
    ]  # fmt: skip


def rows_of(tmp_path: Path, *runs: tuple[str, int, dict[str, float | None]]) -> list[dict]:
    for key, seed, metrics in runs:
        run_folder(tmp_path, key, config() | {"seed": seed}, GENERATE | metrics)
    manifest(tmp_path, "first", [job(number, key, []) for number, (key, _, _) in enumerate(runs)])
    return with_seeds_united(rows_of_sweep(tmp_path, "first"))


def test_runs_that_differ_in_more_than_the_seed_stay_apart(tmp_path: Path) -> None:
    """Two keys for one configuration and one seed: the files of the model were others."""
    assert len(rows_of(tmp_path, ("a", 0, {}), ("b", 0, {}), ("c", 1, {}))) == 3


@pytest.mark.parametrize(
    ("second", "shown", "count"),
    [
        ({"quality/psnr_db": None, "quality/exact": 1}, "24.50 (of 1)", 1),  # infinite: not in the mean, which says so
        ({"quality/psnr_db": None, "quality/exact": 0, "quality/finite": 0}, "not finite", 1),
    ],
)
def test_a_value_that_is_missing_is_not_hidden(second: dict, shown: str, count: int, tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, ("a", 0, {}), ("b", 1, second))
    assert row["counts"]["quality/psnr_db"] == count
    assert shown in format_table([row])
