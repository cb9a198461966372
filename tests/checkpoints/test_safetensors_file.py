"""Files that are laid out for mapping, and that the library reads."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.safetensors_file import ALIGNMENT, make_header, write_safetensors
from qexp.checkpoints.tensor_entry import DTYPE_BYTES


def tensors() -> dict[str, Tensor]:
    """Names in the worst order, sizes that leave any remainder, every kind of element."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (3,), "b": (64, 64), "c": (7, 9), "d": (128,), "e": (), "f": (0, 5), "g": (33, 64)}
    dtypes = (torch.int8, torch.bfloat16, torch.float64, torch.float32, torch.bool)
    return {
        f"{name}.{number}": torch.randint(0, 2, size, generator=generator).to(dtype)
        for name, size in sizes.items()
        for number, dtype in enumerate(dtypes)
    }


@pytest.mark.parametrize("padding", range(0, 64, 7))
def test_what_can_be_aligned_is(padding: int, tmp_path: Path) -> None:
    file, own = tmp_path / "model.safetensors", tensors()
    write_safetensors(file, own, {"format": "pt", "text": "x" * padding})
    entries = open_checkpoint(file).entries
    assert entries.keys() == own.keys()
    for entry in entries.values():
        assert entry.nbytes % ALIGNMENT or entry.offset % ALIGNMENT == 0, entry
        assert entry.offset % DTYPE_BYTES[entry.dtype] == 0, entry  # what other readers take for granted


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    file, own = tmp_path / "model.safetensors", tensors()
    own |= {"view": torch.arange(12.0).view(3, 4).t(), "complex": torch.ones(3, dtype=torch.complex64)}
    write_safetensors(file, own, {"b": "1", "a": 'é \n"'})
    found = load_file(file)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) and found[name].dtype == own[name].dtype for name in own)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"b": "1", "a": 'é \n"'}


def test_header_has_the_offsets_of_the_bytes_behind_it() -> None:
    header = make_header({"a": ("F32", (2, 3), 4), "b": ("I8", (5,), 1)}, {})
    assert len(header) % ALIGNMENT == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    text = '{"__metadata__":{},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    assert header[8:].decode().rstrip() == text + '"b":{"dtype":"I8","shape":[5],"data_offsets":[24,29]}}'
