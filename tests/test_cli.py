"""The command line as a user meets it: help, exit codes, one message for each mistake, sweeps, and what is imported."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

import qexp.__main__
import qexp.sweep.job
from qexp import devices, options
from qexp.errors import ConfigError
from qexp.settings import RunConfig
from qexp.sweep.manifest import JobRow

REPOSITORY = Path(__file__).parents[1]
USER_YAMLS = {
    "backend/unknown": "defaults: [/schema/backend/torchao@_here_, _self_]\nquant_typ: int8wo\n",
    "backend/badtype": "defaults: [/schema/backend/quanto@_here_, _self_]\nweights_dtype: [a]\n",
    "backend/noschema": "quant_method: quanto\nweight_dtype: int4\n",
    "backend/noplugin": "defaults: [/schema/backend/torchaoo@_here_, _self_]\n",
    "backend/noparent": "defaults: [torchaoo, _self_]\n",
    "backend/syntax": "quant_method: quanto\n weights_dtype: : 4\n",
    "backend/mine": "defaults: [torchao, _self_]\nquant_type: int8dq\n",
    "experiment/unknown": "# @package _global_\nsede: 3\n",
    "experiment/badgroup": "# @package _global_\ndefaults:\n  - override /backnd: none\n",
    "experiment/badoption": "# @package _global_\ndefaults:\n  - override /backend: nonee\n",
    "experiment/assigned": "# @package _global_\nbackend: quanto\n",
    "offload/typo": "strategi: leaf\n",
    "offload/list": "- leaf\n",
}


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that came as far as `run_job`, which answers that all is done."""
    received: list[RunConfig] = []

    def run_job(config: RunConfig, overrides: list[str]) -> JobRow:
        received.append(config)
        status = "failed" if config.seed == 13 else "unsupported" if config.seed == 14 else "done"
        return JobRow(len(received), f"key{len(received)}", tuple(overrides), "label", status)

    monkeypatch.setattr(qexp.sweep.job, "run_job", run_job)
    return received


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU and an empty working directory; Hydra's global state is put back afterwards."""
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    HydraConfig.instance().cfg = None


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process; returns its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qexp", *arguments])
        try:
            qexp.__main__.main()
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        return 0

    return run


Command = Callable[..., int]


def test_one_experiment_prints_its_folder_and_litters_nothing(
    command: Command, configs: list[RunConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command("backend=torchao", "seed=3") == 0
    assert [config.seed for config in configs] == [3]
    assert capsys.readouterr().out == "  outputs/runs/key1\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [13, 14], ids=["failed", "unsupported"])
def test_one_experiment_that_is_not_done_exits_with_1(command: Command, configs: list[RunConfig], seed: int) -> None:
    assert command(f"seed={seed}") == 1
    assert len(configs) == 1


def test_a_sweep_runs_every_combination_and_keeps_its_name(
    command: Command, configs: list[RunConfig], tmp_path: Path
) -> None:
    command("-m", "backend=none,torchao", "offload=none,leaf", "offload.to=disk")
    shapes = [(config.components["transformer"].backend.quant_method, config.offload.strategy) for config in configs]
    assert shapes == [("none", "none"), ("none", "leaf"), ("torchao", "none"), ("torchao", "leaf")]
    (name,) = {config.sweep.name for config in configs}
    assert [path.name for path in Path(tmp_path, "outputs", "sweeps").iterdir()] == [name]
    assert [path.name for path in Path(tmp_path, "outputs").iterdir()] == ["sweeps"]


@pytest.mark.parametrize(("preset", "task"), [("backend_pareto", "generate"), ("roundtrip_all", "roundtrip")])
def test_prepared_sweeps_run_every_backend_without_a_flag(
    command: Command, configs: list[RunConfig], preset: str, task: str
) -> None:
    command(f"experiment={preset}")
    assert {config.task.name for config in configs} == {task}
    labels = [config.components["transformer"].backend for config in configs]
    assert len({(backend.quant_method, backend.label) for backend in labels}) == len(options.option_names("backend"))


def test_a_prepared_sweep_can_be_narrowed(command: Command, configs: list[RunConfig]) -> None:
    command("experiment=backend_pareto", "backend=none,quanto", "sweep.name=narrow")
    assert [config.sweep.name for config in configs] == ["narrow", "narrow"]


def test_fields_of_swept_backends_need_not_be_those_of_the_default(command: Command, configs: list[RunConfig]) -> None:
    command("-m", "backend=torchao,torchao_float8wo", "backend.quant_type=int8dq", "backend.label='a, b'")
    backends = [config.components["transformer"].backend for config in configs]
    assert [(backend.quant_type, backend.label) for backend in backends] == [("int8dq", "a, b")] * 2


def test_a_wrong_experiment_in_a_sweep_is_a_row_and_the_others_run(
    command: Command, configs: list[RunConfig], tmp_path: Path
) -> None:
    code = command("-m", "backend=none,torchao,quanto", "low_cpu_mem_usage=false", "sweep.name=mixed")
    assert code == 1
    assert len(configs) == 1
    jobs = json.loads(Path(tmp_path, "outputs/sweeps/mixed/manifest.json").read_text())["jobs"]
    assert [(job["status"], job["reason"]) for job in jobs] == [("failed", "config")] * 2
    assert "streaming path" in jobs[0]["message"]


def test_ctrl_c_ends_a_sweep_with_its_own_exit_code(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: RunConfig, overrides: list[str]) -> JobRow:
        raise KeyboardInterrupt

    monkeypatch.setattr(qexp.sweep.job, "run_job", interrupted)
    assert command("-m", "seed=1,2") == 130
    assert capsys.readouterr().err.startswith("interrupted")


MISTAKES = {
    "backend=torchoa": "backend=torchoa is unknown (did you mean torchao",
    "backend=null": "backend=null chooses nothing; use bitsandbytes, ",
    "experiment=null": "leave it out, or use backend_pareto or roundtrip_all",
    "+backend@components.transformer.backend=nope": "backend=nope is unknown (did you mean none?); use bitsandbytes, ",
    "bakend=none": "bakend=none is not a known field (did you mean backend?); valid here: backend, ",
    "a.b.c=3": "a.b.c=3 is not a known field; valid here: backend, ",
    "backend.quant_typ=3": "not a known field of backend bitsandbytes (did you mean quant_method",
    "backend.weights_dtype=int4": "only of backend=quanto, quanto_float8, quanto_int2 or quanto_int4",
    "offload.too=disk": "offload.too=disk is not a known field (did you mean to?); valid here: num_blocks_per_group, ",
    "hydra.foo=3": "hydra.foo=3 is not a known field",
    "seed=abc": "seed=abc must be an integer",
    "seed=null": "seed=null must be an integer",
    "backend.load_in_4bit=maybe": "backend.load_in_4bit=maybe must be true or false",
    "backend.llm_int8_threshold=high": "backend.llm_int8_threshold=high must be a number",
    "device=[1,2]": "device=[1,2] must be a string",
    "metrics.names=ssim": "metrics.names=ssim must be a list, such as [a,b]",
    "tracking.mode=onlin": "tracking.mode=onlin is unknown (did you mean online or offline?)",
    "backend=none,torchao": "gives several values to one experiment; add -m to run one for each",
    "skip_modules=a,b": "or write skip_modules=[a,b] for a list",
    "seed=choice(1,2)": "seed=choice(1,2) gives several values to one experiment; add -m",
    "components.transformer.compute_dtype=bf16": "write +components.transformer.compute_dtype=bf16",
    "backend=[none,torchao]": "TorchAoConfig and NoneConfig cannot be combined: choose one option of their group",
    "~backnd": "~backnd deletes nothing (did you mean backend?)",
    "+seed=3": "+seed adds what is there already; leave out the +",
    "seed": "cannot read seed (missing EQUAL at '<EOF>'): an override is key=value",
    "sweep.notes=a=b": "quoted twice",
    "seed=[1,2": "cannot read [1,2: an override is key=value",
    "device=cuda": "device=cuda needs CUDA device 0, and this machine, or its torch build, has none; use cpu or auto",
    "--config-name=nope": "Cannot find primary config 'nope'",
    "--config-dir=nope": "not found",
}
SWEEP_MISTAKES = {
    "backend=none,nope": "backend=nope is unknown (did you mean none?)",
    "seed=1,x": "seed=x must be an integer",
    "seed=interval(0,1)": "has no list of values to run; write values, such as 0,1,2",
    "sweep.name=a/b": "sweep.name='a/b' must be a folder's name",
}
YAML_MISTAKES = {
    "backend=unknown": "backend.quant_typ (in backend/unknown.yaml) is not a known field of backend torchao",
    "backend=badtype": "backend.weights_dtype (in backend/badtype.yaml) must be a string",
    "backend=noschema": "backend.weight_dtype is not a known field (did you mean weights_dtype?)",
    "backend=noplugin": "/schema/backend/torchaoo (in backend/noplugin.yaml) is no schema (did you mean torchao?)",
    "backend=noparent": "backend=torchaoo (in backend/noparent.yaml) is unknown (did you mean torchao",
    "backend=syntax": "backend/syntax.yaml, line 2: mapping values are not allowed here",
    "experiment=unknown": "sede (in experiment/unknown.yaml) is not a known field (did you mean seed",
    "experiment=badgroup": "backnd (in experiment/badgroup.yaml) is no group of options (did you mean backend?)",
    "experiment=badoption": "backend=nonee is unknown (did you mean none?)",
    "experiment=assigned": "to choose an option write 'override /backend: quanto' in the yaml's defaults",
    "offload=typo": "offload.strategi (in offload/typo.yaml) is not a known field (did you mean strategy?)",
    "offload=list": "['leaf'] (in offload/list.yaml) stands where a group of fields belongs: num_blocks_per_group, ",
}


def only_message(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was printed, behind 'error: '."""
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_message(
    command: Command, configs: list[RunConfig], capsys: pytest.CaptureFixture[str], argument: str, tmp_path: Path
) -> None:
    assert command(argument) == 1
    assert MISTAKES[argument] in only_message(capsys)
    assert configs == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", SWEEP_MISTAKES)
def test_a_sweep_with_a_mistake_is_one_message_and_leaves_no_folder(
    command: Command, configs: list[RunConfig], capsys: pytest.CaptureFixture[str], argument: str, tmp_path: Path
) -> None:
    assert command("-m", argument) == 1
    assert SWEEP_MISTAKES[argument] in only_message(capsys)
    assert configs == [] and list(tmp_path.glob("outputs/sweeps/*")) == []


def test_a_field_that_not_all_swept_backends_have_names_those_that_do(
    command: Command, configs: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("-m", "backend=torchao,none", "backend.quant_type=int8dq,int8wo") == 1
    message = only_message(capsys)
    assert message.startswith(
        "backend.quant_type=int8dq is not a known field of backend none, only of backend=torchao, "
    )
    assert configs == []


@pytest.mark.parametrize("argument", YAML_MISTAKES)
def test_a_mistake_in_a_yaml_is_one_message_that_names_the_file(
    command: Command, configs: list[RunConfig], capsys: pytest.CaptureFixture[str], argument: str, tmp_path: Path
) -> None:
    for name, text in USER_YAMLS.items():
        path = Path(tmp_path, f"{name}.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert command("--config-dir", str(tmp_path), argument) == 1
    assert YAML_MISTAKES[argument] in only_message(capsys)
    assert configs == []


def test_a_yaml_of_ones_own_is_an_option(command: Command, configs: list[RunConfig], tmp_path: Path) -> None:
    Path(tmp_path, "backend").mkdir()
    Path(tmp_path, "backend", "mine.yaml").write_text(USER_YAMLS["backend/mine"])
    assert command("--config-dir", str(tmp_path), "backend=mine") == 0
    assert configs[0].components["transformer"].backend.quant_type == "int8dq"


def test_a_sweep_that_does_not_compose_leaves_an_older_one_of_its_name_alone(
    command: Command, configs: list[RunConfig], tmp_path: Path
) -> None:
    older = Path(tmp_path, "outputs", "sweeps", "kept", "report.md")
    older.parent.mkdir(parents=True)
    older.write_text("report")
    assert command("-m", "backend=none,nope", "sweep.name=kept") == 1
    assert older.read_text() == "report"


def test_a_traceback_is_shown_if_asked_for(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match="device=gpu"):
        command("device=gpu")


def test_experiments_see_the_users_environment(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def run_job(config: RunConfig, overrides: list[str]) -> JobRow:
        seen.append(os.environ.get("HYDRA_FULL_ERROR"))
        return JobRow(1, "key", (), "label", "done")

    monkeypatch.setattr(qexp.sweep.job, "run_job", run_job)
    assert command() == 0
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert command() == 0
    assert seen == [None, "0"]
    assert os.environ["HYDRA_FULL_ERROR"] == "0"


def test_help_names_every_option_with_its_description(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    text = capsys.readouterr().out
    for path in sorted((REPOSITORY / "conf").glob("*/*.yaml")):
        assert f" {path.stem} " in text and options.description(path) in text
    for example in ("-m backend=none,bitsandbytes,torchao,quanto offload=none,leaf,block", "experiment=backend_pareto"):
        assert f"python -m qexp {example}" in text
    for setting in ("compute_dtype: null", "device: auto", "skip_modules: []", "outputs: outputs", "workers: null"):
        assert setting in text
    assert "hydra.run" not in text and "_target_" not in text
    assert "* bitsandbytes " in text and "* bitsandbytes_fp4" not in text
    assert max(map(len, text.splitlines())) <= 130


def test_an_installed_package_reads_its_own_conf_and_not_a_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options.conf_folder() == REPOSITORY / "conf"
    own, neighbour = tmp_path / "qexp" / "conf", tmp_path / "conf"
    for folder in (own, neighbour):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    monkeypatch.setattr(options, "__file__", str(tmp_path / "qexp" / "options.py"))
    assert options.conf_folder() == own


def imported_by(code: str, cwd: Path) -> set[str]:
    """The top-level modules that a fresh interpreter has imported after running some code elsewhere."""
    ending = "\nimport sys; print('\\nMODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code + ending], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_help_is_quick_and_imports_neither_hydra_nor_torch(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = imported_by("import sys; sys.argv = ['qexp', '--help']; from qexp.__main__ import main; main()", tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert modules.isdisjoint({"hydra", "omegaconf", "torch", "yaml", "numpy"})
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 1.5


def test_the_parent_of_a_sweep_does_not_import_torch(tmp_path: Path) -> None:
    code = """
import sys, qexp.sweep.job
from qexp.sweep.manifest import JobRow
qexp.sweep.job.run_job = lambda config, overrides: JobRow(1, "key", (), "label", "done")
sys.argv = ["qexp", "-m", "backend=none,bitsandbytes,torchao,quanto", "task=generate,roundtrip", "offload=none,leaf"]
from qexp.__main__ import main
try:
    main()
except SystemExit:
    pass
"""
    modules = imported_by(code, tmp_path)
    assert {"hydra", "qexp"} <= modules
    heavy = {"torch", "bitsandbytes", "torchao", "optimum", "accelerate", "diffusers", "transformers"}
    assert modules.isdisjoint(heavy)
