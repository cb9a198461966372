"""What a report is about: names, keys and paths, of one outputs folder or of several, whole or copied in parts."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from qexp.errors import ConfigError, DamagedFileError
from qexp.report.__main__ import main
from qexp.report.comparison import prepare_compared
from qexp.report.selection import Selection, select
from qexp.report.table import table_cells
from tests.report.factory import GENERATE, config, job, manifest, run_folder, sweep_of_six

pytestmark = pytest.mark.usefixtures("drawn_once")


def two_sweeps(outputs: Path) -> None:
    """first: six experiments. second: one of its own, key0 of the first, and one that has never got a run."""
    sweep_of_six(outputs)
    run_folder(outputs, "own", config("quanto", "int8"), GENERATE | {"memory/weights_gib": 0.008})
    jobs = [job(1, "own", ["backend=quanto"]), job(2, "key0", ["backend=none"], reused=True)]
    jobs.append(job(3, "", ["backend=other"], "unsupported", reason="unsupported", message="not here"))
    manifest(outputs, "second", jobs, started="2026-01-03T00:00:00")


def shown(selection: Selection) -> list[dict[str, str]]:
    for row in selection.rows:
        row["samples"] = {}
    return table_cells(prepare_compared(selection.rows))


def keys(selection: Selection) -> list[str]:
    return [row["key"] for row in selection.rows]


def test_key_that_leads_out_of_the_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    for number, key in enumerate((str(tmp_path / "secrets"), "../secrets", "..")):
        manifest(tmp_path, f"sweep{number}", [job(0, key, [])])
        with pytest.raises(DamagedFileError, match="which is no key"):
            select(tmp_path, [f"sweep{number}"])


def test_reports_of_other_runs_have_other_folders(tmp_path: Path) -> None:
    two_sweeps(tmp_path)
    folders = {select(tmp_path, words).folder for words in (["key0", "own"], ["key1", "own"], ["first", "second"])}
    assert len(folders) == 3 and select(tmp_path, ["key0", "own"]).folder in folders


def test_several_sweeps_are_one_table_in_which_a_run_is_once(tmp_path: Path) -> None:
    two_sweeps(tmp_path)
    selection = select(tmp_path, ["first", "second"])
    assert keys(selection) == ["key0", "key1", "key2", "key3", "key4", "", "own", ""]
    assert [row["number"] for row in selection.rows] == list(range(1, 9))
    assert selection.rows[0]["sweep"] == "first, second"
    assert {line["#"]: line["sweep"] for line in shown(selection)} == {
        "1": "first, second", "2": "first", "3": "first", "4": "first", "5": "first", "6": "first", "7": "second",
        "8": "second",
    }  # fmt: skip
    assert (selection.title, selection.folder) == ("first + second", tmp_path / "reports/first+second")


def test_one_sweep_keeps_its_numbers_and_has_no_column_for_it(tmp_path: Path) -> None:
    two_sweeps(tmp_path)
    selection = select(tmp_path, ["first"])
    assert [row["number"] for row in selection.rows] == list(range(6))
    assert selection.folder == tmp_path / "sweeps/first"
    assert "sweep" not in shown(selection)[0]


def test_without_a_word_it_is_the_latest_sweep_or_all_runs(tmp_path: Path) -> None:
    two_sweeps(tmp_path)
    assert select(tmp_path).title == "second"
    shutil.rmtree(tmp_path / "sweeps")
    assert keys(select(tmp_path)) == ["key0", "key1", "key2", "key3", "key4", "own"]
    assert select(tmp_path).title == "6 runs"


def test_runs_are_named_by_key_and_by_path_beside_sweeps(tmp_path: Path) -> None:
    two_sweeps(tmp_path)
    alone = select(tmp_path, ["key2"])
    assert (alone.title, keys(alone), alone.folder) == ("run key2", ["key2"], tmp_path / "reports/run_key2")
    shutil.copytree(tmp_path / "runs/key3", tmp_path / "elsewhere/renamed")
    both = select(tmp_path, ["second", str(tmp_path / "elsewhere/renamed"), "key0"])
    assert keys(both) == ["own", "key0", "", "key3"]  # by its key, whatever its folder is called; key0 is in the sweep
    assert [row["sweep"] for row in both.rows] == ["second", "second", "second", ""]


@pytest.mark.parametrize("word", ["copied", "copied/", "copied/sweeps/first", "copied/sweeps/first/", "."])
def test_copied_outputs_folder_works_by_its_path(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of_six(tmp_path / "outputs")
    shutil.move(tmp_path / "outputs", tmp_path / "copied")
    monkeypatch.chdir(tmp_path / "copied/sweeps/first" if word == "." else tmp_path)
    assert main([word]) == 0
    assert "4 done (1 reused), 1 unsupported, 1 failed" in capsys.readouterr().out
    assert (tmp_path / "copied/sweeps/first/report.md").is_file()


@pytest.mark.parametrize("place", ["../../runs", "../runs", "runs", "outputs/runs"])
def test_copied_sweep_finds_its_runs_beside_it(place: str, tmp_path: Path) -> None:
    sweep_of_six(tmp_path / "outputs")
    sweep = tmp_path / "mail/deep/first"
    shutil.copytree(tmp_path / "outputs/sweeps/first", sweep)
    shutil.copytree(tmp_path / "outputs/runs", Path(os.path.normpath(sweep / place)))
    shutil.rmtree(tmp_path / "outputs")
    assert [row["status"] for row in select(tmp_path / "outputs", [str(sweep)]).rows[:4]] == ["done"] * 4


def test_copied_sweep_without_runs_finds_those_of_outputs_and_reports_the_rest(tmp_path: Path) -> None:
    sweep_of_six(tmp_path / "outputs")
    shutil.copytree(tmp_path / "outputs/sweeps/first", tmp_path / "mail/first")
    shutil.rmtree(tmp_path / "outputs/runs/key1")
    statuses = [row["status"] for row in select(tmp_path / "outputs", [str(tmp_path / "mail/first")]).rows]
    assert statuses == ["done", "missing", "done", "done", "failed", "unsupported"]


def test_outputs_folder_is_all_its_sweeps_and_the_runs_of_none(tmp_path: Path) -> None:
    two_sweeps(tmp_path / "theirs")
    run_folder(tmp_path / "theirs", "lone", config("quanto", "int4"), GENERATE)
    selection = select(tmp_path / "mine", [str(tmp_path / "theirs")])
    assert selection.title == "first + second + run lone"
    assert "lone" in keys(selection)


def test_copies_of_a_run_are_one_row_and_other_results_of_it_are_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sweep_of_six(tmp_path / name)
    paths = [str(tmp_path / name / "sweeps/first") for name in ("a", "b")]
    selection = select(tmp_path, paths)
    assert selection.title == "first (a) + first (b)"
    assert keys(selection) == ["key0", "key1", "key2", "key3", "key4", "", ""]  # what never got a run is not known
    result = tmp_path / "b/runs/key2/result.json"
    faster = json.loads(result.read_text())
    faster["metrics"]["time/step_ms"] = 1.0  # on another machine
    result.write_text(json.dumps(faster))
    selection = select(tmp_path, paths)
    assert sorted(keys(selection)) == ["", "", "key0", "key1", "key2", "key2", "key3", "key4"]
    lines = [line for line in shown(selection) if line["backend"] == "bitsandbytes nf4" and line["offload"] == "none"]
    assert sorted((line["sweep"], line["step ms"]) for line in lines) == [("first (a)", "12.0"), ("first (b)", "1.0")]


def test_csv_says_the_sweep_and_where_the_run_is(tmp_path: Path) -> None:
    two_sweeps(tmp_path)
    assert main(["first", "second", "--outputs", str(tmp_path), "--out", str(tmp_path / "paper/here")]) == 0
    with (tmp_path / "paper/here/results.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["sweep"] for line in lines[:2]] == ["first, second", "first"]
    assert Path(os.path.normpath(tmp_path / "paper/here" / lines[0]["folder"])) == tmp_path / "runs/key0"
    text = (tmp_path / "paper/here/report.md").read_text()
    assert "# Sweeps first + second\n" in text
    assert "**second**: 3 experiments with the model digits, started 2026-01-03 00:00: 2 done (1 reused)" in text
    assert "second: " in text.partition("## Without a result")[2]


def test_report_elsewhere_keeps_the_numbers_of_runs_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_sweeps(tmp_path)
    arguments = ["first", "second", "--outputs", str(tmp_path), "--out", str(tmp_path / "paper")]
    assert main(arguments) == 0
    before = (tmp_path / "paper/results.csv").read_bytes()
    assert main(["key1", "--outputs", str(tmp_path), "--out", str(tmp_path / "paper")]) == 0  # its runs are all there
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "runs/own")
    capsys.readouterr()
    for words in (arguments, ["first", *arguments[2:]]):
        assert main(words) == 1
        assert str(tmp_path / "runs/own") in capsys.readouterr().err
    assert (tmp_path / "paper/results.csv").read_bytes() == before


MISTAKES = {
    "frist": "sweep 'frist' is not in .*did you mean first.*the key of a run, or the path",
    "x.zip": "x.zip is a zip file; unpack it",
    "empty": "empty holds neither a sweep .* nor a run",
    "references/key": "is a reference, which runs are compared with",
    "w" * 300: "is not in ",
    "": "sweep '' is not in ",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_word_that_names_nothing_is_one_clear_message(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_of_six(tmp_path / "outputs")
    shutil.copytree(tmp_path / "outputs/runs/key0", tmp_path / "references/key")
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=MISTAKES[word]):
        select("outputs", [word])


def test_manifest_of_something_else_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "a web application"}')
    with pytest.raises(DamagedFileError, match="is not that of a sweep"):
        select(tmp_path, [str(tmp_path / "web")])


def test_outputs_that_hold_nothing_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no sweep"):
        select(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no sweep and no run"):
        select(tmp_path / "nowhere", ["first"])


def test_folder_that_cannot_be_written_is_said_before_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of_six(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["first", "--outputs", str(tmp_path), "--out", str(tmp_path / "file/folder")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "--out" in printed.err


def test_figures_of_an_earlier_report_go_and_a_users_own_files_stay(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    out = tmp_path / "out"
    assert main(["first", "--outputs", str(tmp_path), "--out", str(out), "--pdf"]) == 0
    made = {path.name for path in out.glob("pareto_*.pdf")}
    (out / "pareto_mine.pdf").touch()
    assert made and main(["first", "--outputs", str(tmp_path), "--out", str(out)]) == 0
    assert {path.name for path in out.glob("pareto_*.pdf")} == {"pareto_mine.pdf"}
    assert (out / "pareto_psnr_db.png").exists()
