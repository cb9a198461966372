"""The errors a user can meet. Each message names value, rule, place and remedy; `reason` goes into status.json."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class QexpError(Exception):
    """An error whose message is meant for the user: it is shown without a traceback."""

    reason = "config"


class ConfigError(QexpError, ValueError):
    """A wrong setting, or settings that conflict."""


class MissingLibraryError(QexpError, ImportError):
    """A package that the configuration needs is not installed, or has the wrong version."""


class LoadError(QexpError):
    """A checkpoint that is missing, damaged, or does not fit the model."""

    reason = "load"


class WrongFileError(LoadError):
    """A file that is not a checkpoint (a web page, a pickle, a git-lfs pointer): its setting is wrong."""

    reason = "config"


class UnsupportedError(QexpError):
    """A correct configuration that this machine cannot run; a sweep reports it and goes on."""

    reason = "unsupported"


class DiskError(QexpError, OSError):
    """A result or an offloaded weight could not be written."""

    reason = "disk"


class DamagedFileError(DiskError):
    """A file of the program's own that does not hold what it wrote there. what: is wrong with it."""

    def __init__(self, path: object, what: str, remedy: str = "run it again") -> None:
        super().__init__(f"{path}: is damaged ({what}); {remedy}")
        self.what = what


class WaitedTooLongError(QexpError):
    """Another process held what an experiment needs for longer than it may take."""

    reason = "timeout"


class HubError(QexpError):
    """A model could not be uploaded to a hub or downloaded from it, or only partly."""

    reason = "hub"


def choices(names: Iterable[object]) -> str:
    """Join names as 'a, b or c' for the remedy of a message; numbers are sorted as numbers."""
    words = [str(name) for name in sorted(names, key=lambda name: (name if isinstance(name, int) else 0, str(name)))]
    if not words:
        return "nothing"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def first_names(names: Sequence[str]) -> str:
    """Return the first five names in quotes, and '…' if there are more."""
    return ", ".join(f"'{name}'" for name in names[:5]) + (" …" if len(names) > 5 else "")


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """Return ' (did you mean seed?)' if one of `names` is similar, else ''; it follows the value in messages."""
    words, typed = {str(word).lower(): str(word) for word in names}, str(name).lower()
    near = [typed] if typed in words else difflib.get_close_matches(typed, list(words), n=3, cutoff=0.6)
    if not near and len(typed) > 2:  # steps: num_inference_steps
        near = [word for word in words if typed in word.split("_")][:3]
    return f" (did you mean {' or '.join(words[word] for word in near)}?)" if near else ""
