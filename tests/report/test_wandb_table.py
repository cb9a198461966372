"""The table of a report as a W&B run: read back from its file, and from a server after `wandb sync` of a sweep."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qexp.experiments.stored import run_config_from_container
from qexp.report.__main__ import main
from qexp.report.comparison import prepare_compared, read_all_samples
from qexp.report.selection import select
from qexp.report.wandb_table import run_id, table_rows
from qexp.results.samples import write_samples
from qexp.results.uncertainty import mean_interval
from qexp.tracking.wandb_run import log_run
from tests.report.factory import GENERATE, config, job, manifest, run_folder, sweep_of_seeds, sweep_of_six
from tests.tracking.wandb_file import read_wandb
from tests.tracking.wandb_server import WandbServer, sync

pytestmark = pytest.mark.usefixtures("drawn_once")

PSNR = np.random.default_rng(0).normal(30.0, 4.0, 12)


def with_samples(outputs: Path, key: str) -> None:
    values = {f"image {n}": (float(value), 1.0) for n, value in enumerate(PSNR)} | {"image 12": (float("inf"), 1.0)}
    write_samples(outputs / "runs" / key, 0, {"quality/psnr_db": values})


def lines_of(outputs: Path, name: str = "first") -> list[dict[str, Any]]:
    rows = select(outputs, [name]).rows
    list(read_all_samples(rows))
    return list(table_rows(prepare_compared(rows)))


def test_numbers_are_numbers_with_interval_n_and_unit(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    with_samples(tmp_path, "key2")
    nf4, nf4_leaf, none, *_ = lines_of(tmp_path)
    assert (nf4["weights MiB"], nf4["PSNR dB"], nf4["PSNR dB is exact"]) == (0.004 * 1024, 24.5, False)
    assert (nf4["PSNR dB 95% low"], nf4["PSNR dB 95% high"]) == mean_interval(PSNR)
    assert (nf4_leaf["PSNR dB 95% low"], none["PSNR dB"], none["PSNR dB is exact"]) == (None, None, True)
    assert nf4["images"] == tmp_path / "runs/key2/images/grid.png"
    failed = next(line for line in lines_of(tmp_path) if line["status"] == "failed: oom")
    assert (failed["reason"], failed["PSNR dB"], failed["images"]) == ("out of memory:\n needed 9 GiB", None, None)


def test_seeds_have_their_deviation(tmp_path: Path) -> None:
    nf4, int8 = lines_of(tmp_path, sweep_of_seeds(tmp_path))
    assert (nf4["PSNR dB"], nf4["PSNR dB ±"], nf4["seeds"]) == (20.0, 10.0, "3")
    assert (int8["PSNR dB ±"], nf4["key"]) == (None, "nf4-0, nf4-1, nf4-2, nf4-2")


def test_whole_sweep_is_synced_with_its_table_and_report(server: WandbServer, tmp_path: Path) -> None:
    """As a user does it: tracked offline, reported, and uploaded later by wandb's own program."""
    sweep_of_six(tmp_path)
    with_samples(tmp_path, "key2")
    shutil.copy(tmp_path / "runs/key2/images/grid.png", tmp_path / "runs/key2/sensitivity.png")
    for path in sorted(tmp_path.glob("runs/*")):
        log_run(path, run_config_from_container(yaml.safe_load((path / "config.yaml").read_text())), "first")
    for _ in range(2):  # the second time replaces the first
        assert main(["first", "--outputs", str(tmp_path), "--wandb"]) == 0
    assert server.calls == []
    folders = [*tmp_path.glob("runs/*/wandb/offline-run-*"), *tmp_path.glob("sweeps/first/wandb/offline-run-*")]
    assert len(folders) == 6
    sync(*folders)
    table_id = run_id(select(tmp_path, ["first"]))
    assert set(server.runs) == {*(f"key{n}" for n in range(5)), table_id}
    assert {run["groupName"] for run in server.runs.values()} == {"first"}
    nf4 = server.runs["key2"]["summary"]
    ends = (nf4["quality/psnr_db_low"], nf4["quality/psnr_db_high"])
    assert ends == mean_interval(PSNR) and nf4["quality/psnr_db"] == 24.5
    samples = json.loads(server.uploads["samples.table.json"])
    assert samples["columns"] == ["seed", "sample", "metric", "value", "weight", "value is infinite"]
    assert samples["data"][-1] == [0, "image 12", "quality/psnr_db", None, 1, True]
    assert "images/sensitivity" in server.runs["key2"]["history"][-1]
    assert server.runs[table_id]["jobType"] == "report"
    table = json.loads(server.uploads["experiments.table.json"])
    first = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (first["backend"], first["PSNR dB"], first["images"]["_type"]) == ("bitsandbytes nf4", 24.5, "image-file")
    assert len(table["data"]) == 6
    for name in ("report.html", "report.md", "results.csv", "table.tex"):
        assert server.uploads[name] == (tmp_path / "sweeps/first" / name).read_bytes()


def test_table_is_logged_online(server: WandbServer, tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), GENERATE)
    manifest(tmp_path, "first", [job(1, "a", [])])
    assert main(["first", "--outputs", str(tmp_path), "--wandb", "--online"]) == 0
    assert set(server.runs) == {run_id(select(tmp_path))}
    assert len(server.reports) == 1 and "report.md" in server.uploads


def test_offline_table_is_one_file_in_the_folder_of_the_report(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    assert main(["first", "--outputs", str(tmp_path), "--out", str(tmp_path / "paper"), "--wandb"]) == 0
    (path,) = (tmp_path / "paper").glob("wandb/offline-run-*/*.wandb")
    run = read_wandb(path)
    assert (run.run.display_name, run.run.job_type, run.exit_code) == ("report: first", "report", 0)
    assert run.history[-1]["experiments"]["nrows"] == 6
