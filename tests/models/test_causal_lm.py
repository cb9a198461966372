"""Language models of transformers: what we load is what `from_pretrained` loads, and what it says is the same."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.config.offload import OffloadConfig
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError, LoadError
from qexp.loading.component import LoadedComponent
from qexp.loading.lifecycle import load_component
from qexp.models.causal_lm import CausalLMConfig, Source
from qexp.models.transformers_networks import network
from qexp.offloading.strategies import apply_offload
from tests.backends import CPU, EVERY_WAY, backend_config
from tests.models.test_networks import assert_same
from tests.products import representatives

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # the config's class, and its arguments
    "llama": ("LlamaConfig", SIZES),
    "qwen2 tied": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "gpt_neox renamed": ("GPTNeoXConfig", {name: value for name, value in SIZES.items() if "key_value" not in name}),
    "gpt2 without heads": ("GPT2Config", GPT2),
}


def config_of(architecture: str) -> Any:
    import transformers

    kind, arguments = ARCHITECTURES[architecture]
    return getattr(transformers, kind)(**arguments)


def save_model(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A model with random weights as its library saves it, biases and norms too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder, **options)
    return model


def load(folder: Path, backend: str = "none", **settings: Any) -> tuple[LoadedComponent, Source]:
    source = Source(CausalLMConfig(path=str(folder)))
    component = ComponentConfig(backend_config(backend), **settings)
    return load_component(source, "model", component, device=CPU, loader=LoaderConfig()), source


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer: torch.Tensor = model(tokens).logits
    return answer


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    representatives(
        product(ARCHITECTURES, [torch.bfloat16, torch.float32]),
        [("llama", torch.bfloat16), ("qwen2 tied", torch.float32), ("gpt_neox renamed", torch.float32)],
    ),
    ids=str,
)
def test_unquantized_it_is_what_the_library_loads(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path, config_of(architecture), dtype)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ours: Any = load(tmp_path)[0].model
    assert_same(ours, theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_sharded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path, config_of("llama"), max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)[0].model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_a_tied_embedding_stays_one_parameter(tmp_path: Path) -> None:
    save_model(tmp_path, config_of("qwen2 tied"))
    for backend in ("none", "torchao"):
        model: Any = load(tmp_path, backend, skip_modules=() if backend == "none" else ("lm_head",))[0].model
        assert model.lm_head.weight is model.get_input_embeddings().weight
    model = load(tmp_path, "torchao")[0].model  # not skipped: the head is quantized, the embedding is not
    assert type(model.lm_head.weight).__name__ != "Parameter"
    assert type(model.get_input_embeddings().weight) is nn.Parameter


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_every_backend_loads_and_answers(backend: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, config_of("llama"), torch.float32)
    loaded, _ = load(tmp_path, backend, skip_modules=() if backend == "none" else ("lm_head",))
    assert len(loaded.plan.quantized) == (0 if backend == "none" else 14)
    expected, found = logits(model), logits(loaded.model)
    bits = 8 * sum(item.result_nbytes for item in loaded.plan.quantized) / (2 * 36864)
    limit = 0.0 if backend == "none" else 0.15 if bits > 7.5 else 0.75 if bits > 3.9 else 1.5
    assert (found - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(
    ("architecture", "strategy"),
    representatives(
        product(["llama", "qwen2 tied"], ["leaf", "block", "sequential", "model"]),
        [("llama", "leaf"), ("qwen2 tied", "block")],
    ),
)
def test_offloading_changes_no_bit(architecture: str, strategy: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", config_of(architecture))
    loaded, source = load(tmp_path / "model", "torchao", skip_modules=("lm_head",))
    assert source.block_lists(loaded.model) == ["model.layers"]
    expected = logits(loaded.model)
    config = OffloadConfig(strategy, "disk").resolved("cpu")
    apply_offload(loaded.model, config, device=CPU, block_lists=["model.layers"], store=tmp_path / "store")
    assert torch.equal(logits(loaded.model), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, r"model_type='lama' is unknown to transformers \d.*install a version that knows it"),
        ({"model_type": None}, "has no model_type: it is not a transformers model's"),
        ({"model_type": "vit"}, "model_type='vit' is not a model for AutoModelForCausalLM"),
    ],
)
def test_a_config_of_something_else_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, config_of("llama"))
    config = json.loads((tmp_path / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("auto_class", [None, "AutoModelForCausalLM"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3}, "of a 'bert' .*10.* not a multiple"),
        ({"model_type": "llama", "hidden_act": "nope"}, "of a 'llama' .*: KeyError 'nope'; download it again"),
    ],
)
def test_values_that_the_network_refuses_are_named(
    values: dict[str, Any], message: str, auto_class: str | None, tmp_path: Path
) -> None:
    """The model_type fits the class, so the message must not say that it does not."""
    architecture = {"bert": "BertLMHeadModel", "llama": "LlamaForCausalLM"}[values["model_type"]]
    with pytest.raises(LoadError, match=message):
        network({**values, "architectures": [architecture]}, tmp_path, auto_class)


def test_a_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    """`lm_head` is `embed_out` in files of GPT-NeoX; they are renamed only if some name of the network is missing."""
    save_model(tmp_path, config_of("gpt_neox renamed"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["embed_out.weight"].clone()
    del tensors["gpt_neox.final_layer_norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"the checkpoint has 'lm_head\.weight' twice"):
        load(tmp_path)


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    save_model(tmp_path, config_of("llama"))
    with pytest.raises(LoadError, match="has no tokenizer that transformers can open"):
        Source(CausalLMConfig(path=str(tmp_path))).encode("text")


def test_without_a_folder_it_says_so() -> None:
    with pytest.raises(ConfigError, match=r"model\.path=null, but this model needs a checkpoint; set model\.path to a"):
        Source(CausalLMConfig()).checkpoints()


def test_a_model_of_another_kind_is_told_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    def keys(mapping: object) -> list[type]:
        raise AssertionError("the library imports every model to list those of an Auto class")

    monkeypatch.setattr(_LazyAutoMapping, "keys", keys)
    with pytest.raises(LoadError, match=r"'t5' is not a model for AutoModelForCausalLM; use model=seq2seq, or"):
        network({"model_type": "t5"}, tmp_path, "AutoModelForCausalLM")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LoadError, match=r"is a diffusers pipeline; use model=diffusers, in Python qexp\.load_pipe"):
        open_checkpoint(tmp_path)
