"""Progress: silence for short work, one line rewritten on a terminal, at most four lines elsewhere."""

import io
import sys

import pytest

from qexp.system import progress, stages
from qexp.system.progress import Progress
from qexp.system.screen import followed_by


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def run(clock: Clock, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, items: int, seconds: float) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Progress("toy", "loading {} tensors", items, items << 30)
    for _ in range(items):
        clock.now += seconds
        shown.advance(1 << 30)
    shown.close()
    return stream.getvalue()


def test_short_work_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        assert run(Clock(monkeypatch), stream, monkeypatch, items=99, seconds=0.01) == ""


def test_elsewhere_than_on_a_terminal_four_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(Clock(monkeypatch), io.StringIO(), monkeypatch, items=40, seconds=2).splitlines()
    assert lines == [
        "toy: loading 10/40 tensors, 10.00/40.00 GiB, 20 s",
        "toy: loading 20/40 tensors, 20.00/40.00 GiB, 40 s",
        "toy: loading 30/40 tensors, 30.00/40.00 GiB, 60 s",
        "toy: loading 40/40 tensors, 40.00/40.00 GiB, 80 s",
    ]


def test_on_a_terminal_one_line_is_rewritten_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(Clock(monkeypatch), Terminal(), monkeypatch, items=100, seconds=0.06)
    assert text.count("\n") == 1 and text.endswith("100/100 tensors, 100.00/100.00 GiB, 6 s\n")
    assert 15 < text.count("\r") < 35  # five times a second, after the first


def test_nothing_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shown = Progress("empty", "reading {} files", 1, 0)
    clock.now += 5
    shown.advance(0)
    shown.close()


def test_what_displays_it_gets_stages_instead_and_lines_for_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, records = Clock(monkeypatch), list[dict[str, object]]()
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock.now)
    with followed_by(lambda record: records.append(dict(record))):
        assert run(clock, io.StringIO(), monkeypatch, items=40, seconds=0.0625) == ""
    assert [record["done"] for record in records[:3]] == [0, 2, 4]  # every tenth of a second
    last = {"words": "loading {} tensors", "done": 40, "total": 40, "done_bytes": 40 << 30, "total_bytes": 40 << 30}
    assert last.items() <= records[-1].items() and records[-1]["seconds"] == 2.5
    # a line for each quarter, once a second is over
    assert [record["line"] for record in records if record["line"]] == [
        f"toy: loading {n}/40 tensors, {n}.00/40.00 GiB, {s} s" for n, s in ((16, 1), (20, 1), (30, 2), (40, 2))
    ]
