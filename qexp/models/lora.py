"""LoRA on a pipeline's components: low-rank updates beside their weights, which stay as they are, quantized or not.

A layer y = W x becomes y = W x + scale · B (A x), with A [rank, in], B [out, rank] and scale = weight · alpha / rank.
Nothing is merged into W: on a quantized layer the update is exact, and the base keeps the quantization error alone.
The update is a hook on the layer, so it works on every backend, on what is offloaded and on what is saved; A and B stay
on the device where the layer computes, in the dtype of the component.

Files are in any layout that the pipeline's own class of diffusers converts (`lora_state_dict`: diffusers, kohya, and
others of an architecture), or a folder of peft, whose adapter_config.json has the scales (`lora_scales.py`). What would
be lost on the way is an error: layers that the model has not, other shapes, DoRA, norms, and adapters that are no LoRA.

Source: arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.config.dataclass_io import check_known
from qexp.errors import ConfigError, LoadError, choices, did_you_mean, first_names
from qexp.models.lora_layers import Update, layer_sizes
from qexp.models.lora_scales import (
    ADAPTER_CONFIG,
    PEFT_PREFIX,
    Scales,
    adapter_config_of,
    alphas_by_layer,
    check_adapter_config,
    scaled_by_adapter_config,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

STANDARD_NAME = "pytorch_lora_weights.safetensors"  # what `save_lora_weights` writes
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


@dataclass(frozen=True)
class LoraConfig:
    """path: a .safetensors file, or a folder with one; weight: how strongly it counts; component: the one it is for,
    where a pipeline has several that it could be for (transformer, transformer_2)."""

    path: str
    weight: float = 1.0
    component: str | None = None

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

    def files(self) -> list[Path]:
        """Return the files that its numbers come from. Raises: ConfigError if there is no such file."""
        beside = self.file.with_name(ADAPTER_CONFIG)
        return [self.file, beside] if adapter_config_of(self.file) is not None else [self.file]


def lora_configs(value: Any) -> tuple[LoraConfig, ...]:
    """model.lora: null, a path, {path, weight, component}, or a list of those. Raises: ConfigError otherwise."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(config for entry in value for config in lora_configs(entry))
    if isinstance(value, str | Path) and str(value):
        return (LoraConfig(str(value)),)
    if isinstance(value, Mapping) and value.get("path"):
        for name in value:
            check_known(f"model.lora.{name}", str(name), ["path", "weight", "component"])
        weight = value.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(
                f"model.lora: weight={weight} of '{value['path']}' must be a finite number; 1 is as trained"
            )
        component = value.get("component")
        if component is not None and not (isinstance(component, str) and component):
            raise ConfigError(f"model.lora: component={component} of '{value['path']}' must be a component's name")
        return (LoraConfig(str(value["path"]), float(weight), component),)
    raise ConfigError(
        f"model.lora={value} must be a path, or a list of them; with weights: "
        "model.lora='[{path: style.safetensors, weight: 0.8}]'"
    )


def lora_with_paths(value: Any, absolute: Callable[[str], str]) -> Any:
    """Return model.lora with `absolute` applied to each path."""
    if isinstance(value, list | tuple):
        return [lora_with_paths(entry, absolute) for entry in value]
    if isinstance(value, Mapping):
        return {**value, "path": absolute(str(value["path"]))}
    return None if value is None else absolute(str(value))


Updates = dict[str, dict[str, list[Update]]]  # component -> layer -> updates in the order of the files


def read_updates(configs: tuple[LoraConfig, ...], pipeline_class: Any, models: Mapping[str, nn.Module]) -> Updates:
    """Return all updates of some LoRA files, checked against the models, which may be skeletons.

    Raises: ConfigError for a pipeline without LoRA, LoadError for a file that does not fit it.
    """
    if not hasattr(pipeline_class, "lora_state_dict"):
        raise ConfigError(f"model.lora: {pipeline_class.__name__} has no LoRA in diffusers; leave it out")
    found: Updates = {}
    for config in configs:
        if config.component is not None and config.component not in models:
            raise ConfigError(
                f"model.lora: component={config.component} of '{config.path}' is none of this pipeline's"
                f"{did_you_mean(config.component, list(models))}; it has {choices(models)}"
            )
        for component, layers in _read_file(config, pipeline_class, models).items():
            for layer, update in layers.items():
                found.setdefault(component, {}).setdefault(layer, []).append(update)
    return found


def _read_file(
    config: LoraConfig, pipeline_class: Any, models: Mapping[str, nn.Module]
) -> dict[str, dict[str, Update]]:
    """Return one file: component -> layer -> update."""
    file, place = config.file, f"model.lora={config.path}"
    stored = _stored_tensors(file)
    factor = 1.0
    if (beside := adapter_config_of(file)) is not None:
        stored, factor = scaled_by_adapter_config(stored, beside, file)
    converted = _of_layers(stored, config, models) or _converted(
        file, stored if beside is not None else None, pipeline_class, models
    )
    tensors = _of_component(converted.tensors, config, list(stored), pipeline_class, models)
    found = dict[str, dict[str, Update]]()
    for component, model in models.items():
        own = _without_prefix(tensors, component)
        if not own:
            continue
        named = _peft_names(own, model, place)
        scales = Scales(
            alphas_by_layer(_without_prefix(converted.alphas, component), own, named, f"{place}: {component}"),
            check_adapter_config(_without_prefix(converted.metadata, component), f"{place}: its metadata"),
            config.weight * factor,
        )
        found[component] = _updates(named, scales, model, f"{place}: {component}")
    rest = [name for name in tensors if name.split(".")[0] not in found]
    if rest or not found:
        kind, shown = pipeline_class.__name__, first_names(rest or list(converted.alphas) or ["nothing"])
        raise LoadError(
            f"{place} does not fit {kind}: it has {shown}, which belongs to none of its components "
            f"({', '.join(models)}); use a LoRA for this architecture"
        )
    return found


@dataclass(frozen=True)
class _Converted:
    """tensors: named component.layer.part; alphas and metadata by the same names."""

    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _stored_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"model.lora={file} cannot be read: {str(error).splitlines()[0]}; get it again") from error
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in tensors):
        raise LoadError(f"model.lora={file} is a DoRA, whose weight norms a quantized layer has not; use a LoRA")
    return tensors


def _of_layers(stored: Mapping[str, Tensor], config: LoraConfig, models: Mapping[str, nn.Module]) -> _Converted | None:
    """Return a file whose names are those of the layers of one component, as peft writes it; None if they are not."""
    bare = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    layers = {name.rpartition(".lora_")[0] for name in bare}
    for component in [config.component] if config.component else list(models):
        if all(name.endswith(PARTS) for name in bare) and layers <= {
            name for name, _ in models[component].named_modules()
        }:
            return _Converted({f"{component}.{name}": tensor for name, tensor in bare.items()})
    return None


def _converted(
    file: Path, stored: Mapping[str, Tensor] | None, kind: Any, models: Mapping[str, nn.Module]
) -> _Converted:
    """Convert a file, or tensors `stored` in it that are scaled already, by the pipeline's class."""
    from qexp.system.imports import quiet

    options: dict[str, Any] = {"local_files_only": True, "return_lora_metadata": True}
    if "unet" in models:
        options["unet_config"] = models["unet"].config
    elif "return_alphas" in inspect.signature(kind.lora_state_dict).parameters:
        options["return_alphas"] = True
    try:
        with quiet():
            if stored is None:
                answer = kind.lora_state_dict(str(file.parent), weight_name=file.name, **options)
            else:
                answer = kind.lora_state_dict(dict(stored), **options)
    except Exception as error:  # whatever a converter of another architecture stumbles over
        reason = " ".join(str(error).split())[:200]
        raise LoadError(
            f"model.lora={file}: {kind.__name__} cannot convert it ({type(error).__name__}: {reason}); use a LoRA for "
            "this architecture"
        ) from error
    tensors, *others = answer
    metadata = others.pop() if others else None
    alphas = {name: float(value) for name, value in ((others[0] if others else None) or {}).items()}
    return _Converted(dict(tensors), alphas, metadata or {})


def _of_component(
    tensors: Mapping[str, Tensor], config: LoraConfig, stored: Sequence[str], kind: Any, models: Mapping[str, nn.Module]
) -> Mapping[str, Tensor]:
    """Return the tensors by component. Raises: ConfigError if it is not said which of two transformers they are for."""
    main = str(getattr(kind, "transformer_name", None) or getattr(kind, "unet_name", "unet"))
    target, place = config.component, f"model.lora={config.path}"
    if target is None:
        twins = [name for name, model in models.items() if main in models and type(model) is type(models[main])]
        says_which = any(name.startswith(tuple(f"{twin}." for twin in twins)) for name in stored)
        if len(twins) > 1 and not says_which:
            raise ConfigError(
                f"{place} does not say which of {choices(twins)} it is for; name it: "
                f"model.lora='[{{path: {config.path}, component: {twins[-1]}}}]'"
            )
        return tensors
    moved = {
        f"{target}.{name.removeprefix(f'{main}.')}" if name.startswith(f"{main}.") else name: tensor
        for name, tensor in tensors.items()
    }
    if others := [name for name in moved if not name.startswith(f"{target}.")]:
        raise LoadError(
            f"{place}, component: {target}: it has {first_names(others)} of other components; leave `component` out"
        )
    return moved


def _without_prefix(named: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _peft_names(tensors: Mapping[str, Tensor], model: nn.Module, place: str) -> dict[str, Tensor]:
    """Return names that end with lora_A and lora_B, of the model's layers, for the same tensors."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if hasattr(model, "base_model_prefix"):
        try:
            named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(tensors)))
        except ValueError as error:  # it tells layouts apart by names of the layers that most files have
            raise LoadError(
                f"{place}: diffusers cannot tell the layout of {first_names(list(tensors))} ({error}); save the LoRA "
                "with save_lora_weights, or take a file that has no layers of text encoders"
            ) from error
        is_flat = not hasattr(model, "text_model")  # transformers took this level out of CLIPTextModel
        return {name.removeprefix("text_model.") if is_flat else name: tensor for name, tensor in named.items()}
    return dict(tensors) if "lora_A" in next(iter(tensors)) else convert_unet_state_dict_to_peft(dict(tensors))


def _updates(tensors: Mapping[str, Tensor], scales: Scales, model: nn.Module, place: str) -> dict[str, Update]:
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
    return {name: _update(name, tensors, scales, layers[name], place) for name in names}


def _update(name: str, tensors: Mapping[str, Tensor], scales: Scales, layer: nn.Module, place: str) -> Update:
    down, up = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
    if down is None or up is None:
        raise LoadError(f"{place}: '{name}' has only one of lora_A and lora_B; the file is damaged: get it again")
    expected = layer_sizes(layer)
    found = (up.shape[0], down.shape[1]) if down.ndim > 1 else tuple(down.shape)
    if expected is None:
        raise LoadError(f"{place}: '{name}' is a {type(layer).__name__}, which takes no LoRA here; use another LoRA")
    if expected != found or up.shape[1] != down.shape[0]:
        raise LoadError(
            f"{place}: '{name}' maps {expected[1]} values to {expected[0]}, but the LoRA's A is {list(down.shape)} and "
            f"B {list(up.shape)}; it is for another size of the architecture"
        )
    return Update(down, up, tensors.get(f"{name}.lora_B.bias"), scales.of(name, down.shape[0]))
