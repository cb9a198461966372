"""report.html from its document: a Jinja template around the data, the style and the scripts.

The page loads nothing and sends nothing: its content security policy forbids both, and lets the script run whose hash
it names, and no other. Data is JSON in which <, > and & are escaped, so that no text in it can end its element.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from qexp.report.html.document import Document, Sweep, report_document
from qexp.results.rows import Row
from qexp.system.files import write_text

FILE_NAME = "report.html"
HERE = Path(__file__).parent
STYLES = ("page.css", "table.css", "figures.css", "print.css")
SCRIPTS = (  # in the order in which they need one another; they share one scope
    "dom.js", "numbers.js", "state.js", "axes.js", "table.js", "export.js", "details.js", "plot.js", "lines.js",
    "heatmap.js", "pictures.js", "texts.js", "blind.js", "differences.js", "main.js",
)  # fmt: skip
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_html_report(
    folder: Path, title: str, sweeps: Sequence[Sweep], rows: list[Row], prepared: list[Row]
) -> tuple[Path, list[str]]:
    """Write report.html into `folder`; return its path, and a line for each file that it had to do without.

    Args:
        title: of the page.
        sweeps: (manifest, its rows) of each.
        rows: of all of them, one for each run.
        prepared: these as rows of the table, see `prepare_compared`.

    Raises: DiskError.
    """
    document = report_document(title, sweeps, rows, prepared, folder)
    write_text(folder / FILE_NAME, render_page(document))
    return folder / FILE_NAME, document["warnings"]


def render_page(document: Document) -> str:
    """Return the text of the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    script, style = _joined("scripts", SCRIPTS), _joined("styles", STYLES)
    page = environment.get_template("report.html.jinja").render(
        document=document, data=to_embedded_json(document), script=script, style=style, script_hash=_hash_of(script)
    )
    return page.encode(errors="replace").decode()  # a name of a file may hold what is no text


def to_embedded_json(value: object) -> str:
    """Return JSON that may stand in an element of a page. Raises ValueError for NaN or infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter, escape in ESCAPES.items():
        text = text.replace(letter, escape)
    return text


def _joined(folder: str, names: tuple[str, ...]) -> str:
    return "\n".join((HERE / folder / name).read_text(encoding="utf-8") for name in names)


def _hash_of(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
