"""The display in a terminal: what a terminal emulator shows of a sweep of fake experiments."""

import sys
from pathlib import Path

import pytest

from scripts.record_sweep import chosen_frames, record

ROOT = Path(__file__).parents[2]
LABEL = "digits checkpoint · bitsandbytes · none · generate"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """Three experiments: one whose stages take a moment, one that fails, one that does nothing."""
    folder = tmp_path_factory.mktemp("terminal")
    command = [sys.executable, "-m", "tests.sweep.hydra_app", str(folder / "conf"), "-m", "behaviour=24,2,1"]
    return record([*command, f"paths.outputs={folder / 'outputs'}"], ROOT)


def test_terminal_shows_stage_counts_and_failures_while_a_sweep_runs(recorded: tuple[list[str], int]) -> None:
    frames, code = recorded
    assert code == 1
    stage, failed = chosen_frames(frames, ["generating step 8/20", "1 done, 1 failed"])[:2]
    assert f"[1/3] {LABEL} · behaviour=24: started" in stage  # scrolls away, what is below does not
    *_, name, words, counts = stage.splitlines()
    assert name == f"[1/3] {LABEL} · behaviour=24"
    assert words.strip() in ("generating step 8/20, 6 s left", "generating step 8/20, 5 s left")  # 8 steps took 4 s
    assert counts == "0 done, 0 failed, 3 left"
    what, log = failed.splitlines()[-2:]
    assert what.startswith(f"failed: [2/3] {LABEL} · behaviour=2: error: RuntimeError")
    assert log.strip().startswith("log: ") and len(what) <= 110


def test_terminal_has_lines_and_table_and_nothing_of_the_display_in_the_end(recorded: tuple[list[str], int]) -> None:
    lines = recorded[0][-1].splitlines()
    assert lines[-1] == "3 experiments: 2 done, 1 failed"
    assert sum(line.startswith("[") and ": started" in line for line in lines) == 3
    assert not any(line.strip().startswith(("starting", "generating step", "failed: ", "log: ")) for line in lines)
    assert any("said beside the stages" in line for line in lines)


@pytest.mark.exhaustive
def test_display_stays_away_from_a_terminal_that_cannot_rewrite_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.sweep.hydra_app", str(tmp_path / "conf"), "-m", "behaviour=24"]
    frames, code = record([*command, f"paths.outputs={tmp_path / 'outputs'}"], ROOT, {"TERM": "dumb"})
    assert code == 0
    shown = frames[-1]
    assert "[1/1] candidate: generating step 10/20, 500 ms a step" in shown and "0 failed" not in shown
