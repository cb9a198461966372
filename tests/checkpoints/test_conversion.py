"""Conversions recorded on headers give what they give on tensors, and refuse what rows cannot do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qexp.checkpoints.conversion import converted
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.loading.streaming.stream import stream
from qexp.loading.work_item import WorkItem
from tests.loading.toys import save_state
from tests.quantizers.test_contract import gaussian


def state() -> dict[str, Tensor]:
    return {
        "qkv": gaussian(12, 5), "other": gaussian(4, 5, seed=1), "bias": gaussian(12, seed=2).half(),
        "steps": torch.arange(7), "conv": gaussian(6, 2, 3, 3, seed=3), "scalar": torch.tensor(2.5),
        "kept": gaussian(3),
    }  # fmt: skip


def everything(tensors: Any) -> dict[str, Any]:
    """What conversion functions do, on tensors and on what stands for them."""
    q, k, v = torch.chunk(tensors.pop("qkv"), 3, dim=0)
    low, high = tensors.pop("bias").chunk(2)
    first, second, third = torch.split(tensors.pop("steps"), (1, 4, 2), dim=0)
    a, b, c = tensors["conv"].split(2)
    swapped = torch.cat([high, low], dim=0)
    assert q.shape == (4, 5) and len(swapped) == 12 and a.ndim == a.dim() == 4 and v.size(0) == 4
    return {
        "q": torch.cat([q]), "kv": torch.concat([k, v]), "vkq": torch.cat((v, k, q)), "swapped": swapped,
        "middle": torch.cat([k, v])[2:-3], "nested": torch.cat([swapped, swapped[3:5]])[4:],
        "joined": torch.cat([k, tensors.pop("other")]), "tail": third, "turned": torch.cat([third, first, second]),
        "conv": torch.cat([c, a, b]), "none": q[4:], "scalar": tensors.pop("scalar"),
        "stack": torch.stack([q, k, v]), "beside": torch.stack([q, k], dim=1), "columns": torch.cat([q, k], dim=-1),
        "left": q.chunk(2, dim=1)[0], "flat": a.reshape(2, -1), "row": k[1], "last": v[-1], "unbound": c.unbind(1)[1],
        "squeezed": a[:1].squeeze(0).unsqueeze(-1), "transposed": q.t(), "column": q[:, 1], "every other": v[::2],
        "turned back": torch.transpose(k.t(), 0, 1).contiguous(), "halves": k.t().chunk(2)[1][1:],
        "both": torch.cat([q.t(), v.t()], dim=1), "permuted": torch.stack([q, k]).permute(2, 0, 1),
    }  # fmt: skip


def read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    items = [WorkItem(name, e, TORCH_DTYPES[e.dtype], e.nbytes) for name, e in checkpoint.entries.items()]
    return {item.target: tensor for item, tensor in stream(items, lambda item, tensor: tensor.clone(), workers=1,
                                                           in_flight_bytes=1000)}  # fmt: skip


def test_what_is_recorded_is_what_the_function_does(tmp_path: Path) -> None:
    tensors = state()
    expected = {**everything(tensors), **{name: tensor for name, tensor in tensors.items() if name == "kept"}}
    found = read(converted(open_checkpoint(save_state(tmp_path, state())), everything))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_a_tensor_of_one_piece_is_read_from_its_place(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_state(tmp_path, state()))
    entry = converted(checkpoint, everything).entries["q"]
    whole = checkpoint.entries["qkv"]
    assert (entry.name, entry.offset, entry.nbytes, entry.pieces) == ("q", whole.offset, whole.nbytes // 3, ())


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (lambda tensors: {"x": tensors["qkv"].nonzero()}, "'qkv' cannot be converted by `nonzero`: "),
        (lambda tensors: {"x": tensors["qkv"].view(7, 9)}, "converted by `view`: .*invalid"),
        (lambda tensors: {"x": tensors["qkv"] + tensors["bias"]}, "cannot convert the tensors .*TypeError: "),
        (lambda tensors: {"x": torch.add(tensors["qkv"], tensors["bias"])}, "'qkv' and others differ in type"),
        (lambda tensors: {"x": tensors["qkv"][99]}, "cannot convert the tensors of .*IndexError: 'qkv' has no row 99"),
        (lambda tensors: {"x": torch.cat([tensors["qkv"], tensors["bias"]])}, "'bias' and 'qkv' differ in type"),
        (lambda tensors: {"x": tensors["qkv"].split([3, 4])[0]}, "cannot convert the tensors .*ValueError: parts"),
        (lambda tensors: {"x": tensors.pop("absent")}, "cannot convert .*KeyError: 'absent'.*another model"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(does: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_state(tmp_path, state()))
    with pytest.raises(LoadError, match=words):
        converted(checkpoint, does)


def test_what_lies_in_crumbs_is_read_at_once(tmp_path: Path) -> None:
    """600 rows of 20 bytes: one read, and put in order afterwards."""
    a, b = gaussian(600, 5), gaussian(600, 5, seed=1)
    checkpoint = open_checkpoint(save_state(tmp_path, {"a": a, "b": b}))
    joined = converted(checkpoint, lambda tensors: {"x": torch.cat([tensors.pop("a"), tensors.pop("b")], dim=1)})
    assert len(joined.entries["x"].pieces) == 2 and joined.entries["x"].transform is not None
    assert torch.equal(read(joined)["x"], torch.cat([a, b], dim=1))


def test_blocks_are_no_numbers_to_compute_with() -> None:
    entry = TensorEntry("w", "GGUF_Q8_0", (4, 64), Path("x.gguf"), 0, 8 * 34)
    checkpoint = Checkpoint(Path("x.gguf"), {}, {"w": entry}, ())
    stacked = converted(checkpoint, lambda tensors: {"x": torch.stack([tensors["w"][2:], tensors["w"][:2]])})
    assert [piece.offset for piece in stacked.entries["x"].pieces] == [4 * 34, 0]
    assert stacked.entries["x"].shape == (2, 2, 64) and stacked.entries["x"].nbytes == 8 * 34
    with pytest.raises(LoadError, match="'w' is quantized in blocks and cannot be converted by `t`"):
        converted(checkpoint, lambda tensors: {"x": tensors.pop("w").t()})
    with pytest.raises(LoadError, match="'w' cannot have rows of 16, which is not a multiple of its block 32"):
        converted(checkpoint, lambda tensors: {"x": tensors.pop("w").view(16, 16)})


def test_blocks_of_one_dimension_are_cut_between_blocks_alone() -> None:
    entry = TensorEntry("norm", "GGUF_Q8_0", (128,), Path("x.gguf"), 64, 4 * 34)
    checkpoint = Checkpoint(Path("x.gguf"), {}, {"norm": entry}, ())
    half = converted(checkpoint, lambda tensors: {"x": tensors.pop("norm").chunk(2)[1]}).entries["x"]
    assert (half.shape, half.offset, half.nbytes) == ((64,), 64 + 2 * 34, 2 * 34)
    with pytest.raises(LoadError, match="'norm' would have to be cut at 16 or 128, inside a block of 32"):
        converted(checkpoint, lambda tensors: {"x": tensors.pop("norm")[16:]})
