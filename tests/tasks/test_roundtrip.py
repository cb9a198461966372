"""The roundtrip task: its rows, its summary and its file."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.loading.component import Prepared
from qexp.loading.lifecycle import request_load
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.tasks.roundtrip import LayerRow, measure_layers, nonfinite_layers, rows_to_csv, summarize
from tests.backends import CPU, Stack, StackSource, backend_config, save_stack
from tests.quantizers.formulas import symmetric_int8


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return save_stack(tmp_path / "stack", [(128, 64), (64, 128), (32, 64)], dtype=torch.bfloat16)


def prepared(folder: Path, backend: str, skip: tuple[str, ...] = ()) -> Prepared:
    settings = ComponentConfig(backend_config(backend), skip_modules=skip)
    request = request_load(StackSource(folder), "stack", settings, device=CPU)
    return prepare(request, load_quantizer_of(request))


def rows_of(folder: Path, backend: str, skip: tuple[str, ...] = ()) -> list[LayerRow]:
    return measure_layers(prepared(folder, backend, skip), loader=LoaderConfig(workers=2))


def test_a_row_compares_with_the_weight_in_the_checkpoint(tmp_path: Path) -> None:
    stack = save_stack(tmp_path, [(128, 64), (64, 128)], dtype=torch.float32)
    rows = rows_of(tmp_path, "quanto")
    assert [row.layer for row in rows] == ["layers.0", "layers.1"]
    for row, layer in zip(rows, stack.layers, strict=True):
        weight = layer.weight.numpy()
        noise = weight - symmetric_int8(weight, 127)
        assert row.sqnr_db == pytest.approx(10 * np.log10(np.square(weight).sum() / np.square(noise).sum()), abs=0.01)
        assert row.max_abs_error == pytest.approx(np.abs(noise).max(), rel=1e-3)
        assert (row.out_features, row.in_features) == weight.shape
        assert row.quantized_bytes == weight.size + 4 * weight.shape[0]  # int8 values and an fp32 scale a row
        assert row.bits_per_weight == pytest.approx(8 + 32 / weight.shape[1])
        assert row.stored_dtype == "float32"


def test_skipped_layers_have_no_row(stack: Stack, tmp_path: Path) -> None:
    assert [row.layer for row in rows_of(tmp_path / "stack", "torchao", ("layers.1",))] == ["layers.0", "layers.2"]


def test_none_casts_every_layer(stack: Stack, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "stack", "none")
    assert [(row.sqnr_db, row.max_abs_error, row.bits_per_weight) for row in rows] == [(None, 0.0, 16.0)] * 3
    summary = summarize(rows)
    assert summary["roundtrip/exact_layers"] == 3
    assert summary["roundtrip/sqnr_db_mean"] is None


def test_the_summary_has_means_and_worst_cases() -> None:
    def row(sqnr: float, relative: float, cosine: float, largest: float) -> LayerRow:
        return LayerRow("c", "l", 1, 1, "float32", "int8", 1, 8.0, sqnr, relative, cosine, largest)

    summary = summarize([row(20.0, 0.1, 0.995, 0.5), row(30.0, 0.03, 0.999, 0.7)])
    counts = {"layers": 2, "exact_layers": 0, "nonfinite_layers": 0, "inexact_layers": 2, "finite_layers": 2}
    means = {"sqnr_db_mean": 25.0, "relative_l2_mean": pytest.approx(0.065)}
    worst = {"sqnr_db_min": 20.0, "cosine_min": 0.995, "max_abs_error": 0.7}
    assert summary == {f"roundtrip/{name}": value for name, value in {**counts, **means, **worst}.items()}


def test_the_csv_reads_back(stack: Stack, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "stack", "bitsandbytes")
    read = list(csv.DictReader(io.StringIO(rows_to_csv(rows))))
    assert [row["layer"] for row in read] == [row.layer for row in rows]
    assert [float(row["sqnr_db"]) for row in read] == [row.sqnr_db for row in rows]


def test_a_layer_that_is_not_finite_is_counted_and_in_no_mean() -> None:
    good = LayerRow("c", "a", 1, 1, "float32", "int8", 1, 8.0, 20.0, 0.1, 0.9, 0.5)
    bad = LayerRow("c", "b", 1, 1, "float32", "int8", 1, 8.0, None, None, None, None)
    summary = summarize([good, bad])
    assert (summary["roundtrip/nonfinite_layers"], summary["roundtrip/sqnr_db_mean"]) == (1, 20.0)
    assert nonfinite_layers([good, bad]) == ["b"]
