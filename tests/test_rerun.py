import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from qexp import rerun
from qexp.config.schema import IsolationConfig, PathsConfig
from qexp.results.run_folder import RunFolder
from qexp.sweep.job import run_job
from qexp.sweep.run_key import run_key
from tests.sweep import fake_experiment
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run."""
    monkeypatch.setattr(rerun, "run_job", partial(run_job, **FAKES))
    config = run_config(tmp_path, isolation=IsolationConfig(mode="inline"))
    run_job(config, ["seed=0"], **FAKES)
    return RunFolder(Path(config.paths.outputs, "runs", run_key(config)))


def change(folder: RunFolder, **metrics: float | None) -> None:
    result = folder.read_result()
    result["metrics"] |= {name.replace("__", "/"): value for name, value in metrics.items()}
    folder.write_json("result.json", result)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rerun", *map(str, arguments)])
    return rerun.main()


def test_equal_metrics_are_reproduced(folder, monkeypatch, capsys) -> None:
    change(folder, time__step_ms=3.0, load__peak_host_gib=1.0)
    assert main(monkeypatch, folder.path) == 0
    output = capsys.readouterr().out
    # weights and psnr; step_ms, load seconds and the peak differ from run to run
    assert "reproduced: all 2 metrics are equal" in output
    assert "time/step_ms: 3.0 -> 1.5 (-0.5 relative)" in output
    assert (folder.path / "overrides.txt").read_text() == "seed=0\n"


@pytest.mark.parametrize(
    "old, shown", [(2.0, "2.0 -> 1.0 (-0.5 relative)"), (None, "null -> 1.0"), (0.0, "0.0 -> 1.0")]
)
def test_a_difference_is_shown_and_fails(old, shown, folder, monkeypatch, capsys) -> None:
    change(folder, quality__psnr_db=old)
    assert main(monkeypatch, folder.path) == 1
    output = capsys.readouterr().out
    assert "NOT reproduced: 1 of 2 metrics differ" in output and f"quality/psnr_db: {shown}\n" in output


def test_a_metric_that_is_gone_is_a_difference(folder, monkeypatch, capsys) -> None:
    change(folder, quality__gone=1.0)
    assert main(monkeypatch, folder.path) == 1
    assert "quality/gone: 1.0 -> absent" in capsys.readouterr().out


def test_another_outputs_folder_keeps_the_old_run(folder, tmp_path, monkeypatch) -> None:
    before = folder.read_status()
    assert main(monkeypatch, folder.path, "--outputs", tmp_path / "second") == 0
    assert folder.read_status() == before
    again = RunFolder(tmp_path / "second" / "runs" / folder.key)
    assert replace(again.read_status(), started="", finished=None, seconds=0, pid=0) == replace(
        before, started="", finished=None, seconds=0, pid=0
    )


def test_what_has_changed_since_is_named(folder, tmp_path, monkeypatch, capsys) -> None:
    result = folder.read_result()
    result["env"]["versions"]["torch"] = "1.0"
    folder.write_json("result.json", result)
    write_checkpoint(tmp_path / "checkpoint", value=2.0)
    main(monkeypatch, folder.path)
    output = capsys.readouterr().out
    assert "torch 1.0 -> " in output
    assert f"not {folder.key}: the checkpoint or the rules of keys changed" in output


def test_a_folder_without_a_run_is_one_clear_message(tmp_path, monkeypatch, capsys) -> None:
    assert main(monkeypatch, tmp_path) == 1
    assert "is not a run folder" in capsys.readouterr().err


def _cut_off(folder: RunFolder, name: str) -> None:
    path = folder.path / name
    path.write_bytes(path.read_bytes()[:40])


def _write(folder: RunFolder, name: str, content: str) -> None:
    (folder.path / name).write_text(content)


def _empty_lists_of_components(folder: RunFolder) -> None:
    path = folder.path / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"components": []}))


def _take_the_result_of_another_run(folder: RunFolder) -> None:
    folder.write_json("result.json", folder.read_result() | {"key": "0123456789abcdef"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: _cut_off(folder, "result.json"), "result.json: is damaged"),
        (
            lambda folder: _write(folder, "result.json", "{}"),
            "result.json: is damaged (it lacks key, config, metrics, env)",
        ),
        (lambda folder: change(folder, quality__psnr_db="31"), "quality/psnr_db is no number"),
        (_take_the_result_of_another_run, "it is of run 0123456789abcdef"),
        (lambda folder: _write(folder, "config.yaml", "- a\n"), "config.yaml: is damaged"),
        (lambda folder: _write(folder, "config.yaml", "model: {"), "config.yaml: is damaged"),
        (lambda folder: _write(folder, "config.yaml", "modell: 1\n"), "config.yaml is damaged, or of another version"),
        (_empty_lists_of_components, "components=[] must be a group"),
        (lambda folder: (folder.path / "config.yaml").unlink(), "is not a run folder"),
        (lambda folder: (folder.path / "overrides.txt").unlink(), "overrides.txt cannot be read"),
        (lambda folder: (folder.path / "overrides.txt").write_bytes(b"\xff\xfe"), "overrides.txt cannot be read"),
    ],
)
def test_damaged_run_is_one_clear_error_and_left_as_it_is(damage, words, folder, monkeypatch, capsys) -> None:
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    assert main(monkeypatch, folder.path) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before


def test_a_result_that_was_moved_away_is_computed_anew(folder, tmp_path, monkeypatch, capsys) -> None:
    """What the error of a damaged one proposes."""
    _cut_off(folder, "result.json")
    (folder.path / "result.json").rename(tmp_path / "result.json")
    assert main(monkeypatch, folder.path) == 0
    assert "nothing to compare with" in capsys.readouterr().out and folder.read_result()


def test_it_runs_from_any_directory_although_paths_were_relative(tmp_path, monkeypatch, capsys) -> None:
    """Also once the outputs folder is elsewhere."""
    monkeypatch.setattr(rerun, "run_job", partial(run_job, **FAKES))
    start, other = tmp_path / "start", tmp_path / "other"
    other.mkdir()
    write_checkpoint(start / "models" / "tiny")
    monkeypatch.chdir(start)
    relative = replace(run_config(start).model, path="models/tiny")
    config = run_config(start, model=relative, isolation=IsolationConfig(mode="inline"), paths=PathsConfig("outputs"))
    assert run_job(config, [], **FAKES).status == "done"
    key = run_key(config)
    stored = yaml.safe_load((start / "outputs/runs" / key / "config.yaml").read_text())
    assert stored["model"]["path"] == str(start / "models/tiny") and stored["paths"]["outputs"] == str(
        start / "outputs"
    )

    monkeypatch.chdir(other)
    assert main(monkeypatch, f"../start/outputs/runs/{key}") == 0
    assert [*other.iterdir()] == []
    (start / "outputs").rename(other / "results")
    assert main(monkeypatch, f"results/runs/{key}") == 0
    assert not (start / "outputs").exists() and "reproduced" in capsys.readouterr().out


def test_a_run_that_was_moved_out_of_its_outputs_runs_there_again(folder, tmp_path, monkeypatch, capsys) -> None:
    moved = tmp_path / "kept" / "my best run"
    moved.parent.mkdir()
    folder.path.rename(moved)
    assert main(monkeypatch, moved) == 0
    assert RunFolder(moved).read_result() and folder.read_result()
    assert f"the new run goes into {folder.path.parents[1]}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.joinpath("kept").iterdir()] == ["my best run"]
    assert main(monkeypatch, moved) == 1  # of two runs, none is overwritten
    assert "--outputs" in capsys.readouterr().err
    assert main(monkeypatch, moved, "--outputs", tmp_path / "second") == 0


def broken(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ending", ["failed", "interrupted", "killed"])
def test_the_old_result_is_kept_until_there_is_a_new_one(ending, folder, monkeypatch, capsys) -> None:
    """A killed one leaves what is aside; the next call puts it back."""
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    old_behaviour = fake_experiment.BEHAVIOURS[1]
    monkeypatch.setitem(fake_experiment.BEHAVIOURS, 1, fake_experiment.BEHAVIOURS[3] if ending == "failed" else broken)
    if ending == "failed":
        assert main(monkeypatch, folder.path) == 1
    else:
        if ending == "killed":
            put_back = rerun.put_back
            monkeypatch.setattr(rerun, "put_back", lambda folder: None)
        with pytest.raises(KeyboardInterrupt):
            main(monkeypatch, folder.path)
        if ending == "killed":
            assert folder.read_result() is None
            put_back(folder)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before
    assert "the old result is kept" in capsys.readouterr().out
    monkeypatch.setitem(fake_experiment.BEHAVIOURS, 1, old_behaviour)
    assert main(monkeypatch, folder.path) == 0
    assert [path.name for path in folder.path.parent.iterdir()] == [folder.key]


def test_a_reference_is_refused(folder, monkeypatch, capsys) -> None:
    (reference,) = (folder.path.parents[1] / "references").iterdir()
    assert main(monkeypatch, reference) == 1
    assert "is a reference" in capsys.readouterr().err
    assert RunFolder(reference).read_result()
