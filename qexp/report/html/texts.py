"""Continuations of language models beside their references', with the differences marked.

Read from compared_texts.csv. A text is a list of [kind, words]: kind 0 is in both, 1 in the reference alone, 2 in the
run alone. So the reference is what has kind 0 and 1, and the run's text what has 0 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from qexp.report.html.tables import read_table
from qexp.results.rows import Row

FILE = "compared_texts.csv"
SAME, REFERENCE, RUN = 0, 1, 2
BUDGET_LETTERS = 200_000  # of all texts in a page
LONGEST = 3000  # letters of a text
WORDS = re.compile(r"\s+|\w+|[^\w\s]")
Segments = list[tuple[int, str]]


@dataclass(frozen=True)
class RunTexts:
    """number: place among the runs; row: of the table; texts: (prompt, reference or None, text) of each prompt."""

    number: int
    row: int
    seed: str
    texts: Sequence[tuple[str, str | None, str]]


def texts_of(row: Row, number: int, table_row: int) -> RunTexts | None:
    """Read the texts of a run; None for one that left none. Raises DamagedFileError, DiskError."""
    lines = read_table(row["folder"] / FILE, ("prompt", "text"))
    texts = [(line["prompt"], line.get("reference"), line["text"]) for line in lines]
    return RunTexts(number, table_row, str(row["config"].get("seed", "")), texts) if texts else None


def make_texts(runs: Sequence[RunTexts], budget: int = BUDGET_LETTERS) -> dict[str, Any]:
    """Return the texts for the page.

    prompts: {text, seed}; texts: {prompt, row, run, segments, is_same, has_reference}; note: what was left out, ''.
    """
    prompts: dict[tuple[int, str, str], int] = {}
    found: list[dict[str, Any]] = []
    spent, total = 0, sum(len(run.texts) for run in runs)
    for place in range(max((len(run.texts) for run in runs), default=0)):
        for run in (run for run in runs if place < len(run.texts)):
            prompt, reference, text = run.texts[place]
            if spent > budget:
                continue
            segments = mark_differences(None if reference is None else reference[:LONGEST], text[:LONGEST])
            spent += sum(len(words) for _, words in segments) + len(prompt)
            number = prompts.setdefault((place, run.seed, prompt), len(prompts))
            found.append(
                {"prompt": number, "row": run.row, "run": run.number, "segments": segments}
                | {"is_same": reference == text, "has_reference": reference is not None}
            )
    shown = [{"text": text[:LONGEST], "seed": seed} for _, seed, text in prompts]
    left = f"{len(found)} of {total} texts are in this page" if len(found) < total else ""
    is_cut = any(len(text) > LONGEST for run in runs for _, _, text in run.texts)
    cut = f"texts end after {LONGEST} letters" if is_cut else ""
    return {"prompts": shown, "texts": found, "note": "; ".join(filter(None, (left, cut)))}


def mark_differences(reference: str | None, text: str) -> Segments:
    """Return the segments of two texts, compared word by word; without a reference, the text as it is."""
    if reference is None or reference == text:
        return [(SAME, text)] if text else []
    ours, theirs = WORDS.findall(text), WORDS.findall(reference)
    segments: Segments = []
    for kind, start, stop, own_start, own_stop in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if kind == "equal":
            segments.append((SAME, "".join(theirs[start:stop])))
            continue
        both = ((REFERENCE, theirs[start:stop]), (RUN, ours[own_start:own_stop]))
        segments += [(of, "".join(words)) for of, words in both if words]
    return segments
