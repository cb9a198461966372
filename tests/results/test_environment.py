import importlib.metadata
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import qexp
from qexp.quantizers.none import NoneConfig
from qexp.quantizers.torchao import TorchAoConfig
from qexp.results import environment
from qexp.results.environment import describe_environment, differences, git_commit, result_packages
from tests.fresh_process import imported_by, run_python
from tests.sweep.settings import run_config, with_backend

ROOT = Path(__file__).parents[2]


def test_it_says_where_a_result_was_made(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MKL_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    env = describe_environment(run_config(tmp_path))
    assert env["versions"]["torch"] == importlib.metadata.version("torch")
    assert env["versions"]["bitsandbytes"] == importlib.metadata.version("bitsandbytes")
    assert env["python"] == platform.python_version()
    assert env["threads"] == "3"
    assert env["device"] == "cpu" and env["device_name"] == env["cpu"]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert abs(env["memory_gib"] - physical) < 0.1
    assert all(value not in (None, "") for name, value in env.items() if name != "commit")


def test_number_of_threads_is_that_of_torch(monkeypatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    code = "import torch; print(torch.get_num_threads(), torch.backends.mkl.is_available())"
    threads, has_mkl = run_python(code).split()
    assert environment.number_of_threads() == threads or has_mkl == "False"  # without MKL, its variable comes second


def test_qexps_version_is_that_of_the_code_and_not_of_its_installation(monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.0.1")
    assert environment.versions_of(("qexp", "torch")) == {"qexp": qexp.__version__, "torch": "0.0.1"}


def test_only_the_libraries_that_an_experiment_uses_can_change_its_result(tmp_path) -> None:
    config = run_config(tmp_path)
    assert "bitsandbytes" in result_packages(config)
    assert "torchao" not in result_packages(config)
    assert "torchao" in result_packages(with_backend(config, TorchAoConfig()))
    assert not {"torchao", "bitsandbytes", "wandb"} & set(result_packages(with_backend(config, NoneConfig())))


def test_what_has_changed_since(tmp_path) -> None:
    config = run_config(tmp_path)
    env = describe_environment(config)
    assert differences(env, config) == []
    older = env | {"versions": env["versions"] | {"torch": "1.0", "wandb": "0.1"}, "date": "2020"}
    assert differences(older, config) == [f"torch 1.0 -> {importlib.metadata.version('torch')}"]
    assert len(differences(env | {"device_name": "other"}, config)) == 1
    for name in ("python", "commit", "threads", "host", "cores"):
        assert differences(env | {name: "other"}, config) == [f"{name} other -> {env[name]}"]


def test_the_commit_of_a_checkout(tmp_path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+"


def test_a_gpu_is_named_without_torch_and_its_absence_is_no_error(tmp_path, monkeypatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(environment.ctypes, "CDLL", no_driver)
    assert describe_environment(replace(run_config(tmp_path), device="cuda:0"))["device_name"] == "cuda"


def test_the_parent_of_experiments_imports_neither_torch_nor_wandb(tmp_path) -> None:
    code = """
import sys, qexp.sweep.job, qexp.sweep.callback, qexp.sweep.worker, qexp.rerun
from qexp.results.environment import describe_environment; from qexp.sweep.run_key import reference_key
from tests.sweep.settings import run_config; from pathlib import Path
config = run_config(Path(sys.argv[1])); describe_environment(config); reference_key(config)
"""
    assert {"torch", "wandb", "numpy", "bitsandbytes"}.isdisjoint(imported_by(code, tmp_path))
