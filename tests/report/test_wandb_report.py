"""The W&B report of a sweep: its specification offline, and saved on a server stand-in."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from qexp.errors import ConfigError
from qexp.report.__main__ import main
from qexp.report.comparison import prepare_compared
from qexp.report.selection import Selection, select
from qexp.report.wandb_report import publish_report
from tests.report.factory import GENERATE, ROUNDTRIP, config, job, manifest, run_folder, sweep_of_six
from tests.tracking.wandb_server import WandbServer, use_server

pytestmark = pytest.mark.usefixtures("drawn_once")

KEYS = [f"key{number}" for number in range(5)]  # of the runs that have a folder


def publish(selection: Selection, online: bool | None = None) -> list[str]:
    for row in selection.rows:
        row["samples"] = {}
    return publish_report(selection, prepare_compared(selection.rows), selection.folder, online=online)


def spec_of(outputs: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((outputs / "sweeps/first/wandb_report.json").read_text())
    return stored["spec"]


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]


def run_sets(spec: dict[str, Any]) -> list[dict[str, Any]]:
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    return [run_set for grid in grids for run_set in grid["runSets"]]


def conditions(run_set: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(item["key"]["name"], item["op"], item["value"]) for item in run_set["filters"]["filters"]]


def test_offline_writes_its_specification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network, a home or a key."""
    importlib.import_module("matplotlib.font_manager")  # it writes a list of fonts into a home that has none
    sweep_of_six(tmp_path)
    (tmp_path / "home").mkdir()
    for name in [name for name in os.environ if name.startswith(("XDG", "HTTP"))]:
        monkeypatch.delenv(name)
    use_server(monkeypatch, tmp_path / "home", "http://127.0.0.1:9", key=None)
    monkeypatch.chdir(tmp_path)
    assert main(["first", "--outputs", str(tmp_path), "--wandb"]) == 0
    folder = tmp_path / "sweeps/first"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"wrote {folder / 'wandb_report.json'}"
    assert printed[-2].startswith("W&B table: sweeps/first/wandb/offline-run-")
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "results.csv", "report.md", "report.html", "table.tex", "pareto_psnr_db.png",
        "pareto_psnr_db.csv", "wandb_report.json", "wandb",
    }  # fmt: skip
    assert not list((tmp_path / "home").rglob("*"))


def test_run_set_is_the_runs_by_their_ids(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    path = tmp_path / "sweeps/first/manifest.json"
    content = json.loads(path.read_text())
    content["jobs"].append(content["jobs"][0] | {"number": 9})  # the same experiment twice
    path.write_text(json.dumps(content))
    publish(select(tmp_path))
    sets = [conditions(run_set) for run_set in run_sets(spec_of(tmp_path))]
    assert [one for one in sets if one[0][2] == KEYS] == [[("name", "IN", KEYS)]] * 2


def test_several_sweeps_have_a_run_set_each(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    run_folder(tmp_path, "other", config("quanto", "int8"), GENERATE)
    manifest(tmp_path, "second", [job(1, "other", ["backend=quanto"]), job(2, "key0", ["backend=none"], reused=True)])
    selection = select(tmp_path, ["first", "second"])
    publish(selection)
    spec = json.loads((selection.folder / "wandb_report.json").read_text())["spec"]
    first, second = run_sets(spec)[:2]
    assert (first["name"], conditions(first)) == ("first", [("name", "IN", KEYS)])
    assert (second["name"], conditions(second)) == ("second", [("name", "IN", ["other", "key0"])])


def test_panels_compare_memory_quality_time_and_images(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    publish(select(tmp_path))
    spec = spec_of(tmp_path)
    (scatter,) = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:memory/weights_gib", "summary:quality/psnr_db")
    bars = [panel["config"]["metrics"] for panel in panels(spec) if panel["viewType"] == "Bar Chart"]
    measured = ("memory/weights_gib", "load/peak_host_gib", "time/step_ms", "quality/psnr_db", "quality/class_accuracy")
    assert bars == [[f"summary_metrics.{name}"] for name in measured]
    (media,) = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Media Browser"]
    assert media["mediaKeys"] == ["images/grid", "images/reference", "images/difference"]
    intro, results = [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"]
    assert "6 experiments" in intro
    assert "python -m qexp -m backend=none,bitsandbytes" in intro
    assert results.startswith("## Results") and "| 24.5" in results and "failed: oom" in results
    assert "](" not in intro + results  # links lead to files that are not on the server
    (parallel,) = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Parallel Coordinates Plot"]
    axes = [column["accessor"] for column in parallel["columns"]]
    assert "config:components.value.transformer.backend.label" in axes
    assert {"summary:memory/weights_gib", "summary:quality/psnr_db"} <= set(axes)


def test_roundtrip_shows_its_layers_instead_of_images(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(task="roundtrip"), ROUNDTRIP)
    manifest(tmp_path, "first", [job(0, "a", [])])
    publish(select(tmp_path))
    spec = spec_of(tmp_path)
    kinds = [panel["viewType"] for panel in panels(spec)]
    assert "Media Browser" not in kinds
    assert kinds[-1] == "Weave"
    assert '"layers"' in json.dumps(panels(spec)[-1])
    (scatter,) = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Scatter Plot"]
    assert scatter["yAxis"] == "summary:roundtrip/sqnr_db_mean"


def test_online_saves_the_report_and_updates_it(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of_six(tmp_path)
    arguments = ["first", "--outputs", str(tmp_path), "--wandb", "--online"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    (saved,) = server.reports.values()
    assert printed.out.splitlines()[-1].startswith(f"W&B report: {server.url}/tester/qexp/reports/")
    assert printed.out.splitlines()[-1].endswith("--report0")
    assert printed.err == ""
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("tester", "qexp", "qexp: first")
    assert json.loads(saved["spec"])["blocks"][1] == spec_of(tmp_path)["blocks"][1]
    assert conditions(run_sets(json.loads(saved["spec"]))[0]) == [("name", "IN", KEYS)]
    assert main(arguments) == 0
    assert list(server.reports) == ["report0"]
    assert len(server.variables("upsertView")) == 2


def test_runs_tracked_online_make_an_online_report(server: WandbServer, tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    for path in tmp_path.glob("runs/*/config.yaml"):
        stored = yaml.safe_load(path.read_text())
        stored["tracking"] |= {"mode": "online", "entity": "tester"}
        path.write_text(yaml.safe_dump(stored))
    assert publish(select(tmp_path))[-1].startswith("W&B report: http")
    assert len(server.reports) == 1


def test_what_cannot_be_reported_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    server: WandbServer,
) -> None:
    sweep_of_six(tmp_path)

    def with_tracking(**changes: Any) -> Selection:
        selection = select(tmp_path)
        for row in (row for row in selection.rows if row["config"]):
            row["config"]["tracking"] |= changes
        return selection

    with pytest.raises(ConfigError, match="no run that was tracked"):
        publish(with_tracking(mode="none"))
    with pytest.raises(ConfigError, match=r"project tester/other cannot be used.*wandb sync"):
        publish(with_tracking(project="other"), online=True)
    use_server(monkeypatch, tmp_path, server.url, key=None)
    with pytest.raises(ConfigError, match="no API key"):
        publish(select(tmp_path), online=True)
