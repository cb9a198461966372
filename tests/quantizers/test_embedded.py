"""A checkpoint that is quantized already wins over what the user asks for, and says which fields lost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.loading.saving import save_model
from qexp.quantizers.embedded import merge
from tests.backends import backend_config
from tests.loading.toys import Toy, load_toy, random_state, save_state, settings

ASKED: list[tuple[tuple[str, ...], tuple[str, ...], list[str]]] = [  # (asked, the checkpoint's, what lost)
    (("none",), ("bitsandbytes",), []),
    (("bitsandbytes",), ("bitsandbytes",), []),
    (("bitsandbytes_fp4",), ("bitsandbytes",), ["fp4 (the checkpoint has nf4)"]),
    (("quanto",), ("bitsandbytes",), ["quant_method=quanto (the checkpoint has bitsandbytes)"]),
    (
        ("bitsandbytes_int8", "llm_int8_threshold=0"),
        ("bitsandbytes",),
        [
            "llm_int8 (the checkpoint has nf4)",
            "load_in_8bit=True (the checkpoint has False)",
            "llm_int8_threshold=0.0 (the checkpoint has 6.0)",
        ],
    ),
    (
        ("bitsandbytes", "bnb_4bit_blocksize=128", "bnb_4bit_quant_storage=bfloat16", "bnb_4bit_compute_dtype=fp16"),
        ("bitsandbytes_nf4_dq",),
        [
            "bnb_4bit_compute_dtype=float16 (the checkpoint has None)",
            "bnb_4bit_quant_storage=bfloat16 (the checkpoint has uint8)",
            "bnb_4bit_blocksize=128 (the checkpoint has 64)",
        ],
    ),
    (
        ("quanto_int4", "activations_dtype=int8", "modules_to_not_convert=[head]"),
        ("quanto",),
        [
            "weights_dtype=int4 (the checkpoint has int8)",
            "activations_dtype=int8 (the checkpoint has None)",
            "modules_to_not_convert=('head',) (the checkpoint has ())",
        ],
    ),
]


@pytest.mark.parametrize(("asked", "embedded", "lost"), ASKED, ids=lambda value: "-".join(map(str, value))[:40])
def test_every_field_that_loses_is_listed(asked: tuple[str, ...], embedded: tuple[str, ...], lost: list[str]) -> None:
    assert merge(backend_config(*asked), backend_config(*embedded)) == lost


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8", "quanto", "quanto_int4"])
def test_a_load_says_what_lost_and_loads_what_is_stored(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state(tmp_path / "dense", random_state(Toy, torch.bfloat16))
    stored: Any = load_toy(tmp_path / "dense", settings(backend)).model
    save_model(stored, tmp_path / "stored")
    capsys.readouterr()
    asked = settings("bitsandbytes_fp4", skip_modules=("head", "embed"), keep_in_fp32_modules=("blocks.*.norm",))
    loaded: Any = load_toy(tmp_path / "stored", asked).model
    said = capsys.readouterr().err
    assert f"warning: toy: '{tmp_path / 'stored'}' is quantized already; unused: " in said
    assert ("quant_method=bitsandbytes (the checkpoint has quanto)" in said) == ("quanto" in backend)
    assert "warning: toy: the checkpoint holds 'embed', 'head' quantized, so they stay quantized" in said
    assert said.rstrip().endswith("without effect on them: embed, head")
    assert loaded.hf_quantizer.config.quantization_method() == stored.hf_quantizer.config.quantization_method()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad():
        expected = stored(x)
    capsys.readouterr()
    again: Any = load_toy(tmp_path / "stored", settings("none")).model
    assert capsys.readouterr().err.count("warning") == 0
    with torch.no_grad():
        assert torch.equal(again(x), expected)
