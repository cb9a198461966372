"""A recipe's model: each layer as its rule's backend makes it alone, planned, loaded, stored and given back."""

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config.backend_options import backend_of
from qexp.config.dataclass_io import to_plain
from qexp.config.plugins import plugin_config
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError, LoadError, UnsupportedError
from qexp.loading.quantized_model import registered_quantizer
from qexp.loading.saving import save_model
from qexp.offloading.payload import leaves, module_nbytes, true_nbytes
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.embedded import embedded_config
from qexp.quantizers.layers import weight_shape
from qexp.tasks.roundtrip import measure_layers
from tests.backends import QUANTIZING, backend_config, same_bytes, save_alike
from tests.loading.toys import WIDTH, Toy, load_toy, prepare_toy, random_state, save_state
from tests.products import representatives
from tests.quantizers.test_contract import gaussian

BF16 = torch.bfloat16
MIB = 1 << 20
INT8 = "bitsandbytes_int8"
RULES: list[dict[str, Any]] = [  # one for each library, and a layer that stays dense
    {"modules": "embed", "backend": "gguf", "quant_type": "Q5_1"},
    {"modules": "blocks.0.fc1", "backend": "torchao"},
    {"modules": "blocks.0.fc2", "backend": "bitsandbytes_nf4_dq"},
    {"modules": "blocks.1.fc1", "backend": "quanto_int4"},
    {"modules": "head", "backend": "none"},
    {"backend": "packed_uint3"},
]
FORMATS = {
    "embed": "gguf Q5_1", "blocks.0.fc1": "torchao int8wo", "blocks.0.fc2": "bitsandbytes nf4+dq",
    "blocks.1.fc1": "quanto int4", "blocks.1.fc2": "qexp_packed uint3wo",
}  # fmt: skip


def recipe(*rules: dict[str, Any], **fields: Any) -> ComponentConfig:
    return ComponentConfig(backend_of("mixed", {"recipe": list(rules)}).resolved("cpu"), **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_state(tmp_path / "toy", random_state(Toy, BF16))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    return all(same_parameter(mine[name], theirs[name]) for name in mine)


def same_parameter(one: Tensor, other: Tensor) -> bool:
    a, b = leaves(one), leaves(other)
    return type(one) is type(other) and len(a) == len(b) and all(map(same_bytes, a, b))


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(gaussian(3, WIDTH, dtype=BF16, seed=5))
    return output


def test_every_layer_has_the_bytes_that_its_backend_gives_it_alone(folder: Path) -> None:
    mixed = load_toy(folder, recipe(*RULES))
    for rule in RULES[:4] + RULES[5:]:
        alone: Any = load_toy(folder, recipe({key: rule[key] for key in rule if key != "modules"})).model
        name = rule.get("modules", "blocks.1.fc2")
        layer: Any = mixed.model.get_submodule(name)
        assert type(layer) is type(alone.get_submodule(name))
        assert same_parameter(layer.weight, alone.get_submodule(name).weight), name
        x = gaussian(3, layer.in_features, dtype=BF16, seed=1)
        with torch.no_grad():
            assert torch.equal(layer(x), alone.get_submodule(name)(x)), name
    assert type(mixed.model.head) is nn.Linear
    assert mixed.plan.formats == FORMATS


@pytest.mark.parametrize(
    "backend", representatives(QUANTIZING, ["bitsandbytes_int8", "torchao", "quanto_int4", "gguf"])
)
def test_one_format_by_a_recipe_is_that_format(backend: str, folder: Path) -> None:
    alone = load_toy(folder, ComponentConfig(backend_config(backend).resolved("cpu")))
    mixed = load_toy(folder, recipe({"backend": backend}))
    assert same_weights(mixed.model, alone.model)
    assert mixed.plan.quantized_nbytes == alone.plan.quantized_nbytes and mixed.plan.formats == alone.plan.formats


def test_planned_bytes_are_those_that_are_loaded(folder: Path) -> None:
    for rules in (RULES, [*RULES[:2], {"backend": "none"}], [*RULES[3:5], {"backend": "bitsandbytes_int8"}]):
        loaded = load_toy(folder, recipe(*rules))
        planned = loaded.plan.to_container()
        persistent = module_nbytes(loaded.model) - loaded.model.position.nbytes
        assert persistent - _activation_scales(loaded.model) == planned["result_bytes"]
        for name, nbytes in loaded.plan.quantized_nbytes.items():
            assert true_nbytes(loaded.model.get_parameter(f"{name}.weight")) == nbytes


def _activation_scales(model: nn.Module) -> int:
    """Of quanto's layers, which no checkpoint holds."""
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("put_scale"))


def test_the_plan_says_each_layers_format_and_bits(folder: Path) -> None:
    prepared = prepare_toy(folder, recipe(*RULES))
    plan = prepared.plan.to_container()
    assert {name: found["layers"] for name, found in plan["formats"].items()} == {
        name: [layer] for layer, name in FORMATS.items()
    }
    assert plan["formats"]["gguf Q5_1"]["bits_per_weight"] == 6  # 5 bits, a scale and a minimum of 16 for 32 weights
    assert plan["formats"]["torchao int8wo"]["bytes"] == plan["quantized"]["blocks.0.fc1"]
    assert plan["skipped"] == {"head": "rule 5 of the recipe (head -> none) keeps it dense"}
    assert plan["left_dense"] == []
    rows = measure_layers(prepared, loader=LoaderConfig())
    assert {row.layer: row.format for row in rows} == FORMATS
    for row in rows:
        assert row.quantized_bytes == prepared.plan.quantized_nbytes[row.layer]
        assert row.sqnr_db is not None and row.sqnr_db > 10


def test_one_format_says_its_layers_too(folder: Path) -> None:
    assert set(prepare_toy(folder, ComponentConfig(backend_config("torchao_int8dq"))).plan.formats.values()) == {
        "torchao int8dq"
    }
    by_name = ComponentConfig(
        backend_of("torchao", {"quant_type": "FqnToConfig", "quant_type_kwargs": {"fqn_to_config": {"head": "int8wo"}}})
    )
    assert prepare_toy(folder, by_name).plan.formats == {"head": "torchao int8wo"}


def test_dequantize_gives_the_dense_weights_of_every_format(folder: Path) -> None:
    model: Any = load_toy(folder, recipe(*RULES)).model
    quantizer = registered_quantizer(model)
    assert quantizer is not None
    expected = {name: quantizer.dequantize_param(model.get_submodule(name).weight, BF16) for name in FORMATS}
    model.dequantize()
    assert Counter(type(module).__name__ for module in model.modules())["Linear"] == 6
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight) and weight.shape == weight_shape(
            model.get_submodule(name)
        )


def test_gradients_pass_through_every_format(folder: Path) -> None:
    model: Any = load_toy(folder, recipe({"modules": "blocks.0", "backend": "torchao_int8dq"}, *RULES[4:])).model
    x = gaussian(2, WIDTH, dtype=BF16).requires_grad_(True)
    model(x).float().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_a_mixture_of_libraries_is_stored_under_a_name_of_its_own(folder: Path, tmp_path: Path) -> None:
    first = load_toy(folder, recipe(*RULES)).model
    save_model(first, tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert values["quant_method"] == "qexp_mixed"
    again = load_toy(tmp_path / "saved", ComponentConfig(backend_config("none")))
    assert same_weights(first, again.model) and torch.equal(answer(first), answer(again.model))
    assert again.plan.formats == FORMATS
    assert again.plan.skipped == {"head": "the checkpoint holds it unquantized"} and again.plan.unused == ()
    save_model(again.model, tmp_path / "again")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_the_recipe_of_a_checkpoint_survives_the_way_into_a_run(folder: Path, tmp_path: Path) -> None:
    """Layers may be called what no pattern may be; sorted or not, the same names are the same rule."""
    model = load_toy(folder, recipe(*RULES)).model
    values: Any = registered_quantizer(model).to_dict(model)  # type: ignore[union-attr]
    values["config"]["recipe"][0]["modules"] = ["z/y", "a b", "a b"]
    config = embedded_config({"quantization_config": values}, "here")
    assert config.recipe[0].modules == ("a b", "z/y")
    assert plugin_config("backend", json.loads(json.dumps(to_plain(config))), "backend") == config


@pytest.mark.parametrize(
    "rules",
    [
        [{"modules": "head", "backend": INT8}, {"backend": "bitsandbytes"}],
        [{"modules": "head", "backend": INT8, "llm_int8_threshold": 0}, {"backend": INT8}],
        [{"modules": "head", "backend": "quanto_int4"}, {"backend": "quanto"}],
        [{"modules": "head", "backend": "packed_fp6_e3w2"}, {"backend": "packed_uint2", "group_size": 32}],
        [{"modules": "head", "backend": "gguf", "compute_dtype": "fp32"}, {"backend": "gguf_q4_0"}],
    ],
    ids=["int8 and 4 bits", "thresholds", "quanto", "packed", "gguf in two dtypes"],
)  # fmt: skip
def test_what_no_format_can_carry_is_stored_and_read_all_the_same(
    rules: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    if rules[0]["backend"] == "quanto_int4":
        rules[0]["modules"] = "embed"
    first = load_toy(folder, recipe(*rules)).model
    save_model(first, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qexp_mixed"
    again = load_toy(tmp_path / "saved", ComponentConfig(backend_config("none"))).model
    assert same_weights(first, again) and torch.equal(answer(first), answer(again))


def test_a_format_that_cannot_be_stored_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_toy(folder, recipe(*RULES)).model
    part = next(part for part in registered_quantizer(model).parts if part.quantization_method == "gguf")  # type: ignore[union-attr]
    monkeypatch.setattr(type(part), "is_serializable", False)
    with pytest.raises(ConfigError, match="save: gguf of 'embed' has no file format; dequantize it first"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.update(recipe=3), "recipe must be a list of rules"),
        (lambda own: own.update(recipe=[]), "needs a recipe"),
        (lambda own: own["recipe"].append({"modules": []}), "which is not a rule"),
        (lambda own: own["recipe"][0]["backend"].update(quant_method="awq"), "quant_method is bitsandbytes, "),
        (lambda own: own["recipe"][0]["backend"].pop("quant_method"), "quant_method is bitsandbytes, "),
        (lambda own: own["recipe"][0].update(modules="embed"), "quant_method is bitsandbytes, "),
        (lambda own: own["recipe"][0].update(modules=[]), "covers every layer"),
    ],
)
def test_a_damaged_recipe_in_a_checkpoint_is_one_error(change: Any, message: str, folder: Path) -> None:
    model = load_toy(folder, recipe(*RULES)).model
    values: Any = registered_quantizer(model).to_dict(model)  # type: ignore[union-attr]
    values = json.loads(json.dumps(values))
    assert embedded_config({"quantization_config": values}, "here").label == "gguf Q5_1+torchao int8wo+" + (
        "bitsandbytes nf4+dq+3 more"
    )
    change(values["config"])
    with pytest.raises(LoadError, match=message):
        embedded_config({"quantization_config": values}, "here")


class Tied(nn.Module):
    """Two layers of one weight, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight, self.d = self.a.weight, self.c

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def save_tied(folder: Path) -> Path:
    state = random_state(Tied, BF16)
    return save_state(folder, {name: state[name] for name in ("a.weight", "a.bias", "b.bias", "c.weight", "c.bias")})


@pytest.mark.parametrize(
    ("rule", "names"),
    [({"modules": "a", "backend": "gguf"}, "'a', 'b'"), ({"modules": ["a", "b", "d"], "backend": "none"}, "'c', 'd'")],
)
def test_two_formats_for_one_weight_are_one_error(rule: dict[str, Any], names: str, tmp_path: Path) -> None:
    folder = save_tied(tmp_path)
    message = (
        rf"{names} have one weight, but backend.recipe: rule 1 \(.*\) and rule 2 \(default -> gguf Q4_0\) give one"
    )
    with pytest.raises(ConfigError, match=message):
        prepare_toy(folder, recipe(rule, {"backend": "gguf_q4_0"}), Tied)


@pytest.mark.parametrize("other", ["gguf_q4_0", "bitsandbytes"], ids=["as gguf", "of two libraries"])
def test_a_tied_weight_is_one_in_memory_and_in_the_file(other: str, tmp_path: Path) -> None:
    folder = save_tied(tmp_path / "tied")
    loaded = load_toy(folder, recipe({"modules": ["a", "b"], "backend": "gguf"}, {"backend": other}), Tied)
    model: Any = loaded.model
    assert (
        loaded.plan.tied == {"b.weight": "a.weight", "d.weight": "c.weight", "d.bias": "c.bias"} and model.c is model.d
    )
    save_model(model, tmp_path / "saved")
    again: Any = load_toy(tmp_path / "saved", ComponentConfig(backend_config("none")), Tied).model
    assert same_weights(model, again) and torch.equal(answer(model), answer(again))


def test_a_format_that_a_named_layer_cannot_hold_is_an_error_and_of_the_default_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.odd = nn.Linear(WIDTH, 31), nn.Linear(31, WIDTH)

    folder = save_state(tmp_path, random_state(Odd, BF16))
    with pytest.raises(ConfigError, match=r"rule 1 \(odd -> gguf Q8_0\): it cannot hold 'odd': Q8_0 has blocks of 32"):
        prepare_toy(folder, recipe({"modules": "odd", "backend": "gguf"}, {"backend": "none"}), Odd)
    with pytest.raises(ConfigError, match=r"rule 2 \(default -> qexp_packed uint4wo\): backend.group_size=64 does not"):
        prepare_toy(folder, recipe({"modules": "wide", "backend": "gguf"}, {"backend": "packed_uint4"}), Odd)
    assert prepare_toy(folder, recipe({"backend": "gguf"}), Odd).plan.left_dense == ("odd",)
    assert (
        "1 linear layer (49.1% of its weights) unquantized though nobody asked for it: 'odd'" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("rules", "skip", "message"),
    [
        ([{"modules": "blocks.0.fc", "backend": "gguf"}], (), "matches no linear layer; did you mean .*blocks.0.fc1"),
        ([{"modules": "**.norm", "backend": "none"}], (), "'toy': the pattern '..\\.norm' matches no linear layer"),
        ([{"modules": "blocks", "backend": "none"}, {"modules": "**.fc1", "backend": "gguf"}], (), "is never reached"),
        ([{"modules": "head", "backend": "gguf"}], ("head",), "quantizes nothing: skip_modules .* has 'head'"),
    ],
)
def test_a_pattern_that_decides_nothing_is_an_error(
    rules: list[dict[str, Any]], skip: tuple[str, ...], message: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_toy(folder, recipe(*rules, {"backend": "gguf_q4_0"}, skip_modules=skip))


def test_a_machine_that_cannot_run_a_rule_is_said_with_the_rule(folder: Path) -> None:
    rules = recipe({"modules": "head", "backend": "torchao", "quant_type": "float8dq"}, {"backend": "gguf"})
    with pytest.raises(UnsupportedError, match=r"backend.recipe: rule 1 \(head -> torchao float8dq_e4m3_tensor\): "):
        prepare_toy(folder, rules)


def test_only_dense_rules_are_an_error(folder: Path) -> None:
    with pytest.raises(LoadError, match="backend 'mixed' would have quantized no layer of 'toy'"):
        prepare_toy(folder, recipe({"backend": "none"}))


def test_planners_of_other_libraries_count_the_widest_format() -> None:
    config = backend_of("mixed", {"recipe": [{"modules": "a", "backend": "torchao"}, {"backend": "gguf_q4_0"}]})
    assert load_quantizer(config).adjust_target_dtype(torch.float16) == torch.int8
    dense = backend_of("mixed", {"recipe": [{"backend": "none"}]})
    assert load_quantizer(dense).adjust_target_dtype(torch.float16) == torch.float16


def test_dense_weights_are_not_kept(tmp_path: Path) -> None:
    """40 layers of 4 MiB with 1 MiB in flight: 160 MiB dense, about 32 MiB afterwards."""
    from tests.loading.test_lifecycle import stack_of

    shapes = save_alike(tmp_path, (1024, 1024), 40, torch.float32)
    gc.collect()
    thirds = [[f"layers.{number}" for number in range(40) if number % 4 == part] for part in range(3)]
    rules = [
        {"modules": names, "backend": name} for names, name in zip(thirds, ("torchao", "quanto", "gguf"), strict=True)
    ]
    settings = recipe(*rules, {"backend": "bitsandbytes"}, compute_dtype="bfloat16")
    loaded = load_toy(tmp_path, settings, stack_of(shapes))
    result = loaded.plan.to_container()["result_bytes"]
    assert result < 40 * MIB
    assert loaded.memory.peak_bytes < result + 4 * MIB + 40 * MIB
    assert loaded.memory.peak_file_bytes < 8 * MIB
