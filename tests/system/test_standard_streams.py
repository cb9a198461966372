"""Programs whose reader goes away, as `| head` does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.cli.commands import COMMANDS
from tests.products import representatives
from tests.report.factory import sweep_of_six

ROOT = Path(__file__).parents[2]
LONG = """
import sys
from pathlib import Path
from qexp.system.standard_streams import survive_closed_pipes
survive_closed_pipes()
survive_closed_pipes()  # again changes nothing
print("first", flush=True)
sys.stdin.read()  # until the reader is gone
for number in range(20_000):
    print(number)
    sys.stdout.buffer.write(b"bytes")
    print(number, file=sys.stderr)
sys.stdout.flush()
Path(sys.argv[1]).write_text("the end")
"""


def run_unread(*command: str) -> tuple[int, str]:
    """(exit code, standard error) of a program whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_program_goes_on_without_its_reader(options: list[str], tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, *options, "-c", LONG, str(tmp_path / "end.txt")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert program.stdin is not None and program.stdout is not None
    assert program.stdout.readline() == "first\n"
    program.stdout.close()
    program.stdin.close()
    assert program.wait(timeout=300) == 0
    assert (tmp_path / "end.txt").read_text() == "the end"


PROGRAMS = [f"qexp {name}" for name in COMMANDS] + list(COMMANDS.values()) + ["qexp"]


@pytest.mark.parametrize("program", representatives(PROGRAMS, ["qexp rerun", "qexp.clean", "qexp"]))
def test_help_that_nobody_reads_ends_quietly(program: str) -> None:
    assert run_unread(*program.removesuffix(".__main__").split(), "--help") == (0, "")


def test_report_writes_its_files_although_nobody_reads_the_table(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    assert run_unread("qexp", "report", "--outputs", str(tmp_path)) == (0, "")
    names = {path.name for path in (tmp_path / "sweeps/first").iterdir()}
    texts = {"results.csv", "report.md", "report.html", "table.tex"}
    assert names == {"manifest.json", *texts, "pareto_psnr_db.png", "pareto_psnr_db.csv"}
