"""A process of its own: what it reports is read, whatever else it prints."""

from pathlib import Path

from tests import own_process


def outcomes_of(path: Path, code: str) -> tuple[list[own_process.Outcome], str]:
    path.write_text(code)
    return own_process._run((path,), "")


def test_words_on_stderr_while_the_process_ends_do_not_hide_its_results(tmp_path: Path) -> None:
    code = "import atexit, os\natexit.register(os.write, 2, b'library: bye <&>')\ndef test_it(): assert 1 == 2\n"
    (outcome,), output = outcomes_of(tmp_path / "test_noise.py", code)
    assert "assert 1 == 2" in outcome.problem and "library: bye" in output


def test_a_process_that_is_killed_is_reported_with_its_exit_code(tmp_path: Path) -> None:
    code = "import os, signal\ndef test_it(): os.kill(os.getpid(), signal.SIGKILL)\n"
    outcomes, output = outcomes_of(tmp_path / "test_killed.py", code)
    assert outcomes == [] and output.endswith("exit code -9")
