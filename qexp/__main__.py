"""The command line: `python -m qexp`, and the console script `qexp`. `--help` answers without importing Hydra.

Its first word may be one of `cli/commands.py`, which are programs of their own: `qexp report` is the same as
`python -m qexp.report`.
"""

from __future__ import annotations

import importlib
import io
import os
import sys

from qexp.cli.commands import COMMANDS
from qexp.system.openmp import openmp_variables
from qexp.system.standard_streams import survive_closed_pipes
from qexp.version import __version__


def main() -> None:
    """Run one experiment or a sweep, or another command, and exit with 0 only if all of it is done."""
    arguments = sys.argv[1:]
    survive_closed_pipes()
    os.environ.update(openmp_variables(os.environ))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt or an arrow that the locale has no letter for
    if arguments and arguments[0] in COMMANDS:
        as_module = sys.argv[0].endswith("__main__.py")
        sys.argv[:] = [f"{'python -m ' * as_module}qexp {arguments[0]}", *arguments[1:]]
        sys.exit(importlib.import_module(COMMANDS[arguments[0]]).main())
    if "--version" in arguments:
        print(f"qexp {__version__}")
        return
    if "--help" in arguments or "-h" in arguments:
        from qexp.cli.help import help_text

        print(help_text())
        return
    from qexp.cli import run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
