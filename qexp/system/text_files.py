"""Read text files of users: prompts, inputs, texts to measure on, skip patterns.

A file is UTF-8, whatever the locale; a byte order mark at its start is skipped. Lines end with a line feed, or with a
carriage return and a line feed. The other line ends of Unicode (U+2028, form feed, …) may be part of a prompt.
"""

from __future__ import annotations

from pathlib import Path

from qexp.errors import ConfigError


def read_text(path: str | Path, place: str, remedy: str) -> str:
    """Return the text of a file, its lines ended by line feeds.

    Args:
        path: the file; `~` is the home directory.
        place: the setting that names it, as the user wrote it: `task.text=a.txt`.
        remedy: for the message: what to give instead.

    Raises: ConfigError if the file cannot be read, is not UTF-8, or contains a zero byte.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: of a home that is not there
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"it is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})"
        raise ConfigError(f"{place} cannot be read: {reason}; {remedy}") from error
    if "\0" in text:  # a zip or a pickle may be valid UTF-8
        raise ConfigError(f"{place} cannot be read: it is a binary file (it contains a zero byte); {remedy}")
    return text


def read_lines(path: str | Path, place: str, remedy: str) -> list[str]:
    """Return the lines of a text file; see `read_text`."""
    lines = read_text(path, place, remedy).split("\n")
    return lines[:-1] if lines[-1] == "" else lines
