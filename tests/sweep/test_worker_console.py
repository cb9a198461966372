"""Lines of a worker: each says its experiment's place and what it is of; stages go to the display, or are lines."""

import json
from dataclasses import asdict

import pytest

from qexp.sweep import worker_console
from qexp.sweep.worker_console import WorkerConsole
from qexp.system.screen import RECORD
from qexp.system.stages import Stage


def record(stage: Stage) -> str:
    return f"{RECORD}{json.dumps(asdict(stage))}\n"


def test_every_line_has_its_place_and_what_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    console = WorkerConsole("reference", 3, 12)
    console.write("one\ntwo in ")
    console.write("parts\n")
    console.write(
        record(Stage("generating step {}", 4, 20)) + record(Stage("generating step {}", 5, 20, line="step 5"))
    )
    console.write("10 %\r20 %")
    console.close()
    expected = ["one", "two in parts", "step 5", "20 %"]
    assert capsys.readouterr().out.splitlines() == [f"[3/12] reference: {line}" for line in expected]
    WorkerConsole().write("alone\n")
    assert capsys.readouterr().out == "candidate: alone\n"


def test_stages_go_to_a_display_without_their_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Display:
        is_shown, shown = True, list[tuple[str, Stage]]()

        def show_stage(self, of: str, stage: Stage) -> None:
            self.shown.append((of, stage))

    display = Display()
    monkeypatch.setattr(worker_console, "DISPLAY", display)
    stage = Stage("quantizing {} layers", 1, 2, 3, 4, 5.0, "a line")
    WorkerConsole("candidate", 1, 2).write(f"text\n{record(stage)}")
    assert display.shown == [("candidate", stage)]
    assert capsys.readouterr().out == "[1/2] candidate: text\n"
