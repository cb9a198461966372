"""Quantize each layer with the backend of its rule in a recipe.

Every layer gets the same bytes as with its rule's backend alone; this backend only forwards the calls. Recipes:
`config/recipe.py`.

A model is saved in a common format if one can hold all of its layers, and opens in every program that reads that
format: GGUF has a type for each tensor, torchao a config for each layer (`FqnToConfig`), and 4-bit weights of
bitsandbytes store their own settings; all of them allow unquantized layers. Other mixtures are saved as
`quant_method: qexp_mixed`, which other programs reject (`mixed_support/container.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from typing_extensions import override

from qexp.config.module_patterns import union
from qexp.config.plugins import plugin_module, plugin_names
from qexp.config.recipe import EXAMPLE, Rule, describe_formats, read_recipe, rule_for, undecided_patterns
from qexp.errors import ConfigError, QexpError, choices
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.embedded import refused_config
from qexp.quantizers.layers import linear_layers
from qexp.quantizers.mixed_support.container import native_entries, pack
from qexp.quantizers.rows import WeightSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry


@dataclass(frozen=True)
class MixedConfig(BackendConfig):
    """recipe: "@recipe.yaml" or a list of rules; parsed here into a tuple of `Rule`."""

    quant_method: str = "mixed"
    recipe: Any = ()

    @override
    def __post_init__(self) -> None:
        name, rules = read_recipe(self.recipe or (), "backend.recipe")
        object.__setattr__(self, "recipe", rules)
        if self.label is None and rules:
            object.__setattr__(self, "label", name or describe_formats(rules))

    @override
    def missing(self) -> str | None:
        return None if self.recipe else f"backend=mixed needs a recipe; give {EXAMPLE}"

    @override
    def resolved(self, device_type: str) -> MixedConfig:
        if (missing := self.missing()) is not None:
            raise ConfigError(missing)
        rules = tuple(replace(rule, backend=rule.backend.resolved(device_type)) for rule in self.recipe)
        return replace(self, recipe=rules)

    @override
    def check_as_rule(self) -> None:
        raise ConfigError("backend=mixed is a recipe itself; replace this rule by its rules")

    @override
    def to_dict(self) -> dict[str, Any]:
        rules = [{"modules": list(rule.modules), "backend": rule.backend.to_dict()} for rule in self.recipe]
        return {"quant_method": self.quant_method, "name": self.label, "recipe": rules}

    @classmethod
    @override
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        rules = values.get("recipe")
        if not isinstance(rules, list):
            raise ConfigError("quantization_config.recipe must be a list of rules")
        name = values.get("name")
        config = cls(label=name if isinstance(name, str) else None, recipe=tuple(map(_stored_rule, rules)))
        if (missing := config.missing()) is not None:
            raise ConfigError(missing)
        return config

    @override
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for rule in self.recipe for name in rule.backend.methods()))

    @override
    def describe(self) -> str | None:
        return describe_formats(self.recipe)

    @override
    def is_quantizable(self) -> bool:
        return any(rule.backend.is_quantizable() for rule in self.recipe)


def _stored_rule(values: Any) -> Rule:
    """Parse a rule written by `to_dict`. Its modules are names of layers, which may have any characters."""
    if not isinstance(values, Mapping) or not isinstance(values.get("backend"), Mapping):
        raise ConfigError(f"quantization_config.recipe has {values!r}, which is not a rule; check its config.json")
    method, modules = values["backend"].get("quant_method"), values.get("modules")
    if method not in plugin_names("backend") or not isinstance(modules, list):
        raise ConfigError(
            f"quantization_config.recipe has {values!r}; quant_method is {choices(plugin_names('backend'))}"
        )
    return Rule(union(tuple(map(str, modules))), plugin_module("backend", method).Config.from_dict(values["backend"]))


Hook = TypeVar("Hook", bound=Callable[..., Any])


def _of_rule(hook: Hook) -> Hook:
    """Return the hook, about one weight, as the quantizer of the weight's rule answers it."""

    def forward(self: MixedQuantizer, spec: WeightSpec, *arguments: Any) -> Any:
        return getattr(self.part_of(spec.module), hook.__name__)(spec, *arguments)

    return cast(Hook, override(forward))


class MixedQuantizer(base.Quantizer):
    """Forwards every call about a layer to the quantizer of its rule."""

    config: MixedConfig
    is_serializable: ClassVar[bool] = True

    def __init__(self, config: MixedConfig) -> None:
        self.parts = _quantizers(config.recipe)  # one a rule; rules with one config share it
        self._numbers: dict[str, int] = {}  # layer -> its rule
        self._of_type: dict[type, base.Quantizer] = {}  # class of a weight -> the quantizer that made it
        self._layers: dict[str, base.Quantizer | None] = {}  # of the loaded model, linear; None: stays dense
        super().__init__(config)
        self.is_trainable = all(part.is_trainable for part in self.parts)
        self.has_backward = all(part.has_backward for part in self.parts)

    @override
    def mark_stored(self, metadata: Mapping[str, str]) -> None:
        for part in self.parts:
            part.mark_stored(metadata)
        super().mark_stored(metadata)

    def _number(self, layer: str) -> int:
        if layer not in self._numbers:
            self._numbers[layer] = rule_for(self.config.recipe, layer)
        return self._numbers[layer]

    @override
    def part_of(self, layer: str) -> base.Quantizer:
        return self.parts[self._number(layer)]

    @contextmanager
    def _at_rule(self, number: int) -> Iterator[None]:
        """Prefix errors with their rule."""
        try:
            yield
        except QexpError as error:
            raise type(error)(f"backend.recipe: rule {number + 1} ({self.config.recipe[number]}): {error}") from error

    # What the whole model has

    @property
    @override
    def model_attributes(self) -> Mapping[str, Any]:
        return {name: value for part in self._used for name, value in part.model_attributes.items()}

    @property
    def _used(self) -> list[base.Quantizer]:
        """Return the quantizers that have layers in the model."""
        return list({id(part): part for part in self._layers.values() if part is not None}.values())

    @override
    def validate_environment(self, device: torch.device) -> None:
        for number, part in enumerate(self.parts):
            with self._at_rule(number):
                part.validate_environment(device)

    @override
    def update_torch_dtype(self, dtype: torch.dtype) -> torch.dtype:
        for part in self.parts:
            dtype = part.update_torch_dtype(dtype)
        return dtype

    @override
    def adjust_target_dtype(self, target_dtype: Any) -> Any:
        """Return the dtype of the format with most bits, so that a planner reserves enough for every layer."""
        import torch

        spec = WeightSpec("", (4096, 4096), torch.bfloat16)
        parts = [part for part in self._used or self.parts if part.quantization_method != "none"]
        largest = max(parts, key=lambda part: part.quantized_nbytes(spec), default=None)
        return target_dtype if largest is None else largest.adjust_target_dtype(target_dtype)

    @override
    def check_patterns(self, model: nn.Module, kept: Sequence[str], component: str) -> dict[str, str]:
        layers = list(linear_layers(model))
        return undecided_patterns(self.config.recipe, layers, kept, f"backend.recipe of '{component}'")

    @override
    def conflict(self, layers: Sequence[str]) -> str | None:
        numbers = {id(self.part_of(layer)): self._number(layer) for layer in layers}
        if len(numbers) < 2:
            return None
        rules = " and ".join(f"rule {number + 1} ({self.config.recipe[number]})" for number in sorted(numbers.values()))
        return f"backend.recipe: {rules} give one shared weight two formats; name all of its layers in one rule"

    @override
    def update_missing_keys(self, missing: Sequence[str]) -> list[str]:
        left = list(missing)
        for part in self.parts:
            left = part.update_missing_keys(left)
        return left

    # What a layer has

    @override
    def keeps_dense(self, layer: str) -> bool:
        return self.part_of(layer).quantization_method == "none"

    @override
    def layer_format(self, layer: str) -> str:
        return self.part_of(layer).layer_format(layer)

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        """Decide as any backend does, but raise ConfigError if a named rule's format cannot hold the layer."""
        number, part = self._number(spec.module), self.part_of(spec.module)
        rule = self.config.recipe[number]
        if self.keeps_dense(spec.module):
            return f"rule {number + 1} of the recipe ({rule}) keeps it dense"
        with self._at_rule(number):
            reason = part.reason_to_skip(spec)
            if reason is not None and rule.modules:
                raise ConfigError(
                    f"it cannot hold '{spec.module}': {reason}; give the layer another format in a rule before it"
                )
        return reason

    hides = _of_rule(base.Quantizer.hides)
    quantized_nbytes = _of_rule(base.Quantizer.quantized_nbytes)
    takes_rows = _of_rule(base.Quantizer.takes_rows)
    check_quantized_param_shape = _of_rule(base.Quantizer.check_quantized_param_shape)
    stored_nbytes = _of_rule(base.Quantizer.stored_nbytes)
    stored_alignment = _of_rule(base.Quantizer.stored_alignment)

    @override
    def format_key(self, spec: WeightSpec) -> Any:
        part = self.part_of(spec.module)
        return id(part), part.format_key(spec)

    @override
    def preprocess_model(self, model: nn.Module, names: Sequence[str], compute_dtype: torch.dtype) -> None:
        for part in {id(part): part for part in self.parts}.values():
            if own := [name for name in names if self.part_of(name) is part]:
                part.preprocess_model(model, own, compute_dtype)

    @override
    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        part = self.part_of(spec.module)
        parameter = part.create_quantized_param(spec, sources, companions, device)
        self._of_type[type(parameter)] = part
        return parameter

    @override
    def is_quantized(self, module: nn.Module) -> bool:
        return any(part.is_quantized(module) for part in self._by_method())

    @override
    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        for part in self._by_method():
            part.postprocess_model(model, device)
        layers = {name: model.get_submodule(name) for name in linear_layers(model)}
        self._layers = {name: self.part_of(name) if self.is_quantized(one) else None for name, one in layers.items()}
        # also a weight that was not made here, but found in a cache
        self._of_type |= {type(layers[name].weight): part for name, part in self._layers.items() if part is not None}

    @override
    def dequantize_param(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        return self._of_type[type(param)].dequantize_param(param, dtype)

    @override
    def restore_linear_layers(self, model: nn.Module, dtype: torch.dtype) -> None:
        for part in self._by_method():
            part.restore_linear_layers(model, dtype)

    def _by_method(self) -> list[base.Quantizer]:
        """Return one quantizer per library; it recognizes all layers of its library by their classes."""
        return list({part.quantization_method: part for part in self.parts}.values())

    # How it is stored

    @property
    @override
    def file_format(self) -> str:  # type: ignore[override]
        writer = self._writer()
        return "safetensors" if writer is None else writer.file_format

    def _writer(self) -> base.Quantizer | None:
        """Return the quantizer with a format for all layers, or None."""
        if len({part.quantization_method for part in self._used}) != 1:
            return None
        return self._used[0].common_format(self._layers)

    @override
    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        return self.part_of(name).stored_parts(name, native_entries(name, entries))

    @override
    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        if (writer := self._writer()) is not None:
            return writer.get_state_dict_and_metadata(state_dict)
        return pack(state_dict, {layer: part for layer, part in self._layers.items() if part is not None})

    @override
    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        if (writer := self._writer()) is not None:
            return writer.to_dict(model)
        rules = [
            {"modules": [layer for layer, own in self._layers.items() if own is part], "backend": _stored(part, model)}
            for part in self._used
        ]
        rules.append({"modules": [], "backend": {"quant_method": "none"}})  # the layers that no rule names
        return refused_config({"quant_method": "mixed", "name": self.config.label, "recipe": rules})

    @override
    def misread(self, model: nn.Module, is_of_transformers: bool) -> str | None:
        writer = self._writer()
        return None if writer is None else writer.misread(model, is_of_transformers)

    @override
    def under_refused_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        writer = self._writer()
        return dict(tensors) if writer is None else writer.under_refused_names(tensors)


def _quantizers(rules: Sequence[Rule]) -> list[base.Quantizer]:
    """Return a quantizer for each rule; rules with equal configs, apart from labels, share one."""
    found: list[base.Quantizer] = []
    for rule in rules:
        same = (part for part in found if base.have_one_config([part.config, rule.backend]))
        found.append(next(same, None) or base.load_quantizer(rule.backend))
    return found


def _stored(part: base.Quantizer, model: nn.Module) -> dict[str, Any]:
    """Return a rule's config as its own format stores it, without the list of unquantized layers."""
    return {**part.to_dict(model), part.config.skip_field: None}


Config = MixedConfig
Quantizer = MixedQuantizer
