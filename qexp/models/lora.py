"""LoRA on a pipeline's components: low-rank updates beside their weights, which stay as they are, quantized or not.

A layer y = W x becomes y = W x + scale · B (A x), with A [rank, in], B [out, rank] and scale = weight · alpha / rank.
Nothing is merged into W: on a quantized layer the update is exact, and the base keeps the quantization error alone.
The update is a hook on the layer, so it works on every backend, on what is offloaded and on what is saved; A and B stay
on the device where the layer computes, in the dtype of the component.

Files are in any layout that the pipeline's own class of diffusers converts (`lora_state_dict`: diffusers, kohya, and
others of an architecture). What would be lost on the way is an error: layers that the model has not, other shapes,
DoRA, norms, and adapters that are no LoRA.

Source: arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.config.dataclass_io import check_known
from qexp.errors import ConfigError, LoadError, first_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

STANDARD_NAME = "pytorch_lora_weights.safetensors"  # what `save_lora_weights` writes
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


@dataclass(frozen=True)
class LoraConfig:
    """path: a .safetensors file, or a folder with one; weight: how strongly it counts."""

    path: str
    weight: float = 1.0

    @property
    def file(self) -> Path:
        """Raises: ConfigError if there is no such file."""
        path = Path(self.path).expanduser()
        if path.is_file():
            return path
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        found = [file for file in found if file.name == STANDARD_NAME] or found
        if len(found) == 1:
            return found[0]
        has = f"it has {first_names([file.name for file in found]) or 'none'}" if path.is_dir() else "it does not exist"
        raise ConfigError(f"model.lora={self.path} must be a .safetensors file, or a folder with one; {has}")


def lora_configs(value: Any) -> tuple[LoraConfig, ...]:
    """model.lora: null, a path, {path, weight}, or a list of those. Raises: ConfigError for anything else."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(config for entry in value for config in lora_configs(entry))
    if isinstance(value, str | Path) and str(value):
        return (LoraConfig(str(value)),)
    if isinstance(value, Mapping) and value.get("path"):
        for name in value:
            check_known(f"model.lora.{name}", str(name), ["path", "weight"])
        weight = value.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(
                f"model.lora: weight={weight} of '{value['path']}' must be a finite number; 1 is as trained"
            )
        return (LoraConfig(str(value["path"]), float(weight)),)
    raise ConfigError(
        f"model.lora={value} must be a path, or a list of them; with weights: "
        "model.lora='[{path: style.safetensors, weight: 0.8}]'"
    )


@dataclass(frozen=True)
class Update:
    """One layer's: down is A [rank, in, ...], up is B [out, rank, ...]; of convolutions with the kernel's size."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


Updates = dict[str, dict[str, list[Update]]]  # component -> layer -> updates in the order of the files


def read_updates(configs: tuple[LoraConfig, ...], pipeline_class: Any, models: Mapping[str, nn.Module]) -> Updates:
    """All updates of some LoRA files, checked against the models, which may be skeletons.

    Raises: ConfigError for a pipeline without LoRA, LoadError for a file that does not fit it.
    """
    if not hasattr(pipeline_class, "lora_state_dict"):
        raise ConfigError(f"model.lora: {pipeline_class.__name__} has no LoRA in diffusers; leave it out")
    found: Updates = {}
    for config in configs:
        for component, layers in _read(config, pipeline_class, models).items():
            for layer, update in layers.items():
                found.setdefault(component, {}).setdefault(layer, []).append(update)
    return found


def _read(config: LoraConfig, pipeline_class: Any, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Update]]:
    """One file: component -> layer -> update."""
    tensors, alphas, metadata = _state_dict(config.file, pipeline_class, models)
    place, found = f"model.lora={config.path}", dict[str, dict[str, Update]]()
    for component, model in models.items():
        prefix = f"{component}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not own:
            continue
        own = _peft_names(own, model)
        scales = _Scales(
            {_layer_of(name.removeprefix(prefix)): value for name, value in alphas.items() if name.startswith(prefix)},
            {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)},
        )
        found[component] = _updates(own, scales, model, config, f"{place}: {component}")
    rest = [name for name in tensors if name.split(".")[0] not in found]
    if rest or not found:
        kind, shown = pipeline_class.__name__, first_names(rest or list(alphas) or ["nothing"])
        raise LoadError(
            f"{place} does not fit {kind}: it has {shown}, which belongs to none of its components "
            f"({', '.join(models)}); use a LoRA for this architecture"
        )
    return found


def _state_dict(
    file: Path, kind: Any, models: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """(tensors, alphas, metadata) as the pipeline's class converts them, the tensors by component and layer."""
    from safetensors import SafetensorError, safe_open

    from qexp.system.imports import quiet

    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        if any("dora_scale" in name or "lora_magnitude_vector" in name for name in names):
            raise LoadError(f"model.lora={file} is a DoRA, whose weight norms a quantized layer has not; use a LoRA")
        options: dict[str, Any] = {"weight_name": file.name, "local_files_only": True, "return_lora_metadata": True}
        if "unet" in models:
            options["unet_config"] = models["unet"].config
        elif "return_alphas" in _parameters(kind.lora_state_dict):
            options["return_alphas"] = True
        with quiet():
            answer = kind.lora_state_dict(str(file.parent), **options)
    except LoadError:
        raise
    except (SafetensorError, OSError) as error:
        raise LoadError(f"model.lora={file} cannot be read: {str(error).splitlines()[0]}; get it again") from error
    except Exception as error:  # whatever a converter of another architecture stumbles over
        reason = " ".join(str(error).split())[:200]
        raise LoadError(
            f"model.lora={file}: {kind.__name__} cannot convert it ({type(error).__name__}: {reason}); use a LoRA for "
            "this architecture"
        ) from error
    tensors, *others = answer
    metadata = others.pop() if others else None
    alphas = {name: float(value) for name, value in ((others[0] if others else None) or {}).items()}
    return dict(tensors), alphas, metadata or {}


def _parameters(function: Any) -> Any:
    import inspect

    return inspect.signature(function).parameters


def _peft_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names that end with lora_A and lora_B, of the model's layers."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if hasattr(model, "base_model_prefix"):
        named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(tensors)))
        is_flat = not hasattr(model, "text_model")  # transformers took this level out of CLIPTextModel
        return {name.removeprefix("text_model.") if is_flat else name: tensor for name, tensor in named.items()}
    return dict(tensors) if "lora_A" in next(iter(tensors)) else convert_unet_state_dict_to_peft(dict(tensors))


def _layer_of(name: str) -> str:
    """The layer that an alpha is named after."""
    for mark in (".lora_A.", ".lora.down.", ".down.", ".alpha"):
        name = name.split(mark)[0]
    return name.removesuffix(".alpha")


class _Scales:
    """alpha / rank of each layer: from the file's own alphas, from the metadata of a LoRA that peft trained, or 1.

    A layer without an alpha of its own has the one that most of the others have, as in diffusers.
    """

    def __init__(self, alphas: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
        self.alphas, self.metadata = alphas, metadata
        self.usual = Counter(alphas.values()).most_common(1)[0][0] if alphas else None

    def of(self, layer: str, rank: int) -> float:
        alpha: float = rank if self.usual is None else self.alphas.get(layer, self.usual)
        if self.metadata.get("lora_alpha") is not None:
            alpha = self._in_pattern(layer, self.metadata.get("alpha_pattern") or {}, self.metadata["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.metadata.get("use_rslora") else rank)

    @staticmethod
    def _in_pattern(layer: str, pattern: Mapping[str, float], default: float) -> float:
        """As peft matches: a pattern is a regular expression for the end of the name, from a segment border on."""
        found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer))
        return float(next(found, default))


def _updates(
    tensors: Mapping[str, Tensor], scales: _Scales, model: nn.Module, config: LoraConfig, place: str
) -> dict[str, Update]:
    """layer -> update. Raises: LoadError for a layer that is not there, of another shape, or no plain LoRA."""
    layers = dict(model.named_modules())
    strange = [name for name in tensors if not name.endswith(PARTS)]
    if strange:
        raise LoadError(f"{place}: {first_names(strange)} is no part of a LoRA that can be applied; use a plain LoRA")
    names = dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors)
    absent = [name for name in names if name not in layers]
    if absent:
        raise LoadError(
            f"{place} has no layer {first_names(absent)} ({len(absent)} of the {len(names)} that the LoRA is for); it "
            f"is for another architecture than {type(model).__name__}, or another size of it"
        )
    return {name: _update(name, tensors, scales, layers[name], config, place) for name in names}


def _update(
    name: str, tensors: Mapping[str, Tensor], scales: _Scales, layer: nn.Module, config: LoraConfig, place: str
) -> Update:
    down, up = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
    if down is None or up is None:
        raise LoadError(f"{place}: '{name}' has only one of lora_A and lora_B; the file is damaged: get it again")
    expected = _sizes(layer)
    found = (up.shape[0], down.shape[1]) if down.ndim > 1 else tuple(down.shape)
    if expected is None:
        raise LoadError(f"{place}: '{name}' is a {type(layer).__name__}, which takes no LoRA here; use another LoRA")
    if expected != found or up.shape[1] != down.shape[0]:
        raise LoadError(
            f"{place}: '{name}' maps {expected[1]} values to {expected[0]}, but the LoRA's A is {list(down.shape)} and "
            f"B {list(up.shape)}; it is for another size of the architecture"
        )
    return Update(down, up, tensors.get(f"{name}.lora_B.bias"), config.weight * scales.of(name, down.shape[0]))


def _sizes(layer: Any) -> tuple[int, int] | None:
    """(out, in) of a layer that LoRA can be applied to."""
    from torch import nn

    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.out_channels, layer.in_channels
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):  # linear layers, quantized ones too
        sizes: Any = layer.out_features, layer.in_features
        return int(sizes[0]), int(sizes[1])
    return None


def apply_updates(model: nn.Module, updates: Mapping[str, list[Update]], dtype: torch.dtype) -> None:
    """Hook the updates to the layers of a model. dtype: of the component, where it is not quantized."""
    for name, of_layer in updates.items():
        model.get_submodule(name).register_forward_hook(_Hook(of_layer, dtype))


class _Hook:
    """Adds the updates of a layer to its output; in the order of computation of peft, whose bits it gives."""

    def __init__(self, updates: list[Update], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.updates = [
            Update(u.down.to(dtype), u.up.to(dtype), None if u.bias is None else u.bias.to(dtype), u.scale)
            for u in updates
        ]

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x, *_), result = arguments, output
        if self.updates[0].down.device != x.device:
            self.updates = [_moved(update, x.device) for update in self.updates]
        for update in self.updates:
            x = x.to(self.dtype)
            result = result + _low_rank(layer, update, x) * update.scale
        return result.to(output.dtype)


def _moved(update: Update, device: torch.device) -> Update:
    bias = None if update.bias is None else update.bias.to(device)
    return Update(update.down.to(device), update.up.to(device), bias, update.scale)


def _low_rank(layer: Any, update: Update, x: Tensor) -> Tensor:
    """B (A x); a convolution's A has its kernel, stride and padding, and its B looks at single pixels."""
    from torch.nn.functional import conv2d, linear

    if update.down.ndim == 2:
        return linear(linear(x, update.down), update.up, update.bias)
    inner = conv2d(x, update.down, None, layer.stride, layer.padding, layer.dilation)
    return conv2d(inner, update.up, update.bias)
