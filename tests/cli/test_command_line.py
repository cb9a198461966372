"""The command line as a user meets it: exit codes, sweeps, the environment, and what is imported."""

import json
import os
import resource
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

import qexp.__main__
import qexp.cli.command_line
import qexp.sweep.job
from qexp.cli.dry_run import Preview
from qexp.cli.flags import flags_first
from qexp.config import yaml_options
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError
from qexp.results.manifest import JobRow, Manifest
from qexp.sweep.run_key import run_key
from tests.composing import CommandLine
from tests.composing import command as command
from tests.fresh_process import imported_by
from tests.tracking.wandb_server import use_server

REPOSITORY = Path(__file__).parents[2]


def test_one_experiment_prints_its_folder_and_litters_nothing(
    command: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path(tmp_path, "outputs/runs/key1").mkdir(parents=True)
    assert command("backend=torchao", "seed=3") == 0
    assert [config.seed for config in command.configs] == [3]
    assert command.keys == [run_key(command.configs[0])]  # computed once: the job is told
    assert capsys.readouterr().out == "  outputs/runs/key1\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["outputs", "runs", "key1"]
    assert command("seed=3") == 0
    assert capsys.readouterr().out == ""  # there is no outputs/runs/key2


@pytest.mark.parametrize("seed", [13, 14], ids=["failed", "unsupported"])
def test_one_experiment_that_is_not_done_exits_with_1(command: CommandLine, seed: int) -> None:
    assert command(f"seed={seed}") == 1
    assert len(command.configs) == 1


def test_a_sweep_runs_every_combination_and_keeps_its_name(command: CommandLine, tmp_path: Path) -> None:
    command("-m", "backend=none,torchao", "offload=none,leaf", "offload.to=disk")
    shapes = [
        (config.components["transformer"].backend.quant_method, config.offload.strategy) for config in command.configs
    ]
    assert shapes == [("none", "none"), ("none", "leaf"), ("torchao", "none"), ("torchao", "leaf")]
    (name,) = {config.sweep.name for config in command.configs}
    assert [path.name for path in Path(tmp_path, "outputs", "sweeps").iterdir()] == [name]
    assert [path.name for path in Path(tmp_path, "outputs").iterdir()] == ["sweeps"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("preset", "task"), [("backend_pareto", "generate"), ("roundtrip_all", "roundtrip")])
def test_prepared_sweeps_run_every_backend_without_a_flag(command: CommandLine, preset: str, task: str) -> None:
    """But mixed, which needs a recipe."""
    command(f"experiment={preset}")
    assert {config.task.name for config in command.configs} == {task}
    labels = [config.components["transformer"].backend for config in command.configs]
    options = [name for name in yaml_options.option_names("backend") if name != "mixed"]
    assert len({(backend.quant_method, backend.label) for backend in labels}) == len(options)


def test_a_prepared_sweep_can_be_narrowed(command: CommandLine) -> None:
    command("experiment=backend_pareto", "backend=none,quanto", "sweep.name=narrow")
    assert [config.sweep.name for config in command.configs] == ["narrow", "narrow"]


def test_fields_of_swept_backends_need_not_be_those_of_the_default(command: CommandLine) -> None:
    command("-m", "backend=torchao,torchao_float8wo", "backend.quant_type=int8dq", "backend.label='a, b'")
    backends = [config.components["transformer"].backend for config in command.configs]
    assert [(backend.quant_type, backend.label) for backend in backends] == [("int8dq", "a, b")] * 2


def test_a_wrong_experiment_in_a_sweep_is_a_row_and_the_others_run(
    command: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = ("backend=torchao,none,quanto", "low_cpu_mem_usage=false", "offload=leaf")
    assert command("-m", *wrong, "sweep.name=mixed") == 1
    assert len(command.configs) == 1
    jobs = json.loads(Path(tmp_path, "outputs/sweeps/mixed/manifest.json").read_text())["jobs"]
    assert [(job["status"], job["reason"]) for job in jobs] == [("failed", "config")] * 2
    assert "streaming path" in jobs[0]["message"]
    assert "[1/3] digits · torchao int8wo · leaf→auto · generate: failed (config): low_cpu" in capsys.readouterr().out


def test_overrides_stand_on_both_sides_of_a_flag(command: CommandLine) -> None:
    command("backend=torchao", "offload=leaf", "-m", "seed=1,2", "--config-dir", ".", "task.num_images=20")
    assert [(config.seed, config.offload.strategy) for config in command.configs] == [(1, "leaf"), (2, "leaf")]


FLAGS = {
    "--multi": "--multi is not a flag (did you mean --multirun?); use --cfg, ",
    "-x": "-x is not a flag",
    "--cfg": "--cfg needs a value; use all, hydra or job",
    "--cfg=jbo": "--cfg jbo is unknown; use all, hydra or job",
    "--config-dir=": "--config-dir needs a value; write --config-dir <value>",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_mistake_in_a_flag_is_one_message(command: CommandLine, flag: str) -> None:
    message = command.refusal("-m", "backend=torchao,none", "backend.group_size=64", flag)
    assert message.startswith(FLAGS[flag])


def test_messages_show_what_was_typed(command: CommandLine) -> None:
    error = command.refusal("backend.quant_type=int8dq", "backend=torchao,none")
    assert "add -m" in error and "choice(" not in error


def test_flags_with_values_travel_together() -> None:
    assert flags_first(["a=1", "-c", "job", "b=-1", "--info", "c=2", "-p=x", "--", "-d"]) == [
        "--cfg=job", "--info=all", "--package=x", "a=1", "b=-1", "c=2", "-d",
    ]  # fmt: skip
    assert flags_first(["-i", "plugins", "a=1"]) == ["--info=plugins", "a=1"]


def test_sweeps_that_begin_in_one_second_get_names_of_their_own(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "2026-01-02_03-04-05"
    for other in (name, f"{name}_2"):  # of sweeps that began before
        Path(tmp_path, "outputs/sweeps", other).mkdir(parents=True)
    command("-m", "seed=1", f"sweep.name={name}")
    assert [config.sweep.name for config in command.configs] == [f"{name}_3"]
    assert {path.name for path in Path(tmp_path, "outputs/sweeps").iterdir()} == {name, f"{name}_2", f"{name}_3"}
    folder = Path(tmp_path, "outputs/sweeps", f"{name}_3")
    assert json.loads((folder / "manifest.json").read_text())["name"] == folder.name
    assert (folder / "multirun.yaml").exists() and not any(Path(tmp_path, "outputs/sweeps", name).iterdir())


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1,2"]], ids=["single", "sweep"])
def test_online_without_an_account_is_found_before_anything_runs(
    arguments: list[str], command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_server(monkeypatch, tmp_path / "home", "http://127.0.0.1:9", key=None)
    assert "needs a W&B account" in command.refusal(*arguments, "tracking=online")
    assert not Path(tmp_path, "outputs").exists()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_torch_does_not_take(command: CommandLine, seed: int) -> None:
    assert f"seed={seed} must be from 0 to 9223372036854775807" in command.refusal(f"seed={seed}")


def test_ctrl_c_ends_a_sweep_with_its_own_exit_code(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: RunConfig, overrides: list[str], *, key: str) -> JobRow:
        raise KeyboardInterrupt

    monkeypatch.setattr(qexp.sweep.job, "run_job", interrupted)
    assert command("-m", "seed=1,2") == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_sweep_that_does_not_compose_leaves_an_older_one_of_its_name_alone(
    command: CommandLine, tmp_path: Path
) -> None:
    older = Path(tmp_path, "outputs", "sweeps", "kept", "report.md")
    older.parent.mkdir(parents=True)
    older.write_text("report")
    assert command("-m", "backend=none,nope", "sweep.name=kept") == 1
    assert older.read_text() == "report"


def test_a_traceback_is_shown_if_asked_for(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match="device=gpu"):
        command("device=gpu")


def test_experiments_see_the_users_environment(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def run_job(config: RunConfig, overrides: list[str], *, key: str) -> JobRow:
        seen.append(os.environ.get("HYDRA_FULL_ERROR"))
        return JobRow(1, "key", (), "label", "done")

    monkeypatch.setattr(qexp.sweep.job, "run_job", run_job)
    assert command() == 0
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert command() == 0
    assert seen == [None, "0"]
    assert os.environ["HYDRA_FULL_ERROR"] == "0"


def test_help_is_quick_and_imports_neither_hydra_nor_torch(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = imported_by(
        "import sys; sys.argv = ['qexp', '--help']; from qexp.__main__ import main; main()", cwd=tmp_path
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert modules.isdisjoint({"hydra", "omegaconf", "torch", "yaml", "numpy"})
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 1.5


def test_the_parent_of_a_sweep_does_not_import_torch(tmp_path: Path) -> None:
    code = """
import sys, qexp.sweep.job
from qexp.results.manifest import JobRow, Manifest
from tests.composing import CommandLine
qexp.sweep.job.run_job = lambda config, overrides, key: JobRow(1, "key", (), "label", "done")
sys.argv = ["qexp", "-m", "backend=none,bitsandbytes,torchao,quanto", "task=roundtrip", "offload=leaf"]
from qexp.__main__ import main
try:
    main()
except SystemExit:
    pass
"""
    modules = imported_by(code, cwd=tmp_path)
    assert {"hydra", "qexp"} <= modules
    heavy = {"torch", "bitsandbytes", "torchao", "optimum", "accelerate", "diffusers", "transformers"}
    assert modules.isdisjoint(heavy)


def test_sweep_tries_what_is_typed_before_it_runs_anything(command: CommandLine, tmp_path: Path) -> None:
    assert "did you mean torchao" in command.refusal("-m", "seed=range(100)", "backend=none,torchoa")
    assert not list(tmp_path.glob("outputs/sweeps/*"))


def test_mistake_that_is_met_late_costs_its_own_experiment(
    command: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Plugins.instance()  # loads Hydra's own sweeper, which must not be there before
    monkeypatch.setattr("qexp.cli.sweeper.MOST_TRIED", 2)  # else 50 compositions, 6 seconds
    assert command("-m", "seed=0,1,2,many,30") == 1
    assert [config.seed for config in command.configs] == [0, 1, 2, 30]
    assert "[4/5] seed=many: failed (config): seed=many" in capsys.readouterr().out


def test_every_option_and_then_other_values_are_tried_first() -> None:
    from qexp.cli.sweeper import with_each_value

    jobs = [[f"seed={seed}", f"backend={name}", "x=1"] for seed in range(50) for name in ("a", "b", "c")]
    tried = list(with_each_value(jobs, ["backend", "task"], 5))
    assert [job[1] for job in tried[:3]] == ["backend=a", "backend=b", "backend=c"]
    assert len(tried) == 5 and {job[0] for job in tried[3:]} == {"seed=1", "seed=2"}


def test_experiments_return_their_objectives_to_hydras_sweeper(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(config: RunConfig, overrides: list[str], key: str) -> JobRow:
        metrics = {"quality/psnr_db": 30.0 + config.seed, "memory/weights_gib": 0.5}
        return JobRow(1, "key", tuple(overrides), "label", "failed" if config.seed == 2 else "done", metrics=metrics)

    returned = []
    values = qexp.cli.command_line.objective_values

    def noted(names: list[str], metrics: dict[str, float | None]) -> object:
        returned.append(values(names, metrics))
        return returned[-1]

    monkeypatch.setattr(qexp.cli.command_line, "objective_values", noted)
    monkeypatch.setattr(qexp.sweep.job, "run_job", run_job)
    command("-m", "seed=1,2", "sweep.objectives=[quality/psnr_db,memory/weights_gib]")
    assert returned == [(31.0, 0.5), None]


@pytest.mark.parametrize("objectives", ["[quality/psnr]", "quality/psnr_db", "[1]"])
def test_objectives_that_are_wrong_end_a_sweep_before_anything_runs(
    objectives: str, command: CommandLine, tmp_path: Path
) -> None:
    assert "sweep.objectives" in command.refusal("-m", "seed=0,1", f"sweep.objectives={objectives}")
    assert not Path(tmp_path, "outputs").exists()


def test_ctrl_c_in_a_dry_run_says_what_was_counted_and_leaves_nothing(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(self: object, config: RunConfig, number: int, settings: str) -> None:
        if number == 2:
            raise KeyboardInterrupt
        self.counts["run"] += 1  # type: ignore[attr-defined]

    monkeypatch.setattr(Preview, "show", interrupted)
    assert command("-m", "seed=1,2,3", "sweep.dry_run=true") == 130
    captured = capsys.readouterr()
    assert captured.out == "interrupted: 1 experiment: 1 would run; about 0.0 s. Nothing was run.\n"
    assert not captured.err and not Path(tmp_path, "outputs").exists()


@pytest.mark.parametrize("jobs", [0, 1])
def test_folder_of_a_sweep_is_removed_only_while_no_experiment_is_in_it(jobs: int, tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "outputs", "s")
    manifest.start([], 1)
    for number in range(jobs):  # of another process
        manifest.add(JobRow(number + 1, "key", (), "label", "failed"))
    try:
        qexp.cli.command_line.SweepFolder.unused = manifest.folder
        qexp.cli.command_line.SweepFolder.remove_unused()
    finally:
        qexp.cli.command_line.SweepFolder.unused = None
    assert manifest.folder.exists() == bool(jobs)
