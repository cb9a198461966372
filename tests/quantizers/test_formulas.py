"""`task=roundtrip` on a layer of N(0, 1) weights gives the error that each format's published formula gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.loading.lifecycle import request_load
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.tasks.roundtrip import LayerRow, measure_layers
from tests.backends import CPU, QUANTIZING, StackSource, backend_config, save_stack
from tests.quantizers.formulas import FORMULAS

ROWS, COLUMNS = 128, 4096
# What a weight has once, beside the formula's bits: the 16 levels; with nested scales, their 256 levels and the offset.
TABLE_BYTES = {"bitsandbytes": 64, "bitsandbytes_fp4": 64, "bitsandbytes_nf4_dq": 64 + 1024 + 4}
PUBLISHED_DB = {  # measured with each library that has the format, on N(0, 1) weights, 4096 x 4096, fp32
    "bitsandbytes": 20.73, "bitsandbytes_nf4_dq": 20.72, "bitsandbytes_fp4": 18.28, "bitsandbytes_int8": 41.23,
    "torchao": 41.26, "torchao_int8dq": 41.26, "torchao_float8wo": 31.55, "torchao_float8wo_e5m2": 25.57,
    "quanto": 41.23, "quanto_int4": 20.02, "quanto_int2": 6.01, "quanto_float8": 31.55,
    "gguf": 45.43, "gguf_q5_1": 28.44, "gguf_q5_0": 27.39, "gguf_q4_1": 22.13, "gguf_q4_0": 21.32,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gaussian")
    save_stack(path, [(ROWS, COLUMNS)], dtype=torch.float32, bias=False)
    return path


def round_trip(folder: Path, backend: str) -> LayerRow:
    settings = ComponentConfig(backend_config(backend))
    request = request_load(StackSource(folder), "stack", settings, device=CPU)
    (row,) = measure_layers(prepare(request, load_quantizer_of(request)), loader=LoaderConfig())
    return row


def sqnr_db(weight: np.ndarray, restored: np.ndarray) -> float:
    error = np.square(weight - restored, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(weight, dtype=np.float64).sum() / error))


def test_every_backend_has_a_formula() -> None:
    assert set(FORMULAS) == set(QUANTIZING) >= set(PUBLISHED_DB)


@pytest.mark.parametrize("backend", QUANTIZING)
def test_round_trip_has_the_error_and_the_bits_of_the_formula(backend: str, folder: Path) -> None:
    formula, bits = FORMULAS[backend]
    torch.manual_seed(0)
    weight = torch.nn.init.normal_(torch.empty(ROWS, COLUMNS)).numpy()
    row = round_trip(folder, backend)
    expected = sqnr_db(weight, formula(weight))
    assert row.sqnr_db == pytest.approx(expected, abs=0.1)
    assert expected == pytest.approx(PUBLISHED_DB.get(backend, expected), abs=0.1)
    assert row.relative_l2 == pytest.approx(10 ** (-expected / 20), rel=0.02)
    tables = 8 * TABLE_BYTES.get(backend, 0) / (ROWS * COLUMNS)
    assert row.bits_per_weight == pytest.approx(bits + tables, abs=0.002)


def test_none_is_exact(folder: Path) -> None:
    row = round_trip(folder, "none")
    assert (row.sqnr_db, row.max_abs_error, row.bits_per_weight) == (None, 0.0, 32.0)
