"""Texts with their differences marked; steps that are thinned; settings that are shared."""

import json
from pathlib import Path

import pytest

from qexp.errors import DamagedFileError
from qexp.report.html.appearance import FAMILIES, SPARE, family_colors, offload_marker
from qexp.report.html.settings import shared_settings, typed_command
from qexp.report.html.steps import steps_of
from qexp.report.html.tables import number_of, read_table
from qexp.report.html.texts import RunTexts, make_texts, mark_differences
from tests.report.factory import config
from tests.report.html.made_sweeps import made_run, write_csv
from tests.report.html.made_sweeps import steps_of as made_steps


@pytest.mark.parametrize(
    ("reference", "text"),
    [("a b c", "a x c"), ("", "new"), ("old", ""), ("same", "same"), ("one\n two", "one two"), ("日本 語", "日本語")],
)
def test_both_texts_can_be_read_from_the_segments(reference: str, text: str) -> None:
    segments = mark_differences(reference, text)
    assert "".join(words for kind, words in segments if kind in (0, 1)) == reference
    assert "".join(words for kind, words in segments if kind in (0, 2)) == text
    assert all(words for _, words in segments)


def test_only_the_words_that_differ_are_marked() -> None:
    assert mark_differences("France is Paris.", "France is Lyon.") == [
        (0, "France is "),
        (1, "Paris"),
        (2, "Lyon"),
        (0, "."),
    ]


def test_texts_beyond_the_budget_are_left_out_and_counted() -> None:
    texts = [("prompt", "reference", "text " * 20)] * 10
    found = make_texts([RunTexts(0, 0, "0", texts), RunTexts(1, 1, "0", texts)], budget=500)
    assert 2 <= len(found["texts"]) < 20
    assert {text["run"] for text in found["texts"]} == {0, 1}
    assert found["note"] == f"{len(found['texts'])} of 20 texts are in this page"


def test_steps_are_thinned_with_their_ends_and_memory_is_above_the_baseline(tmp_path: Path) -> None:
    folder = made_run(tmp_path, "a", config(), {})
    write_csv(folder / "history.csv", made_steps(100.0, 0.5, count=1000))
    row = {"status": "done", "folder": folder, "metrics": {"load/baseline_host_gib": 0.4, "load/seconds": 0.25}}
    found = steps_of(row, 3, 2, points=50)
    assert found is not None
    assert len(found["step"]) == 50
    assert (found["step"][0], found["step"][-1]) == (1, 1000)
    assert found["host"][0] == pytest.approx(0.432 - 0.4)
    assert found["error"][-1] == pytest.approx(0.5)
    assert found["seconds"][0] == pytest.approx(0.2)  # the first step takes twice as long
    assert "device" not in found  # 0 everywhere
    assert found["load"] == {"seconds": 0.25, "host": None, "device": None, "trace": []}
    assert (found["run"], found["row"]) == (3, 2)


def test_memory_while_loading_is_above_the_same_baseline(tmp_path: Path) -> None:
    folder = made_run(tmp_path, "a", config(), {})
    write_csv(folder / "history.csv", made_steps(100.0, 0.5))
    write_csv(folder / "load_memory.csv", [{"seconds": n / 100, "host_gib": 0.4 + n / 1000} for n in range(200)])
    row = {"status": "done", "folder": folder, "metrics": {"load/baseline_host_gib": 0.4, "load/seconds": 2.0}}
    found = steps_of(row, 0, 0, points=40)
    assert found is not None
    trace = found["load"]["trace"]
    assert len(trace) == 40
    assert trace[0] == [0.0, 0.0] and trace[-1] == [1.99, 0.199]


def test_a_run_that_was_not_scored_has_its_memory(tmp_path: Path) -> None:
    folder = made_run(tmp_path, "a", config(), {})
    (folder / "memory.csv").write_text("step,step_ms,device_gib\n1,10,0.5\n2,10,0.6\n")
    found = steps_of({"status": "done", "folder": folder, "metrics": {}}, 0, 0)
    assert found is not None
    assert found["device"] == [0.5, 0.6]
    assert "error" not in found and "host" not in found


def test_settings_are_stored_once_and_read_back_whole() -> None:
    runs = [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {}, {"a": "2", "c": "only here"}, {"a": "1", "b": "x"}]
    base, differences = shared_settings(runs)
    for run, difference in zip(runs, differences, strict=True):
        merged = {**base, **difference} if run else {}
        assert {name: value for name, value in merged.items() if value is not None} == run
    assert differences[0] == {"c": None}  # few values: what most have is in `base`


def test_commands_are_quoted_for_a_shell() -> None:
    row = {"overrides": ["task.prompt=['a cat']", "seed=1"], "folder": None}
    assert typed_command(row) == """python -m qexp 'task.prompt=['"'"'a cat'"'"']' seed=1"""
    assert "hydra.mode=RUN" in typed_command({"overrides": ["experiment=backend_pareto", "backend=none"]})


def test_colors_and_markers_depend_on_the_name_alone() -> None:
    assert family_colors("torchao") == FAMILIES["torchao"]
    assert family_colors("rowwise") == family_colors("rowwise")
    assert family_colors("rowwise") in SPARE
    assert offload_marker("block×2→cpu") == offload_marker("block→disk") == "diamond"
    assert (
        len({offload_marker(name) for name in ("none", "leaf→disk", "block→cpu", "model→cpu", "sequential→cpu")}) == 5
    )


def contrast(one: str, other: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""
    levels = []
    for color in (one, other):
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_colors_stand_out_from_the_page() -> None:
    for light, dark in (*FAMILIES.values(), *SPARE):
        assert contrast(light, "#ffffff") >= 4.5 and contrast(dark, "#14171b") >= 4.5, (light, dark)


def test_tables_that_are_no_tables_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    assert read_table(path, ("a",)) == []
    path.write_text("a,b\n1\n")
    with pytest.raises(DamagedFileError, match=r"x\.csv: is damaged \(a line of it lacks a, b\)"):
        read_table(path, ("a", "b"))
    assert number_of("", path) is None
    assert number_of("inf", path) is None
    assert number_of("1.23456789", path, 3) == 1.23
    with pytest.raises(DamagedFileError, match="'soon' is no number"):
        number_of("soon", path)
    assert json.dumps(number_of("0.1", path)) == "0.1"
