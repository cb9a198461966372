"""Tables that a class computes in its constructor: skipped where a file brings them, else the eager numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.models import computed_tables
from qexp.models.computed_tables import Table, deferred_tables, settle_tables
from qexp.models.skeletons import on_meta
from tests.loading.toys import load_toy, random_state, save_state, settings

ROWS, COLUMNS = 1200, 1000  # above LARGE


def sinusoids() -> Tensor:
    positions, omega = torch.arange(ROWS, dtype=torch.float64), torch.arange(COLUMNS // 2, dtype=torch.float64)
    omega /= COLUMNS / 2
    angles = torch.outer(positions, 1.0 / 10000**omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float().unsqueeze(0)


def ramp() -> Tensor:
    """Whole numbers divided: the result has torch's default dtype."""
    return torch.arange(ROWS)[:, None] * torch.arange(COLUMNS) / 7


def written_later() -> Tensor:
    """A table whose argument, and whose own numbers, change after it was made."""
    start = torch.arange(COLUMNS, dtype=torch.float32)
    table = torch.ones(ROWS, 1) * start
    before = table + 1
    start.zero_()
    table[3] = 5.0
    table[:, 0::2].mul_(2)
    return torch.stack([before, table])


def decided_by_numbers() -> Tensor:
    table = torch.outer(torch.arange(ROWS, dtype=torch.float32), torch.ones(COLUMNS))
    return table / table.max().item() + float(table[1, 1]) + torch.from_numpy(table.numpy().copy())


def of_bits() -> Tensor:
    causal = torch.arange(ROWS)[:, None] >= torch.arange(COLUMNS)
    return causal.float().masked_fill(~causal, float("-inf"))


TABLES: tuple[Callable[[], Tensor], ...] = (sinusoids, ramp, written_later, decided_by_numbers, of_bits)


class Positions(nn.Module):
    def __init__(self, make: Callable[[], Tensor], persistent: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("table", make(), persistent=persistent)
        self.plain = make()
        self.drawn = nn.Parameter(torch.randn(4, 4) / 2)
        self.of_table = nn.Parameter(make(), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", TABLES)
def test_tables_that_no_file_brings_have_the_eager_numbers(make: Callable[[], Tensor], dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        with on_meta(), deferred_tables():
            model = Positions(make, persistent=False)
        expected = make()
    finally:
        torch.set_default_dtype(torch.float32)
    settle_tables(model, {"table"})  # a name that is not saved with the network is nobody's
    for found in (model.table, model.plain):
        assert type(found) is Tensor and found.dtype == expected.dtype and torch.equal(found, expected)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta and isinstance(parameter, nn.Parameter) and type(parameter) is nn.Parameter, name
    assert not model.of_table.requires_grad and model.drawn.requires_grad


def test_a_table_that_the_file_brings_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[Table] = []
    evaluate = Table.evaluate
    monkeypatch.setattr(Table, "evaluate", lambda table: (evaluated.append(table), evaluate(table))[1])
    with on_meta(), deferred_tables():
        model = Positions(sinusoids)
    del model.plain
    assert {name: tensor.shape for name, tensor in model.state_dict().items()}["table"] == (1, ROWS, COLUMNS)
    settle_tables(model, {"table", "layer.weight"})
    assert not evaluated and model.table.is_meta and model.table.shape == (1, ROWS, COLUMNS)
    with on_meta(), deferred_tables():
        model = Positions(sinusoids)
    settle_tables(model, {"layer.weight"})
    assert evaluated and torch.equal(model.table, sinusoids())


def test_loaded_table_is_the_checkpoints(tmp_path: Path) -> None:
    """Not what the class computes: files hold trained or rounded ones."""

    def build() -> nn.Module:
        model: Any = Positions(sinusoids)
        del model.plain
        return model

    state = random_state(build)
    state["table"] = state["table"] + 1
    folder = save_state(tmp_path / "model", state)
    loaded = load_toy(folder, settings("none"), build).model
    assert torch.equal(loaded.get_buffer("table"), state["table"])
    assert torch.equal(loaded.get_parameter("drawn"), state["drawn"])


def test_deferring_does_not_import_the_compiler() -> None:
    """torch wraps this method of a mode by a function that imports torch._dynamo, unless the class says no."""
    method = computed_tables._Deferring.__torch_dispatch__
    assert not hasattr(method, "__wrapped__") and method.__module__ == computed_tables.__name__


def test_small_results_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed_tables, "LARGE", 10)
    with deferred_tables():
        small, large = torch.arange(3) * 2, torch.outer(torch.arange(4), torch.arange(3))
    assert type(small) is Tensor and small.tolist() == [0, 2, 4]
    assert isinstance(large, Table) and large.tolist() == [[0, 0, 0], [0, 1, 2], [0, 2, 4], [0, 3, 6]]


def test_random_tables_draw_in_the_order_of_the_class() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        for name in ("first", "second"):
            model.register_buffer(name, torch.randn(ROWS, COLUMNS) * 2)
        return model

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    with on_meta(), deferred_tables():
        model = build()
    settle_tables(model, ())
    assert torch.equal(model.second, eager.second) and torch.equal(model.first, eager.first)
