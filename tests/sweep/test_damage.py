"""Damaged files of earlier runs: reported, kept, and computed again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qexp.config.schema import IsolationConfig, MetricsConfig, RunConfig
from qexp.errors import DiskError
from qexp.results.manifest import Manifest
from qexp.results.run_folder import RunFolder
from qexp.sweep.damage import set_damage_aside
from qexp.sweep.job import JobRow, run_job
from qexp.sweep.run_key import reference_key, run_key
from tests.products import exhaustive, representatives
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config

STATUS = {"status": "done", "pid": 1, "started": "2026-01-01T00:00:00.000+00:00"}
DAMAGE = [
    ("status.json", b"", "Expecting value"),
    ("status.json", b"{}", "status, pid, started is missing or wrong"),
    ("status.json", b"[1]", "must hold a JSON object"),
    ("status.json", b"\xff\xfe\x00", "utf"),
    ("status.json", json.dumps(STATUS | {"status": "finished"}).encode(), "status is missing or wrong"),
    ("status.json", json.dumps(STATUS | {"started": "yesterday"}).encode(), "started is missing or wrong"),
    ("status.json", json.dumps(STATUS | {"seconds": "3"}).encode(), "seconds is missing or wrong"),
    ("result.json", b"{}", "it lacks key, config, metrics, env"),
    ("result.json", b'{"key": "0', "Unterminated string"),
    (
        "result.json",
        b'{"key": "0000000000000000", "config": {}, "metrics": {}, "env": {}}',
        "is of run 0000000000000000",
    ),
    ("result.json", b"[" * 100_000, "recursion"),
    ("plan.json", b"{", "Expecting property name"),
    ("hub.json", b"x", "Expecting value"),
    ("config.yaml", b"model: [", "while parsing"),
    ("config.yaml", b"", "must hold a configuration"),
]
BROKEN_OUTPUTS = [b"", b"none", b"\x00" * 8, (2**40).to_bytes(8, "little"), b"\x02" + b"\x00" * 7 + b"{}more"]


def settings(tmp_path: Path) -> RunConfig:
    return run_config(tmp_path, isolation=IsolationConfig(mode="inline"))


def run(config: RunConfig, **options) -> JobRow:
    return run_job(config, [], **(FAKES | options))


def runs(config: RunConfig) -> list[str]:
    return [line.partition("/")[0] for line in Path(config.paths.outputs, "ran.txt").read_text().splitlines()]


def folders(config: RunConfig) -> tuple[RunFolder, RunFolder]:
    outputs = Path(config.paths.outputs)
    return RunFolder(outputs / "runs" / run_key(config)), RunFolder(outputs / "references" / reference_key(config))


@pytest.mark.parametrize(
    ("name", "content", "reason", "resume"),
    [
        (*case, resume) if (number % 2 == 0) == (resume == "missing") else exhaustive(*case, resume)
        for number, case in enumerate(DAMAGE)
        for resume in ("missing", "failed")
    ],
)
def test_a_damaged_file_of_a_run_is_kept_and_the_run_done_again(
    name: str, content: bytes, reason: str, resume: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path)
    first = run(config)
    folder, _ = folders(config)
    (folder.path / name).write_bytes(content)
    again = run(replace(config, resume=resume))
    assert (again.status, again.reused, again.metrics) == ("done", False, first.metrics)
    assert runs(config) == ["references", "runs", "runs"]
    assert (folder.path / "damaged" / name).read_bytes() == content
    (line,) = (line for line in capfd.readouterr().out.splitlines() if "is damaged" in line)
    assert str(folder.path / name) in line and reason in line and "delete" not in line
    assert run(config).reused


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(DAMAGE[number][:2] for number in (1, 7, 9)),
        *representatives(
            [("outputs.safetensors", content) for content in BROKEN_OUTPUTS],
            [("outputs.safetensors", content) for content in (b"none", BROKEN_OUTPUTS[-1])],
        ),
    ],
)
def test_a_damaged_reference_is_computed_again_once(name: str, content: bytes, tmp_path: Path) -> None:
    config = settings(tmp_path)
    run(config)
    _, reference = folders(config)
    (reference.path / name).write_bytes(content)
    component = config.components["transformer"]
    for pattern in ("a", "b"):
        other = replace(config, components={"transformer": replace(component, skip_modules=(pattern,))})
        assert run(other).status == "done"
    assert runs(config) == ["references", "runs", "references", "runs", "runs"]
    assert (reference.path / "damaged" / name).exists()


@pytest.mark.parametrize(("damaged", "runs_again"), [("reference", "references"), ("run", "runs")])
def test_damaged_outputs_cost_nothing_until_more_is_scored(damaged: str, runs_again: str, tmp_path: Path) -> None:
    config = settings(tmp_path)
    run(config)
    folder, reference = folders(config)
    ((reference if damaged == "reference" else folder).path / "outputs.safetensors").write_bytes(b"none")
    assert run(config).reused
    row = run(replace(config, metrics=MetricsConfig(names=("ssim",))))
    assert (row.status, row.rescored) == ("done", damaged == "reference")
    assert runs(config) == ["references", "runs", runs_again]


def test_what_was_damaged_twice_is_kept_twice(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for content in ("1", "2"):
        folder.write_text("status.json", content)
        assert set_damage_aside(folder, print) == ["status.json"]
        folder.clear()
    assert (tmp_path / "damaged/status.json").read_text() == "1"
    assert (tmp_path / "damaged/status.json.1").read_text() == "2"


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("status.json", "{}")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DiskError, match="cannot be read"):
        set_damage_aside(folder, print)
    assert (tmp_path / "status.json").exists()


def test_a_damaged_manifest_of_an_earlier_sweep_is_kept_and_the_sweep_starts(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "test")
    manifest.folder.mkdir(parents=True)
    manifest.path.write_text("{")
    manifest.start(["x"], 2)
    assert manifest.read()["total"] == 2
    assert (manifest.folder / "manifest.json.damaged").read_text() == "{"
