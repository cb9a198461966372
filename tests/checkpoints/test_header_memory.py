"""The memory of reading a header, measured in a process without torch, which starts in a third of the time."""

import os
import resource
from pathlib import Path

import pytest

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.errors import LoadError


def refuse(file: Path, length: int) -> None:
    file.write_bytes(length.to_bytes(8, "little"))
    os.truncate(file, 800_000_000)
    with pytest.raises(LoadError, match="header length"):
        open_checkpoint(file)


@pytest.mark.own_process
def test_no_memory_is_reserved_for_a_header_that_is_too_long(tmp_path: Path) -> None:
    """Nor is one that is there, in a sparse file, above the format's limit of 100 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(tmp_path / "model.safetensors", 100_000_001)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB
