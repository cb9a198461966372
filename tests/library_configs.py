"""Configs with which diffusers and transformers quantize as an option of conf/backend does."""

from importlib import import_module
from typing import Any

import torch

LIBRARY_BACKENDS = ("bitsandbytes", "bitsandbytes_int8", "torchao", "quanto")


def library_config(library: str, backend: str, skip: list[str] | None = None) -> Any:
    """Return the config of one of LIBRARY_BACKENDS, of diffusers or transformers, that leaves modules as they are."""
    module = import_module(library)
    if backend.startswith("bitsandbytes"):
        four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        fields = {"load_in_8bit": True} if backend.endswith("int8") else four_bit
        return module.BitsAndBytesConfig(**fields, llm_int8_skip_modules=skip)
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return module.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=skip)
    return module.QuantoConfig("int8", modules_to_not_convert=skip)
