from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qexp.checkpoints.row_file import row_file
from qexp.errors import DiskError

SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "values": (torch.float32, (7, 3)),
    "ids": (torch.int32, (7,)),
}


def test_rows_in_any_order_are_what_safetensors_reads(tmp_path: Path) -> None:
    values = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))[:, ::2]  # not contiguous
    ids = torch.arange(7, dtype=torch.int32)
    with row_file(tmp_path / "rows.safetensors", SHAPES) as file:
        for start in (4, 0, 2, 6):
            file.put("values", start, values[start : start + 2])
            file.put("ids", start, ids[start : start + 2])
        assert not (tmp_path / "rows.safetensors").exists()
    loaded = load_file(tmp_path / "rows.safetensors")
    assert torch.equal(loaded["values"], values) and torch.equal(loaded["ids"], ids)


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), row_file(tmp_path / "rows.safetensors", SHAPES):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError), row_file(tmp_path / "file" / "rows.safetensors", SHAPES):
        pass
