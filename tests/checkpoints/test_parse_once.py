"""A file is parsed once, and again when it has changed, however soon."""

import os
from io import BufferedReader
from pathlib import Path

import pytest

from qexp.checkpoints.parse_once import parse_once
from qexp.checkpoints.regular_file import FileState


def parse_line(file: Path, stream: BufferedReader, state: FileState) -> list[bytes]:
    """A new object for each parse, so that `is` tells whether there was one."""
    return [stream.readline()]


def test_an_unchanged_file_is_parsed_once(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one\n")
    assert parse_once(file, parse_line) is parse_once(file, parse_line)


def test_a_file_that_was_written_again_is_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexp.checkpoints.file_facts.FRESH_NS", -(10**12))  # as if it had lain there for long
    file = tmp_path / "x"
    file.write_bytes(b"one\n")
    assert parse_once(file, parse_line) is parse_once(file, parse_line)
    file.write_bytes(b"three\n")
    assert parse_once(file, parse_line) == [b"three\n"]


def test_a_second_write_in_the_same_tick_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qexp.checkpoints.regular_file as regular_file

    file = tmp_path / "x"
    file.write_bytes(b"one\n")
    status = os.stat(file)
    state = FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    monkeypatch.setattr(regular_file, "state_of", lambda descriptor: state)  # as if the clock had not moved
    assert parse_once(file, parse_line) == [b"one\n"]
    file.write_bytes(b"two\n")
    assert parse_once(file, parse_line) == [b"two\n"]
