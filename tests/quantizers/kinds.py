"""Every kind of quantization that runs on this machine: all options of conf/backend, and the types beside them."""

import re
from typing import Any

from qexp.quantizers.base import load_quantizer
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.qexp_packed import PackedConfig
from qexp.quantizers.torchao import TorchAoConfig
from tests.backends import QUANTIZING, backend_config


def ao(quant_type: str, group_size: int | None = None, **arguments: Any) -> TorchAoConfig:
    return TorchAoConfig(quant_type=quant_type, group_size=group_size, quant_type_kwargs=arguments)


INTX, DYNAMIC_INTX = "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"
TORCHAO = {
    "int4dq": ao("int4dq"),
    "int4dq asymmetric": ao("int4dq", 64, weight_mapping_type="ASYMMETRIC"),
    "int8wo tensor": ao("int8wo", granularity="PerTensor"),
    "int8wo g32": ao("int8wo", 32),
    "int8dq mixed": ao("int8dq", granularity=["PerRow", "PerTensor"]),
    "int8dq asymmetric": ao("int8dq", act_mapping_type="ASYMMETRIC"),
    "float8wo tensor": ao("float8wo_e4m3", granularity="PerTensor"),
    "float8wo g32": ao("float8wo_e5m2", 32),
    **{f"intx{bits} g32": ao(INTX, 32, weight_dtype=f"int{bits}") for bits in (2, 5, 8)},
    "intx4 row": ao(INTX, weight_dtype="int4"),
    "intx4 asymmetric": ao(INTX, 32, weight_dtype="int4", mapping_type="ASYMMETRIC"),
    "intx4 fp32 scale": ao(INTX, 64, weight_dtype="int4", scale_dtype="float32"),
    "intx4 hqq": ao(INTX, 64, weight_dtype="int4", intx_choose_qparams_algorithm="hqq_scale_only"),
    "intx3dq row": ao(DYNAMIC_INTX, weight_dtype="int3", weight_granularity={"_type": "PerAxis", "axis": 0}),
    "nvfp4": ao("NVFP4WeightOnlyConfig"),
    "by name": ao("FqnToConfig", fqn_to_config={"re:blocks.*": "int8wo", "embed": "int4dq"}),
}
PACKED = {
    **{name: PackedConfig(quant_type=name) for name in ELEMENTS},
    **{f"{name} row": PackedConfig(quant_type=name, group_size=None) for name in ("uint5wo", "fp6_e3w2")},
}
OPTIONS: dict[str, Any] = {name: backend_config(name) for name in QUANTIZING}
KINDS: dict[str, Any] = {
    **OPTIONS,
    **{f"torchao {name}": config for name, config in TORCHAO.items()},
    **{f"packed {name}": config for name, config in PACKED.items() if config not in OPTIONS.values()},
}
SERIALIZABLE = [name for name, config in KINDS.items() if load_quantizer(config).is_serializable]


def error_bound(kind: str) -> float:
    """The most that quantizing N(0, 1) weights may change a layer's output, relative to it.

    Uniform codes of N bits over +-4.5 sigma, which the largest of a few thousand weights does not leave, are off by
    their step over sqrt(12). Floats of M mantissa bits are off by up to half of 2^-M of themselves. Activations in 8
    bits, and bf16, add about 0.01. Never 1 or more (one bit, by the formula), which is what an answer of zeros is
    off by.
    """
    kind = {"quanto_float8": "e4m3", "torchao_float8wo": "e4m3", "torchao float8wo tensor": "e4m3"}.get(kind, kind)
    kind = "e5m2" if kind == "torchao float8wo g32" else kind
    if match := re.search(r"e(\d)(?:m|w)(\d)", kind):
        bits, mantissa = 1 + int(match[1]) + int(match[2]), int(match[2])
    else:
        bits, mantissa = BITS.get(kind, 0) or int(re.findall(r"(?:int|intx|q|fp|nf)(\d)", kind)[0]), 8
    return min(max(9 / (2**bits - 1) / 12**0.5, 2.0 ** -(mantissa + 1)) + 0.01, 0.9)


BITS = {"bitsandbytes": 4, "gguf": 8, "quanto": 8, "torchao": 8, "torchao by name": 4}
