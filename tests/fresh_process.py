"""Code in an interpreter of its own: what it prints, and which modules it imports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_python(code: str, *arguments: object, **options: Any) -> str:
    """Run code in a fresh interpreter, which must end well, and return its standard output."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "cwd": ROOT} | options
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], **settings)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def imported_by(code: str, *arguments: object, **options: Any) -> set[str]:
    """Return the top-level modules that a fresh interpreter has imported after some code."""
    ending = "\nimport sys; print('\\nMODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    return set(run_python(code + ending, *arguments, **options).rpartition("MODULES ")[2].split())
