"""A run logged without a server is read back from its .wandb file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from qexp.config.schema import RunConfig, TrackingConfig
from qexp.errors import ConfigError
from qexp.experiments.stored import run_config_from_container
from qexp.tracking.wandb_run import log_run
from tests.products import representatives
from tests.report.factory import ENV, GENERATE, ROUNDTRIP, config, run_folder
from tests.tracking.wandb_file import Logged, read_wandb


def logged(
    tmp_path: Path, container: dict[str, Any], metrics: dict[str, float | None] | None, **status: Any
) -> tuple[Path, Logged]:
    folder = run_folder(tmp_path, "abc0", container, metrics, **status)
    place = log_run(folder, run_config_from_container(container), "first", "seed=1")
    assert place is not None
    return folder, read_wandb(Path(place, "run-abc0.wandb"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Logged]:
    container = config("bitsandbytes", "nf4", "leaf", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return logged(tmp_path_factory.mktemp("outputs"), container, GENERATE | {"quality/frechet_distance": None})


def test_config_is_nested_and_complete(generated: tuple[Path, Logged]) -> None:
    folder, run = generated
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: run.config[name] for name in stored} == stored
    assert run.config["components"]["transformer"]["backend"]["bnb_4bit_quant_type"] == "nf4"
    assert run.config["env"] == ENV


def test_run_is_named_grouped_and_tagged(generated: tuple[Path, Logged]) -> None:
    run = generated[1].run
    assert (run.run_id, run.project, run.display_name) == (
        "abc0",
        "qexp",
        "digits · bitsandbytes nf4 · leaf→disk · generate · seed=1",
    )
    assert (run.run_group, run.job_type) == ("first", "generate")
    assert list(run.tags) == ["digits", "bitsandbytes nf4", "leaf", "mine"]
    assert generated[1].exit_code == 0


LEFT_BEHIND = [
    {"WANDB_RUN_ID": "other", "WANDB_RESUME": "must", "WANDB_PROJECT": "theirs", "WANDB_NAME": "nn"},
    {
        "WANDB_RUN_GROUP": "gg",
        "WANDB_JOB_TYPE": "train",
        "WANDB_TAGS": "a,b",
        "WANDB_NOTES": "note",
        "WANDB_REINIT": "x",
    },
    {"WANDB_SWEEP_ID": "s1", "WANDB_FORK_FROM": "r1?_step=3", "WANDB_MODE": "disabled", "WANDB_DIR": "/nowhere"},
]


@pytest.mark.parametrize(
    ("left", "sweep_name"),
    representatives(product(range(len(LEFT_BEHIND)), ["first", None]), [(0, "first"), (1, None), (2, "first")]),
)
def test_environment_of_another_run_changes_nothing(
    left: int, sweep_name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = LEFT_BEHIND[left]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    container = config()
    folder = run_folder(tmp_path, "abc0", container, GENERATE)
    place = log_run(folder, run_config_from_container(container), sweep_name)
    run = read_wandb(Path(str(place), "run-abc0.wandb")).run
    assert (run.run_id, run.project, run.run_group) == ("abc0", "qexp", sweep_name or "")
    assert (run.job_type, run.notes, run.sweep_id, run.resumed) == ("generate", "", "", False)
    assert list(run.tags) == ["digits", "bitsandbytes nf4", "none", "mine"]
    assert {name: os.environ[name] for name in variables} == variables


def test_long_names_are_cut_and_stay_distinct(tmp_path: Path) -> None:
    groups = []
    for ending in ("one", "two"):
        container = config(label="x" * 200)
        folder = run_folder(tmp_path / ending, "abc0", container, GENERATE)
        place = log_run(folder, run_config_from_container(container), "s" * 200 + ending)
        run = read_wandb(Path(str(place), "run-abc0.wandb")).run
        assert len(run.display_name) == 128 and run.display_name.startswith("digits · bitsandbytes xxx")
        groups.append(run.run_group)
    assert [len(group) for group in groups] == [128, 128] and groups[0] != groups[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"project": "a/b"}, r"tracking\.project='a/b' must be without / .* as W&B demands; give another name"),
        ({"project": "100%"}, r"tracking\.project='100%' must be without"),
        ({"project": "p" * 129}, "must have 1 to 128 characters, not 129"),
        ({"project": ""}, "must have 1 to 128 characters, not 0"),
        ({"tags": ("ok", "x" * 65)}, r"tracking\.tags: 'x+' must have 1 to 64 characters"),
        ({"tags": ("",)}, r"tracking\.tags: '' must have 1 to 64 characters"),
    ],
)
def test_name_that_wandb_refuses_is_refused_with_the_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrackingConfig(**changes)
    TrackingConfig(mode="none", **changes)


def test_summary_has_the_metrics_and_how_it_ended(generated: tuple[Path, Logged]) -> None:
    summary = generated[1].summary
    assert {name: summary[name] for name in GENERATE} == GENERATE
    assert summary["quality/frechet_distance"] is None
    assert (summary["status"], summary["reason"], summary["seconds"]) == ("done", None, 10.0)
    assert not [name for name in summary if name.startswith("steps/")]


def test_history_follows_the_generation_steps(generated: tuple[Path, Logged]) -> None:
    rows = [{k: v for k, v in row.items() if k.startswith("steps/")} for row in generated[1].history]
    assert [row["_step"] for row in generated[1].history] == [0, 1, 2]
    assert rows[0] == {"steps/step_ms": 12.5, "steps/host_gib": 0.5, "steps/device_gib": 0.0, "steps/relative_l2": 0.01}
    assert "steps/relative_l2" not in rows[1]  # an empty cell
    assert rows[2]["steps/relative_l2"] == 0.03


def test_images_are_logged_with_the_last_step(generated: tuple[Path, Logged]) -> None:
    folder, run = generated
    for name in ("grid", "reference", "difference"):
        image = run.history[-1][f"images/{name}"]
        assert (image["_type"], image["caption"], image["width"]) == ("image-file", name, 40)
        (copy,) = (folder / "wandb").glob(f"*/files/{image['path']}")
        assert copy.read_bytes() == (folder / "images" / f"{name}.png").read_bytes()
        assert image["path"] in run.files


def test_roundtrip_has_a_table_of_its_layers(tmp_path: Path) -> None:
    folder, run = logged(tmp_path, config(task="roundtrip"), ROUNDTRIP)
    table = run.history[-1]["layers"]
    assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 2, 4)
    (path,) = (folder / "wandb").glob(f"*/files/{table['path']}")
    content = json.loads(path.read_text())
    assert content["columns"] == ["layer", "shape", "quantized", "sqnr_db"]
    assert content["data"] == [["blocks.0.attn.to_q", "256x256", "true", 20.7], ["proj_out", "4x256", "false", None]]
    assert run.summary["roundtrip/sqnr_db_mean"] == 20.7
    assert run.run.job_type == "roundtrip"


def test_a_failed_run_has_its_reason_and_exit_code_1(tmp_path: Path) -> None:
    _, run = logged(tmp_path, config(), None, status="failed", reason="oom", message="out of memory")
    assert run.exit_code == 1
    assert (run.summary["status"], run.summary["reason"], run.summary["message"]) == ("failed", "oom", "out of memory")
    assert run.config["task"]["name"] == "generate"


def test_logging_again_replaces_the_file(tmp_path: Path) -> None:
    container = config()
    folder, _ = logged(tmp_path, container, GENERATE)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"metrics": GENERATE | {"quality/ssim": 0.5}}))
    second = log_run(folder, run_config_from_container(container), "second")
    (path,) = (folder / "wandb").glob("*/*.wandb")
    assert path.parent == Path(str(second))
    run = read_wandb(path)
    assert (run.summary["quality/ssim"], run.run.run_group, len(run.history)) == (0.5, "second", 3)


def test_nothing_is_written_elsewhere_and_one_line_is_printed(tmp_path: Path) -> None:
    """In a process of its own, with a home of its own."""
    run_folder(tmp_path, "abc0", config(), GENERATE)
    code = (
        "import os, sys; from pathlib import Path; import yaml\n"
        "from qexp.experiments.stored import run_config_from_container\n"
        "from qexp.tracking.wandb_run import log_run\n"
        "assert 'wandb' not in sys.modules\n"
        "folder = Path(sys.argv[1]); before = dict(os.environ)\n"
        "log_run(folder, run_config_from_container(yaml.safe_load((folder / 'config.yaml').read_text())), None)\n"
        "assert dict(os.environ) == before and 'torch' not in sys.modules\n"
    )
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    private = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path.cwd())}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "XDG"))} | private
    command = [sys.executable, "-c", code, str(tmp_path / "runs/abc0")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("W&B run: runs/abc0/wandb/offline-run-")
    assert done.stdout.count("\n") == 1
    assert not [*(tmp_path / "home").rglob("*"), *(tmp_path / "tmp").rglob("*")]
    assert {path.name for path in tmp_path.iterdir()} == {"home", "tmp", "runs"}
    assert {path.name for path in (tmp_path / "runs/abc0").iterdir()} == {
        "config.yaml", "env.json", "status.json", "result.json", "history.csv", "images", "wandb",
    }  # fmt: skip


def test_a_run_of_the_caller_stays_open(tmp_path: Path) -> None:
    import wandb

    mine = wandb.init(settings=wandb.Settings(mode="offline", root_dir=str(tmp_path), silent=True, console="off"))
    try:
        logged(tmp_path, config(), GENERATE)
        assert wandb.run is mine
        mine.log({"mine": 1})
    finally:
        mine.finish()
        wandb.teardown()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [row["mine"] for row in read_wandb(path).history] == [1]


def test_none_logs_nothing(tmp_path: Path) -> None:
    container = config()
    folder = run_folder(tmp_path, "abc0", container, GENERATE)
    settings: RunConfig = run_config_from_container(container)
    settings = replace(settings, tracking=replace(settings.tracking, mode="none"))
    assert log_run(folder, settings, "first") is None
    assert not (folder / "wandb").exists()


def test_a_folder_that_cannot_be_read_is_an_error_and_a_failed_run(tmp_path: Path) -> None:
    container = config()
    folder = run_folder(tmp_path, "abc0", container, GENERATE)
    (folder / "history.csv").write_text("step,step_ms\nnot a number,1\n")
    with pytest.raises(ValueError, match="not a number"):
        log_run(folder, run_config_from_container(container), "first")
    (path,) = (folder / "wandb").glob("*/*.wandb")
    assert read_wandb(path).exit_code == 1
