"""Models from a hub: a path of the form user/name, or user/name@revision, where there is no such file or folder here.

`pinned` downloads what is missing, in the process that composes experiments, and answers the same id with the commit
that it has: user/name@<commit>. That goes into the stored configuration, and wherever a model is opened `local_folder`
finds it in the cache, without a network. Both leave a path on this machine as it is.

The cache is huggingface_hub's, shared with every program that uses it: HF_HUB_CACHE, or HF_HOME. HF_TOKEN, or
what `hf auth login` stored, is the token; HF_ENDPOINT names another hub; HF_HUB_OFFLINE=1 is for what is cached. A hub
that does not answer is given up within seconds, and then what is cached is used, if all of it is there.

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
FILE_SUFFIXES = (".safetensors", ".gguf", *PICKLE_SUFFIXES)  # a name that ends so is of a file, which is missing
SPARE_BYTES = 64 << 20  # to leave on a disk
TIMEOUT_SECONDS = 5.0  # for the list of files
AGAIN = "run the same command again: files that are there are not downloaded twice"


@dataclass(frozen=True)
class HubFile:
    """etag: the name of its content in the cache, the sha256 of a large file, git's hash of a small one."""

    nbytes: int
    etag: str


@dataclass(frozen=True)
class HubId:
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(path: str | Path) -> HubId | None:
    """The repository that a path names; None for one that is here, or that has not the form of a repository's name."""
    found = HUB_ID.fullmatch(path) if isinstance(path, str) else None
    if found is None or path.endswith(FILE_SUFFIXES) or Path(path).exists():  # type: ignore[union-attr]
        return None
    return HubId(found["repo"], found["revision"])


def pinned_model(model: Any) -> Any:
    """A model source's config with the repositories in `path` and `reference_path` downloaded, and their commits."""
    changes: dict[str, Any] = {}
    revision = getattr(model, "revision", None)
    for name in ("path", "reference_path"):
        path = getattr(model, name, None)
        of_path = revision if name == "path" else None
        variant = getattr(model, "variant", None) if name == "path" else None
        if path is not None:
            changes[name] = pinned(path, of_path, variant, place=f"model.{name}")
        elif of_path is not None:
            raise ConfigError(f"model.revision={revision} is of a hub's repository; set model.path=user/name too")
    if revision is not None:
        changes["revision"] = None  # the path has it now
    return replace(model, **changes) if changes else model


def pinned(path: str, revision: str | None = None, variant: str | None = None, *, place: str) -> str:
    """A path here as it is; of a hub's repository, downloaded as far as it is missing, user/name@<commit>.

    variant: of the weights' files, such as "fp16". place: the setting, for messages.
    Raises: ConfigError, HubError, LoadError for a repository without weights that can be opened, DiskError.
    """
    found = hub_id(path)
    if found is None:
        if revision is not None:
            remedy = "leave the revision out" if Path(path).expanduser().exists() else "give such a path"
            raise ConfigError(
                f"{place}={path} is a path on this machine, and revision={revision} is of a hub's user/name; {remedy}"
            )
        return path
    if revision is not None and found.revision not in (None, revision):
        raise ConfigError(f"{place}={path} has a revision already; leave out revision={revision}")
    return str(replace(found, revision=_downloaded(found.repo, found.revision or revision or "main", variant, place)))


def local_folder(path: str | Path) -> Path:
    """Where a model is on this machine: a path as it is, a repository's snapshot in the cache; never asks a network.

    Raises: LoadError for a repository that is not in the cache, and for a folder of the cache above a snapshot.
    """
    found = hub_id(path)
    if found is None:
        folder = Path(path).expanduser()
        refuse_cache_folder(folder)
        return folder
    storage = _storage(found.repo)
    commit = _cached_commit(storage, found.revision or "main")
    if commit is None:
        raise LoadError(f"'{path}' is neither a path here nor a repository in the cache {storage.parent}")
    return storage / "snapshots" / commit


def _storage(repo: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _cached_commit(storage: Path, revision: str) -> str | None:
    """The commit of a revision whose snapshot is in the cache, or None."""
    try:
        commit = (
            revision
            if COMMIT.fullmatch(revision)
            else (storage / "refs" / revision).read_text(encoding="utf-8").strip()
        )
    except OSError:
        return None
    return commit if (storage / "snapshots" / commit).is_dir() else None


@cache
def _downloaded(repo: str, revision: str, variant: str | None, place: str) -> str:
    """The commit of a revision, all of which that is needed is in the cache now. A sweep asks once."""
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
            f"{place}={repo} is no path here, and no name of a repository either: {error} Give a path, or user/name"
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
    """A hub that does not answer, or answers that it cannot now."""


def _list_files(repo: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit of a revision, and its files by name. Raises: _Unreachable, errors of the library."""
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
            raise HubError(f"{endpoint} lists {name!r} with size {one.size} and hash {etag}, not as a hub does")
        files[name] = HubFile(one.size, str(etag))
    if not COMMIT.fullmatch(commit):
        raise HubError(f"{endpoint} names no commit of it, but {commit!r}")
    return commit, files


def _bring(
    repo: str, revision: str, commit: str, files: Mapping[str, HubFile], variant: str | None, place: str
) -> None:
    """Download what is needed of a repository's files and is not in the cache."""
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
    """Raises DiskError if the files are more than the disk has free."""
    needed = sum(file.nbytes for file in missing if not (storage / "blobs" / file.etag).exists())
    free = shutil.disk_usage(storage.parent).free
    if needed + SPARE_BYTES > free:
        raise DiskError(
            f"{place}: {needed / GIB:.2f} GiB are to be downloaded, and {storage.parent} has {free / GIB:.2f} GiB "
            "free; free space there, or choose another folder with HF_HUB_CACHE="
        )


def _from_cache(repo: str, revision: str, variant: str | None, place: str, why: str) -> str:
    """The commit of a revision in the cache. Raises HubError if not everything that is needed of it is there."""
    storage = _storage(repo)
    remedy = f"set {place} to a folder that holds the model, HF_ENDPOINT to a hub that answers, or HF_HUB_CACHE to a "
    remedy += "cache that has it (HF_HUB_OFFLINE=1 then asks no hub)"
    where = f"{place}={repo} is no file or folder here, and {why}"
    commit = _cached_commit(storage, revision)
    if commit is None:
        raise HubError(
            f"{where}; revision {revision} of a repository so called is not in the cache {storage.parent}; {remedy}"
        )
    snapshot = storage / "snapshots" / commit
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    try:
        needed_files(names, lambda name: read_object(snapshot / name), f"{place}={repo}", variant)
    except LoadError as error:
        raise HubError(f"{where}; what the cache has of it is not complete ({error}); {remedy}") from error
    return commit


@contextmanager
def _download_errors(place: str, repo: str, revision: str) -> Iterator[None]:
    """Failures of the hub, the network and the disk as one error of ours."""
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
    """What a hub's answer means, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    text = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    if isinstance(error, RevisionNotFoundError):
        return f"{endpoint} has no revision {revision!r} of it; use a branch, a tag or a commit that is listed there"
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"it is gated: {endpoint} gives it to those who accepted its licence ({text}); accept it on "
            f"{endpoint}/{repo}, and set HF_TOKEN to a token of the same account (or run `hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no file or folder so called here, and {endpoint} has no such repository, or hides it from this "
            "token; check the name, and for a private one set HF_TOKEN (or run `hf auth login`)"
        )
    if status == 401:
        return f"{endpoint} does not accept the token ({text}); set HF_TOKEN to one that may read, or unset it"
    if status is not None:
        return f"{endpoint} answered {status} ({text}); {AGAIN}"
    return f"the connection to {endpoint} broke off ({type(error).__name__}: {text}); {AGAIN}"
