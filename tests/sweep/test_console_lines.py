from dataclasses import replace

from qexp.results.manifest import JobRow
from qexp.sweep.console_lines import end_line, job_name

METRICS = {"quality/psnr_db": 31.24, "memory/weights_gib": 0.00478, "quality/exact": 0.0}
ROW = JobRow(3, "0123456789abcdef", (), "digits · torchao", "done", seconds=8.09, metrics=METRICS)
NAME = job_name(3, 12, ROW.label)


def manifest(*statuses: str, total: int | None = 12) -> dict[str, object]:
    return {"total": total, "jobs": [{"status": status} for status in statuses]}


def test_the_name_says_as_much_as_is_known() -> None:
    assert job_name(3, 12, "x") == "[3/12] x"
    assert job_name(3, None, "x") == "[3] x"
    assert job_name(None, None, "x") == "x"


def test_a_done_experiment_in_a_line() -> None:
    line = end_line(NAME, ROW, manifest("done", "failed", "done"))
    # 0.00478 GiB = 4.89 MiB
    assert line == "[3/12] digits · torchao: done in 8.1 s, psnr 31.2 dB, 4.9 MiB (2 done, 1 failed, 9 left)"


def test_what_is_not_known_is_left_out() -> None:
    line = end_line("x", replace(ROW, metrics={"roundtrip/sqnr_db_mean": 20.73}), manifest("done", total=None))
    assert line == "x: done in 8.1 s, sqnr 20.7 dB (1 done)"
    assert end_line("x", replace(ROW, metrics={"quality/psnr_db": None}), None) == "x: done in 8.1 s"
    exact = {"quality/psnr_db": None, "quality/exact": 1.0}
    broken = {"quality/psnr_db": None, "quality/exact": 0.0, "quality/finite": 0.0}
    assert end_line("x", replace(ROW, metrics=broken), None) == "x: done in 8.1 s, not finite"
    counted = broken | {"quality/exact": 1.0, "quality/nonfinite": 12}
    assert end_line("x", replace(ROW, metrics=counted), None) == "x: done in 8.1 s, not finite (12 values)"
    layers = {"roundtrip/nonfinite_layers": 2, "roundtrip/sqnr_db_mean": 20.73}
    assert end_line("x", replace(ROW, metrics=layers), None) == "x: done in 8.1 s, 2 layers not finite"
    assert end_line("x", replace(ROW, metrics={}, rescored=True), None) == "x: scored again"
    assert end_line("x", replace(ROW, metrics=exact), None) == "x: done in 8.1 s, identical to the reference"


def test_other_endings() -> None:
    row = replace(ROW, metrics={}, message="too big; use less")
    assert end_line("x", replace(row, status="failed", reason="oom"), None) == "x: failed (oom): too big; use less"
    unsupported = replace(row, status="unsupported", reason="unsupported", reused=True)
    assert end_line("x", unsupported, None) == "x: still unsupported: too big; use less"
    assert end_line("x", replace(row, status="skipped"), None) == "x: skipped: too big; use less"
    assert end_line("x", replace(ROW, reused=True), None).startswith("x: reused from 0123456789abcdef, psnr")
