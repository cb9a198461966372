"""Download models from a hub: paths of the form user/name or user/name@revision without such a local file or folder.

`pinned` downloads missing files, in the process that composes experiments, and returns the id with its commit:
user/name@<commit>. The stored configuration has that id, and `local_folder` finds it in the cache wherever a model is
opened, without a network. Both return local paths unchanged.

The cache is huggingface_hub's, shared with other programs: HF_HUB_CACHE, or HF_HOME. The token is HF_TOKEN, or that of
`hf auth login`; HF_ENDPOINT names another hub; HF_HUB_OFFLINE=1 uses only the cache. If a hub does not respond within
seconds, a complete snapshot in the cache is used.

Importing this module imports neither torch nor huggingface_hub.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from qexp.checkpoints.checkpoint import read_object
from qexp.checkpoints.foreign_files import PICKLE_SUFFIXES, refuse_cache_folder
from qexp.errors import ConfigError, DiskError, HubError, LoadError, MissingLibraryError, QexpError
from qexp.hub.file_selection import needed_files
from qexp.hub.transfer import download_files
from qexp.system.files import check_writable, disk_error, write_text
from qexp.system.memory import GIB
from qexp.system.screen import say

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>.+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a small file, of a large one
FILE_SUFFIXES = (".safetensors", ".gguf", *PICKLE_SUFFIXES)  # names of files, not of repositories
SPARE_BYTES = 64 << 20  # to leave on a disk
TIMEOUT_SECONDS = 5.0  # for the list of files
AGAIN = "run the same command again: complete files are not downloaded again"


@dataclass(frozen=True)
class HubFile:
    """etag: the content's name in the cache: sha256 of a large file, git's hash of a small one."""

    nbytes: int
    etag: str


@dataclass(frozen=True)
class HubId:
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(path: str | Path) -> HubId | None:
    """Return the repository that a path names; None for a local path, or one that is not of the form user/name."""
    found = HUB_ID.fullmatch(path) if isinstance(path, str) else None
    if found is None or path.endswith(FILE_SUFFIXES) or Path(path).exists():  # type: ignore[union-attr]
        return None
    return HubId(found["repo"], found["revision"])


def pinned_model(model: Any) -> Any:
    """Download the repositories in `path` and `reference_path` of a model's config, and add their commits."""
    changes: dict[str, Any] = {}
    path, reference, revision = model.path, model.reference_path, model.revision
    if path is not None:
        changes["path"] = pinned(path, revision, getattr(model, "variant", None), place="model.path")
    elif revision is not None:
        raise ConfigError(f"model.revision={revision} needs a hub's repository; set model.path=user/name, too")
    if reference is not None:
        changes["reference_path"] = pinned(reference, place="model.reference_path")
    if revision is not None:
        changes["revision"] = None  # the path has it now
    return replace(model, **changes) if changes else model


def pinned(path: str, revision: str | None = None, variant: str | None = None, *, place: str) -> str:
    """Download a repository's missing files and return user/name@<commit>; return a local path unchanged.

    variant: of the weights' files, such as "fp16". place: the setting, for messages.
    Raises: ConfigError, HubError, DiskError, LoadError for a repository without readable weights.
    """
    found = hub_id(path)
    if found is None:
        if revision is not None:
            remedy = "leave the revision out" if Path(path).expanduser().exists() else "give such a path"
            raise ConfigError(
                f"{place}={path} is a local path, but revision={revision} needs a hub's user/name; {remedy}"
            )
        return path
    if revision is not None and found.revision not in (None, revision):
        raise ConfigError(f"{place}={path} has a revision already; leave out revision={revision}")
    return str(replace(found, revision=_downloaded(found.repo, found.revision or revision or "main", variant, place)))


def local_folder(path: str | Path) -> Path:
    """Return the local folder of a model: a path unchanged, or a repository's snapshot in the cache; no network.

    Raises: LoadError for a repository that is not in the cache, and for a folder of the cache above its snapshots.
    """
    found = hub_id(path)
    if found is None:
        folder = Path(path).expanduser()
        refuse_cache_folder(folder)
        return folder
    storage = _storage(found.repo)
    commit = _cached_commit(storage, found.revision or "main")
    if commit is None:
        raise LoadError(
            f"'{path}' is neither a local path nor a repository in the cache {storage.parent}; check the name"
        )
    return storage / "snapshots" / commit


def _storage(repo: str) -> Path:
    """Return the folder of a repository in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _cached_commit(storage: Path, revision: str) -> str | None:
    """Return the commit of a revision with a snapshot in the cache, or None."""
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (storage / "refs" / revision).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    return commit if (storage / "snapshots" / commit).is_dir() else None


@cache
def _downloaded(repo: str, revision: str, variant: str | None, place: str) -> str:
    """Download the needed files of a revision and return its commit. Cached: a sweep asks once."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise MissingLibraryError(
            f"{place}={repo} needs huggingface_hub ({error}); pip install huggingface_hub"
        ) from error
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ConfigError(
            f"{place}={repo} is neither a local path nor a repository's name: {error} Give a path, or user/name"
        ) from None
    if constants.HF_HUB_OFFLINE:
        return _from_cache(repo, revision, variant, place, "HF_HUB_OFFLINE forbids the network")
    with _download_errors(f"{place}={repo}", repo, revision):
        try:
            commit, files = _list_files(repo, revision)
        except _Unreachable as error:
            reason = str(error)
        else:
            _bring(repo, revision, commit, files, variant, place)
            return commit
    commit = _from_cache(repo, revision, variant, place, reason)
    say(f"warning: {place}={repo}: {reason}; using commit {commit} from the cache")
    return commit


class _Unreachable(Exception):
    """A hub that does not respond, or responds that it is unavailable."""


def _list_files(repo: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """Return the commit of a revision, and its files by name. Raises _Unreachable and errors of the library."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    endpoint = constants.ENDPOINT
    try:
        info = HfApi(endpoint=endpoint).model_info(
            repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        raise _Unreachable(f"{endpoint} answered {error.response.status_code}") from error
    except HTTPError as error:
        raise _Unreachable(f"{endpoint} cannot be reached ({type(error).__name__}: {error})") from error
    commit, files = str(info.sha), {}
    for one in info.siblings or ():
        name, etag = one.rfilename, one.lfs.sha256 if one.lfs is not None else one.blob_id
        if one.size is None or not HASH.fullmatch(str(etag)) or ".." in PurePosixPath(name).parts:
            raise HubError(
                f"{endpoint} lists {name!r} with size {one.size} and hash {etag}, which is invalid; check HF_ENDPOINT"
            )
        files[name] = HubFile(one.size, str(etag))
    if not COMMIT.fullmatch(commit):
        raise HubError(f"{endpoint} returned {commit!r} in place of a commit; check HF_ENDPOINT")
    return commit, files


def _bring(
    repo: str, revision: str, commit: str, files: Mapping[str, HubFile], variant: str | None, place: str
) -> None:
    """Download the needed files of a repository that are not in the cache."""
    storage = _storage(repo)
    snapshot = storage / "snapshots" / commit

    def bring(names: Sequence[str]) -> None:
        check_writable(storage.parent, "HF_HUB_CACHE=")
        download_files(repo, commit, {name: files[name].nbytes for name in names}, snapshot)

    def read(name: str) -> dict[str, Any]:
        if not (snapshot / name).exists():
            bring([name])
        return read_object(snapshot / name)

    wanted = needed_files(files, read, f"{place}={repo}", variant)
    missing = [name for name in wanted if not (snapshot / name).exists()]
    if missing:
        _check_space(storage, [files[name] for name in missing], f"{place}={repo}")
        gib = sum(files[name].nbytes for name in missing) / GIB
        files_text = f"{len(missing)} file" + ("s" if len(missing) > 1 else "")
        say(f"{repo}: downloading {files_text}, {gib:.2f} GiB, to {storage}")
        bring(missing)
    if revision != commit:
        write_text(storage / "refs" / revision, commit)


def _check_space(storage: Path, missing: Sequence[HubFile], place: str) -> None:
    """Raise DiskError if the disk has too little free space for the files."""
    needed = sum(file.nbytes for file in missing if not (storage / "blobs" / file.etag).exists())
    free = shutil.disk_usage(storage.parent).free
    if needed + SPARE_BYTES > free:
        raise DiskError(
            f"{place}: the download needs {needed / GIB:.2f} GiB, and {storage.parent} has {free / GIB:.2f} GiB free; "
            "free space there, or choose another folder with HF_HUB_CACHE="
        )


def _from_cache(repo: str, revision: str, variant: str | None, place: str, why: str) -> str:
    """Return the commit of a revision in the cache. Raises HubError if needed files are missing there."""
    storage = _storage(repo)
    remedy = f"set {place} to a folder with the model, HF_ENDPOINT to a reachable hub, or HF_HUB_CACHE to a cache that "
    remedy += "has it (HF_HUB_OFFLINE=1 then uses no hub)"
    where = f"{place}={repo} is not a local file or folder, and {why}"
    commit = _cached_commit(storage, revision)
    if commit is None:
        raise HubError(
            f"{where}; revision {revision} of this repository is not in the cache {storage.parent}; {remedy}"
        )
    snapshot = storage / "snapshots" / commit
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    try:
        needed_files(names, lambda name: read_object(snapshot / name), f"{place}={repo}", variant)
    except LoadError as error:
        raise HubError(f"{where}; its snapshot in the cache is incomplete ({error}); {remedy}") from error
    return commit


@contextmanager
def _download_errors(place: str, repo: str, revision: str) -> Iterator[None]:
    """Convert failures of the hub, the network and the disk to qexp's errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except HubError as error:
        raise HubError(f"{place}: {error}; {AGAIN}") from error
    except QexpError:
        raise
    except HTTPError as error:
        raise HubError(f"{place}: {_explain_answer(error, repo, revision, constants.ENDPOINT)}") from error
    except OSError as error:
        raise disk_error(Path(constants.HF_HUB_CACHE), error, "HF_HUB_CACHE=") from error


def _explain_answer(error: Exception, repo: str, revision: str, endpoint: str) -> str:
    """Describe a hub's error response and its remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    if isinstance(error, RevisionNotFoundError):
        return f"{endpoint} has no revision {revision!r} of it; use a branch, a tag or a commit from its page"
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"it is gated: its licence must be accepted first ({text}); accept it on "
            f"{endpoint}/{repo}, and set HF_TOKEN to a token of the same account (or run `hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no local file or folder of this name, and {endpoint} has no such repository, or hides it from "
            "this token; check the name, and for a private one set HF_TOKEN (or run `hf auth login`)"
        )
    if status == 401:
        return f"{endpoint} does not accept the token ({text}); set HF_TOKEN to one that may read, or unset it"
    if status is not None:
        return f"{endpoint} answered {status} ({text}); {AGAIN}"
    return f"the connection to {endpoint} broke off ({type(error).__name__}: {text}); {AGAIN}"
