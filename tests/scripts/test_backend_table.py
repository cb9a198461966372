"""docs/backends.md has every type there is, with the numbers that the script measures."""

import datetime
import re

import pytest

from qexp.doctor.options import trials
from scripts import backend_table as script

MACHINE = {"torch": "2.13.0", "versions": {"a": "1", "b": None}, "devices": {"cpu": "A CPU"}, "cores": 2, "python": "3"}
ROW = {"option": "a x=1", "backend": "b", "label": "t", "bits_per_weight": 4.5, "sqnr_db": 20.7321, "cpu": "runs"}


def stored_rows() -> dict[str, list[str]]:
    """The cells of each row of the document, by what is typed for it."""
    generated = script.DOCUMENT.read_text(encoding="utf-8").partition(script.BEGIN)[2].partition(script.END)[0]
    lines = [line.strip("| ").split(" | ") for line in generated.splitlines() if line.startswith("| ")][1:]
    return {cells[2].strip("`").replace(" backend.", " "): cells for cells in lines}


def test_the_document_is_in_step_with_the_backends() -> None:
    assert list(stored_rows()) == list(trials([])), "run python scripts/backend_table.py"


@pytest.mark.parametrize("name", ["bitsandbytes", "gguf_q5_0", "packed_uint4 quant_type=uint5wo", "torchao_float8wo"])
def test_the_numbers_in_the_document_are_those_that_are_measured(name: str) -> None:
    measured, cells = script.measure(trials([])[name], script.gaussian()), stored_rows()[name]
    assert cells[3] == f"{measured['bits_per_weight']:.3f}"
    assert float(cells[4]) == pytest.approx(measured["sqnr_db"], abs=0.01)


def test_nothing_is_said_of_a_device_that_was_not_there() -> None:
    text = script.DOCUMENT.read_text(encoding="utf-8")
    if "cuda:0 (" not in text:
        assert all(cells[6] == script.ABSENT for cells in stored_rows().values())


def test_what_a_type_needs_is_noted_once() -> None:
    needs = "needs: compute capability 8.9 | here: cpu"
    rows = [
        ROW | {"cuda": "runs"},
        ROW | {"cpu": needs, "cuda": script.ABSENT, "bits_per_weight": None, "sqnr_db": None},
    ]
    text = script.table(MACHINE, [*rows, rows[1]], datetime.date(2026, 1, 2))
    assert "| b | t | `a backend.x=1` | 4.500 | 20.73 | runs | runs |" in text
    assert text.count("| b | t | `a backend.x=1` |  |  | needs (1) | not measured here |") == 2
    assert text.endswith("\n\n1. compute capability 8.9 \\| here: cpu")
    assert "Measured 2026-01-02 on cpu (A CPU), 2 cores; python 3, torch 2.13.0, a 1, b not installed." in text


def test_only_the_generated_part_is_replaced() -> None:
    document = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.inserted(document, "new") == f"before\n{script.BEGIN}\n\nnew\n\n{script.END}\nafter\n"
    with pytest.raises(SystemExit, match=re.escape(script.END)):
        script.inserted("nothing", "new")
