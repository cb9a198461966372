"""A run is uploaded to a server stand-in on the loopback; every way to fail ends quickly, with one clear message."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qexp.errors import ConfigError, UnsupportedError
from qexp.experiments.stored import run_config_from_container
from qexp.tracking import wandb_run
from qexp.tracking.wandb_run import log_run
from tests.products import exhaustive, representatives
from tests.report.factory import GENERATE, ROUNDTRIP, config, run_folder
from tests.tracking.wandb_server import WandbServer, sync, use_server


def log(folder: Path, container: dict[str, Any], mode: str = "online", sweep: str | None = "first") -> str | None:
    settings = run_config_from_container(container)
    return log_run(folder, replace(settings, tracking=replace(settings.tracking, mode=mode)), sweep)


def config_of(run: dict[str, Any]) -> dict[str, Any]:
    return {name: item["value"] for name, item in json.loads(run["config"]).items()}


def check_generated(server: WandbServer, folder: Path) -> None:
    """What every way to upload must leave on the server."""
    run = server.runs["abc0"]
    assert (run["groupName"], run["jobType"], run["project"]) == ("first", "generate", "qexp")
    assert run["displayName"] == "digits · bitsandbytes nf4 · leaf→disk · generate"
    assert run["tags"] == ["digits", "bitsandbytes nf4", "leaf", "mine"]
    assert config_of(run)["components"]["transformer"]["backend"]["quant_method"] == "bitsandbytes"
    assert {name: run["summary"][name] for name in GENERATE} == GENERATE
    assert [row["_step"] for row in run["history"]] == [0, 1, 2]
    assert [row["steps/step_ms"] for row in run["history"]] == [12.5, 11.5, 12.0]
    for name in ("grid", "reference", "difference"):
        path = run["history"][-1][f"images/{name}"]["path"]
        assert server.uploads[path] == (folder / "images" / f"{name}.png").read_bytes()
    assert run["exitcode"] == 0


def test_online_run_arrives_whole(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    container = config(offload="leaf")
    folder = run_folder(tmp_path, "abc0", container, GENERATE)
    address = log(folder, container)
    assert address == f"{server.url}/tester/qexp/runs/abc0"
    check_generated(server, folder)
    assert capsys.readouterr() == (f"W&B run: {address}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # the home: no settings, no cache, no .netrc


def test_logging_again_updates_the_same_run(server: WandbServer, tmp_path: Path) -> None:
    container = config(offload="leaf")
    folder = run_folder(tmp_path, "abc0", container, GENERATE)
    log(folder, container)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"metrics": GENERATE | {"quality/ssim": 0.5}}))
    log(folder, container, sweep="second")
    assert list(server.runs) == ["abc0"]
    run = server.runs["abc0"]
    assert (run["summary"]["quality/ssim"], run["groupName"]) == (0.5, "second")
    assert [row["steps/step_ms"] for row in run["history"]] == [12.5, 11.5, 12.0]  # not twice


def test_roundtrip_uploads_its_table(server: WandbServer, tmp_path: Path) -> None:
    container = config(task="roundtrip")
    log(run_folder(tmp_path, "abc0", container, ROUNDTRIP), container)
    table = json.loads(server.uploads["layers.table.json"])
    assert table["data"][0] == ["blocks.0.attn.to_q", "256x256", "true", 20.7]
    assert "CommitArtifact" in [name for name, _ in server.calls]


def test_failed_run_is_failed_on_the_server(server: WandbServer, tmp_path: Path) -> None:
    log(run_folder(tmp_path, "abc0", config(), None, "failed", "oom", "out of memory"), config())
    assert server.runs["abc0"]["exitcode"] == 1
    assert server.runs["abc0"]["summary"]["message"] == "out of memory"


@pytest.mark.parametrize("task", representatives(["generate", "roundtrip"], ["generate"]))
def test_offline_folder_is_synced_later(server: WandbServer, tmp_path: Path, task: str) -> None:
    container = config(offload="leaf" if task == "generate" else "none", task=task)
    folder = run_folder(tmp_path, "abc0", container, GENERATE if task == "generate" else ROUNDTRIP)
    for _ in range(2):  # the second time over what is there
        before = len(server.calls)
        log(folder, container, mode="offline")
        assert len(server.calls) == before
        sync(next((folder / "wandb").glob("offline-run-*")))
    if task == "generate":
        check_generated(server, folder)
    else:
        assert json.loads(server.uploads["layers.table.json"])["columns"][0] == "layer"


def test_without_a_key_it_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_server(monkeypatch, tmp_path, "http://127.0.0.1:9", key=None)
    folder = run_folder(tmp_path, "abc0", config(), GENERATE)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no API key.*wandb login.*tracking=offline"):
        log(folder, config())
    assert time.monotonic() - started < 15  # it did not wait for an answer (INIT_TIMEOUT_SECONDS)


@contextmanager
def socket_that_is_silent(listens: bool) -> Iterator[str]:
    """Without listening it refuses connections; else it never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@contextmanager
def server_that_goes_away() -> Iterator[str]:
    with WandbServer(silent_after=("UpsertBucket",)) as server:
        yield server.url


@pytest.mark.parametrize(
    ("connect", "cause"),
    [
        exhaustive(partial(socket_that_is_silent, False), "connection refused"),
        (partial(socket_that_is_silent, True), "deadline exceeded"),
        exhaustive(server_that_goes_away, "Timed out finishing run"),
    ],
    ids=["refuses", "is silent", "goes away"],
)
def test_server_that_does_not_answer_is_given_up_in_time(
    connect: Callable[[], AbstractContextManager[str]], cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT_SECONDS", 2.0)
    folder = run_folder(tmp_path, "abc0", config(), GENERATE)
    message = rf"tracking\.mode=online: the run in .*abc0 is not logged.*{cause}.*tracking=offline"
    with connect() as url, pytest.raises(UnsupportedError, match=message):
        use_server(monkeypatch, tmp_path, url)
        started = time.monotonic()
        log(folder, config())
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("changes", [{"project": "a/b"}, {"tags": ["x" * 65]}])
def test_a_name_that_wandb_refuses_is_a_clear_error(
    server: WandbServer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    container = config()
    container["tracking"] |= changes
    folder = run_folder(tmp_path, "abc0", container, GENERATE)
    with pytest.raises(ConfigError, match=rf"tracking\.{next(iter(changes))}"):
        log(folder, container)
