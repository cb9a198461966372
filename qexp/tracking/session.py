"""wandb for a while: imported late, kept quiet and in one folder, shut down again; its failures in our words.

Everything that talks to W&B goes through here, so that nothing is written outside the folder it belongs to, nothing
asks for a key on the terminal, and no service process outlives the work.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qexp.config.wandb_names import OF_A_RUN
from qexp.errors import ConfigError, MissingLibraryError, UnsupportedError
from qexp.system.variables import variables_set


@contextmanager
def wandb_session(folder: Path, mode: str) -> Iterator[Any]:
    """Provide the wandb module, with its data and cache in <folder>/wandb; offline it says not a word to anyone.

    Variables of the environment that name a run, another program's, are taken away for as long.

    At the end its service process is shut down, which also makes a .wandb file complete (`finish` alone returns before
    it is written), and the environment is as before. A run that the calling program has open is left alone.
    """
    cache = folder / "wandb" / "cache"
    changes: dict[str, str | None] = dict.fromkeys(OF_A_RUN)
    changes |= {"WANDB_DATA_DIR": str(folder / "wandb" / "data"), "WANDB_CACHE_DIR": str(cache)}
    if mode == "offline":
        changes["WANDB_ERROR_REPORTING"] = "false"
    with variables_set(changes):
        wandb = import_wandb()
        try:
            if wandb.run is None:
                wandb.setup(wandb.Settings(mode=mode, silent=True))
            yield wandb
        finally:
            if wandb.run is None:
                wandb.teardown()
    shutil.rmtree(cache, ignore_errors=True)  # debug logs, of use only if something failed
    with suppress(OSError):
        cache.parent.rmdir()  # if nothing else is there


def require_login(wandb: Any) -> None:
    """Raise ConfigError without an API key: wandb would ask for one, and wait."""
    if wandb.run is None and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "tracking.mode=online needs a W&B account, and there is no API key on this machine; run `wandb login`, "
            "or set WANDB_API_KEY, or use tracking=offline and `wandb sync` the run folder later"
        )


def check_login() -> None:
    """Raise ConfigError without an API key: for asking before experiments run whose log would be lost."""
    with (
        TemporaryDirectory(prefix="qexp-login-") as folder,
        clear_errors("tracking.mode=online: W&B does not start", "use tracking=offline"),
        wandb_session(Path(folder), "online") as wandb,
    ):
        require_login(wandb)


@contextmanager
def clear_errors(subject: str, remedy: str) -> Iterator[None]:
    """Raise failures of wandb and of the network as one UnsupportedError; `subject` names the work that failed."""
    try:
        yield
    except Exception as error:
        if not (type(error).__module__.startswith("wandb") or isinstance(error, ConnectionError | TimeoutError)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(f"{subject} ({text}); check the network and the account, or {remedy}") from error


def import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingLibraryError(f"tracking needs wandb ({error}); pip install wandb, or use tracking=none") from error
    return wandb
