"""The command line: `python -m qexp`, and the console script `qexp`. `--help` answers without importing Hydra."""

from __future__ import annotations

import io
import signal
import sys


def main() -> None:
    """Run one experiment or a sweep, and exit with 0 only if all of it is done."""
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt or an arrow that the locale has no letter for
    if "--help" in arguments or "-h" in arguments:
        from qexp.cli.help import help_text

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
        print(help_text())
        return
    from qexp.cli import run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
