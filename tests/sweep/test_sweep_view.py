"""The lines at the bottom of a terminal, from what happened so far and a clock of the test's."""

from pathlib import Path

import pytest

from qexp.results.manifest import JobRow
from qexp.results.numbers import format_duration
from qexp.sweep.sweep_view import SweepView
from qexp.system.stages import Stage

ROW = JobRow(1, "0123456789abcdef", (), "digits · none", "done")
FAILED = JobRow(2, "fedcba9876543210", (), "digits · none", "failed", "oom", "out of memory:\n use less")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def manifest(*statuses: str, total: int | None = 12) -> dict[str, object]:
    return {"total": total, "jobs": [{"status": status} for status in statuses]}


def texts(view: SweepView) -> list[str]:
    return [text for text, _ in view.lines()]


@pytest.mark.parametrize(
    ("of", "stage", "words"),
    [
        ("candidate", Stage("reading the checkpoint"), "reading the checkpoint"),
        # 3 of 12 MiB took 2 s, so that 9 MiB take 6 s, of which one is over
        ("candidate", Stage("quantizing {} layers", 37, 120, 3 << 20, 12 << 20, 2.0),
         "quantizing 37/120 layers, 3.0 MiB of 12.0 MiB, 5 s left"),
        ("reference", Stage("generating step {}", 8, 20, seconds=8.0), "reference step 8/20, 11 s left"),
        ("candidate", Stage("generating step {}", 8, 20, seconds=8.0), "generating step 8/20, 11 s left"),
        ("candidate", Stage("reading the text step {}", 3, None, seconds=8.0), "reading the text step 3"),
        ("reference", Stage("reading {} files", 0, 9, 0, 1 << 30), "reference: reading 0/9 files, 0.0 KiB of 1.0 GiB"),
        ("candidate", Stage("generating step {}", 20, 20, seconds=8.0), "generating step 20/20, 0 s left"),
    ],
)  # fmt: skip
def test_running_experiment_has_its_stage_bytes_and_time_left(of: str, stage: Stage, words: str) -> None:
    clock = Clock()
    view = SweepView(clock)
    view.begin("digits · none", None)
    clock.now += 2
    assert texts(view) == ["digits · none", "       starting, 2 s"]
    view.show_stage(of, stage)
    clock.now += 1
    assert texts(view) == ["digits · none", f"       {words}"]


def test_sweep_has_counts_and_the_time_that_the_rest_takes_at_the_pace_so_far() -> None:
    clock = Clock()
    view = SweepView(clock)
    view.begin("[1/12] a", 12)
    assert texts(view)[2:] == ["0 done, 0 failed, 12 left"]
    clock.now += 60
    view.end(ROW, manifest("done"), None)
    assert texts(view) == ["1 done, 0 failed, 11 left, about 11 min left"]
    view.begin("[2/12] b", 11)
    clock.now += 30
    assert texts(view)[2:] == ["1 done, 0 failed, 11 left, about 10 min left"]  # 11 times 60 s but for 30 s: 10.5
    clock.now += 90
    view.end(ROW, manifest("done", "unsupported"), None)
    view.begin("[3/12] c", 10)
    view.end(JobRow(3, "k", (), "c", "done", reused=True), manifest("done", "unsupported", "done"), None)
    # two experiments took 60 s and 120 s, the reused one nothing that counts: 9 times 90 s
    assert texts(view) == ["2 done, 0 failed, 1 unsupported, 9 left, about 14 min left"]
    view.end(ROW, manifest("done", total=None), None)
    assert texts(view) == ["1 done, 0 failed"]


def test_failures_stay_with_reason_and_log_the_latest_of_many() -> None:
    view = SweepView(Clock())
    for number in range(1, 8):
        view.begin(f"[{number}/9] a", 10 - number)
        view.end(FAILED, manifest(*["failed"] * number, total=9), Path(f"runs/{number}/worker.log"))
    view.begin("[8/9] b", 2)
    lines = texts(view)
    assert lines[:3] == ["[8/9] b", "       starting, 0 s", "0 done, 7 failed, 2 left, about 0 s left"]
    assert lines[3:5] == ["failed: [3/9] a: oom: out of memory: use less", "        log: runs/3/worker.log"]
    assert len(lines) == 3 + 2 * 5 + 1 and lines[-1].strip() == "and 2 more"
    assert {kind for _, kind in view.lines()[3:]} == {"failed"}


def test_durations_are_as_exact_as_a_guess_can_be() -> None:
    shown = [format_duration(seconds) for seconds in (0.4, 89, 91, 3569, 3600, 8040)]
    assert shown == ["0 s", "89 s", "2 min", "59 min", "1 h 0 min", "2 h 14 min"]
