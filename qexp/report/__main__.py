"""`python -m qexp.report [sweep …]`: a table of sweeps and runs, and files with all of it, from files alone.

    python -m qexp.report                      the latest sweep
    python -m qexp.report first_look second    two sweeps in one table; also paths, and keys of runs
    python -m qexp.report first_look --baseline "torchao int8wo"      which are better or worse on the same samples
    python -m qexp.report first_look --pdf     also figures for a paper; table.tex is there always
    python -m qexp.report first_look --bundle first_look.zip          all of it in one file, for a colleague
    python -m qexp.report first_look --wandb   also a W&B report; for runs tracked offline its specification

Everything is written into the sweep's folder, of several into <outputs>/reports/<names>, or where --out says. Importing
this module imports no torch.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from qexp.errors import ConfigError, LoadError, QexpError
from qexp.report.comparison import comparison_notes, prepare_compared, read_all_samples
from qexp.report.selection import Selection, select
from qexp.report.table import format_table
from qexp.results.manifest import count_line
from qexp.results.numbers import format_memory
from qexp.results.rows import Row
from qexp.system.command_parser import CommandParser
from qexp.system.files import check_writable, write_bytes
from qexp.system.program_name import program_name
from qexp.system.standard_streams import survive_closed_pipes

FIGURES = ("pdf", "svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, or 1 with one line that says what is wrong."""
    options = _report_parser().parse(arguments)
    try:
        if options.online and not options.wandb:
            raise ConfigError("--online says where the W&B report goes, and there is none; add --wandb")
        if options.with_outputs and options.bundle is None:
            raise ConfigError("--with-outputs says what is in a bundle, and there is none; add --bundle <file>.zip")
        selection = select(options.outputs, options.sweeps)
        folder = selection.folder if options.out is None else options.out
        if options.out is not None:
            check_writable(folder, "--out")
        if options.bundle is not None:
            check_writable(options.bundle.parent, "--bundle")
        prepared = print_table(selection, options.baseline)
        formats = [name for name in FIGURES if getattr(options, name)]
        for path in write_report(selection, prepared, folder, formats):
            print(f"wrote {path}")
        if options.bundle is not None:
            print(_pack(selection, options, formats))
        if options.wandb:
            from qexp.report.wandb_report import publish_report

            print(*publish_report(selection, prepared, folder, online=options.online or None), sep="\n")
    except QexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def print_table(selection: Selection, baseline: str | None) -> list[Row]:
    """Print the table and what is in it; return its rows (`prepare_compared`)."""
    for warning in read_all_samples(selection.rows):
        print(f"warning: {warning}", file=sys.stderr)
    prepared = prepare_compared(selection.rows, baseline)
    print("\n".join([format_table(prepared), "", *comparison_notes(prepared)]))
    print(count_line(selection.rows, selection.manifest["total"]))
    return prepared


def write_report(selection: Selection, prepared: list[Row], folder: Path, formats: Sequence[str] = ()) -> list[Path]:
    """Write results.csv, report.md, report.html, table.tex, plots and their numbers; return their paths.

    Args:
        prepared: rows of the table, see `prepare_compared`.
        formats: of figures for papers: pdf, svg.

    Raises: LoadError if results.csv has numbers of runs that are gone since: it is all that is left of them.
    """
    from qexp.report.html.page import write_html_report
    from qexp.report.latex import table_tex
    from qexp.report.markdown import report_heading, report_markdown
    from qexp.report.results_csv import lost_runs, results_csv

    if lost := lost_runs(folder / "results.csv", selection.rows):
        raise LoadError(
            f"{folder / 'results.csv'} has the results of runs that are gone or damaged since, so it, the reports and "
            "the plots are left as they are; run them again, move results.csv elsewhere for a report without them, or "
            f"write into another folder with --out: {', '.join(map(str, lost))}"
        )
    files = dict(_figures(prepared, selection.title, formats))
    texts = {
        "results.csv": results_csv(selection.rows, folder),
        "report.md": report_markdown(selection, prepared, folder, [name for name in files if name.endswith(".png")]),
        "table.tex": table_tex(prepared),
    }
    files = {name: text.encode() for name, text in texts.items()} | files
    for name, data in files.items():
        write_bytes(folder / name, data)
    for name in _figure_names() - files.keys():  # of an earlier report, and of other numbers
        (folder / name).unlink(missing_ok=True)
    sweeps = [(sweep.manifest, sweep.rows) for sweep in selection.sweeps]
    page, warnings = write_html_report(folder, report_heading(selection), sweeps, selection.rows, prepared)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return [*(folder / name for name in files), page]


def _figure_names() -> set[str]:
    """Return the names of all files that `_figures` may yield."""
    from qexp.report.pareto import file_name, plotted_metrics
    from qexp.report.pareto_plot import PAPER

    endings = [".png", ".csv", *(f"_{width}.{kind}" for width in PAPER for kind in FIGURES)]
    return {file_name(metric, ending) for metric in plotted_metrics() for ending in endings}


def _figures(prepared: list[Row], title: str, formats: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each plot, of the figures for papers, and of the numbers behind them."""
    from qexp.report.pareto import file_name, plotted_metrics, points_csv, points_of
    from qexp.report.pareto_plot import PAPER, SCREEN, draw_pareto

    for metric in plotted_metrics():
        if points := points_of(prepared, metric):
            yield file_name(metric), draw_pareto(points, metric, f"{title}: memory against quality", SCREEN, "png")
            for kind in formats:
                for width, style in PAPER.items():
                    yield file_name(metric, f"_{width}.{kind}"), draw_pareto(points, metric, "", style, kind)
            yield file_name(metric, ".csv"), points_csv(points, metric).encode()


def _pack(selection: Selection, options: Namespace, formats: Sequence[str]) -> str:
    """Write the bundle; returns a line that says what is in it."""
    from qexp.report.bundle import write_bundle

    def report(staged: Selection, folder: Path) -> list[Path]:
        list(read_all_samples(staged.rows))  # what cannot be read was said before
        return write_report(staged, prepare_compared(staged.rows, options.baseline), folder, formats)

    size = write_bundle(options.bundle, selection, report, with_outputs=options.with_outputs)
    return f"wrote {options.bundle}: {size.runs} runs, {size.files} files, {format_memory(size.nbytes / 2**30)}"


def _report_parser() -> CommandParser:
    parser = CommandParser(prog=program_name("report"), description="Compare the experiments of sweeps, and runs.")
    parser.add_argument(
        "sweeps",
        nargs="*",
        metavar="sweep",
        help="a sweep's name (<outputs>/sweeps), the key of a run, or the path of a sweep's, a run's or an outputs "
        "folder (default: the latest sweep)",
    )
    parser.add_argument("--outputs", default="outputs", help="where results are kept (default: outputs)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the report is written (default: the sweep's folder; of several <outputs>/reports/<names>)",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="compare every row with this one on the same samples (better, worse or undecided): the name of a backend "
        "as in the table, the key of a run, or #3 for row 3",
    )
    for kind in FIGURES:
        parser.add_argument(
            f"--{kind}",
            action="store_true",
            help=f"also figures for papers as {kind.upper()}, in one column and in two",
        )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.zip",
        help="also one file with the report and all that it is made from; where it is unpacked, report and rerun work",
    )
    parser.add_argument(
        "--with-outputs", action="store_true", help="with --bundle: what the models produced, too, and the references"
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
