"""The command line: Hydra's run, flags, help and the wording of composition errors."""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Do what `python -m qexp` does with these arguments; returns its exit code, 0 only if every experiment is done."""
    from qexp.cli import command_line  # imports Hydra, which --help does without

    return command_line.run(arguments)
