"""`python -m qexp.report [sweep]`: the table of a sweep, and its results.csv, reports and plots, from files alone.

    python -m qexp.report                      the latest sweep
    python -m qexp.report first_look --baseline "torchao int8wo"      which are better or worse on the same samples
    python -m qexp.report first_look --wandb   also a W&B report; for runs tracked offline its specification

Everything is written into outputs/sweeps/<sweep>/. Importing this module imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.errors import ConfigError, LoadError, QexpError
from qexp.report.comparison import comparison_notes, prepare_compared, read_all_samples
from qexp.report.table import format_table
from qexp.results.manifest import count_line
from qexp.results.rows import Row, find_sweep, read_manifest, rows_of_sweep
from qexp.system.command_parser import CommandParser
from qexp.system.files import write_bytes, write_text
from qexp.system.program_name import program_name
from qexp.system.standard_streams import survive_closed_pipes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, or 1 with one line that says what is wrong."""
    options = _report_parser().parse(arguments)
    try:
        if options.online and not options.wandb:
            raise ConfigError("--online says where the W&B report goes, and there is none; add --wandb")
        name = find_sweep(options.outputs, options.sweep)
        rows = rows_of_sweep(options.outputs, name)
        for warning in read_all_samples(rows):
            print(f"warning: {warning}", file=sys.stderr)
        prepared = prepare_compared(rows, options.baseline)
        print("\n".join([format_table(prepared), "", *comparison_notes(prepared)]))
        print(count_line(rows, read_manifest(options.outputs, name).get("total")))
        for path in write_report(Path(options.outputs), name, rows, prepared):
            print(f"wrote {path}")
        if options.wandb:
            from qexp.report.wandb_report import publish_report

            print(publish_report(Path(options.outputs), name, rows, online=options.online or None))
    except QexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_report(outputs: Path, name: str, rows: list[Row], prepared: list[Row]) -> list[Path]:
    """Write results.csv, report.md, report.html and the plots of a sweep; returns their paths.

    prepared: see `prepare_compared`.
    Raises: LoadError if results.csv has numbers of runs that are gone since: it is all that is left of them.
    """
    from qexp.report.html.page import write_html_report
    from qexp.report.markdown import report_markdown
    from qexp.report.pareto import file_name, pareto_png, plotted_metrics
    from qexp.report.results_csv import lost_runs, results_csv

    folder = outputs / "sweeps" / name
    if lost := lost_runs(folder / "results.csv", rows):
        raise LoadError(
            f"{folder / 'results.csv'} has the results of runs that are gone or damaged since, so it, the reports and "
            "the plots are left as they are; run them again, or move results.csv elsewhere for a report without them: "
            f"{', '.join(map(str, lost))}"
        )
    plots = []
    for metric in plotted_metrics():
        picture = pareto_png(prepared, metric, f"{name}: memory against quality")
        if picture is not None:
            write_bytes(folder / file_name(metric), picture)
            plots.append(file_name(metric))
    write_text(folder / "results.csv", results_csv(rows))
    manifest = read_manifest(outputs, name)
    write_text(folder / "report.md", report_markdown(manifest, rows, prepared, folder, plots))
    page, warnings = write_html_report(folder, f"Sweep {name}", [(manifest, rows)], rows, prepared)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return [*(folder / file for file in ("results.csv", "report.md", *plots)), page]


def _report_parser() -> CommandParser:
    parser = CommandParser(prog=program_name("report"), description="Compare the experiments of a sweep.")
    parser.add_argument("sweep", nargs="?", help="its name, a folder in <outputs>/sweeps (default: the latest)")
    parser.add_argument("--outputs", default="outputs", help="where results are kept (default: outputs)")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="compare every row with this one on the same samples (better, worse or undecided): the name of a backend "
        "as in the table, or the key of a run",
    )
    parser.add_argument(
        "--wandb",
        action="store_true",
        help="also a W&B report: online if the runs were tracked online, else its specification as wandb_report.json",
    )
    parser.add_argument(
        "--online",
        action="store_true",
        help="with --wandb: save it online although the runs were tracked offline (after `wandb sync`)",
    )
    return parser


if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
