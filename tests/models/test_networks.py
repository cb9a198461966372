"""Networks of transformers in their true layouts, tiny: loaded as the library loads them, dense and quantized."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError, LoadError
from qexp.loading.component import LoadedComponent
from qexp.loading.lifecycle import load_component
from qexp.loading.saving import save_model
from qexp.models.transformers import Source, TransformersConfig
from tests.backends import CPU, backend_config
from tests.library_configs import LIBRARY_BACKENDS, library_config
from tests.products import diagonal, representatives

BF16, FP16 = torch.bfloat16, torch.float16
DECODER: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
T5 = {
    "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
UNTIED_T5 = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART = {
    "vocab_size": 64, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT_OSS = {**DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_shared_experts": 1,
}  # fmt: skip
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # by class: its config's class, and the arguments of that
    "T5ForConditionalGeneration": ("T5Config", T5),
    "T5ForConditionalGeneration untied": ("T5Config", UNTIED_T5),
    "T5EncoderModel": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "BertModel": ("BertConfig", ENCODER),
    "BertForMaskedLM": ("BertConfig", ENCODER),
    "CLIPTextModel": ("CLIPTextConfig", ENCODER),
    "GemmaForCausalLM": ("GemmaConfig", {**DECODER, "head_dim": 16}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", DECODER),
    "Qwen2ForCausalLM": ("Qwen2Config", DECODER),
    "MixtralForCausalLM": ("MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**DECODER, **FEW, "shared_expert_intermediate_size": 64}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**DECODER, **FEW, "head_dim": 16}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**DECODER, **DEEPSEEK, "num_key_value_heads": 4}),
    "GptOssForCausalLM": ("GptOssConfig", GPT_OSS),
}


def class_of(name: str) -> Any:
    import transformers

    return getattr(transformers, name.split()[0])


def save_network(name: str, folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """Random weights, biases and norms too, as the library saves them."""
    torch.manual_seed(0)
    kind, arguments = NETWORKS[name]
    model = class_of(name)(class_of(kind)(**arguments))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def load_all(folder: Path, backend: str = "none", auto_class: str | None = None, **settings: Any) -> LoadedComponent:
    source = Source(TransformersConfig(path=str(folder), auto_class=auto_class))
    component = ComponentConfig(backend_config(backend), **settings)
    return load_component(source, "model", component, device=CPU, loader=LoaderConfig(workers=1))


def load(folder: Path, backend: str = "none", **settings: Any) -> Any:
    return load_all(folder, backend, **settings).model


def answer(model: Any) -> Tensor:
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": tokens[:, :4]} if type(model).__name__.endswith("ConditionalGeneration") else {}
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens, **decoder)[0]
    return output


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours).__name__ == type(theirs).__name__
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(model, kind)()) for model in (ours, theirs))
        assert found.keys() == expected.keys()  # tied ones once
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert torch.equal(answer(ours), answer(theirs))


# By default tied and untied stacks, final biases, a head, Conv1D, plain layers, experts with and without shared ones
# and with biases; the other families differ from one of these only in sizes and names.
PLAIN = ("T5EncoderModel", "BertModel", "CLIPTextModel", "GemmaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM")
KEPT = [(name, (BF16, FP16)[number % 2]) for number, name in enumerate(NETWORKS) if name not in PLAIN]


@pytest.mark.parametrize(("name", "dtype"), representatives(product(NETWORKS, [BF16, FP16]), KEPT), ids=str)
def test_unquantized_it_is_what_the_library_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In fp16 some keep layers in fp32 (T5's wo), in bf16 none does; experts are merged on the way."""
    save_network(name, tmp_path, dtype)
    theirs = class_of(name).from_pretrained(tmp_path, dtype="auto").eval()
    assert_same(load(tmp_path), theirs)


@pytest.mark.parametrize(
    "name",
    representatives(
        ["T5EncoderModel", "BertForMaskedLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"],
        ["T5EncoderModel", "MixtralForCausalLM"],
    ),
)
def test_sharded_in_another_dtype(name: str, tmp_path: Path) -> None:
    save_network(name, tmp_path, torch.float32, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs = class_of(name).from_pretrained(tmp_path, dtype=FP16).eval()
    expected, found = dict(theirs.named_parameters()), dict(load(tmp_path, compute_dtype="float16").named_parameters())
    assert expected.keys() == found.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())


def test_experts_lie_one_by_one_in_the_file(tmp_path: Path) -> None:
    """What the rules are for: hubs' layout is not the network's. We save the network's, which the library opens too."""
    import transformers

    save_network("MixtralForCausalLM", tmp_path / "a", BF16)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in load_file(tmp_path / "a" / "model.safetensors")
    model = load(tmp_path / "a")
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 256, 64)
    save_model(model, tmp_path / "b")
    assert torch.equal(answer(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "b")), answer(model))
    assert torch.equal(answer(load(tmp_path / "b")), answer(model))


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_network("MixtralForCausalLM", tmp_path, BF16)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"'model\.layers\.1\.mlp\.experts\.down_proj' has shape \[3, 64, 128\]"):
        load(tmp_path)


# Against the library's own quantizers


QUANTIZED = ["T5ForConditionalGeneration", "BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"]


pytestmark = pytest.mark.usefixtures("without_repacking")


@pytest.mark.parametrize(("name", "backend"), diagonal(QUANTIZED, LIBRARY_BACKENDS))
def test_quantized_it_is_what_the_library_quantizes(name: str, backend: str, tmp_path: Path) -> None:
    """But for torchao, of which transformers quantizes what T5 keeps in fp32, and quanto and torchao of GPT-2, whose
    layers they do not take for linear."""
    save_network(name, tmp_path / "dense", BF16)
    loaded = load_all(tmp_path / "dense", backend)
    ours: Any = loaded.model
    head = [path for path, module in ours.named_modules() if module is ours.get_output_embeddings()]
    keeps = [f"{path}.wo" for path, _ in ours.named_modules() if path.endswith("DenseReluDense")]
    options = {"quantization_config": library_config("transformers", backend, head + keeps), "device_map": {"": "cpu"}}
    theirs = class_of(name).from_pretrained(tmp_path / "dense", dtype="auto", **options).eval()
    if name == "GPT2LMHeadModel" and not backend.startswith("bitsandbytes"):
        assert len(loaded.plan.quantized) == 8 and type(theirs.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        dense = answer(class_of(name).from_pretrained(tmp_path / "dense", dtype="auto"))
        assert 0 < (answer(ours) - dense).norm() / dense.norm() < 0.05
        return
    assert torch.equal(answer(ours), answer(theirs))
    save_model(ours, tmp_path / "ours")
    assert torch.equal(answer(load(tmp_path / "ours")), answer(ours))
    if backend == "quanto":
        return  # the library saves none, and opens none
    theirs.save_pretrained(tmp_path / "theirs")
    found, expected = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key
    again = class_of(name).from_pretrained(tmp_path / "ours", device_map={"": "cpu"})
    assert torch.equal(answer(again), answer(ours))
    assert torch.equal(answer(load(tmp_path / "theirs")), answer(theirs))


# Layers that are linear in all but class


@pytest.mark.parametrize(
    "backend", representatives(["bitsandbytes", "torchao", "quanto", "gguf", "packed_uint4"], ["bitsandbytes", "gguf"])
)
def test_conv1d_is_quantized_saved_and_dequantized(backend: str, tmp_path: Path) -> None:
    """GPT-2's square layers are where a weight the wrong way round would not be seen by its shape."""
    import transformers

    save_network("GPT2LMHeadModel", tmp_path / "dense", BF16)
    dense = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense", dtype="auto")
    loaded = load_all(tmp_path / "dense", backend)
    model: Any = loaded.model
    assert {item.target for item in loaded.plan.quantized} == {
        f"transformer.h.{n}.{layer}.weight"
        for n in (0, 1)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    expected = answer(model)
    assert 0 < (expected - answer(dense)).norm() / answer(dense).norm() < 0.4
    save_model(model, tmp_path / "quantized")
    assert torch.equal(answer(load(tmp_path / "quantized")), expected)
    model.dequantize()
    assert type(model.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    save_model(model, tmp_path / "restored")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "restored", dtype="auto")
    assert torch.equal(answer(theirs), answer(model))
    restored, original = (load_file(tmp_path / name / "model.safetensors") for name in ("restored", "dense"))
    for key, tensor in original.items():
        assert (restored[key].float() - tensor.float()).norm() < 0.2 * tensor.float().norm(), key


def test_what_is_not_linear_is_listed_and_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_network("GptOssForCausalLM", tmp_path, BF16)
    plan = load_all(tmp_path, "torchao").plan.to_container()
    kept = plan["not_linear"]
    experts = {name: value for name, value in kept.items() if name.endswith("experts.gate_up_proj")}
    assert list(experts.values()) == [{"reason": "merged weights of 4 experts", "bytes": 2 * 4 * 64 * 256}] * 2
    assert kept["model.embed_tokens.weight"] == {"reason": "an embedding", "bytes": 2 * 64 * 64}
    assert json.loads(json.dumps(kept)) == kept
    message = capfd.readouterr().err
    assert "of its weights are not those of linear layers and stay unquantized" in message
    assert "'model.layers.0.mlp.experts.gate_up_proj' (merged weights of 4 experts)" in message
    save_network("BertModel", tmp_path / "bert", BF16)
    load(tmp_path / "bert", "none")
    assert "stay unquantized" not in capfd.readouterr().err


# Which class


def test_a_part_of_a_model_by_its_class(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers

    save_network("T5ForConditionalGeneration", tmp_path, BF16)
    encoder = load(tmp_path, auto_class="T5EncoderModel")
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype="auto").eval()
    assert_same(encoder, theirs)
    assert "tensors of the checkpoint have no place in the model and are not read: 'decoder." in capfd.readouterr().err
    assert type(load(tmp_path, auto_class="AutoModel")).__name__ == "T5Model"


@pytest.mark.parametrize(
    ("auto_class", "error", "words"),
    [
        (
            "T5EncodrModel",
            ConfigError,
            r"auto_class=T5EncodrModel \(did you mean T5EncoderModel.*no class of transform",
        ),
        ("AutoTokenizer", ConfigError, "AutoTokenizer.*is no class of transformers .* that builds a network"),
        ("BertModel", LoadError, "model_type='t5' is not a model for BertModel, which is built from a BertConfig"),
        ("AutoModelForCausalLM", LoadError, "model_type='t5' is not a model for AutoModelForCausalLM"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(auto_class: str, error: Any, words: str, tmp_path: Path) -> None:
    save_network("T5EncoderModel", tmp_path, BF16)
    with pytest.raises(error, match=words):
        load(tmp_path, auto_class=auto_class)
