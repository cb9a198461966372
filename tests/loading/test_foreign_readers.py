"""What transformers makes of its own models that were saved here: the same model, or an error, never other weights."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import qexp
from qexp.errors import LoadError
from tests.products import representatives

IDS = torch.arange(2, 12)[None]
BACKENDS = [
    "bitsandbytes", "bitsandbytes_int8", "torchao", "torchao_float8wo", "quanto", "quanto_int4", "quanto_int2",
    "quanto_float8", "gguf", "packed_uint4",
]  # fmt: skip


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, **shape))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=256, n_layer=1, n_head=4, n_positions=32))


def bert() -> Any:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=64, **shape))


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=256, d_kv=64, d_ff=256, num_layers=1, num_heads=4))


def saved(build: Callable[[], Any], backend: str, folder: Path, **options: Any) -> torch.Tensor:
    """Save a model; returns its output."""
    torch.manual_seed(0)
    build().save_pretrained(folder / "dense")
    model = qexp.load(folder / "dense", backend, device="cpu", compute_dtype="fp32")
    qexp.save(model, folder / "saved", **options)
    return model(IDS)[0]


@pytest.mark.parametrize(
    ("build", "backend"),
    representatives(
        product([mistral, gpt2, bert, t5], BACKENDS),
        [
            *product([bert], ["bitsandbytes", "torchao", "quanto", "gguf"]),
            *product([mistral], ["bitsandbytes", "quanto"]),
        ],
    ),
)
def test_transformers_reads_the_same_model_or_refuses_it(build: Any, backend: str, tmp_path: Path) -> None:
    expected = saved(build, backend, tmp_path)
    assert torch.equal(qexp.load(tmp_path / "saved", device="cpu", compute_dtype="fp32")(IDS)[0], expected)
    try:
        theirs = type(build()).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    except (RuntimeError, OSError):  # shapes that do not fit; no file that it reads
        assert backend not in ("bitsandbytes", "bitsandbytes_int8") and (backend[:7] != "torchao" or build is gpt2)
        return
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS)[0], expected, rtol=0, atol=0.05 * float(expected.std()))
    assert backend[:6] != "quanto"


@pytest.mark.parametrize("backend", representatives(["quanto", "quanto_int4", "quanto_float8"], ["quanto_int4"]))
def test_the_formats_own_name_is_kept_on_request_with_a_warning(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = saved(bert, backend, tmp_path, interchange=True)
    assert "transformers opens this folder with random weights" in capsys.readouterr().err
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quanto"
    assert torch.equal(qexp.load(tmp_path / "saved", device="cpu", compute_dtype="fp32")(IDS)[0], expected)


def test_a_refused_name_is_read_for_known_methods_only(tmp_path: Path) -> None:
    saved(bert, "quanto", tmp_path)
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["quant_method"] == "qexp_quanto"
    config["quantization_config"]["quant_method"] = "qexp_awq"
    file.write_text(json.dumps(config))
    with pytest.raises(LoadError, match="quant_method='qexp_awq', which is not supported"):
        qexp.load(tmp_path / "saved", device="cpu")


def saved_dit(folder: Path, skip: list[str]) -> tuple[Any, dict[str, Any]]:
    """(a DiT of two blocks in quanto's int8, saved; its quantization_config)."""
    from diffusers import DiTTransformer2DModel

    shape: Any = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "num_layers": 2}
    DiTTransformer2DModel(**shape, sample_size=8, norm_num_groups=4).save_pretrained(folder / "dense")
    model = qexp.load(folder / "dense", "quanto", device="cpu", compute_dtype="fp32", skip_modules=skip)
    qexp.save(model, folder / "saved")
    return model, json.loads((folder / "saved" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("skip", [[], ["proj_out_2"], ["**.to_q", "**.to_v"]])
def test_a_model_of_diffusers_keeps_the_formats_own_name(skip: list[str], tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    model, config = saved_dit(tmp_path, skip)
    assert config["quant_method"] == "quanto"
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert type(theirs.transformer_blocks[0].attn1.to_q) is type(model.transformer_blocks[0].attn1.to_q)
    want, got = (model.state_dict(), theirs.state_dict())
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("skip", [["transformer_blocks.0.attn1.to_q"], ["transformer_blocks.1"]])
def test_a_dense_layer_that_diffusers_takes_for_a_quantized_one_has_a_name_that_it_refuses(
    skip: list[str], tmp_path: Path
) -> None:
    """It goes by the last part of a layer's name alone."""
    from diffusers import DiTTransformer2DModel

    model, config = saved_dit(tmp_path, skip)
    assert config["quant_method"] == "qexp_quanto"
    with pytest.raises(ValueError, match="qexp_quanto"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "theirs")
    again: Any = qexp.load(tmp_path / "saved", device="cpu", compute_dtype="fp32")
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
