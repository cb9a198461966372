"""Map every name of torchao's types to today's config class.

A type is named by a shorthand (`int8wo`), by its former function (`int8_weight_only`), or by a config class of torchao
(`Int8WeightOnlyConfig`). `settle` reduces all spellings of a type to one: the shorthand, if any, and only those
arguments that differ from the defaults. Values are written as in yaml:

    torch.int4                  int4
    MappingType.SYMMETRIC       SYMMETRIC
    PerRow()                    PerRow
    PerGroup(32)                {_type: PerGroup, group_size: 32}, or the field group_size

torchao no longer has uintNwo and fpX_eAwB: these are `qexp_packed` (`packed_type`). The names are in `names.py`.
This module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.torchao_support.names import (
    CLASSES,
    FUNCTIONS,
    NAMES,
    OTHER_SHORTHANDS,
    SHORTHANDS,
    STATIC,
    LibraryClass,
    NamedType,
)

Arguments = dict[str, Any]


def settle(quant_type: str, arguments: Mapping[str, Any], group_size: int | None) -> tuple[str, Arguments, int | None]:
    """Return the canonical (type, arguments, group size) of equivalent spellings.

    Raises: ConfigError for an unknown type or argument, or one that needs calibration.
    """
    if quant_type in STATIC:
        raise ConfigError(
            f"backend.quant_type={quant_type} needs calibration data for its activation scales, which a load does not "
            f"have; use {STATIC[quant_type]}: the same weights with dynamic activation scales"
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
    """Return the type of a name, or of a torchao class. Raises ConfigError."""
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
    """Return the type of `qexp_packed` for a name of torchao's former packed types, or None.

    Raises: ConfigError for an argument that it does not have.
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
            raise ConfigError(f"backend.quant_type_kwargs={dict(arguments)} is not a type; use {choices(ELEMENTS)}")
        return None
    for name in sorted(arguments.keys() - takes):
        raise ConfigError(
            f"backend.quant_type_kwargs.{name} is not for {quant_type}{did_you_mean(name, ('group_size', *takes))}; "
            f"it takes {choices(('group_size', *takes))}"
        )
    return quant_type


def library_call(quant_type: str, arguments: Mapping[str, Any], group_size: int | None) -> tuple[str, Arguments]:
    """Return (config class, arguments) of a canonical type."""
    named = named_type(quant_type)
    call = {**named.arguments, **arguments}
    known = CLASSES.get(named.config)
    if group_size is not None:
        grouped = known.groups if known is not None else "group_size"
        assert grouped is not None, quant_type
        call[grouped] = group_size if grouped == "group_size" else {"_type": "PerGroup", "group_size": group_size}
    return named.config, call


def default_group_size(quant_type: str) -> int | None:
    """Return the default group size; None for one scale per row or weight, or if it is unknown."""
    known = CLASSES.get(named_type(quant_type).config)
    return known.group_size if known is not None else None


def spelled(value: Any) -> Any:
    """Return a value in the spelling above, from that spelling or from torchao's in a config.json."""
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
    """Return the arguments under today's names. Raises ConfigError for an unknown one."""
    result = {named.former.get(name, name): value for name, value in arguments.items()}
    if named.config == "Int4WeightOnlyConfig":
        if result.pop("inner_k_tiles", 8) != 8:
            raise ConfigError(
                "backend.quant_type_kwargs.inner_k_tiles must be 8, the only one that torchao still packs; leave it out"
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
                f"backend.quant_type_kwargs.{name} is not an argument of {quant_type}{did_you_mean(name, names)}; "
                f"it takes {choices(names)}"
            )
    return result


def _shortest(config: str, arguments: Arguments, group_size: int | None) -> tuple[str, Arguments, int | None]:
    """Return the shorthand of a class and its arguments, with the remaining arguments."""
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
