"""Masks, positions and counters take the dtype that the model declares, whatever the file holds them in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qexp.errors import LoadError
from tests.loading.toys import load_toy, save_state, settings
from tests.products import representatives


class Masked(nn.Module):
    """Whole numbers that work only in their own dtype: `~` of a byte is no negation, and int16 is no index."""

    causal: Tensor
    order: Tensor
    levels: Tensor
    count: Tensor
    none: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.register_buffer("causal", torch.ones(4, 32, dtype=torch.bool).tril())
        self.register_buffer("order", torch.arange(31, -1, -1, dtype=torch.int32))
        self.register_buffer("levels", torch.arange(32, dtype=torch.uint8))
        self.register_buffer("count", torch.tensor(-3, dtype=torch.int16))
        self.register_buffer("none", torch.zeros(0, 2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).masked_fill(~self.causal, 0.0)[:, self.order]
        return y * self.levels.to(y.dtype) + self.count.to(y.dtype)


def stored(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = dict(Masked().state_dict())
    return {**state, name: change(state[name])}


CHANGED = [
    ("causal", torch.uint8),
    ("causal", torch.int16),
    ("causal", torch.uint64),
    ("order", torch.uint16),
    ("order", torch.int64),
    ("levels", torch.uint32),
    ("levels", torch.int8),
    ("count", torch.int8),
    ("count", torch.int64),
    ("none", torch.bool),
]
QUANTIZED = [("causal", torch.int16, "bitsandbytes"), ("order", torch.int64, "gguf")]  # buffers stay as they are


@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    representatives(
        [(*case, backend) for backend in ("none", "bitsandbytes", "gguf") for case in CHANGED],
        [*((*case, "none") for case in CHANGED), *QUANTIZED],
    ),
)
def test_whole_numbers_in_another_dtype_load_as_load_state_dict_does(
    name: str, dtype: torch.dtype, backend: str, tmp_path: Path
) -> None:
    state = stored(name, lambda tensor: tensor.to(dtype))
    expected = Masked()
    expected.load_state_dict(state)
    loaded = load_toy(save_state(tmp_path, state), settings(backend), Masked).model
    for own, buffer in expected.named_buffers():
        assert loaded.get_buffer(own).dtype == buffer.dtype and torch.equal(loaded.get_buffer(own), buffer)
    if backend == "none":
        x = torch.randn(4, 32)
        assert torch.equal(loaded(x), expected(x))


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        ("causal", 2, torch.uint8, r"'causal' is U8 .* holds 2, .* as bool \(0 to 1\)"),
        ("causal", -1, torch.int64, r"'causal' is I64 .* holds -1, .* as bool \(0 to 1\)"),
        ("order", 2**31, torch.int64, rf"'order' is I64 .* holds {2**31}, .* as int32"),
        ("levels", -1, torch.int8, r"'levels' is I8 .* holds -1, .* as uint8 \(0 to 255\)"),
        ("levels", 256, torch.uint16, r"'levels' is U16 .* holds 256, .* as uint8"),
        ("count", 40_000, torch.uint16, r"'count' is U16 .* holds 40000, .* as int16"),
    ],
)
def test_a_whole_number_outside_the_declared_dtype_is_refused(
    name: str, value: int, dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    state = stored(name, lambda tensor: torch.full(tensor.shape, value).to(dtype))
    with pytest.raises(LoadError, match=message):
        load_toy(save_state(tmp_path, state), settings("none"), Masked)


def test_whole_numbers_of_a_saved_gguf_file_come_back_in_the_declared_dtype(tmp_path: Path) -> None:
    import qexp

    state = stored("causal", lambda tensor: tensor.to(torch.int32))
    qexp.save(qexp.load(save_state(tmp_path / "a", state), "gguf", skeleton=Masked, device="cpu"), tmp_path / "b")
    again = qexp.load(tmp_path / "b", skeleton=Masked, device="cpu")
    assert all(again.get_buffer(name).dtype == buffer.dtype for name, buffer in Masked().named_buffers())
    assert torch.equal(again.get_buffer("causal"), Masked().causal)
