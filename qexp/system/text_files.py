"""Read text files of users: prompts, inputs, texts to measure on, skip patterns.

A file is UTF-8, whatever the locale; a byte order mark at its begin is no text. Lines end at a line feed, and a
carriage return before it belongs to the end; no other character ends one, although Unicode knows more (U+2028, form
feed, …): a prompt may have them inside.
"""

from __future__ import annotations

from pathlib import Path

from qexp.errors import ConfigError


def read_text(path: str | Path, place: str, remedy: str) -> str:
    """Return the text of a file, with line feeds alone.

    Args:
        path: the file; `~` is the home directory.
        place: the setting that names it, as the user wrote it: `task.text=a.txt`.
        remedy: what to give in its place.

    Raises: ConfigError if it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: of a home that is not there
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"it is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})"
        raise ConfigError(f"{place} cannot be read: {reason}; {remedy}") from error


def read_lines(path: str | Path, place: str, remedy: str) -> list[str]:
    """Return the lines of a text file; see `read_text`."""
    lines = read_text(path, place, remedy).split("\n")
    return lines[:-1] if lines[-1] == "" else lines
