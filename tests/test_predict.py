"""Predictions of published models: what a load of the same architecture then takes, to the byte."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest

import qexp
from qexp import predict
from qexp.config.backend_options import backend_of
from qexp.models import architectures
from tests.products import pairwise
from tests.scripts.test_make_checkpoint import TINY

T5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1,
      "num_heads": 4, "vocab_size": 100, "feed_forward_proj": "gated-gelu"}  # fmt: skip
TRANSFORMER = {
    **TINY, "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12], "in_channels": 64, "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published model of no size, whose components are on disk as well."""
    described = {
        "repository": "nobody/tiny", "source": "nowhere", "license": "none", "gated": False, "model_index": {},
        "scheduler": {},
        "components": {
            name: {"parameters": 1, "dtype": "bfloat16", "max_shard_gb": 5, "config": config}
            for name, config in (("transformer", TRANSFORMER), ("text_encoder", T5))
        },
    }  # fmt: skip
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "tiny.json").write_text(json.dumps(described))
    monkeypatch.setattr(architectures, "ASSETS", tmp_path / "assets")
    make_checkpoint.write_architecture(tmp_path / "tiny", "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    ("option", "component", "dtype"),
    pairwise(
        ["none", "bitsandbytes", "bitsandbytes_int8", "torchao", "gguf_q4_0", "packed_uint3"],
        ["transformer", "text_encoder"],
        ["bfloat16", "float16"],
    ),
)
def test_it_is_what_a_load_takes(tiny: Path, component: str, option: str, dtype: str) -> None:
    predicted = predict.predict("tiny", component, backend_of(option).resolved("cpu"), dtype)
    model = qexp.load(tiny / component, option, device="cpu", compute_dtype=dtype)
    computed = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in model.state_dict())
    assert predicted.result_bytes == qexp.memory_footprint(model) - computed
    assert predicted.loading_bytes > predicted.result_bytes + (128 << 20)


def test_flux_in_nf4_by_hand() -> None:
    found = predict.predict("flux_dev", "transformer", backend_of("bitsandbytes"), "bfloat16")
    linear = sum(  # all weights of linear layers are multiples of 64: half a byte each, and 4 bytes for 64 of them
        module.weight.numel()
        for module in architectures.network(architectures.component_of("flux_dev", "transformer").config).modules()
        if type(module).__name__ == "Linear"
    )
    dense = 11_901_408_320 - linear
    quantized = linear // 2 + linear // 64 * 4
    extra = found.result_bytes - dense * 2 - quantized
    assert 0 <= extra <= 64 * len(found.quantized) + 64 * len(found.quantized)  # the 16 levels of each weight
    assert not found.skipped


def test_models_with_one_network_have_numbers_of_their_own_skip_patterns(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(name: str, component: str, backend: Any, dtype: str, skip: Any) -> predict.Prediction:
        return predict.Prediction((1 + len(skip)) * predict.GIB, 0, (), {})

    shutil.copy(architectures.ASSETS / "tiny.json", architectures.ASSETS / "other.json")
    monkeypatch.setattr(predict, "predict", predicted)
    monkeypatch.setattr(predict, "_skip_modules", lambda name: {"tiny": (), "other": ("proj_out", "x_embedder")}[name])
    rows = predict.rows(["tiny", "other"], ["torchao"], "bfloat16")
    cells = {(name, component): row[-2:] for name, component, *row in rows}
    assert cells["tiny", "transformer"] == ["1.00", "1.00"]
    assert cells["other", "transformer"] == ["1.00", "3.00"]
    assert cells["other", "text_encoder"] == ["1.00", "1.00"]  # the patterns are of denoisers


def test_the_table_has_a_row_for_each_component(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict.rows(["tiny"], ["bitsandbytes"], "bfloat16")
    assert [row[:2] for row in rows] == [["tiny", "transformer"], ["tiny", "text_encoder"]]
    assert predict.table(rows, ["bitsandbytes"], markdown=True).startswith("| model | component | B weights | files |")
    text = predict.table(rows, ["bitsandbytes"], markdown=False).splitlines()
    assert len({len(line) for line in text}) == 1 and text[0].split()[-2:] == ["dense", "bitsandbytes"]


def test_a_format_that_cannot_hold_a_model_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict.rows(["tiny"], ["torchao_nothing"], "bfloat16")
    assert [row[-1] for row in rows] == ["–", "–"]
    assert "backend='torchao_nothing' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sdxl", "model.quantize=[unet]"], r"model\.quantize=\[unet\] is an override; predict takes none"),
        (["sdxl", "sdlx"], r"architecture 'sdlx' is unknown \(did you mean sdxl"),
        (["sdxl", "--backends", "wan"], "backend='wan' is unknown"),
    ],
)
def test_arguments_are_checked_before_anything_is_computed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["predict", *arguments])
    monkeypatch.setattr(predict, "rows", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit, match=message):
        predict.main()


def test_what_is_said_of_a_network_is_said_once(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = predict.predict

    def warned(name: str, component: str, *options: Any) -> Any:
        print(f"{component}: a warning", file=sys.stderr)
        return computed(name, component, *options)

    monkeypatch.setattr(predict, "predict", warned)
    predict.rows(["tiny"], ["bitsandbytes", "torchao"], "bfloat16")
    said = sorted(capsys.readouterr().err.splitlines())
    assert [line for line in said if line.endswith("a warning")] == [
        "tiny: text_encoder: a warning",
        "tiny: transformer: a warning",
    ]
    assert len(said) == len({*said})
