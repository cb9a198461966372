"""As much of a hub as huggingface_hub's own client needs to make a repository, upload to it and download from it.

Branches are lists of commits; a commit is a title and the repository's files by path. Large files travel as they do on
the real one: the client asks how each is to be sent (preupload), then where (the batch request of Git LFS), puts the
bytes there in one piece or in parts, and names them by their sha256 in the commit, which refuses what was never put.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_" + "t" * 34
PART_BYTES = 64 << 10  # of a large file: sent in parts of this
LARGE = (".safetensors", ".gguf", ".bin", ".ckpt")


@dataclass
class Commit:
    title: str
    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()  # the paths among them that are large files

    @property
    def sha(self) -> str:
        content = "".join(f"{name}:{hashlib.sha256(data).hexdigest()};" for name, data in sorted(self.files.items()))
        return hashlib.sha1((self.title + content).encode()).hexdigest()


@dataclass
class Repository:
    """gated: its files are only for the token, while anybody may list them."""

    visibility: str | None = None
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})

    def head(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for commits in self.branches.values() for one in commits if one.sha == revision), None)


@dataclass
class HubServer:
    """`with serving(HubServer()) as hub:` listens on `hub.url`.

    namespaces: where the token may write. repositories: by name; objects: large files by sha256.
    requests: "METHOD path" of each in their order. fault: given that, the status to answer with, 0 to hang up, or None.
    cut: given that, after how many bytes of a file to hang up, or None. ranges: the first byte asked for of each file.
    spoil: what to make of a file's bytes. elsewhere: large files are handed out at another address.
    """

    namespaces: tuple[str, ...] = ("tester",)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str], int | None] = lambda request: None
    cut: Callable[[str], int | None] = lambda request: None
    spoil: Callable[[bytes], bytes] = lambda data: data
    elsewhere: bool = False
    ranges: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], title: str = "added") -> str:
        """Commit files to a repository's main branch, made if it is not there; the commit."""
        branch = self.repositories.setdefault(repo, Repository()).branches["main"]
        large = frozenset(name for name in files if name.endswith(LARGE))
        branch.append(Commit(title, branch[-1].files | files, branch[-1].lfs | large))
        return branch[-1].sha

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo].head(revision)
        assert commit is not None
        return commit.files

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        return [commit.title for commit in self.repositories[repo].branches[revision]]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


@contextmanager
def serving(hub: HubServer) -> Iterator[HubServer]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up when they are done
    hub.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        http.shutdown()
        http.server_close()


def environment(hub: HubServer, token: str | None = TOKEN) -> dict[str, str]:
    """Variables that point a process of its own at this hub."""
    plain = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return plain if token is None else {**plain, "HF_TOKEN": token}


@contextmanager
def client_of(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> Iterator[None]:
    """Point this process' huggingface_hub at it: the library reads its variables on import, long ago. No waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    yield


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **rest: str) -> None:
        super().__init__(message)
        self.status, self.code, self.rest = status, code, rest


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet, or every answer waits for an acknowledgement
    hub: HubServer

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "GET" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        status = self.hub.fault(request)
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        try:
            if status is not None:
                raise _Refusal(status, f"status {status}, as the test wants it")
            for pattern, answer in ROUTES.items():
                if found := re.fullmatch(pattern, request):
                    answer(self, body, **found.groupdict())
                    return
            raise _Refusal(501, f"this stand-in cannot answer {request}")
        except _Refusal as refusal:
            codes = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.reply(
                {"error": str(refusal), **refusal.rest}, refusal.status, {"X-Error-Message": str(refusal), **codes}
            )

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass

    def authorize(self, namespace: str) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if namespace not in self.hub.namespaces:
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")

    def repository(self, repo: str) -> Repository:
        if repo not in self.hub.repositories:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo]

    def commit_at(self, repo: str, revision: str) -> Commit:
        commit = self.repository(repo).head(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # making repositories and branches

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        self.authorize(asked["organization"])
        if repo in self.hub.repositories:
            raise _Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{repo}")
        self.hub.repositories[repo] = Repository(asked.get("visibility"))
        self.reply({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        self.authorize(repo.partition("/")[0])
        branches = self.repository(repo).branches
        if revision in branches:
            raise _Refusal(409, f"Reference refs/heads/{revision} already exists")
        branches[revision] = list(branches["main"])
        self.reply({})

    # uploading

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self.authorize(repo.partition("/")[0])
        head, asked, answers = self.commit_at(repo, revision), json.loads(body), []
        ignored = asked.get("gitIgnore", head.files.get(".gitignore", b"").decode()).split()
        for one in asked["files"]:
            large = one["path"].endswith(LARGE)
            data = head.files.get(one["path"])
            ignore = any(one["path"].endswith(pattern.lstrip("*")) for pattern in ignored)
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_hash(data)
            mode = "lfs" if large else "regular"
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        self.reply({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        self.authorize(repo.partition("/")[0])
        asked, answers = json.loads(body), []
        for one in asked["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/upload/{one['oid']}"
                parts = -(-one["size"] // PART_BYTES)
                header = {str(n + 1): f"{href}/{n + 1}" for n in range(parts)} | {"chunk_size": str(PART_BYTES)}
                upload = {"href": href, "header": header if parts > 1 else {}}
                verify = {"href": f"{self.hub.url}/verify/{repo}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self.reply({"transfer": "multipart", "objects": answers})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "the bytes are not those of the name")
        self.hub.objects[oid] = body
        self.reply({}, headers={"ETag": oid})

    def put_part(self, body: bytes, oid: str, part: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(part)] = body
        self.reply({}, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> None:
        asked, parts = json.loads(body), self.hub.parts.pop(oid)
        assert [one["partNumber"] for one in asked["parts"]] == sorted(parts)
        self.put(b"".join(parts[number] for number in sorted(parts)), oid)

    def verify(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, "this object was never uploaded")
        self.reply({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self.authorize(repo.partition("/")[0])
        head, title = self.commit_at(repo, revision), ""
        files, lfs = dict(head.files), set(head.lfs)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refusal(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = self.hub.objects[value["oid"]]
                lfs.add(value["path"])
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        new = Commit(title, files, frozenset(lfs & set(files)))
        self.repository(repo).branches[revision].append(new)
        self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{new.sha}", "commitOid": new.sha})

    # downloading

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        commit = self.commit_at(repo, revision)
        files: list[dict[str, Any]] = [{"rfilename": name} for name in sorted(commit.files)]
        for one in files if "blobs" in self.query else ():
            data = commit.files[one["rfilename"]]
            one |= {"size": len(data), "blobId": git_hash(data)}
            if one["rfilename"] in commit.lfs:
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        self.reply({"id": repo, "modelId": repo, "sha": commit.sha, "siblings": files, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.commit_at(repo, revision)
        entries = []
        for name, data in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if name in commit.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.reply(entries)

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        commit = self.commit_at(repo, revision)
        if name not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        if self.repository(repo).gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, f"Access to model {repo} is restricted", "GatedRepo")
        data = commit.files[name]
        tag = hashlib.sha256(data).hexdigest() if name in commit.lfs else git_hash(data)
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit.sha}
        if self.hub.elsewhere and name in commit.lfs:
            other = self.hub.url.replace("127.0.0.1", "localhost")  # another host: no token may go there
            self.reply(b"", 302, {**headers, "Location": f"{other}/elsewhere/{tag}"})
            self.hub.objects[tag] = data
            return
        self.send_file(data, name, first, headers)

    def send_file(self, data: bytes, name: str, first: int, headers: dict[str, str]) -> None:
        if self.command == "GET":
            self.hub.ranges.append((name, first))
        cut = self.hub.cut(name)
        if self.command == "GET":
            data = self.hub.spoil(data)
        if cut is None or self.command == "HEAD":
            self.reply(data[first:], 206 if first else 200, headers)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first : first + cut])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def moved(self, body: bytes, oid: str) -> None:
        if "Authorization" in self.headers:
            raise _Refusal(400, "a token has no business here")
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_file(self.hub.objects[oid], oid, first, {})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": _Handler.create,
    f"POST /api/models/{REPO}/branch/{REVISION}": _Handler.branch,
    f"POST /api/models/{REPO}/preupload/{REVISION}": _Handler.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /upload/(?P<oid>[0-9a-f]{64})": _Handler.put,
    r"PUT /upload/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)": _Handler.put_part,
    "POST /upload/(?P<oid>[0-9a-f]{64})": _Handler.complete,
    f"POST /verify/{REPO}": _Handler.verify,
    f"POST /api/models/{REPO}/commit/{REVISION}": _Handler.commit,
    f"GET /api/models/{REPO}": _Handler.info,
    f"GET /api/models/{REPO}/revision/{REVISION}": _Handler.info,
    f"GET /api/models/{REPO}/tree/{REVISION}": _Handler.tree,
    "GET /elsewhere/(?P<oid>[0-9a-f]{64})": _Handler.moved,
    f"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<name>.+)": _Handler.resolve,
}
