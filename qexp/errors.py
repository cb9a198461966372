"""The errors a user can meet. Each message names value, rule, place and remedy; `reason` goes into status.json."""


class QexpError(Exception):
    """An error whose message is meant for the user: it is shown without a traceback."""

    reason = "config"


class ConfigError(QexpError, ValueError):
    """A setting that is wrong, or wrong together with another one."""


class MissingLibraryError(QexpError, ImportError):
    """A package that the configuration needs is not installed, or has the wrong version."""


class LoadError(QexpError):
    """A checkpoint that is missing, damaged, or does not fit the model."""

    reason = "load"


class UnsupportedError(QexpError):
    """A correct configuration that this machine cannot run; a sweep reports it and goes on."""

    reason = "unsupported"


class DiskError(QexpError, OSError):
    """A result or an offloaded weight could not be written."""

    reason = "disk"


def choices(names: object) -> str:
    """'a, b or c', for the remedy part of a message."""
    words = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
