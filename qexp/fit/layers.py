"""The layers that a format can be chosen for, with their exact bytes in each: from headers, no weight is read.

A component is planned once, dense. What each format makes of a layer is then asked of its quantizer, as a load does.
Layers that share a weight have it once; where an embedding shares it, too, the dense weight stays whatever the layers
are given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qexp.checkpoints.checkpoint import open_component
from qexp.config.dataclass_io import to_plain
from qexp.errors import ConfigError, QexpError, first_names
from qexp.interop.interfaces import kept_by_class
from qexp.loading.components import check_shared_patterns
from qexp.loading.forecast import LOADING_BYTES, bytes_by_site
from qexp.loading.lifecycle import plan_component, request_load
from qexp.loading.plan import LoadPlan, choose_modules
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.embedded import is_quantized
from qexp.quantizers.none import NoneConfig
from qexp.sensitivity.groups import LayerByLayer
from qexp.sensitivity.table import DENSE, Candidate

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig, RunConfig
    from qexp.loading.component import Prepared
    from qexp.models.base import ModelSource


@dataclass(frozen=True)
class FormatLayers:
    """backend: the fields of its config; nbytes: layer -> bytes of its weight; refused: layer -> why it cannot hold
    it; refuses_model: whether as the backend of a whole model it is an error for one of those layers."""

    backend: Mapping[str, Any]
    nbytes: Mapping[str, int]
    refused: Mapping[str, str]
    refuses_model: bool


@dataclass(frozen=True)
class ComponentLayers:
    """A component, dense, and the layers that some format can hold.

    total_bytes: of all its tensors; weight_of: layer -> the name of its weight, the same for those that share it;
    dense: weight -> bytes that are saved by quantizing all of its layers; numel: weight -> its numbers; beside: layer
    -> bytes of its other tensors; order: every linear layer, as the network has them.
    """

    total_bytes: int
    weight_of: Mapping[str, str]
    dense: Mapping[str, int]
    numel: Mapping[str, int]
    beside: Mapping[str, int]
    formats: Mapping[str, FormatLayers]
    order: tuple[str, ...]

    def groups(self) -> list[tuple[str, ...]]:
        """Return layers that share a weight together, all others alone."""
        found: dict[str, list[str]] = {}
        for layer, weight in self.weight_of.items():
            found.setdefault(weight, []).append(layer)
        return [tuple(layers) for layers in found.values()]

    def numel_of(self, layers: Iterable[str]) -> int:
        return sum(self.numel[weight] for weight in {self.weight_of[layer] for layer in layers})

    def dense_bytes(self, layers: Iterable[str]) -> int:
        return sum(self.dense[weight] for weight in {self.weight_of[layer] for layer in layers})

    def bytes_in(self, name: str, layers: Sequence[str]) -> int | None:
        """Return bytes of the layers in a format; None if it cannot hold one of them."""
        known = self.formats[name].nbytes
        if any(layer not in known for layer in layers):
            return None
        by_weight = {self.weight_of[layer]: known[layer] for layer in layers}
        return sum(by_weight.values())


@dataclass(frozen=True)
class ModelLayers:
    """components: those that formats are chosen for; other_bytes: of all others; largest_bytes: the largest tensor
    before it is quantized; checkpoints: component -> hash of its content; left_out: format -> why none has it."""

    components: Mapping[str, ComponentLayers]
    other_bytes: int
    largest_bytes: int
    checkpoints: Mapping[str, str]
    left_out: Mapping[str, str]

    @property
    def loading_bytes(self) -> int:
        """What a load may take beside its result."""
        return self.largest_bytes + LOADING_BYTES

    @property
    def dense_bytes(self) -> int:
        return self.other_bytes + sum(layers.total_bytes for layers in self.components.values())

    def unscored(self) -> list[list[Candidate]]:
        """Return every candidate of every group, with bytes alone: score 0."""
        return [
            self.candidates(component, group, layers.formats)
            for component, layers in self.components.items()
            for group in layers.groups()
        ]

    def candidates(self, component: str, group: tuple[str, ...], names: Iterable[str]) -> list[Candidate]:
        """Return the candidates of a group, without scores, the dense one first."""
        layers = self.components[component]
        dense = layers.dense_bytes(group)
        found = [Candidate(component, group[0], group, DENSE, {"quant_method": DENSE}, dense, 0.0)]
        for name in names:
            nbytes = layers.bytes_in(name, group)
            if nbytes is not None:
                found.append(Candidate(component, group[0], group, name, layers.formats[name].backend, nbytes, 0.0))
        return found


def chosen_components(source: ModelSource, own: Collection[str]) -> list[str]:
    """Return the components that `backend=` is for. own: those with a backend of their own, which they keep.

    Raises: ConfigError where nothing is left to choose.
    """
    given = [name for name in source.quantized_components() if name not in own]
    if not given:
        raise ConfigError("every component has a backend of its own, so that there is none to choose; leave one out")
    stored = [name for name in given if is_quantized(open_component(source, name))]
    if stored:
        raise ConfigError(
            f"the checkpoint of {first_names(stored)} is quantized already, and fit chooses formats for unquantized "
            "weights; set model.path to the original one"
        )
    return given


def plan_layers(
    source: ModelSource, config: RunConfig, chosen: Sequence[str], formats: Mapping[str, BackendConfig], hashed: bool
) -> ModelLayers:
    """Plan every component, the chosen ones dense. hashed: whether to hash the chosen checkpoints' content.

    Raises: ConfigError or LoadError for a model that cannot be planned, or where no format can be used.
    """
    device = torch.device(config.device)
    usable, left_out = _usable(formats, device)
    components: dict[str, ComponentLayers] = {}
    prepared: dict[str, Prepared] = {}
    settings = {
        name: replace(component, backend=NoneConfig()) if name in chosen else component
        for name, component in config.components.items()
    }
    other_bytes = 0
    for name, component in settings.items():
        prepared[name] = plan_component(request_load(source, name, component, device=device)).prepared
        if name in chosen:
            components[name] = _component_layers(source, name, component, prepared[name], usable)
        else:
            other_bytes += sum(bytes_by_site(prepared[name]).values())
    check_shared_patterns(prepared, settings)
    for name in usable:
        if not any(layers.formats[name].nbytes for layers in components.values()):
            refused = [why for layers in components.values() for why in layers.formats[name].refused.values()]
            left_out[name] = f"no layer can hold it: {refused[0] if refused else 'there is none'}"
    if not any(layers.weight_of for layers in components.values()):
        raise ConfigError(f"no layer can be quantized: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
    largest = max((item.dense_nbytes for one in prepared.values() for item in one.plan.items), default=0)
    hashes = {
        name: open_component(source, name).content_hash(full=config.identity == "full") for name in chosen if hashed
    }
    return ModelLayers(components, other_bytes, largest, hashes, left_out)


def _usable(
    formats: Mapping[str, BackendConfig], device: torch.device
) -> tuple[dict[str, BackendConfig], dict[str, str]]:
    """Return (formats that run on this machine, reasons for the others)."""
    usable, left_out = dict[str, BackendConfig](), dict[str, str]()
    for name, config in formats.items():
        try:
            load_quantizer(config.resolved(device.type)).validate_environment(device)
            usable[name] = config
        except QexpError as error:
            left_out[name] = str(error)
    return usable, left_out


def _component_layers(
    source: ModelSource, name: str, settings: ComponentConfig, prepared: Prepared, formats: Mapping[str, BackendConfig]
) -> ComponentLayers:
    model, plan = prepared.model, prepared.plan
    in_fp32, unquantized = kept_by_class(model, prepared.compute_dtype)
    kept = (*settings.skip_modules, *source.skip_modules(name, model))
    fp32 = (*settings.keep_in_fp32_modules, *in_fp32)
    found, shapes = dict[str, FormatLayers](), dict[str, int]()
    for label, config in formats.items():
        quantizer = load_quantizer(config)
        asked = LayerByLayer(quantizer)
        specs, refused = choose_modules(model, asked, kept, fp32, prepared.compute_dtype, unquantized)
        shapes |= {layer: spec.numel for layer, spec in specs.items()}
        nbytes = {layer: quantizer.quantized_nbytes(spec) for layer, spec in specs.items()}
        found[label] = FormatLayers(fields_of(config), nbytes, refused, asked.refuses_model)
    planned = {item.target: item.result_nbytes for item in plan.items}
    order = tuple(layer for layer, _ in model.named_modules(remove_duplicate=False) if layer in shapes)
    weight_of = {layer: plan.tied.get(f"{layer}.weight", f"{layer}.weight") for layer in order}
    return ComponentLayers(
        sum(bytes_by_site(prepared).values()),
        weight_of,
        _dense_bytes(plan, set(order)),
        {weight_of[layer]: shapes[layer] for layer in order},
        {layer: _bytes_beside(model.get_submodule(layer), layer, planned) for layer in order},
        found,
        tuple(linear_layers(model)),
    )


def fields_of(config: BackendConfig) -> dict[str, Any]:
    """Return the fields by which a recipe's rule has a backend: those that have not their default."""
    default = to_plain(type(config)())
    return {
        name: value
        for name, value in to_plain(config).items()
        if name == "quant_method" or (value is not None and value != default[name])
    }


def linear_layers(model: nn.Module) -> list[str]:
    from qexp.quantizers.layers import weight_shape

    return [name for name, module in model.named_modules(remove_duplicate=False) if weight_shape(module) is not None]


def _dense_bytes(plan: LoadPlan, layers: set[str]) -> dict[str, int]:
    """Weight -> its bytes; 0 where something else than layers has it, too, so that it stays."""
    found = {item.target: item.result_nbytes for item in plan.distinct}
    for other in plan.items:
        weight = plan.tied.get(other.target, other.target)
        if weight in found and other.target.removesuffix(".weight") not in layers:
            found[weight] = 0
    return found


def _bytes_beside(module: nn.Module, layer: str, planned: Mapping[str, int]) -> int:
    """Return bytes of a layer's tensors beside its weight: what travels along. planned: tensor -> its bytes."""
    names = [name for name, _ in module.named_parameters(recurse=False) if name != "weight"]
    return sum(planned.get(f"{layer}.{name}", 0) for name in names)
