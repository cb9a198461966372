"""Marks of rows that cannot be compared with the others."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from qexp.report.__main__ import main
from qexp.report.results_csv import results_csv
from qexp.report.table import format_table, rows_of_sweep
from tests.report.factory import ENV, GENERATE, config, job, manifest, run_folder

pytestmark = pytest.mark.usefixtures("drawn_once")

STEPS = {"time/step_ms": 12.0, "time/step_ms_min": 11.5, "time/step_ms_max": 14.25}


def sweep_of(outputs: Path, *runs: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """A sweep whose runs have these metrics, and this in place of parts of ENV."""
    jobs = []
    for number, (metrics, env) in enumerate(runs, 1):
        folder = run_folder(outputs, f"key{number}", config(label=f"format{number}"), GENERATE | metrics)
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"env": ENV | env}))
        jobs.append(job(number, f"key{number}", [f"backend={number}"]))
    manifest(outputs, "first", jobs)
    return format_table(rows_of_sweep(outputs, "first"))


def line_of(table: str, label: str) -> str:
    (line,) = (line for line in table.splitlines() if label in line)
    return line


def test_times_of_a_busy_machine_are_marked_and_have_their_spread(tmp_path: Path) -> None:
    """ENV has two cores: a tenth of them is 0.2."""
    quiet, busy = STEPS | {"time/other_cores": 0.19}, STEPS | {"time/other_cores": 0.21}
    table = sweep_of(tmp_path, (quiet, {}), (busy, {}), (busy | {"time/other_cores": 1.5}, {"usable_cores": 16.0}))
    assert "12.0 (11.5-14.2) " in line_of(table, "format1") + " "
    assert "12.0 (11.5-14.2) *" in line_of(table, "format2")
    assert "*" not in line_of(table, "format3")
    assert "* times were taken while other programs kept 0.2 cores busy: #2" in table
    assert main(["first", "--outputs", str(tmp_path)]) == 0
    report = (tmp_path / "sweeps/first/report.md").read_text()
    assert "12.0 (11.5-14.2) *" in line_of(report, "format2 ")
    assert "\\* times were taken while other programs kept 0.2 cores busy: #2" in report


def test_rows_of_another_environment_are_marked_with_what_differs(tmp_path: Path) -> None:
    other = {"versions": ENV["versions"] | {"torch": "2.12.0", "torchao": "0.18.0"}, "threads": "1"}
    table = sweep_of(tmp_path, ({}, {}), ({}, other), ({}, {}), ({}, {"commit": "fedcba9876543210"}))
    assert [label for label in ("1", "2", "3", "4") if "†" in line_of(table, f"format{label} ")] == ["2", "4"]
    assert "† #2: threads 1 (most: 2), torch 2.12.0 (most: 2.13.0)\n" in table
    assert "† #4: commit fedcba987654 (most: 0123456789ab+)" in table
    lines = list(csv.DictReader(io.StringIO(results_csv(rows_of_sweep(tmp_path, "first")))))
    assert [line["environment"] for line in lines[:2]] == ["", "threads 1 (most: 2), torch 2.12.0 (most: 2.13.0)"]
    assert main(["first", "--outputs", str(tmp_path)]) == 0
    report = (tmp_path / "sweeps/first/report.md").read_text()
    assert "(../../runs/key2) #2 † |" in report and "† #2: threads 1" in report


def test_rows_that_can_be_compared_have_no_marks(tmp_path: Path) -> None:
    """A library that only one of them uses is no difference."""
    table = sweep_of(tmp_path, ({}, {}), (STEPS | {"time/other_cores": 0.0}, {"versions": {"torchao": "0.18.0"}}))
    assert "*" not in table and "†" not in table
