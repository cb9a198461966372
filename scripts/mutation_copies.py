"""A copy of the repository in which tests run while one of its files is changed.

The copy comes before an installed package on the import path. No bytecode is written: two versions of a
file may have the same size and time.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "qexp"
MUTATIONS = "tests/mutations"  # left out: they fail with every fault, since its old text is gone
LEFT_OUT = ("exhaustive", "external")  # markers of tests that scripts/check leaves out
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?(?:\[.*\])?)(?: - .*)?$", re.MULTILINE)
NO_TESTS = 5  # pytest's exit code if none was selected
IN_ONE_PROCESS = "-n 0" if importlib.util.find_spec("xdist") else ""  # faults run beside each other already


class Stopped(Exception):
    """A copy was told to stop while its tests ran."""


@dataclass(frozen=True)
class Tests:
    """A set of tests that run in one process. markers: pytest's -m; empty: all tests."""

    stage: str
    targets: tuple[str, ...]
    markers: str

    def __str__(self) -> str:
        return " ".join(self.targets) + (f" -m '{self.markers}'" if self.markers else "")


@dataclass(frozen=True)
class Run:
    """How a set of tests ended. test: what failed, in words if pytest named no test; empty: all passed."""

    test: str
    seconds: float


class Copy:
    """A copy of the repository, with a temporary folder for its processes beside it."""

    def __init__(self, source: Path, folder: Path, files: Iterable[str]) -> None:
        self.root, self._temporary = folder / "copy", folder / "tmp"
        for name in files:
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target, follow_symlinks=False)
        shutil.rmtree(self.root / MUTATIONS, ignore_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._check_import()

    def environment(self) -> dict[str, str]:
        """Return the variables of processes in the copy."""
        own = {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self._temporary),
            "PYTEST_ADDOPTS": IN_ONE_PROCESS,  # also of pytest within tests
        }
        return {**os.environ, **own}

    def _check_import(self) -> None:
        """Raise SystemExit if another copy of the package would be tested."""
        code = f"import importlib.util as u; print(u.find_spec({PACKAGE!r}).submodule_search_locations[0])"
        command = [sys.executable, "-c", code]
        found = subprocess.run(
            command, cwd=os.sep, env=self.environment(), capture_output=True, text=True, encoding="utf-8"
        ).stdout.strip()
        if Path(found) != self.root / PACKAGE:
            raise SystemExit(f"the copy in {self.root} is not what is imported, but {found or 'nothing'}")

    def run(self, tests: Tests, limit_seconds: float | None) -> Run:
        """Run tests until one fails.

        limit_seconds: after which they are stopped, which counts as a failure.
        Raises: Stopped if `stop` was called.
        """
        if self._is_stopped:
            raise Stopped
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        command += [*(["-m", tests.markers] if tests.markers else []), *tests.targets]
        started = time.monotonic()
        with tempfile.TemporaryFile(dir=self._temporary.parent) as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = self._wait(limit_seconds)
            output.seek(0)
            said = output.read().decode(errors="replace")
        if self._is_stopped:
            raise Stopped
        return Run(failure(code, said, limit_seconds), time.monotonic() - started)

    def _wait(self, limit_seconds: float | None) -> int | None:
        """The exit code of the process, None if it had to be stopped; then all that it started has ended, too."""
        assert self._process is not None
        try:
            return self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """End what runs in the copy, for good."""
        self._is_stopped = True
        self._kill()


def failure(code: int | None, said: str, limit_seconds: float | None) -> str:
    """What went wrong in a process of pytest, '' if nothing did. code: its exit code, None for one that was stopped.

    Raises: SystemExit if pytest was called with arguments that it does not take.
    """
    if code is None:
        return f"no end within {limit_seconds:.0f} s"
    if code in (0, NO_TESTS):
        return ""
    if code == 4:
        raise SystemExit(f"pytest cannot be called so:\n{said[-2000:]}")
    found = FAILED.search(said)
    return found[1] if found else f"pytest ended with {f'signal {-code}' if code < 0 else f'code {code}'}"


def files_of(root: Path) -> list[str]:
    """Return the files of a repository that git tracks, or would: new ones that it does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.split("\0")
    return [name for name in dict.fromkeys(names) if name and (root / name).is_file()]


def default_markers(root: Path) -> str:
    """pytest's -m for the tests that scripts/check runs: pytest refuses markers that a repository does not register."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    registered = {line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"].get("markers", [])}
    return " and ".join(f"not {name}" for name in LEFT_OUT if name in registered)
