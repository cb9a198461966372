"""Tests that need the fake device run in a process of their own, because a registered backend cannot be taken back.

A folder of such tests has a `conftest.py` with

    collect_ignore_glob = own_process.ignored(__file__)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(config):
        own_process.register(config, __file__)

`pytest tests/that/folder`, or one of its files or tests, then registers the device and runs them as usual. A run of
anything else leaves them out; there, a test beside the folder calls `failures` once for each of the files, so that
they are part of a run of everything too. All files of a folder share one child process, which `failures` starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PATTERN = "test_*.py"
TIMEOUT_SECONDS = 1800

_registered: list[Path] = []


def register(config: pytest.Config, conftest: str) -> None:
    """Install the device if this process runs tests of the folder only."""
    folder = Path(conftest).parent
    wanted = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    if all(path.is_relative_to(folder) for path in wanted):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what libraries compile takes longer than all tests together
        from tests.fake_device import backend

        backend.install()
        _registered.append(folder)


def is_registered() -> bool:
    return bool(_registered)


def modules(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(PATTERN))


@cache
def _run(folder: Path) -> tuple[dict[str, list[str]], str]:
    """Run all tests of a folder: (module -> one text for each test, empty if it passed; what pytest printed)."""
    command = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider", "--junitxml=/dev/stderr"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    results: dict[str, list[str]] = {}
    start = done.stderr.find("<?xml")
    for case in ElementTree.fromstring(done.stderr[start:]).iter("testcase") if start >= 0 else ():
        problems = [*case.findall("failure"), *case.findall("error")]
        text = "\n".join(f"{case.get('name')}:\n{problem.text or problem.get('message')}" for problem in problems)
        results.setdefault(case.get("classname", "").rpartition(".")[2] + ".py", []).append(text)
    return results, done.stdout + done.stderr[: max(start, 0)]


def failures(folder: Path, module: str) -> str:
    """What failed in a module of a folder; also if it has no test that ran. Empty if all is well."""
    results, output = _run(folder)
    if module not in results:
        return f"no test of {module} ran:\n{output[-4000:]}"
    return "\n\n".join(filter(None, results[module]))
