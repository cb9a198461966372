"""docs/benchmarks.md: every row of its tables is a row of the raw results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
GIB, MIB = 2**30, 2**20
SHARED_NUMBERS = {"n": "d", "slowest_step_ms": ".0f", "other_cores": ".2f", "times_quiet": ".2f"}
NAMES = {"text_encoder_2": "T5 encoder", "torchao int4wo": "int4wo"}


def stored(name: str) -> list[dict[str, Any]]:
    return list(json.loads((DOCS / "bench" / name).read_text(encoding="utf-8"))["rows"])


def table(section: str) -> list[list[str]]:
    """The rows of the table in a section, without its head."""
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert text is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text[1], re.M)][
        2:
    ]


def loading(name: str = "load_warm.json") -> list[list[str]]:
    rows = []
    for row in stored(name):
        ours, theirs = row["qexp"], row["diffusers"]
        held = [one.get("memory", one) for one in (ours, theirs)]  # older results have it beside the times
        peaks, seconds = [one["peak_total_bytes"] for one in held], [one["wall_seconds"] for one in (ours, theirs)]
        rows.append([
            row["format"], f"{held[0]['quantized_bytes'] / MIB:.0f}",
            *(f"{peak / MIB:.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}",
            *(f"{value:.1f}" for value in seconds), f"{seconds[1] / seconds[0]:.1f}",
        ])  # fmt: skip
    return rows


def stored_files() -> list[list[str]]:
    rows = []
    for row in stored("load_flux.json"):
        cells = [row["format"], row["case"]]
        for kind in ("wall_seconds", "touched_seconds"):
            ours, theirs = row["qexp"][kind], row["diffusers"][kind]
            cells += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}"]
        rows.append(cells)
    return rows


def full_size() -> list[list[str]]:
    sizes = ("file_bytes", "weights_bytes", "loaded_peak_total_bytes", "peak_total_bytes")
    return [
        [
            f"{NAMES.get(row['component'], row['component'])}, {NAMES.get(row['format'], row['format'])}",
            *(f"{row[name] / GIB:.2f}" for name in sizes),
            *(f"{row[name]:.0f}" for name in ("load_seconds", "forward_seconds")),
        ]
        for row in stored("full_size.json")
    ]


def offloading() -> list[list[str]]:
    programs = {"qexp leaf", "qexp block", "diffusers leaf", "diffusers block", "accelerate"}
    return [
        [f"{row[program][f'{state}_1_seconds']:.2f}" for state in ("cold", "warm")]
        for row in stored("offload.json")
        for program in row
        if program in programs and "cold_1_seconds" in row[program]
    ]


def sweeps() -> list[list[str]]:
    result = json.loads((DOCS / "bench" / "sweep.json").read_text(encoding="utf-8"))
    return [
        [
            str(row["experiments"]),
            *(
                value
                for kind in ("wall", "cpu")
                for value in (
                    *(f"{row[start][f'{kind}_seconds']:.0f}" for start in ("fork", "spawn")),
                    f"{row[f'{kind}_ratio']:.1f}",
                )
            ),
        ]
        for row in result["sweeps"]
    ]


def shared() -> list[list[str]]:
    return [
        [
            *(row[name] for name in ("backend", "threads", "beside")),
            "{step_ms:.1f} ({least_step_ms:.1f}, {largest_step_ms:.1f})".format(**row),
            *(f"{row[name]:{shape}}" for name, shape in SHARED_NUMBERS.items()),
        ]
        for row in stored("shared.json")
    ]


TABLES = {
    "Loading": loading,
    "Loading from the call to the model": lambda: loading("load_sd3.json"),
    "Stored files, warm and cold": stored_files,
    "A T5 encoder, beside transformers": lambda: loading("load_t5.json"),
    "Full size": full_size,
    "Sweeps": sweeps,
    "A shared machine": shared,
}


@pytest.mark.parametrize(("section", "rows"), TABLES.items())
def test_table_has_the_numbers_of_the_raw_results(section: str, rows: Any) -> None:
    assert sorted(table(section)) == sorted(rows())


def test_steps_of_offloading_are_those_of_the_raw_results() -> None:
    assert sorted(row[1:3] for row in table("Offloading to disk")) == sorted(offloading())
