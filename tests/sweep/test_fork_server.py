import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qexp.config.schema import IsolationConfig
from qexp.results.run_folder import RunFolder, remove_leftovers
from qexp.sweep import worker_process
from qexp.sweep.fork_client import SERVER
from qexp.sweep.reference import prepare_folder
from qexp.sweep.worker import Work
from qexp.sweep.worker_process import run_worker
from qexp.system.child_process import MARK
from tests.sweep.settings import run_config
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _new_server() -> Iterator[None]:
    SERVER.stop()
    SERVER.deaths = 0
    worker_process._say_once.cache_clear()
    yield
    SERVER.stop()
    SERVER.deaths = 0


def work_of(tmp_path: Path, function: str = "run", name: str = "key", behaviour: int = 1) -> Work:
    """A fake experiment in its folder, before it runs."""
    folder = RunFolder(tmp_path / "outputs" / "runs" / name)
    folder.path.mkdir(parents=True)
    prepare_folder(folder, run_config(tmp_path, behaviour), ())
    return Work(folder.path, "run", experiment=f"tests.sweep.fake_experiment:{function}")


def run(tmp_path: Path, function: str, modules: tuple[str, ...] = (), name: str = "key", start: str = "fork") -> dict:
    """Run a fake experiment; its result."""
    work = work_of(tmp_path, function, name)
    status = run_worker(work, IsolationConfig(start=start), modules)
    assert status.status == "done", status.message
    return json.loads((work.folder / "result.json").read_text())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_stands_alone_however_it_starts(start, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(tmp_path, "run_where_it_is", start=start)
    metrics = result["metrics"]
    assert result["start"] == start and metrics["a/forked"] == (start == "fork")
    assert metrics["a/leads_session"] == metrics["a/stdin_is_empty"] == metrics["a/in_folder"] == 1
    assert metrics["a/threads"] == 1


def test_workers_of_one_server_are_processes_of_their_own(tmp_path) -> None:
    first, second = (run(tmp_path, "run_where_it_is", name=name)["metrics"] for name in ("one", "two"))
    assert first["a/pid"] != second["a/pid"] and first["a/parent"] == second["a/parent"]


def test_forked_worker_has_the_environment_and_folder_of_now(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run(tmp_path, "run_environment", name="one")
    monkeypatch.setenv("SET_LATER", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(tmp_path, "run_environment", name="two")
    lines = (tmp_path / "outputs/runs/two/environment.txt").read_text().splitlines()
    assert {"SET_LATER=1", "OMP_NUM_THREADS=7", "OMP_WAIT_POLICY=PASSIVE"} <= {*lines}
    assert not [line for line in lines if line.startswith(("WANDB_", "OPENBLAS_"))]
    assert os.environ["WANDB_API_KEY"] == "secret"


def test_forked_worker_computes_with_the_threads_of_a_fresh_process(tmp_path, monkeypatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name)  # tests run with one thread
    code = "import torch; print(torch.get_num_threads())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    forked = run(tmp_path, "count_torch_threads", ("torch",))
    assert forked["start"] == "fork" and forked["metrics"]["a/torch_threads"] == int(fresh.stdout)


def test_settings_that_libraries_read_once_are_those_of_now(tmp_path, monkeypatch) -> None:
    settings = {"CHANGED": "1", "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    servers = [run(tmp_path, "run_where_it_is", name="first")["metrics"]["a/parent"]]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
        servers.append(run(tmp_path, "run_where_it_is", name=name)["metrics"]["a/parent"])
    assert servers[0] == servers[1] and len({*servers}) == 4


def test_server_that_dies_once_runs_the_experiment_again(tmp_path, capfd) -> None:
    assert run(tmp_path, "run_killing_the_server_once")["start"] == "fork"
    assert SERVER.deaths == 1 and "run again" in capfd.readouterr().err


def test_server_that_dies_twice_leaves_workers_to_spawn(tmp_path) -> None:
    assert run(tmp_path, "run_killing_the_server")["start"] == "spawn"
    assert run(tmp_path, "run_where_it_is", name="next")["start"] == "spawn"


@pytest.mark.parametrize(
    "module, said",
    [
        ("no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("tests.sweep.threads_on_import", "started 1 threads"),
    ],
)
def test_import_that_makes_a_fork_unsafe_is_said_and_spawned(module, said, tmp_path, capfd) -> None:
    result = run(tmp_path, "run_where_it_is", modules=(module,))
    assert result["start"] == "spawn" and result["metrics"]["a/forked"] == 0
    assert said in (error := capfd.readouterr().err) and "isolation.start=fork" in error


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != "zombie"


@pytest.mark.parametrize("behaviour, count", [(20, 2), (15, 4)])
def test_killed_parent_takes_server_and_worker_and_its_children_along(behaviour: int, count: int, tmp_path) -> None:
    """Count: the server, the worker, a child of the worker, and a daemon in a session of its own."""
    work = work_of(tmp_path, behaviour=behaviour)
    code = (
        "from qexp.config.schema import IsolationConfig; from qexp.sweep.worker import Work; "
        "from qexp.sweep.worker_process import run_worker; from pathlib import Path; "
        f"run_worker(Work(Path({str(work.folder)!r}), 'run', experiment={work.experiment!r}), IsolationConfig())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (work.folder / "started").exists())
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == count, family
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_running, family)))


def test_children_of_a_worker_whose_server_was_killed_are_gone(tmp_path) -> None:
    assert run(tmp_path, "run_with_a_daemon_killing_the_server_once")["start"] == "fork"
    number = int((tmp_path / "outputs" / "daemon.pid").read_text())
    wait_for(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie")


def test_next_sweep_ends_what_nobody_watches_any_more(tmp_path) -> None:
    outputs = tmp_path / "outputs"
    folders = {name: outputs / "runs" / name for name in ("left", "held")} | {"other": tmp_path / "other/runs/left"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    sleepers = {
        name: subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: str(folder)}, start_new_session=True)
        for name, folder in folders.items()
    }
    try:
        with RunFolder(folders["held"]).locked(print):
            remove_leftovers(outputs)
        assert sleepers["left"].wait(60) == -9
        assert sleepers["held"].poll() is None and sleepers["other"].poll() is None
        prepare_folder(RunFolder(folders["held"]), run_config(tmp_path), ())  # has no status: it never ran
        assert sleepers["held"].poll() is None
        (folders["held"] / "status.json").write_text("{}")
        prepare_folder(RunFolder(folders["held"]), run_config(tmp_path), ())
        assert sleepers["held"].wait(60) == -9
    finally:
        for sleeper in sleepers.values():
            sleeper.kill()
            sleeper.wait()


def test_timeout_kills_a_forked_worker_and_the_server_stays(tmp_path) -> None:
    status = run_worker(work_of(tmp_path, behaviour=20), IsolationConfig(timeout_minutes=0.02))
    assert (status.status, status.reason) == ("failed", "timeout")
    assert run(tmp_path, "run_where_it_is", name="next")["start"] == "fork" and SERVER.deaths == 0


@pytest.mark.exhaustive  # half a minute; tests/system/test_processes.py has the pages
def test_forked_digits_equal_spawned_ones_in_outputs_and_memory(tmp_path) -> None:
    metrics, outputs = {}, {}
    for start in ("fork", "spawn"):
        command = [sys.executable, "-m", "qexp", "backend=gguf_q4_0", "tracking=none", f"isolation.start={start}"]
        command += [f"paths.outputs={tmp_path / start}", "task.num_images=4", "task.num_inference_steps=2"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
        (folder,) = (tmp_path / start / "runs").iterdir()
        result = json.loads((folder / "result.json").read_text())
        assert result["start"] == start
        metrics[start], outputs[start] = result["metrics"], (folder / "outputs.safetensors").read_bytes()
    assert outputs["fork"] == outputs["spawn"]
    compared = [name for name in metrics["fork"] if name.startswith(("load/", "memory/")) and name.endswith("_gib")]
    compared.remove("load/baseline_host_gib")  # the server has imported what the reference needed too
    assert len(compared) >= 6
    for name in compared:
        assert abs(metrics["fork"][name] - metrics["spawn"][name]) < 2 / 1024, name
