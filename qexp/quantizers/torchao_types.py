"""torchao's types by every name that users know them by, and the config class that each one is today.

A type is named by a shorthand (`int8wo`), by the name of the function that once made it (`int8_weight_only`), or by a
config class of torchao (`Int8WeightOnlyConfig`). `settle` brings all spellings of one type to one: the shorthand,
where there is one, and only those arguments that differ from the defaults. Values are written as in a yaml:

    torch.int4                  int4
    MappingType.SYMMETRIC       SYMMETRIC
    PerRow()                    PerRow
    PerGroup(32)                {_type: PerGroup, group_size: 32}, or the field group_size

torchao no longer has uintNwo and fpX_eAwB: these are `qexp_packed` (`packed_type`). This module imports no torch.
Source: torchao 0.18; for the names, the tables of diffusers' TorchAoConfig up to 0.36.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.quantizers.qexp_packed import ELEMENTS

Arguments = dict[str, Any]


@dataclass(frozen=True)
class LibraryClass:
    """The arguments of one of torchao's config classes with their defaults.

    groups: the argument that makes groups of weights, group_size itself or a granularity; group_size: its default.
    """

    defaults: Mapping[str, Any]
    groups: str | None = None
    group_size: int | None = None
    version: int = 2


@dataclass(frozen=True)
class NamedType:
    """A name for `config` with these arguments. former: arguments that the name took once -> today's."""

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    former: Mapping[str, str] = field(default_factory=dict)


INTX = {"intx_packing_format": "UNPACKED_TO_INT8", "intx_choose_qparams_algorithm": "AFFINE"}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
FAST_ACCUM = {"_type": "Float8MMConfig", "emulate": False, "use_fast_accum": True, "pad_inner_dim": False}
NO_INDUCTOR = {"set_inductor_config": False}  # True, torchao's default, changes how torch.compile works everywhere
CLASSES = {
    "Int8WeightOnlyConfig": LibraryClass({"granularity": "PerRow", **NO_INDUCTOR}, "granularity"),
    "Int8DynamicActivationInt8WeightConfig": LibraryClass(
        {
            "act_mapping_type": "SYMMETRIC",
            "weight_only_decode": False,
            "granularity": "PerRow",
            "reduce_range": False,
            **NO_INDUCTOR,
        }
    ),
    "Int4WeightOnlyConfig": LibraryClass(
        {
            "int4_packing_format": "PLAIN",
            "int4_choose_qparams_algorithm": "TINYGEMM",
            "int4_tile_packed_ntile": 8,
            **NO_INDUCTOR,
        },
        "group_size",
        128,
    ),
    "Int8DynamicActivationIntxWeightConfig": LibraryClass(
        {
            "weight_dtype": "int8",
            "weight_granularity": {"_type": "PerGroup", "group_size": 32},
            "weight_mapping_type": "SYMMETRIC",
            "weight_scale_dtype": None,
            "act_mapping_type": "ASYMMETRIC",
            **INTX,
        },
        "weight_granularity",
        32,
    ),
    "IntxWeightOnlyConfig": LibraryClass(
        {
            "weight_dtype": "int8",
            "granularity": {"_type": "PerAxis", "axis": 0},
            "mapping_type": "SYMMETRIC",
            "scale_dtype": None,
            **INTX,
        },
        "granularity",
    ),
    "Float8WeightOnlyConfig": LibraryClass(
        {"weight_dtype": E4M3, "granularity": "PerRow", **NO_INDUCTOR}, "granularity"
    ),
    "Float8DynamicActivationFloat8WeightConfig": LibraryClass(
        {
            "activation_dtype": E4M3,
            "weight_dtype": E4M3,
            "granularity": "PerTensor",
            "packing_format": "PLAIN",
            "mm_config": FAST_ACCUM,
            "activation_value_lb": None,
            "activation_value_ub": None,
            "kernel_preference": "AUTO",
            "alg_id": 0,
            **NO_INDUCTOR,
        }
    ),
}

TILED = {"int4_packing_format": "TILE_PACKED_TO_4D"}  # tinygemm, which PyTorch itself has
FLOAT8_DYNAMIC = {"activation_dtype": E4M3, "weight_dtype": E4M3}
FORMER_INT4DQ = {"mapping_type": "weight_mapping_type"}
SHORTHANDS = {
    "int4wo": NamedType("Int4WeightOnlyConfig", TILED),
    "int4dq": NamedType("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": "int4"}, FORMER_INT4DQ),
    "int8wo": NamedType("Int8WeightOnlyConfig"),
    "int8dq": NamedType("Int8DynamicActivationInt8WeightConfig"),
    "float8wo_e4m3": NamedType("Float8WeightOnlyConfig", {"weight_dtype": E4M3}),
    "float8wo_e5m2": NamedType("Float8WeightOnlyConfig", {"weight_dtype": E5M2}),
    "float8dq_e4m3_tensor": NamedType(
        "Float8DynamicActivationFloat8WeightConfig", {**FLOAT8_DYNAMIC, "granularity": "PerTensor"}
    ),
    "float8dq_e4m3_row": NamedType(
        "Float8DynamicActivationFloat8WeightConfig", {**FLOAT8_DYNAMIC, "granularity": "PerRow"}
    ),
}
OTHER_SHORTHANDS = {
    "float8wo": "float8wo_e5m2",
    "float8dq": "float8dq_e4m3_tensor",
    "float8dq_e4m3": "float8dq_e4m3_tensor",
}
FUNCTIONS = {
    "int4_weight_only": NamedType("Int4WeightOnlyConfig", TILED),
    "int8_dynamic_activation_int4_weight": SHORTHANDS["int4dq"],
    "int8_weight_only": NamedType("Int8WeightOnlyConfig"),
    "int8_dynamic_activation_int8_weight": NamedType("Int8DynamicActivationInt8WeightConfig"),
    "float8_weight_only": NamedType("Float8WeightOnlyConfig"),
    "float8_dynamic_activation_float8_weight": NamedType("Float8DynamicActivationFloat8WeightConfig"),
}
STATIC = {
    "float8_e4m3_tensor": "float8dq_e4m3_tensor",
    "float8_e4m3_row": "float8dq_e4m3_row",
    "float8_static_activation_float8_weight": "float8dq_e4m3_tensor",
}
OTHER_NAMES = (*OTHER_SHORTHANDS, *FUNCTIONS, *STATIC, *CLASSES, "uintx_weight_only", "fpx_weight_only")
NAMES = (*dict.fromkeys((*SHORTHANDS, *ELEMENTS)), *OTHER_NAMES)


def settle(quant_type: str, arguments: Mapping[str, Any], group_size: int | None) -> tuple[str, Arguments, int | None]:
    """(type, arguments, group size) in the one spelling that all of the same meaning have.

    Raises: ConfigError for an unknown type or argument, or one that needs calibration.
    """
    if quant_type in STATIC:
        raise ConfigError(
            f"backend.quant_type={quant_type} needs the scales of its activations measured on calibration data, which "
            f"there is none of while a model loads; use {STATIC[quant_type]}: the same weights, activations scaled as "
            "they come"
        )
    given = {name: spelled(value) for name, value in arguments.items()}
    group_size = _only_group_size(given.pop("group_size", None), group_size)
    if (packed := packed_type(quant_type, given)) is not None:
        return packed, {}, group_size
    named = named_type(quant_type)
    given = _todays(quant_type, named, given)
    if quant_type in SHORTHANDS or quant_type in OTHER_SHORTHANDS:
        for name in given.keys() & named.arguments.keys():
            if given[name] != named.arguments[name]:
                raise ConfigError(
                    f"backend.quant_type_kwargs.{name}={given[name]} contradicts quant_type={quant_type}, which is "
                    f"{named.arguments[name]}; leave it out, or use quant_type={named.config}"
                )
    if named.config not in CLASSES:
        return quant_type, given, group_size
    if group_size is not None and CLASSES[named.config].groups is None:
        taking = [name for name, other in SHORTHANDS.items() if CLASSES[other.config].groups]
        raise ConfigError(f"backend.group_size={group_size} is for {choices(taking)}, not {quant_type}; set it to null")
    return _shortest(named.config, {**named.arguments, **given}, group_size)


def named_type(quant_type: str) -> NamedType:
    """What a name stands for; a class of torchao stands for itself. Raises ConfigError."""
    if quant_type.endswith("Config") and quant_type.isidentifier():
        return NamedType(quant_type)
    shorthand = OTHER_SHORTHANDS.get(quant_type, quant_type)
    named = SHORTHANDS.get(shorthand) or FUNCTIONS.get(shorthand)
    if named is None:
        rule = " (of X bits, X = A + B + 1)" if quant_type.startswith("fp") else ""
        raise ConfigError(
            f"backend.quant_type={quant_type!r} is unknown{did_you_mean(quant_type, NAMES)}; use "
            f"{', '.join((*SHORTHANDS, *OTHER_SHORTHANDS))}, uint1wo … uint8wo, fpX_eAwB{rule}, "
            "or the name of a config class of torchao, such as IntxWeightOnlyConfig"
        )
    return named


def packed_type(quant_type: str, arguments: Mapping[str, Any]) -> str | None:
    """The type of `qexp_packed` that a name of torchao's packed types stands for, None if it stands for none.

    Raises: ConfigError for an argument that is not for it.
    """
    takes: tuple[str, ...] = ()
    if quant_type == "uintx_weight_only":
        takes, quant_type = ("dtype",), f"{arguments.get('dtype', 'uint4')}wo"
    elif quant_type == "fpx_weight_only":
        takes = ("ebits", "mbits")
        exponent, mantissa = (arguments.get(name) for name in takes)
        if not (isinstance(exponent, int) and isinstance(mantissa, int)):
            raise ConfigError("backend.quant_type=fpx_weight_only needs quant_type_kwargs.ebits and .mbits")
        quant_type = f"fp{exponent + mantissa + 1}_e{exponent}w{mantissa}"
    elif match := re.fullmatch(r"(fp\d_e\d)m(\d)", quant_type):
        quant_type = f"{match[1]}w{match[2]}"
    elif match := re.fullmatch(r"fp([3-8])", quant_type):  # more exponent than mantissa, as it was
        bits = int(match[1])
        quant_type = f"fp{bits}_e{bits // 2}w{bits - 1 - bits // 2}"
    if quant_type == "int4wo" or quant_type not in ELEMENTS:
        if takes:
            raise ConfigError(f"backend.quant_type_kwargs={dict(arguments)} is no type; use {choices(ELEMENTS)}")
        return None
    for name in sorted(arguments.keys() - takes):
        raise ConfigError(
            f"backend.quant_type_kwargs.{name} is not for {quant_type}{did_you_mean(name, ('group_size', *takes))}; "
            f"it takes {choices(('group_size', *takes))}"
        )
    return quant_type


def library_call(quant_type: str, arguments: Mapping[str, Any], group_size: int | None) -> tuple[str, Arguments]:
    """(config class, its arguments) of a settled type."""
    named = named_type(quant_type)
    call = {**named.arguments, **arguments}
    known = CLASSES.get(named.config)
    if group_size is not None:
        grouped = known.groups if known is not None else "group_size"
        assert grouped is not None, quant_type
        call[grouped] = group_size if grouped == "group_size" else {"_type": "PerGroup", "group_size": group_size}
    return named.config, call


def default_group_size(quant_type: str) -> int | None:
    """How many weights share a scale where nothing else is said; None for a row or all, or if it is not known."""
    known = CLASSES.get(named_type(quant_type).config)
    return known.group_size if known is not None else None


def spelled(value: Any) -> Any:
    """A value in the words above, whether written in them or as torchao writes it into a config.json."""
    if isinstance(value, str):
        return value.removeprefix("torch.")
    if isinstance(value, list | tuple):
        items = [spelled(item) for item in value]
        return items[0] if len(items) == 2 and items[0] == items[1] and _is_granularity(items[0]) else items
    if not isinstance(value, Mapping):
        return value
    if "_data" in value:
        data = value["_data"]
        if not isinstance(data, Mapping):
            return spelled(data)
        value = {"_type": value.get("_type"), **data}
    parts = {str(name): spelled(item) for name, item in value.items() if name != "_version"}
    if parts.get("_type") == "PerRow" and parts.get("dim", -1) == -1:
        return "PerRow"
    return parts["_type"] if parts.keys() == {"_type"} else parts


def _is_granularity(value: Any) -> bool:
    return str(value.get("_type") if isinstance(value, Mapping) else value).startswith("Per")


def _only_group_size(argument: Any, group_size: int | None) -> int | None:
    if argument is not None and (isinstance(argument, bool) or not isinstance(argument, int)):
        raise ConfigError(f"backend.quant_type_kwargs.group_size={argument!r} must be an integer, or null")
    if argument is not None and group_size is not None and argument != group_size:
        raise ConfigError(
            f"backend.group_size={group_size} and backend.quant_type_kwargs.group_size={argument} disagree; set one"
        )
    size = group_size if argument is None else argument
    if size is not None and size < 1:
        raise ConfigError(f"backend.group_size={size} must be 1 or more, or null for the type's own")
    return size


def _todays(quant_type: str, named: NamedType, arguments: Arguments) -> Arguments:
    """The arguments by their names of today. Raises ConfigError for one that the type does not take."""
    result = {named.former.get(name, name): value for name, value in arguments.items()}
    if named.config == "Int4WeightOnlyConfig":
        if result.pop("inner_k_tiles", 8) != 8:
            raise ConfigError(
                "backend.quant_type_kwargs.inner_k_tiles must be 8: torchao packs no other tiles any more"
            )
        if result.pop("use_hqq", False):
            result["int4_choose_qparams_algorithm"] = "HQQ"
    known = CLASSES.get(named.config)
    names = [] if known is None else [*known.defaults, "version", *(["group_size"] if known.groups else [])]
    for name, value in result.items():
        if known is not None and name in known.defaults and str(known.defaults[name]).isupper():
            result[name] = str(value).upper()  # a member of an enum
        elif known is not None and name not in names:
            names = sorted({*names, *named.former} - {"version"})
            raise ConfigError(
                f"backend.quant_type_kwargs.{name} is no argument of {quant_type}{did_you_mean(name, names)}; "
                f"it takes {choices(names)}"
            )
    return result


def _shortest(config: str, arguments: Arguments, group_size: int | None) -> tuple[str, Arguments, int | None]:
    """The shorthand for a class and its arguments, and what is left to say beside it."""
    known = CLASSES[config]
    if known.groups is not None:
        granularity = arguments.get(known.groups)
        if isinstance(granularity, Mapping) and granularity.keys() == {"_type", "group_size"}:
            group_size = _only_group_size(granularity["group_size"], group_size)
            del arguments[known.groups]
        group_size = None if group_size == known.group_size else group_size
    if arguments.get("version") == known.version:
        del arguments["version"]
    full = {**known.defaults, **arguments}
    for name, named in SHORTHANDS.items():
        if named.config == config and all(full[key] == value for key, value in named.arguments.items()):
            return name, _without_defaults(known, arguments, named.arguments), group_size
    return config, _without_defaults(known, arguments, {}), group_size


def _without_defaults(known: LibraryClass, arguments: Arguments, said: Mapping[str, Any]) -> Arguments:
    usual = {**known.defaults, **said}
    return {name: value for name, value in arguments.items() if name not in usual or value != usual[name]}
