"""Reading ahead: which bytes of which files the system is asked for."""

import os
from pathlib import Path
from threading import Event

import pytest

from qexp.checkpoints import regular_file


def test_beginning_of_files_is_read_ahead_up_to_a_number_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in "abc"]
    for file, size in zip(files, (300, 500, 900), strict=True):
        file.write_bytes(bytes(size))
    asked, done = list[tuple[str, int, int]](), Event()

    def advise(descriptor: int, start: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), start, nbytes))
        if len(asked) == 2:
            done.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    regular_file.read_ahead([tmp_path / "missing", *files], nbytes=400)
    assert done.wait(timeout=10)
    assert asked == [("a", 0, 300), ("b", 0, 100)]
