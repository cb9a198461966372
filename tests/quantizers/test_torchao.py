"""torchao's types by every name, what they become, and what is said of those that cannot be."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from qexp.errors import ConfigError, UnsupportedError
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.qexp_packed import PackedConfig
from qexp.quantizers.rows import WeightSpec
from qexp.quantizers.torchao import TorchAoConfig, TorchAoQuantizer
from qexp.quantizers.torchao_support.names import CLASSES, FUNCTIONS, NAMES, OTHER_SHORTHANDS, SHORTHANDS
from qexp.quantizers.torchao_support.types import spelled
from qexp.sweep.run_key import run_key
from tests.assigning import run_config
from tests.backends import CPU
from tests.quantizers.kinds import DYNAMIC_INTX, INTX, ao

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SPEC = WeightSpec("blocks.0.fc", (64, 256), torch.bfloat16)
TILED = {"int4_packing_format": "tile_packed_to_4d"}


@cache
def upstream() -> dict[str, Any]:
    """What diffusers' TorchAoConfig made of each name while it took names, as torchao writes it today."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig as Float8DQ
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        PerTensor,
    )

    int4dq = Int8DynamicActivationIntxWeightConfig(torch.int4)
    return {
        "int4wo": Int4WeightOnlyConfig(**TILED), "int4_weight_only": Int4WeightOnlyConfig(**TILED),
        "int4dq": int4dq, "int8_dynamic_activation_int4_weight": int4dq,
        "int8wo": Int8WeightOnlyConfig(), "int8_weight_only": Int8WeightOnlyConfig(),
        "int8dq": Int8DynamicActivationInt8WeightConfig(),
        "int8_dynamic_activation_int8_weight": Int8DynamicActivationInt8WeightConfig(),
        "float8wo": Float8WeightOnlyConfig(E5M2), "float8_weight_only": Float8WeightOnlyConfig(E4M3),
        "float8wo_e5m2": Float8WeightOnlyConfig(E5M2), "float8wo_e4m3": Float8WeightOnlyConfig(E4M3),
        "float8dq": Float8DQ(), "float8_dynamic_activation_float8_weight": Float8DQ(), "float8dq_e4m3": Float8DQ(),
        "float8dq_e4m3_tensor": Float8DQ(granularity=PerTensor()), "float8dq_e4m3_row": Float8DQ(granularity=PerRow()),
    }  # fmt: skip


def written(config: Any) -> dict[str, Any]:
    """A config as torchao writes it, but for its wish to set up torch.compile, which only we leave out."""
    from torchao.core.config import config_to_dict

    described = config_to_dict(config)
    described["_data"].pop("set_inductor_config", None)
    packing = described["_data"].get("int4_packing_format")
    if isinstance(packing, str):  # torchao's enums are strings too, and are kept as they were given
        described["_data"]["int4_packing_format"] = {"_type": "Int4PackingFormat", "_data": packing.upper()}
    return described


def test_the_names_are_those_of_upstream() -> None:
    assert upstream().keys() == {*SHORTHANDS, *OTHER_SHORTHANDS, *FUNCTIONS}


@pytest.mark.parametrize("name", [*SHORTHANDS, *OTHER_SHORTHANDS, *FUNCTIONS])
def test_names_stand_for_the_classes_of_today(name: str) -> None:
    assert written(ao(name).library_config()) == written(upstream()[name])


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_defaults_are_the_librarys(name: str) -> None:
    """What the table says without torch; a new version of torchao that disagrees is found here."""
    from torchao.core.config import config_to_dict

    from qexp.quantizers.torchao_support import library

    known, cls = CLASSES[name], library.config_classes()[name]
    config = cls(**({"set_inductor_config": False} if "set_inductor_config" in known.defaults else {}))
    described = config_to_dict(config)
    defaults = {key: spelled(value) for key, value in described["_data"].items()}
    assert (defaults.pop("group_size", None), described["_version"]) == (
        known.group_size if known.groups == "group_size" else None,
        known.version,
    )
    assert defaults == known.defaults
    fields = {item.name for item in dataclasses.fields(cls)}
    assert fields - {"version", "group_size"} == set(known.defaults)


SAME = [
    (ao("int8wo"), ao("int8_weight_only"), ao("Int8WeightOnlyConfig"), ao("int8wo", granularity="PerRow")),
    (ao("int8wo", 32), ao("int8wo", granularity={"_type": "PerGroup", "group_size": 32})),
    (ao("int4dq"), ao("int8_dynamic_activation_int4_weight", 32), ao(DYNAMIC_INTX, weight_dtype="torch.int4")),
    (ao("int4dq", weight_mapping_type="ASYMMETRIC"), ao("int4dq", mapping_type="asymmetric")),
    (ao("int4wo"), ao("int4wo", 128), ao("int4_weight_only", inner_k_tiles=8, use_hqq=False)),
    (ao("int4wo", int4_choose_qparams_algorithm="HQQ"), ao("int4wo", use_hqq=True)),
    (ao("float8wo_e5m2"), ao("float8wo"), ao("float8_weight_only", weight_dtype="float8_e5m2")),
    (ao("float8dq"), ao("float8dq_e4m3_tensor"), ao("float8dq", granularity=["PerTensor", "PerTensor"])),
    (ao("fp6_e3w2"), ao("fp6"), ao("fp6_e3m2"), ao("fpx_weight_only", ebits=3, mbits=2)),
    (ao("uint4wo"), ao("uintx_weight_only"), ao("uintx_weight_only", dtype="torch.uint4")),
]


@pytest.mark.parametrize("same", SAME, ids=lambda same: same[0].quant_type)
def test_spellings_of_one_type_are_one_config(same: tuple[TorchAoConfig, ...]) -> None:
    assert all(config == same[0] for config in same)


def test_a_label_that_is_the_type_follows_it() -> None:
    assert TorchAoConfig(quant_type="float8wo", label="float8wo").label == "float8wo_e5m2"
    assert TorchAoConfig(quant_type="float8wo", label="mine").label == "mine"


@pytest.mark.parametrize(
    ("config", "packed"),
    [
        *((ao(name), PackedConfig(quant_type=name, group_size=64)) for name in ELEMENTS if name != "int4wo"),
        (ao("int4wo"), PackedConfig(quant_type="int4wo", group_size=128)),
        (ao("int4wo", 32), PackedConfig(quant_type="int4wo", group_size=32)),
        (ao("uintx_weight_only", 16, dtype="uint3"), PackedConfig(quant_type="uint3wo", group_size=16)),
        (ao("fp3"), PackedConfig(quant_type="fp3_e1w1")),
        (ao("fp7"), PackedConfig(quant_type="fp7_e3w3")),
    ],
    ids=lambda config: config.quant_type,
)
def test_types_that_torchao_has_no_more_are_packed(config: TorchAoConfig, packed: PackedConfig) -> None:
    assert config.resolved("cpu") == packed
    assert (config.resolved("cuda") == packed) == (config.quant_type != "int4wo")  # which GPUs have a kernel for
    with pytest.raises(UnsupportedError, match=r"use backend\.quant_method=qexp_packed with backend.quant_type="):
        load_quantizer(config).validate_environment(CPU)


def test_torchaos_own_stay_torchaos() -> None:
    for name in ("int8wo", "float8dq", "int4dq", "NVFP4WeightOnlyConfig"):
        assert ao(name).resolved("cpu") is not None and ao(name).resolved("cpu") == ao(name)
    assert ao("Int4WeightOnlyConfig").resolved("cpu").quant_method == "torchao"  # it was asked for


def test_a_run_is_known_by_what_really_runs() -> None:
    typed = run_config("backend=torchao", "backend.quant_type=uint4wo")
    backend = typed.components["transformer"].backend
    assert (backend.quant_method, backend.label, backend.group_size) == ("qexp_packed", "uint4wo", 64)
    assert run_key(typed) == run_key(run_config("backend=packed_uint4"))
    one = run_config("backend=torchao", "backend.quant_type=int8_weight_only", "backend.group_size=32")
    other = run_config("backend=torchao", "+backend.quant_type_kwargs={granularity:{_type:PerGroup,group_size:32}}")
    assert run_key(one) == run_key(other) != run_key(run_config("backend=torchao"))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("int9wo", {}, r"'int9wo' is unknown \(did you mean int8wo.*use int4wo, int4dq, .*uint1wo … uint8wo, fpX_eAwB"),
        ("fp6_e3w3", {}, r"unknown \(did you mean .*fp6_e3w2.*X = A \+ B \+ 1"),
        ("int8wo", {"granularty": 1}, r"granularty is not an argument .*mean granularity\?\); it takes"),
        ("int8wo", {"inner_k_tiles": 8}, "inner_k_tiles is not an argument of int8wo"),
        ("int4wo", {"inner_k_tiles": 4}, "inner_k_tiles must be 8"),
        ("int4dq", {"weight_dtype": "int5"}, "contradicts quant_type=int4dq, .*=Int8DynamicAct"),
        ("int8dq", {"group_size": 32}, "group_size=32 is for .*int8wo, not int8dq; set it to null"),
        ("uint4wo", {"groupsize": 32}, r"groupsize is not for uint4wo \(did you mean group_size\?\); it takes"),
        ("fpx_weight_only", {"ebits": 3}, "needs quant_type_kwargs.ebits and .mbits"),
        ("fpx_weight_only", {"ebits": 6, "mbits": 6}, "is not a type; use fp3_e1w1"),
        ("float8_e4m3_row", {}, "needs calibration data.*use float8dq_e4m3_row"),
        ("float8_static_activation_float8_weight", {}, "calibration data.*use float8dq_e4m3_tensor"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_torch_is_imported(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ao(name, **arguments)


@pytest.mark.parametrize(
    ("size", "message"),
    [("32", "'32' must be an integer"), (True, "True must be an integer"), (0, "0 must be 1 or more")],
)
def test_a_group_size_is_a_number(size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"group_size={message}"):
        TorchAoConfig(quant_type="int8wo", quant_type_kwargs={"group_size": size})
    assert TorchAoConfig(quant_type="int8wo", quant_type_kwargs={"group_size": 32}) == ao("int8wo", 32)


def test_two_group_sizes_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"group_size=32 and .*group_size=64 disagree"):
        TorchAoConfig(quant_type="int8wo", group_size=32, quant_type_kwargs={"group_size": 64})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Int9WeightOnlyConfig", {}, r"not a config class of torchao .*\(did you mean .*IntxWeightOnlyConfig"),
        ("NVFP4WeightOnlyConfig", {"scale": 1}, "scale is not an argument of NVFP4WeightOnlyConfig.*it takes"),
        ("FqnToConfig", {"fqn_to_config": {"a": {"_type": "Int8Config"}}}, "fqn_to_config.a=Int8Config is unknown"),
        (INTX, {"mapping_type": "symetric"}, r"mapping_type=SYMETRIC is unknown \(did you mean SYMMETRIC"),
        (INTX, {"granularity": "PerRov"}, r"granularity=PerRov is unknown \(did you mean PerRow"),
        (INTX, {"granularity": "PerTensor"}, r"torchao rejects IntxWeightOnlyConfig\(granularity=PerTensor\(\)\): "),
        (INTX, {"weight_dtype": "uint4"}, "torchao rejects .*weight_dtype must be torch.intx"),
        (INTX, {"weight_dtype": "int1"}, "sets every weight to zero; use uint1wo"),
        ("GGUFWeightOnlyConfig", {}, "needs 17.1 bits per weight, and the unquantized weight 16"),
        ("AWQConfig", {}, "AWQConfig needs calibration.*int8dq"),
        ("Int8StaticActivationInt8WeightConfig", {}, "needs calibration"),
    ],
)
def test_what_torchao_does_not_have_or_refuses(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_quantizer(ao(name, **arguments)).validate_environment(CPU)


def test_what_this_machine_cannot_run_names_what_would_and_what_does() -> None:
    with pytest.raises(UnsupportedError) as caught:
        load_quantizer(ao("float8dq")).validate_environment(CPU)
    text = str(caught.value)
    assert text.startswith("backend.quant_type=float8dq_e4m3_tensor needs compute capability 8.9; here: cpu")
    assert "On this machine: int4dq, int8wo, int8dq, float8wo_e4m3, float8wo_e5m2; through qexp_packed" in text
    with pytest.raises(UnsupportedError, match=r"does not run here, on cpu \(torchao: gemlite is required"):
        load_quantizer(ao("UIntxWeightOnlyConfig")).validate_environment(CPU)


def test_the_list_of_what_runs_is_found_by_running(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    from qexp.quantizers.torchao_support import layout as torchao_trial

    right = torchao_trial.quantize

    def without_int8(weight: torch.Tensor, config: Any) -> torch.Tensor:
        if "Int8" in type(config).__name__:
            raise RuntimeError("no int8 today.\nCompile it.")
        return right(weight, config)

    monkeypatch.setattr(torchao_trial, "quantize", without_int8)
    assert torchao_trial.running_types(CPU) == ["float8wo_e4m3", "float8wo_e5m2"]
    assert torchao_trial.obstacle(Int8WeightOnlyConfig(), CPU) == "no int8 today"


@pytest.mark.parametrize(
    ("case", "multiple"),
    [("int8 rows", 1), ("int8 groups", 1), ("int8 tensor", None), ("int4 groups", 1), ("int4 hqq", None)],
)
def test_a_weight_is_sliced_only_where_that_changes_nothing(case: str, multiple: int | None) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, PerTensor

    from qexp.quantizers.torchao_support import layout as torchao_trial
    from qexp.quantizers.torchao_support import library

    hqq = {"intx_choose_qparams_algorithm": "hqq_scale_only"}
    config: Any = {
        "int8 rows": Int8WeightOnlyConfig(),
        "int8 groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int8 tensor": Int8WeightOnlyConfig(granularity=PerTensor()),  # one scale, of the whole weight
        "int4 groups": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "int4 hqq": IntxWeightOnlyConfig(torch.int4, PerGroup(32), **hqq),
    }[case]
    layout = torchao_trial.layout_of(config, SPEC.shape, SPEC.dtype, CPU)
    assert layout is not None and layout.rows_multiple == multiple
    made = library.inner_tensors(library.quantize(torch.ones(SPEC.shape, dtype=SPEC.dtype), config))
    assert layout.parts == {name: (tuple(part.shape), part.dtype) for name, part in made.items()}
    assert layout.nbytes == sum(part.nbytes for part in made.values())


def test_kernels_that_take_sixteen_rows_get_slices_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    from qexp.quantizers.torchao_support import layout as torchao_trial

    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    layout = torchao_trial.layout_of(config, (48, 64), torch.bfloat16, CPU)
    assert layout is not None and layout.rows_multiple == 16
    assert torchao_trial.layout_of(config, (40, 64), torch.bfloat16, CPU) is None
    quantizer = load_quantizer(ao("float8dq_e4m3_row"))
    reason = quantizer.reason_to_skip(WeightSpec("head", (40, 64), torch.bfloat16))
    assert reason == "torchao leaves a weight of [40, 64] unquantized"


def test_a_class_that_cannot_be_decoded_is_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    from qexp.quantizers.torchao_support import library

    weight = torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = library.quantize(weight, Int8WeightOnlyConfig())
    exact = library.dequantize(tensor)

    def missing(self: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    monkeypatch.setattr(type(tensor), "dequantize", missing)
    assert torch.equal(library.dequantize(tensor), exact)


def test_layers_are_found_by_name() -> None:
    names = {"a": "int8wo", "re:b\\..*": {"_type": INTX, "weight_dtype": "int4"}, "b.special": None}
    quantizer = load_quantizer(ao("FqnToConfig", fqn_to_config=names))
    assert isinstance(quantizer, TorchAoQuantizer)
    quantizer.validate_environment(CPU)
    kinds = {}
    for name in ("a", "b.fc", "b.special", "c"):
        spec = dataclasses.replace(SPEC, module=name)
        reason = quantizer.reason_to_skip(spec)
        kinds[name] = reason or type(quantizer.create_quantized_param(spec, [torch.ones(SPEC.shape)], {}, CPU)).__name__
    alone = "FqnToConfig leaves it unquantized"
    assert kinds == {"a": "Int8Tensor", "b.fc": "IntxUnpackedToInt8Tensor", "b.special": alone, "c": alone}


def test_values_are_written_as_in_a_yaml() -> None:
    from torchao.core.config import config_to_dict
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    quantizer = ao(INTX, weight_dtype="int4", mapping_type="ASYMMETRIC", scale_dtype="bfloat16", group_size=64)
    expected = IntxWeightOnlyConfig(torch.int4, PerGroup(64), MappingType.ASYMMETRIC, torch.bfloat16)
    assert quantizer.library_config() == expected
    assert {spelled(value) for value in ("torch.int4", "int4")} == {"int4"}
    assert spelled(config_to_dict(expected)["_data"]["granularity"]) == {"_type": "PerGroup", "group_size": 64}


def test_the_config_of_a_checkpoint_is_read_in_either_form() -> None:
    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    today = {"quant_type": {"default": config_to_dict(Int8WeightOnlyConfig(granularity=PerGroup(32)))}}
    once = {"quant_type": "int8wo", "quant_type_kwargs": {"group_size": 32}, "modules_to_not_convert": ["head"]}
    for values in (today, {**today, "include_input_output_embeddings": False, "untie_embedding_weights": False}):
        config = TorchAoConfig.from_dict(values)
        assert (config.quant_type, config.group_size) == ("int8wo", 32)
        assert config.quant_type_kwargs == {"set_inductor_config": True} and config.label == "int8wo"
    assert TorchAoConfig.from_dict(once) == TorchAoConfig(
        label="int8wo", quant_type="int8wo", group_size=32, modules_to_not_convert=("head",)
    )
    with pytest.raises(ConfigError, match="one config, named default"):
        TorchAoConfig.from_dict({"quant_type": {"blocks": {}}})


def test_what_no_file_can_hold_is_said_when_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = load_quantizer(ao("int8wo"))
    layer = torch.nn.Linear(256, 64)
    layer.weight = quantizer.create_quantized_param(SPEC, [torch.ones(SPEC.shape)], {}, CPU)
    from torchao.prototype.safetensors import safetensors_support

    monkeypatch.setattr(safetensors_support, "ALLOWED_TENSORS_SUBCLASSES", [])
    with pytest.raises(ConfigError, match=r"torchao's files cannot hold int8wo .*dequantize it first"):
        quantizer.get_state_dict_and_metadata(torch.nn.Sequential(layer).state_dict())


def test_every_name_is_offered_for_a_typo() -> None:
    assert {"int4wo", "uint7wo", "fp6_e3w2", "float8_e4m3_row", "uintx_weight_only", INTX} <= set(NAMES)
    assert len(NAMES) == len(set(NAMES))
