"""By what factor a LoRA counts on a layer: alpha / rank, or alpha / sqrt(rank) (rsLoRA).

Alpha is a tensor of the file (kohya), in the metadata of the file (diffusers), or in the adapter_config.json beside it
(peft). Without any it is the rank, as in kohya's scripts and ComfyUI.

Source: peft's LoraConfig; arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.checkpoints.checkpoint import read_header, read_object
from qexp.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"  # what peft's save_pretrained writes beside it
PEFT_PREFIX = "base_model.model."
SCALED_BY_DIFFUSERS = "lora_adapter_metadata"  # in the metadata of a file that save_lora_weights wrote
READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias")
HARMLESS = (  # they are about training, or say what the tensors' names say
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core",
    "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "runtime_config", "lora_bias", "ensure_weight_tying", "peft_version",
)  # fmt: skip
OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base's weights too


def adapter_config_of(file: Path) -> dict[str, Any] | None:
    """Read the adapter_config.json that peft wrote beside a file; another file beside peft's own has none."""
    beside, own = file.with_name(ADAPTER_CONFIG), file.with_name(PEFT_FILE)
    if not beside.is_file() or (file.name != PEFT_FILE and own.is_file()):
        return None
    return read_object(beside)


def check_adapter_config(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return the config itself.

    Raises: LoadError for a field that changes what the adapter computes and is not read here.
    """
    kind, start = config.get("peft_type") or "LORA", str(config.get("init_lora_weights"))
    kind = str(getattr(kind, "value", kind))
    if kind != "LORA":
        raise LoadError(f"{place}: peft_type={kind} is no LoRA; use a LoRA")
    if start.startswith(OF_ANOTHER_BASE):
        raise LoadError(
            f"{place}: init_lora_weights={start} changes the weights that the LoRA is for as well; convert it in peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias") not in (None, "none"):
        raise LoadError(f"{place}: bias={config['bias']} trains biases of the model, too; use a LoRA with bias=none")
    for name, value in config.items():
        if name not in (*READ, *HARMLESS) and value not in (None, False, [], {}):
            raise LoadError(f"{place}: {name}={value} is not applied here; use a plain LoRA (without {name})")
    return config


def scaled_by_adapter_config(
    stored: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> tuple[dict[str, Tensor], float]:
    """Apply the scales of adapter_config.json: one factor for all layers, or else each layer's in its B.

    A converter may merge, split and rename layers, so that scales of single layers are applied before it runs.
    Raises: LoadError for a config that is not of this file, or says what is not applied here.
    """
    place = f"'{file.with_name(ADAPTER_CONFIG)}'"
    check_adapter_config(config, place)
    if SCALED_BY_DIFFUSERS in read_header(file).metadata or any(name.endswith(".alpha") for name in stored):
        raise LoadError(
            f"{place} lies beside '{file}', which has alphas of its own; put the file into a folder without "
            f"{ADAPTER_CONFIG} if that is of another LoRA"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise LoadError(f"{place} has lora_alpha={config.get('lora_alpha')}, which is no number; download it again")
    scales = dict[str, float]()
    for name, tensor in stored.items():
        if name.endswith(".lora_A.weight"):
            layer, rank = name.removesuffix(".lora_A.weight"), int(tensor.shape[0])
            stated = in_pattern(layer, config.get("rank_pattern") or {}, config.get("r", rank))
            if rank != stated:
                raise LoadError(f"{place} says that the rank of '{layer}' is {stated:g}, but in '{file}' it is {rank}")
            scales[layer] = scale_of(layer, rank, config)
    if len({*scales.values()}) == 1:
        return dict(stored), next(iter(scales.values()))
    return {name: _apply_scale_of(name, tensor, scales) for name, tensor in stored.items()}, 1.0


def _apply_scale_of(name: str, tensor: Tensor, scales: Mapping[str, float]) -> Tensor:
    layer, is_up, _ = name.partition(".lora_B.")
    return tensor.float() * scales[layer] if is_up and layer in scales else tensor


class Scales:
    """The factor of each layer.

    Args:
        alphas: layer -> alpha, from the file's tensors.
        metadata: the config of peft that the file's metadata has, or {}.
        weight: what all of them are multiplied with.
    """

    def __init__(self, alphas: Mapping[str, float], metadata: Mapping[str, Any], weight: float) -> None:
        self.alphas, self.metadata, self.weight = alphas, metadata, weight

    def of(self, layer: str, rank: int) -> float:
        if self.metadata.get("lora_alpha") is not None:
            return self.weight * scale_of(layer, rank, self.metadata)
        return self.weight * self.alphas.get(layer, rank) / rank


def scale_of(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = in_pattern(layer, config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def in_pattern(layer: str, pattern: Mapping[str, float], default: float) -> float:
    """Match as peft does: a pattern is a regular expression for the end of a name, from a segment border on."""
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer))
    return float(next(found, default))


def alphas_by_layer(
    alphas: Mapping[str, float], tensors: Mapping[str, Tensor], named: Mapping[str, Tensor], place: str
) -> dict[str, float]:
    """Layer -> alpha. alphas are named after `tensors`, which are the same as those of `named`, by layer.

    Raises: LoadError for an alpha of nothing.
    """
    layers = {id(tensor): name.rpartition(".lora_")[0] for name, tensor in named.items()}
    found = dict[str, float]()
    for name, alpha in alphas.items():
        base = name.removesuffix(".alpha")
        tensor = next((tensors[key] for key in tensors if key == base or key.startswith(f"{base}.lora")), None)
        if tensor is None:
            raise LoadError(f"{place}: '{name}' belongs to no layer of the file, which is damaged; get it again")
        found[layers[id(tensor)]] = alpha
    return found
