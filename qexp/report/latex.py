r"""table.tex: the table of a report for a paper, with \usepackage{booktabs} (and longtable, where it has many rows).

    \begin{table}\centering\small\input{table}\end{table}

The columns are those that a terminal has room for; rows without a result are left out, and counted in a comment. A
header has the unit in brackets, and n where it is the same in all rows. Of several seeds a cell is mean ± standard
deviation. Below the last line stands what marks and intervals mean. It compiles with pdflatex, xelatex and lualatex.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

from qexp.report.comparison import comparison_notes
from qexp.report.marks import BUSY, OTHER, differing_environments, footnotes, members_of
from qexp.report.table import TEXTS, Column, columns_that_fit, number_columns, table_cells
from qexp.results.rows import Row

LONGEST = 45  # rows of a table that stays on a page
NOTE_WIDTH = 90  # characters of a line below the table
LIGATURE = "\0"  # stands for a hyphen before another one
NAMES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}", LIGATURE: "-{}",
    "±": r"$\pm$", "×": r"$\times$", "→": r"$\rightarrow$", "≤": r"$\leq$", "≥": r"$\geq$", "∞": r"$\infty$",
    "−": "$-$", "µ": r"$\mu$", "·": r"$\cdot$", "…": r"\ldots{}", "–": "--", "—": "---", "°": r"$^\circ$",
    "²": "$^2$", "³": "$^3$", "‖": r"$\Vert$", "\u00a0": "~", BUSY: "$^{*}$", OTHER: r"$^{\dag}$",
}  # fmt: skip


def table_tex(prepared: Sequence[Row]) -> str:
    """Return the text of table.tex. prepared: rows of the table, see `prepare_compared`."""
    done = [row for row in prepared if row["status"] == "done"]
    comments = [r"% \usepackage{booktabs}"]
    if len(done) < len(prepared):
        comments.append(f"% {len(prepared) - len(done)} rows without a result are left out")
    if not done:
        return "\n".join([*comments, "% no row has a result"]) + "\n"
    marked = footnotes(done)
    cells, columns = _marked_cells(done), number_columns(done)
    hidden = {"status"} if marked else {"status", "#"}  # notes name rows by their number
    names = [name for name in columns_that_fit(cells, columns) if name not in hidden]
    common = {name: n for name in names if name in columns and (n := _common_n(done, columns[name])) is not None}
    heads = [_header(name, columns.get(name), common.get(name)) for name in names]
    lines = [_line(_cell(line[name], name in TEXTS, common.get(name)) for name in names) for line in cells]
    kind, repeated = ("longtable", [r"\endhead"]) if len(lines) > LONGEST else ("tabular", [])
    if repeated:
        comments.append(r"% \usepackage{longtable}; outside of a table environment")
    align = "".join("l" if name in TEXTS else "r" for name in names)
    head = [rf"\begin{{{kind}}}{{{align}}}", r"\toprule", _line(heads), r"\midrule", *repeated]
    notes = _note_lines([*marked, *comparison_notes(done)], len(names))
    return "\n".join([*comments, *head, *lines, r"\bottomrule", *notes, rf"\end{{{kind}}}"]) + "\n"


def escape_latex(text: str) -> str:
    """Return a text that LaTeX prints as it is. A character that its fonts lack is named: [U+4F60]."""
    return "".join(NAMES.get(one) or _letter(one) for one in re.sub("-(?=-)", LIGATURE, text))


def _letter(one: str) -> str:
    """Return ASCII, and letters of European languages, which pdflatex takes as UTF-8; another one by its number."""
    is_printed = 32 <= ord(one) < 127 or ("\u00c0" <= one <= "\u017f" and unicodedata.category(one).startswith("L"))
    return one if is_printed else f"{{[}}U+{ord(one):04X}{{]}}"


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _marked_cells(done: Sequence[Row]) -> list[dict[str, str]]:
    """Return the texts of the table, runs of another environment marked at their backend: no status is shown."""
    differing = differing_environments(done)
    cells = table_cells(list(done))
    for row, line in zip(done, cells, strict=True):
        if any(member["number"] in differing for member in members_of(row)):
            line["backend"] += f" {OTHER}"
    return cells


def _header(name: str, column: Column | None, n: str | None) -> str:
    """Return 'PSNR (dB, n = 200)': a table has the unit as the last word of a header."""
    if column is None:
        return escape_latex(name)
    part = {"value": "", "interval": "95%", "versus": "vs"}[column.part]
    quantity = name.removesuffix(f" {part}").removesuffix(f" {column.unit}")
    has_unit = column.unit and column.part != "versus" and column.unit not in re.split(r"\W", quantity)
    words = [escape_latex(word) for word in (column.unit if has_unit else "", part) if word]
    brackets = ", ".join([*words, *([f"$n={n}$"] if n is not None else [])])
    return escape_latex(quantity) + (f" ({brackets})" if brackets else "")


def _common_n(done: Sequence[Row], column: Column) -> str | None:
    """Return the number of samples of a metric, if every row that has the metric has the same."""
    metric = column.metric
    if not metric.count_name or column.part != "value":
        return None
    counts = {row["metrics"].get(metric.count_name) for row in done if row["metrics"].get(metric.name) is not None}
    return f"{counts.pop():g}" if len(counts) == 1 and None not in counts else None


def _cell(text: str, is_text: bool, n: str | None) -> str:
    """Return a cell, numbers as in print: minus signs, ranges, powers of ten; without n where the header has it."""
    if n is not None:
        text = text.replace(f" n={n}", "")
    body = escape_latex(re.sub(rf" ([{re.escape(BUSY + OTHER)}])(?= |$)", r"\1", text))
    if is_text:
        return body
    body = re.sub(r"(\d)e([+-])0*(\d+)", lambda m: rf"{m[1]}$\times10^{{{m[2].strip('+')}{m[3]}}}$", body)
    return re.sub(r"(?<=\d)-(?=\d)", "--", re.sub(r"(?<![\w.${])-(?=\d)", "$-$", body))


def _note_lines(notes: Sequence[str], columns: int) -> list[str]:
    lines = [line for note in notes for line in textwrap.wrap(note, NOTE_WIDTH)]
    return [rf"\multicolumn{{{columns}}}{{@{{}}l@{{}}}}{{\footnotesize {escape_latex(line)}}} \\" for line in lines]
