"""As much of a W&B server as a run and a report need, on the loopback: it answers, and keeps what it is given."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ENTITY = {"id": "e", "name": "tester"}
PROJECT = {"id": "p", "name": "qexp", "internalId": "p", "entityName": "tester", "entity": ENTITY}
PROJECT |= {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
KEY = "0123456789" * 4  # 40 characters are a valid form
VIEWER = ENTITY | {"username": "tester", "entity": "tester", "flags": "{}", "teams": {"edges": []}}


class WandbServer:
    """`with WandbServer() as server:` listens on `server.url`.

    calls: (operation, variables) of every GraphQL call; runs and reports: by id; uploads: bytes by name.
    silent_after: operations after which it no longer answers anything, as a network that went away.
    """

    def __init__(self, silent_after: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.silent_after, self.silent = silent_after, threading.Event()
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up when they are done
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def variables(self, operation: str) -> list[dict[str, Any]]:
        return [variables for name, variables in self.calls if name == operation]

    def answer(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        artifact = {"id": "a", "digest": "d", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        pages = {"endCursor": None, "hasNextPage": False}
        answers: dict[str, Callable[[], dict[str, Any]]] = {
            "Viewer": lambda: {"viewer": VIEWER},
            "GetDefaultEntity": lambda: {"viewer": VIEWER},
            "ServerFeaturesQuery": lambda: {"serverInfo": {"features": []}},
            "UpsertBucket": lambda: {"upsertBucket": self.upsert(v)},
            "CreateRunFiles": lambda: {
                "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": self.slots(v["files"])}
            },
            "ArtifactType": lambda: {"project": {"artifact": None}},
            "CreateArtifact": lambda: {"createArtifact": {"artifact": artifact}},
            "CreateArtifactManifest": lambda: {
                "createArtifactManifest": {"artifactManifest": {"id": "m", "file": self.slots(["manifest.json"])[0]}}
            },
            "CreateArtifactFiles": lambda: {"createArtifactFiles": {"files": {"edges": self.artifact_slots(v)}}},
            "ProjectInternalId": lambda: {"project": PROJECT if v["projectName"] == PROJECT["name"] else None},
            "GetProjects": lambda: {"models": {"pageInfo": pages, "edges": [{"node": PROJECT}]}},
            "upsertView": lambda: {"upsertView": {"view": self.save_report(v), "inserted": v["id"] is None}},
            "CommitArtifact": lambda: {"commitArtifact": {"artifact": artifact}},
        }
        return answers[operation]()

    def slots(self, names: list[str]) -> list[dict[str, Any]]:
        """Places to upload files to."""
        rest = {"uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": "a"}}
        fields = ("id", "name", "displayName", "storagePath")
        return [dict.fromkeys(fields, name) | {"uploadUrl": f"{self.url}/upload/{name}"} | rest for name in names]

    def artifact_slots(self, v: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"node": slot} for slot in self.slots([file["name"] for file in v["input"]["artifactFiles"]])]

    def upsert(self, v: dict[str, Any]) -> dict[str, Any]:
        new = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], {"history": [], "summary": {}, "exitcode": None})
        run |= {name: value for name, value in v.items() if value is not None}
        bucket = {"id": "r", "name": v["name"], "displayName": run.get("displayName"), "config": "{}"}
        bucket |= {"description": "", "sweepName": None, "historyLineCount": 0, "project": PROJECT}
        return {"bucket": bucket, "inserted": new}

    def save_report(self, v: dict[str, Any]) -> dict[str, Any]:
        number = v["id"] or f"report{len(self.reports)}"
        self.reports[number] = v
        kept = {name: v[name] for name in ("type", "name", "displayName", "description", "spec")}
        return kept | {"id": number, "project": PROJECT, "updatedAt": "2026-01-01T00:00:00"}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        files, run = body.get("files") or {}, self.runs[name]
        if "wandb-history.jsonl" in files:
            new = [json.loads(line) for line in files["wandb-history.jsonl"]["content"]]
            run["history"][files["wandb-history.jsonl"]["offset"] :] = new
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"] = json.loads(line)
        if body.get("complete"):
            run["exitcode"] = body["exitcode"]


def use_server(monkeypatch: pytest.MonkeyPatch, home: Path, url: str, key: str | None = KEY) -> None:
    """Point wandb at a server, away from the account of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)


def sync(*folders: Path) -> None:
    """Run `wandb sync`, in this process, which has imported wandb."""
    import wandb
    from wandb.cli.cli import sync as command
    from wandb.sdk.lib import wbauth

    try:
        with contextlib.chdir(folders[0].parent):  # where it writes a log
            command.main([*map(str, folders)], standalone_mode=False)  # raises what it would print otherwise
    finally:  # as at the end of a process
        wandb.teardown()
        wbauth.unauthenticate_session(update_settings=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: WandbServer

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/graphql":
            call = json.loads(body)
            (operation,) = re.findall(r"(?:query|mutation)\s+(\w+)", call["query"])
            self.state.calls.append((operation, call.get("variables") or {}))
            self.reply({"data": self.state.answer(*self.state.calls[-1])})
            if operation in self.state.silent_after:
                self.state.silent.set()
        elif self.path.endswith("/file_stream"):
            self.state.stream(self.path.split("/")[-2], json.loads(body))
            self.reply({"exitcode": None, "limits": {}})
        else:
            self.reply({})

    def do_PUT(self) -> None:
        self.state.uploads[self.path.removeprefix("/upload/")] = self.body()
        self.reply({})

    def body(self) -> bytes:
        if self.state.silent.is_set():
            self.state.closing.wait(30)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def reply(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A running server that wandb uses, with an account."""
    with WandbServer() as running:
        use_server(monkeypatch, tmp_path, running.url)
        yield running
