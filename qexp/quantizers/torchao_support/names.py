"""Tables of the names of torchao's types and their config classes.

Source: torchao 0.18; for the names, the tables of diffusers' TorchAoConfig while it took names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qexp.quantizers.packed.elements import ELEMENTS


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
    """A name for `config` with these arguments. former: earlier arguments of the name -> today's."""

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    former: Mapping[str, str] = field(default_factory=dict)


INTX = {"intx_packing_format": "UNPACKED_TO_INT8", "intx_choose_qparams_algorithm": "AFFINE"}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
FAST_ACCUM = {"_type": "Float8MMConfig", "emulate": False, "use_fast_accum": True, "pad_inner_dim": False}
NO_INDUCTOR = {"set_inductor_config": False}  # True, torchao's default, changes how torch.compile works everywhere
FLOAT8_DYNAMIC = "Float8DynamicActivationFloat8WeightConfig"
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
    FLOAT8_DYNAMIC: LibraryClass(
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
BOTH_E4M3 = {"activation_dtype": E4M3, "weight_dtype": E4M3}
FORMER_INT4DQ = {"mapping_type": "weight_mapping_type"}
SHORTHANDS = {
    "int4wo": NamedType("Int4WeightOnlyConfig", TILED),
    "int4dq": NamedType("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": "int4"}, FORMER_INT4DQ),
    "int8wo": NamedType("Int8WeightOnlyConfig"),
    "int8dq": NamedType("Int8DynamicActivationInt8WeightConfig"),
    "float8wo_e4m3": NamedType("Float8WeightOnlyConfig", {"weight_dtype": E4M3}),
    "float8wo_e5m2": NamedType("Float8WeightOnlyConfig", {"weight_dtype": E5M2}),
    "float8dq_e4m3_tensor": NamedType(FLOAT8_DYNAMIC, {**BOTH_E4M3, "granularity": "PerTensor"}),
    "float8dq_e4m3_row": NamedType(FLOAT8_DYNAMIC, {**BOTH_E4M3, "granularity": "PerRow"}),
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
    "float8_dynamic_activation_float8_weight": NamedType(FLOAT8_DYNAMIC),
}
STATIC = {
    "float8_e4m3_tensor": "float8dq_e4m3_tensor",
    "float8_e4m3_row": "float8dq_e4m3_row",
    "float8_static_activation_float8_weight": "float8dq_e4m3_tensor",
}
OTHER_NAMES = (*OTHER_SHORTHANDS, *FUNCTIONS, *STATIC, *CLASSES, "uintx_weight_only", "fpx_weight_only")
NAMES = (*dict.fromkeys((*SHORTHANDS, *ELEMENTS)), *OTHER_NAMES)
