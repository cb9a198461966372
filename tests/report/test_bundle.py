"""A report in one file: what is in it, what is not, and that the commands work where it is unpacked."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qexp.report.__main__ import main
from qexp.report.bundle import constraints_of, safe_name
from tests.report.factory import GENERATE, config, job, manifest, run_folder, sweep_of_six

pytestmark = pytest.mark.usefixtures("drawn_once")

ROOT = Path(__file__).parents[2]


def unpacked(outputs: Path, *arguments: str) -> Path:
    """Make a bundle and unpack it; the outputs that it was made of are gone then."""
    place = outputs.parent / "theirs"
    assert main(["first", "--outputs", str(outputs), "--bundle", str(outputs.parent / "x.zip"), *arguments]) == 0
    with zipfile.ZipFile(outputs.parent / "x.zip") as file:
        for name in file.namelist():
            assert re.fullmatch(r"x/[\w.+=/-]+", name) and ".." not in name.split("/"), name
        file.extractall(place)
    shutil.rmtree(outputs)
    return place / "x"


def test_report_works_where_the_bundle_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of_six(tmp_path / "outputs")
    folder = unpacked(tmp_path / "outputs", "--baseline", "key1", "--pdf")
    names = {path.name for path in (folder / "report").iterdir()}
    assert {"report.md", "results.csv", "table.tex", "pareto_psnr_db.png", "pareto_psnr_db_1col.pdf"} <= names
    text = (folder / "report/report.md").read_text()
    for target in re.findall(r"\]\(([^)]*)\)", text):
        assert (folder / "report" / target).exists(), target
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main([]) == 0
    assert "4 done (1 reused), 1 unsupported, 1 failed" in capsys.readouterr().out
    assert (folder / "outputs/sweeps/first/results.csv").is_file()


def test_bundle_has_configurations_environments_and_logs_but_no_outputs(tmp_path: Path) -> None:
    sweep_of_six(tmp_path / "outputs")
    run = tmp_path / "outputs/runs/key2"
    for name in ("outputs.safetensors", "logprobs.safetensors", "worker.log", ".lock", "wandb/run.wandb", "damaged/x"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    (run / "link").symlink_to("/etc/hostname")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"reference": "ref0"}))
    (tmp_path / "outputs/references/ref0").mkdir(parents=True)
    (tmp_path / "outputs/references/ref0/outputs.safetensors").write_text("reference")
    shutil.copytree(tmp_path / "outputs", tmp_path / "again")
    folder = unpacked(tmp_path / "outputs")
    assert {path.name for path in (folder / "outputs/runs/key2").iterdir()} == {
        "config.yaml", "env.json", "status.json", "result.json", "history.csv", "images", "worker.log",
    }  # fmt: skip
    assert not (folder / "outputs/references").exists()
    assert "outputs.safetensors) is not in here" in (folder / "README.txt").read_text()
    assert (folder / "constraints.txt").read_text() == "bitsandbytes==0.50.2\n# qexp==0.1.0\ntorch==2.13.0\n"
    shutil.rmtree(folder)
    folder = unpacked(tmp_path / "again", "--with-outputs")
    assert (folder / "outputs/runs/key2/logprobs.safetensors").read_text() == "logprobs.safetensors"
    assert (folder / "outputs/references/ref0/outputs.safetensors").read_text() == "reference"


def test_bundle_names_files_that_it_lacks(tmp_path: Path) -> None:
    container = config()
    container["model"]["path"] = "/models/their own"
    run_folder(tmp_path / "outputs", "a", container, GENERATE)
    manifest(tmp_path / "outputs", "first", [job(1, "a", []), job(2, "b", [])])
    folder = unpacked(tmp_path / "outputs")
    text = (folder / "README.txt").read_text()
    assert "    model.path=/models/their own\n" in text
    assert "Missing or damaged, and so not in here: b." in text
    assert "    qexp report first\n    qexp rerun outputs/runs/a\n" in text
    assert "missing" in (folder / "report/report.md").read_text()


def test_bundle_of_several_sweeps_with_names_that_no_file_has(tmp_path: Path) -> None:
    names = ["a: b/é", "a? b/é"]
    for number, name in enumerate(names):
        run_folder(tmp_path / "outputs", f"k{number}", config("quanto", f"int{number}"), GENERATE)
        folder = manifest(tmp_path / "outputs", f"s{number}", [job(1, f"k{number}", [])])
        folder.rename(folder.parent / name.replace("/", " "))
    words = [name.replace("/", " ") for name in names]
    path = tmp_path / "b.zip"
    assert main([*words, "--outputs", str(tmp_path / "outputs"), "--bundle", str(path)]) == 0
    with zipfile.ZipFile(path) as file:
        found = {name.split("/")[3] for name in file.namelist() if name.startswith("b/outputs/sweeps/")}
    assert found == {"a_b_é", "a_b_é-2"}


@pytest.mark.parametrize("name", ["..", "/etc/passwd", "a/../../b", ".hidden", "C:\\x", "", "…"])
def test_names_in_a_bundle_lead_nowhere_else(name: str) -> None:
    assert re.fullmatch(r"[\w+=-][\w.+=-]*", safe_name(name))


def test_versions_that_differ_are_not_demanded() -> None:
    rows = [
        {"env": {"versions": {"torch": version, "numpy": "2.4.0", "gguf": None}}} for version in ("2.13.0", "2.14.0")
    ]
    assert constraints_of(rows) == "numpy==2.4.0\n# torch==2.13.0\n# torch==2.14.0\n"


def test_mistakes_are_said_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        run_folder(tmp_path / name, "same", config(), GENERATE | {"time/step_ms": float(ord(name))})
        manifest(tmp_path / name, "first", [job(1, "same", [])])
    first, second = (str(tmp_path / name / "sweeps/first") for name in "ab")
    for arguments, words in (
        ([first, "--bundle", str(tmp_path / "x.tar")], "must end with .zip"),
        ([first, "--with-outputs"], "add --bundle"),
        ([first, second, "--bundle", str(tmp_path / "x.zip")], "there are two of same; make two bundles"),
        ([first, "--bundle", "/proc/none/x.zip"], "--bundle"),
    ):
        assert main([*arguments, "--outputs", str(tmp_path)]) == 1
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


def test_bundle_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of_six(tmp_path / "outputs")
    path = tmp_path / "x.zip"
    path.write_text("the old one")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", fail)
    assert main(["first", "--outputs", str(tmp_path / "outputs"), "--bundle", str(path)]) == 1
    assert "free space there" in capsys.readouterr().err
    assert path.read_text() == "the old one" and [one.name for one in tmp_path.glob("*x.zip*")] == ["x.zip"]


@pytest.mark.exhaustive
def test_rerun_reproduces_a_run_where_the_bundle_is_unpacked(tmp_path: Path) -> None:
    """A real run of the embedded model, by the commands that the README of the bundle names."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}

    def qexp(folder: Path, *words: str) -> str:
        command = [sys.executable, "-m", "qexp", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    mine = tmp_path / "mine"
    mine.mkdir()
    quick = ("task.num_images=4", "task.num_inference_steps=2", "tracking=none", "-m", "sweep.name=first")
    qexp(mine, "backend=torchao", *quick)
    folder = unpacked(mine / "outputs")
    (command,) = re.findall(r"^    qexp (rerun .*)$", (folder / "README.txt").read_text(), re.MULTILINE)
    assert "reproduced: all" in qexp(folder, *command.split())
    assert "1 experiment: 1 done" in qexp(folder, "report", "first")
