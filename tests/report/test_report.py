"""The command: what it prints, writes and answers to mistakes."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qexp.report.__main__ import main
from tests.fresh_process import imported_by
from tests.report.factory import ENV, GENERATE, ROUNDTRIP, config, job, manifest, run_folder, sweep_of_six

pytestmark = pytest.mark.usefixtures("drawn_once")

WRITTEN = ("results.csv", "report.md", "table.tex", "pareto_psnr_db.png", "pareto_psnr_db.csv", "report.html")


def report_of(outputs: Path, name: str = "first") -> str:
    assert main([name, "--outputs", str(outputs)]) == 0
    return (outputs / "sweeps" / name / "report.md").read_text()


def test_command_prints_the_table_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of_six(tmp_path)
    manifest(tmp_path, "older", [], started="2025-01-01T00:00:00")
    assert main(["--outputs", str(tmp_path)]) == 0  # the latest
    printed = capsys.readouterr().out
    assert "bitsandbytes nf4" in printed
    folder = tmp_path / "sweeps/first"
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *WRITTEN,
    }
    assert re.findall(r"wrote (.*)", printed) == [str(folder / name) for name in WRITTEN]


def test_unknown_sweep_is_one_line_with_those_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of_six(tmp_path)
    assert main(["frist", "--outputs", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: sweep 'frist' is not in ")
    assert "did you mean first?" in error
    assert error.count("\n") == 1


def test_online_without_wandb_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["first", "--outputs", str(tmp_path), "--online"]) == 1
    assert "add --wandb" in capsys.readouterr().err


def test_report_compares_explains_and_links(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    text = report_of(tmp_path)
    counts = "4 done (1 reused), 1 unsupported, 1 failed."
    assert f"6 experiments with the model digits, started 2026-01-02 03:04: {counts}\n" in text
    results = [line.split(" | ") for line in text.splitlines() if re.search(r"\[key[0-3]\]", line)]
    assert [line[2] for line in results] == ["4.10", "4.10", "16.38", "16.38"]  # sorted by memory
    assert "| quanto int2" not in text.partition("## Without a result")[0]
    assert "failed: oom | out of memory: needed 9 GiB |" in text
    assert "unsupported | needs a GPU |" in text
    assert "torch 2.13.0" in text
    assert "gguf" not in text  # not installed
    assert "- commit: 0123456789ab+ (+: with changes)\n" in text
    assert "\nwhy I ran it\n" in text
    assert "```\npython -m qexp -m backend=none,bitsandbytes 'sweep.notes=why I ran it'\n```" in text
    for target in re.findall(r"\]\(([^)]*)\)", text):
        assert (tmp_path / "sweeps/first" / target).exists()
    assert len(re.findall(r"\]\(([^)]*)\)", text)) == 7  # five folders, a plot, results.csv


def test_report_tells_machines_apart_and_unites_versions(tmp_path: Path) -> None:
    for key, changes in (
        ("a", {}),
        ("b", {"versions": {"torch": "2.14.0", "torchao": "0.18.0"}}),
        ("c", {"host": "bench-2"}),
    ):
        folder = run_folder(tmp_path, key, config(), GENERATE)
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"env": ENV | changes}))
    manifest(tmp_path, "first", [job(n, key, []) for n, key in enumerate("abc")])
    text = report_of(tmp_path)
    assert "2 different machines" in text
    assert "Experiments 0, 1:" in text
    assert "torch 2.13.0 and 2.14.0, torchao 0.18.0" in text
    assert "Experiments 2:\n\n- device: cpu (Example CPU)\n- host: bench-2" in text


def test_report_of_both_tasks_has_both_plots_and_escapes_cells(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(label="a|b"), GENERATE)
    run_folder(tmp_path, "b", config(task="roundtrip"), ROUNDTRIP)
    manifest(tmp_path, "first", [job(0, "a", []), job(1, "b", [])])
    text = report_of(tmp_path)
    assert "](pareto_psnr_db.png)" in text
    assert "](pareto_sqnr_db_mean.png)" in text
    assert "| bitsandbytes a\\|b |" in text


def test_what_has_not_run_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of_six(tmp_path)
    path = tmp_path / "sweeps/first/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total": 9, "finished": None}))
    text = report_of(tmp_path)
    assert (
        "9 experiments with the model digits" in text and "1 failed, 3 not run, or cut off. The sweep has not" in text
    )
    assert (
        "9 experiments: 4 done (1 reused), 1 unsupported, 1 failed, 3 not run, or cut off\n" in capsys.readouterr().out
    )


def _remove_the_folder(outputs: Path) -> None:
    shutil.rmtree(outputs / "runs/key2")


def _cut_the_result_off(outputs: Path) -> None:
    (outputs / "runs/key2/result.json").write_text("{")


def _move_all_runs(outputs: Path) -> None:
    (outputs / "runs").rename(outputs / "elsewhere")


def _begin_the_sweep_again(outputs: Path) -> None:
    """Without the experiment whose folder is gone."""
    _remove_the_folder(outputs)
    path = outputs / "sweeps/first/manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"jobs": [one for one in content["jobs"] if one["key"] != "key2"]}))


@pytest.mark.parametrize(
    "lose",
    [_remove_the_folder, _cut_the_result_off, _move_all_runs, _begin_the_sweep_again],
    ids=lambda lose: lose.__name__,
)
def test_report_without_a_run_that_it_had_names_it_and_leaves_its_files(lose, tmp_path: Path, capsys) -> None:
    sweep_of_six(tmp_path)
    report_of(tmp_path)
    folder = tmp_path / "sweeps/first"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    lose(tmp_path)
    capsys.readouterr()
    assert main(["first", "--outputs", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {folder / 'results.csv'} has the results of runs that are gone")
    assert str(tmp_path / "runs/key2") in printed.err and printed.err.count("\n") == 1
    assert "wrote" not in printed.out and "experiments: " in printed.out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"} == before
    (folder / "results.csv").rename(tmp_path / "results.csv")  # as the message says
    assert main(["first", "--outputs", str(tmp_path)]) == 0


def test_first_report_over_a_missing_run_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of_six(tmp_path)
    _remove_the_folder(tmp_path)
    text = report_of(tmp_path)
    assert f"missing | {tmp_path / 'runs/key2'} is gone; run the experiment again |" in text
    assert "key2" in (tmp_path / "sweeps/first/results.csv").read_text()


def test_report_of_an_experiment_that_fails_now_is_written(tmp_path: Path) -> None:
    """Nothing is missing: it was run again, and its row says why it failed."""
    sweep_of_six(tmp_path)
    report_of(tmp_path)
    shutil.rmtree(tmp_path / "runs/key2")
    run_folder(tmp_path, "key2", config(), None, "failed", "oom", "out of memory")
    assert "| failed: oom |" in report_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n"])
def test_results_csv_that_is_none_is_replaced(content: bytes, tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    (tmp_path / "sweeps/first/results.csv").write_bytes(content)
    _remove_the_folder(tmp_path)
    report_of(tmp_path)
    assert (tmp_path / "sweeps/first/results.csv").read_text().startswith("number,key,")


def test_report_has_the_frechet_distance(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), GENERATE | {"quality/frechet_distance": 1.234})
    manifest(tmp_path, "first", [job(0, "a", [])])
    assert "| Fréchet distance |" in report_of(tmp_path) and "| 1.23 |" in report_of(tmp_path)


def test_report_of_nothing_but_failures(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), None, "failed", "load", "no such file")
    folder = manifest(tmp_path, "first", [job(0, "a", [], "failed", reason="load")])
    text = report_of(tmp_path)
    assert "1 experiment with the model digits, started 2026-01-02 03:04: 0 done, 1 failed." in text
    assert "## Results" not in text
    assert not list(folder.glob("*.png"))


def test_command_stays_light(tmp_path: Path) -> None:
    """Neither torch nor wandb is imported; the W&B report is the only thing that would."""
    sweep_of_six(tmp_path)
    code = "import sys; from qexp.report.__main__ import main; assert main(['--outputs', sys.argv[1]]) == 0"
    assert {"torch", "wandb", "wandb_workspaces", "pandas"}.isdisjoint(imported_by(code, tmp_path))
