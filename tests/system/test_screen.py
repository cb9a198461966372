"""What this program says reaches the screen; what libraries print stays in a log."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.system.screen import library_output_in, say, sayings_in

NOISY = """
import logging, os, sys, warnings
from qexp.system.screen import library_output_in, open_screen, say
earlier = logging.StreamHandler()  # took standard error before it became a log
logging.getLogger("library").addHandler(earlier)
def make_noise():
    print("printed"); print("bar 3/10", file=sys.stderr)
    os.write(1, b"from C\\n"); os.write(2, b"from C, too\\n")
    logging.getLogger("library").warning("a library's warning"); logging.getLogger("other").error("of no handler")
    warnings.warn("deprecated")
    say("own line"); logging.getLogger("qexp.room").warning("own warning")
"""
NOISE = ("printed", "bar 3/10", "from C\n", "from C, too", "a library's warning", "of no handler", "deprecated")


def run(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NOISY + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)  # type: ignore[call-overload, no-any-return]


def test_only_own_lines_reach_the_screen_while_libraries_print(tmp_path: Path) -> None:
    code = "with open(sys.argv[1], 'ab', buffering=0) as log, library_output_in(log): make_noise()\n"
    done = run(code + "say('after'); print('output')", str(tmp_path / "log"))
    assert done.stderr == "own line\nwarning: own warning\nafter\n" and done.stdout == "output\n"
    log = (tmp_path / "log").read_text()
    assert all(words in log for words in (*NOISE, "own line", "own warning"))


def test_worker_shows_its_own_lines_on_its_screen_and_logs_everything() -> None:
    screen, written = os.pipe()
    done = run("open_screen(int(sys.argv[1])); make_noise()", str(written), pass_fds=(written,))
    os.close(written)
    with open(screen) as said:
        assert said.read() == "own line\nwarning: own warning\n"
    assert all(words in done.stdout + done.stderr for words in (*NOISE, "own line", "own warning"))


def test_screen_is_what_it_was_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), (tmp_path / "log").open("ab") as log, library_output_in(log):
        print("noise")
        say("said")
        raise ValueError("inside")
    say("after")
    print("output")
    assert capsys.readouterr() == ("output\n", "said\nafter\n")
    assert logging.getLogger("qexp").handlers == []


def test_messages_that_are_collected_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[str] = []
    with sayings_in(found):
        say("kept")
    say("shown")
    assert (found, capsys.readouterr().err) == (["kept"], "shown\n")


def test_children_of_a_worker_do_not_inherit_its_screen() -> None:
    screen, written = os.pipe()
    os.set_inheritable(written, True)
    code = "open_screen(int(sys.argv[1])); print(os.get_inheritable(int(sys.argv[1])))"
    done = run(code, str(written), pass_fds=(written,))
    os.close(written)
    os.close(screen)
    assert done.stdout == "False\n"


def test_records_of_a_worker_are_lines_of_its_screen_and_only_their_text_is_logged() -> None:
    screen, written = os.pipe()
    code = "import qexp.system.screen as s; assert not s.is_followed(); open_screen(int(sys.argv[1]));"
    code += "assert s.is_followed(); s.show_record({'a': 1}); s.show_record({'a': 2}, 'in the log')"
    done = run(code, str(written), pass_fds=(written,))
    os.close(written)
    with open(screen) as said:
        assert said.read() == '\x1e{"a": 1}\n\x1e{"a": 2}\n'
    assert done.stderr == "in the log\n" and done.stdout == ""
