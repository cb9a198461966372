"""How a command was typed: for the usage lines of programs that have two names."""

from __future__ import annotations

import sys
from pathlib import Path


def program_name(command: str) -> str:
    """'qexp report', 'python -m qexp report' or 'python -m qexp.report', as the command line began."""
    started = sys.argv[0]
    if started.endswith(f"qexp {command}"):  # __main__ has put it together
        return started
    return f"python -m qexp.{command}" if Path(started).suffix == ".py" else f"qexp {command}"
