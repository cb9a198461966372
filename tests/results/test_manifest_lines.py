import json
from pathlib import Path

from qexp.results.manifest import JobRow, Manifest, lines_of


def row(number: int, status: str = "done") -> JobRow:
    return JobRow(number, f"key{number}", (f"seed={number}",), "label", status)


def test_added_experiments_are_read_before_and_after_the_end(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "s")
    manifest.start([], 3)
    for number in (3, 1):
        values = manifest.add(row(number))
    assert [job["number"] for job in values["jobs"]] == [1, 3] and values["total"] == 3
    assert Manifest(tmp_path, "s").read() == values
    assert json.loads(manifest.path.read_text())["jobs"] == []
    finished = manifest.finish()
    assert finished["jobs"] == values["jobs"] and not manifest.added.exists()
    assert json.loads(manifest.path.read_text()) == finished


def test_experiment_that_is_added_twice_counts_as_it_ended_last(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "s")
    manifest.start([], 1)
    manifest.add(row(1, "failed"))
    values = manifest.add(row(1))
    assert [(job["number"], job["status"]) for job in values["jobs"]] == [(1, "done")]


def test_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "s")
    manifest.start([], 3)
    manifest.add(row(1))
    with manifest.added.open("a") as stream:
        stream.write('{"number": 2, "key')
    values = manifest.add(row(3))
    assert [job["number"] for job in values["jobs"]] == [1, 3]


def test_file_that_was_begun_anew_is_read_anew(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "s")
    manifest.start([], 2)
    manifest.add(row(1))
    manifest.start([], 2)
    assert manifest.add(row(2))["jobs"][0]["number"] == 2
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [each["a"] for each in lines_of(path, "first")] == [1, 2]
    path.write_text('{"a": 3}\n{"a": 4}\n{"a": 5}\n')
    assert [each["a"] for each in lines_of(path, "second")] == [3, 4, 5]
