"""config.json of transformers, read and saved as the library does: classes of config and network, and values.

Networks are built on the meta device in the sizes that the library's own defaults have, with two layers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qexp
from qexp.checkpoints.checkpoint import read_object
from qexp.errors import LoadError
from qexp.interop.interfaces import interface_of
from qexp.models.skeletons import on_meta
from qexp.models.transformers_networks import network, transformers_config

CAUSAL = [
    "apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "cpmant", "ctrl",
    "cwm", "deepseek_v2", "diffllama", "doge", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite",
    "granite_swa", "helium", "internlm3", "jais2", "jetmoe", "lfm2", "llama", "mamba", "mamba2", "mistral",
    "modernbert-decoder", "mpt", "nanochat", "olmo", "olmo2", "olmo3", "openai-gpt", "opt", "persimmon", "phi",
    "phi3", "qwen2", "qwen3", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2",
    "vaultgemma", "xglm", "xlm", "xlnet", "zamba2",
]  # fmt: skip
SEQ2SEQ = ["bart", "blenderbot", "led", "longt5", "m2m_100", "marian", "mt5", "pegasus", "plbart", "t5", "umt5"]
ENCODERS = ["albert", "bert", "clip", "electra", "roberta", "siglip", "vit"]
FAMILIES = [
    (family, auto)
    for families, auto in (
        (CAUSAL, "AutoModelForCausalLM"),
        (SEQ2SEQ, "AutoModelForSeq2SeqLM"),
        (ENCODERS, "AutoModel"),
    )
    for family in families
]
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "num_decoder_layers")
SHOWN = ("gpt2", "mamba2", "t5", "clip")
KINDS_OF_TWO_LAYERS = {  # where the default is a list as long as the default's layers
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


def save_config(family: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """The library's own default of an architecture with two layers, as its writer has it; `changes` are entries."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    few = {name: 2 for name in LAYERS if (getattr(kind(), name, None) or 0) > 2}
    config = kind(**few, **KINDS_OF_TWO_LAYERS.get(family, {}))
    config.save_pretrained(folder)
    if changes:
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | changes), encoding="utf-8"
        )
    return read_object(folder / "config.json")


def values(config: Any) -> str:
    return repr({name: value for name, value in config.to_dict().items() if name != "_name_or_path"})


def assert_as_the_library_builds(raw: dict[str, Any], folder: Path, auto_class: str) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    theirs_config = transformers.AutoConfig.from_pretrained(folder)
    with on_meta(), no_init_weights():
        theirs = getattr(transformers, auto_class).from_config(theirs_config)
    with on_meta():
        ours = network(raw, folder, auto_class)
    assert type(ours) is type(theirs) and type(ours.config) is type(theirs.config)
    assert values(ours.config) == values(theirs.config)
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (ours, theirs)]
    assert shapes[0] == shapes[1]
    return ours


@pytest.mark.parametrize(
    ("family", "auto_class"),
    [
        pytest.param(family, auto, marks=() if family in SHOWN else pytest.mark.exhaustive, id=family)
        for family, auto in FAMILIES
    ],
)
def test_a_config_is_read_and_saved_as_the_library_does(family: str, auto_class: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    ours = assert_as_the_library_builds(save_config(family, tmp_path), tmp_path, auto_class)
    interface = interface_of(ours)
    assert interface is not None
    saved = interface.saved_config(ours)
    assert saved["architectures"] == [type(ours).__name__]
    (tmp_path / "config.json").write_text(json.dumps(saved, allow_nan=False), encoding="utf-8")
    again = AutoConfig.from_pretrained(tmp_path)
    again.architectures, again.dtype = ours.config.architectures, ours.config.dtype
    assert type(again) is type(ours.config) and values(again) == values(ours.config)


@pytest.mark.parametrize("kinds", [["full_attention", "sliding_attention"], ["sliding_attention"] * 2])
@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", None])
def test_a_mistral_with_kinds_of_layers_is_a_ministral(
    kinds: list[str], auto_class: str | None, tmp_path: Path
) -> None:
    """By the Auto class that is named, and by the architecture that config.json has."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    raw = save_config(
        "mistral", tmp_path, layer_types=kinds, architectures=["MistralForCausalLM"], sliding_window=8, **sizes
    )
    ours = assert_as_the_library_builds(raw, tmp_path, "AutoModelForCausalLM")
    assert type(ours).__name__ == "MinistralForCausalLM"
    with on_meta():
        assert type(network(raw, tmp_path, auto_class)) is type(ours)


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.001, 0.1], [float("-inf"), float("inf")]], ids=str)
def test_infinity_in_a_config_is_read_and_saved(limit: list[float], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Mamba2Config

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, vocab_size=16, n_groups=1,
        time_step_limit=limit, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = qexp.load(tmp_path / "theirs", "none", device="cpu")
    assert list(ours.config.time_step_limit) == limit
    qexp.save(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert list(again.config.time_step_limit) == limit
    tokens = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.equal(ours(tokens).logits, expected) and torch.equal(again(tokens).logits, expected)
    assert torch.equal(qexp.load(tmp_path / "ours", "none", device="cpu")(tokens).logits, expected)


def test_bare_infinity_of_older_files_is_read_too(tmp_path: Path) -> None:
    raw = save_config("mamba2", tmp_path, time_step_limit=[0.0, float("inf")])
    assert "Infinity" in (tmp_path / "config.json").read_text() and "__float__" not in str(raw)
    assert list(transformers_config(raw, tmp_path).time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"num_attention_heads": [1]}, {"rope_parameters": 3}])
def test_a_value_that_the_library_refuses_is_an_error_with_its_place(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"config\.json' cannot be read as that of a 'llama' by transformers \d.*: "):
        transformers_config({"model_type": "llama", **values}, tmp_path)


def test_code_of_a_models_own_is_not_run(tmp_path: Path) -> None:
    raw = {"model_type": "llama_of_mine", "auto_map": {"AutoConfig": "mine.Config"}}
    with pytest.raises(LoadError, match=r"'llama_of_mine' is unknown.*code of their own are not loaded"):
        transformers_config(raw, tmp_path)
