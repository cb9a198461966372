"""Push a saved model to a hub repository: config.json first, then the weights.

The first commit, of a few hundred bytes, shows that the token may write here before gigabytes are sent. Each file of
weights is then stored by its content, and one last commit puts them all into the repository, so that it never has some
of a model's shards without the others. An upload that broke off goes on where it was: quantizing the same weights gives
the same bytes, and content that is there already is not sent again.

The library's `upload_folder` would be shorter, and is not used: it leaves out, without a word, weights that a
.gitignore in the repository names, and commits a large folder in parts.

The token is the one of huggingface_hub: HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT names another hub.
Importing this module imports neither torch nor huggingface_hub.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qexp.checkpoints.checkpoint import SAVED_WEIGHTS
from qexp.config.schema import SaveConfig
from qexp.errors import ConfigError, HubError, MissingLibraryError
from qexp.system.screen import say

LOGIN = "set HF_TOKEN to a token that may write, or run `hf auth login`"
AGAIN = "run the same command again: stored files are not sent again"


def check_ready(save: SaveConfig) -> None:
    """Check the repository's name, the library and the token, before a model is loaded.

    Raises: ConfigError or MissingLibraryError.
    """
    place = f"save.push_to_hub={save.push_to_hub}"
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.errors import HFValidationError, OIDCError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise MissingLibraryError(f"{place} needs huggingface_hub ({error}); pip install huggingface_hub") from error
    repo = str(save.push_to_hub)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{place} is not a repository's name: {error} Write it as user/name") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{place} must be user/name: the account and the repository's name")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{place}, but HF_HUB_OFFLINE forbids the network; unset it, or use save.path=<folder>")
    try:
        token = get_token()
    except OIDCError as error:
        raise ConfigError(f"{place}: HF_OIDC_RESOURCE is set, but gives no token ({error}); {LOGIN}") from error
    if token is None:
        raise ConfigError(f"{place} needs a token of {constants.ENDPOINT}, and none is set; {LOGIN}")


def push(folder: Path, files: Sequence[Path], save: SaveConfig, message: str) -> dict[str, Any]:
    """Upload `files` of `folder` to the repository `save.push_to_hub`, created if missing.

    Weights of an earlier push in the same folders that do not belong to this model are removed.
    Returns: {"repo_id", "revision", "commit", "url"}.
    Raises: HubError, which names the files that arrived.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo = HfApi(), str(save.push_to_hub)
    message = save.commit_message or message
    paths = {file.relative_to(folder).as_posix(): file for file in files}
    configs = [name for name in paths if not SAVED_WEIGHTS.fullmatch(PurePosixPath(name).name)]  # and a tokenizer
    weights = [name for name in paths if name not in configs]
    where: dict[str, Any] = {"repo_id": repo, "revision": save.revision}
    with _upload_errors(save, api.endpoint) as progress:
        api.create_repo(repo, private=save.private, exist_ok=True)
        if save.revision is not None:
            api.create_branch(repo, branch=save.revision, exist_ok=True)

        def stored(name: str) -> CommitOperationAdd:
            """Return a file ready to be committed, whatever a .gitignore in the repository says about it."""
            addition = CommitOperationAdd(name, paths[name])
            api.preupload_lfs_files(additions=[addition], gitignore_content="", free_memory=False, **where)
            return addition

        additions = [stored(name) for name in configs]
        api.create_commit(operations=additions, commit_message=f"{message}: configuration", **where)
        progress.committed += configs
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for name in weights:
            operations.append(stored(name))
            progress.stored.append(name)
            say(f"{repo}: uploaded {name}, {paths[name].stat().st_size / 2**20:.1f} MiB")
        there = api.list_repo_files(repo, revision=save.revision)
        operations += [CommitOperationDelete(name) for name in _stale(there, paths)]
        info = api.create_commit(operations=operations, commit_message=f"{message}: weights", **where)
    return {**where, "commit": info.oid, "url": info.commit_url}


def _stale(there: Sequence[str], paths: Mapping[str, Path]) -> list[str]:
    """Return weights in a model's folders that do not belong to it, which a loader would read as a part of it."""
    folders = {PurePosixPath(name).parent for name in paths}
    found = [PurePosixPath(name) for name in there if name not in paths]
    return [str(path) for path in found if path.parent in folders and SAVED_WEIGHTS.fullmatch(path.name)]


@dataclass
class _Progress:
    """Progress of an upload. committed: files in the repository; stored: weights not committed yet."""

    committed: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.committed:
            return "nothing was uploaded"
        waiting = f"; stored for the next try: {', '.join(self.stored)}" if self.stored else ""
        return f"in the repository: {', '.join(self.committed)}{waiting}; {AGAIN}"


@contextmanager
def _upload_errors(save: SaveConfig, endpoint: str) -> Iterator[_Progress]:
    """Convert failures of the hub and of the network to a HubError."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    progress, quiet = _Progress(), are_progress_bars_disabled() or not sys.stderr.isatty()
    if quiet:
        disable_progress_bars()
    try:
        yield progress
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # of the library, of hf_xet, of a server's nonsense
        kept = f"; the model is in {save.path}" if save.path else ""
        raise HubError(
            f"save.push_to_hub={save.push_to_hub}: {_explain_failure(error, save, endpoint)}; {progress}{kept}"
        ) from error
    finally:
        if quiet:
            enable_progress_bars()


def _explain_failure(error: BaseException, save: SaveConfig, endpoint: str) -> str:
    """Describe an error and its remedy."""
    error = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error  # of one file
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(getattr(error, "server_message", None) or error).split())[:300] or type(error).__name__
    user = str(save.push_to_hub).partition("/")[0]
    if status == 401:
        return f"{endpoint} does not accept the token ({text}); {LOGIN}"
    if status == 403:
        return f"this token may not write to '{user}' ({text}); use one that may, or push to a repository of your own"
    if status == 404:
        return f"{endpoint} does not have it, or hides it from this token ({text}); check the name and the token"
    if status is not None:
        return f"{endpoint} answered {status} ({text})"
    return f"the upload to {endpoint} broke off ({type(error).__name__}: {text}); check the network"
