"""The groups of layers of a component, and the formats that each can have, from headers alone.

Layers are in one group if they share a weight, or if `task.groups` puts them together. A format is a candidate of a
group if it can hold every layer of it; a group without a candidate stays dense, and is none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.config.module_patterns import covers, unmatched_patterns
from qexp.config.recipe import format_name
from qexp.errors import ConfigError, QexpError
from qexp.interop.interfaces import kept_by_class
from qexp.loading.plan import choose_modules
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.loading.sharing import layers_by_weight
from qexp.quantizers import base
from qexp.system.screen import say
from qexp.tasks.sensitivity import default_formats

if TYPE_CHECKING:
    from qexp.loading.component import LoadRequest, Prepared
    from qexp.loading.plan import LoadPlan
    from qexp.quantizers.rows import WeightSpec
    from qexp.tasks.sensitivity import SensitivityConfig


@dataclass(frozen=True)
class Format:
    """A format that is tried. config: as a recipe's rule has it; chosen: layer that it can hold -> its weight."""

    name: str
    config: Any
    quantizer: base.Quantizer
    chosen: Mapping[str, WeightSpec]


@dataclass(frozen=True)
class Group:
    """Layers that have one format. nbytes: format -> bytes of their weights in it, "none" (dense) among them."""

    layers: tuple[str, ...]
    nbytes: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def formats(self) -> list[str]:
        """The names of the formats to be scored."""
        return [name for name in self.nbytes if name != "none"]


@dataclass(frozen=True)
class ComponentGroups:
    """groups: in the order of the model's layers; formats: by name; fixed_bytes: of all tensors in no group;
    block_lists: the network's lists of blocks."""

    groups: tuple[Group, ...]
    formats: Mapping[str, Format]
    fixed_bytes: int
    block_lists: tuple[str, ...] = ()

    @property
    def layers(self) -> list[str]:
        return [layer for group in self.groups for layer in group.layers]

    def without(self, left_out: Sequence[Group]) -> ComponentGroups:
        """Return those of the groups that are not left out; their layers stay dense."""
        groups = tuple(group for group in self.groups if group not in left_out)
        return replace(self, groups=groups, fixed_bytes=self.fixed_bytes + sum(g.nbytes["none"] for g in left_out))


def plan_groups(request: LoadRequest, task: SensitivityConfig) -> ComponentGroups:
    """Plan what is scored of one component; no weight is read.

    request: of the unquantized component, in the dtype that its formats are to be quantized from.
    Raises: ConfigError for formats that no layer can hold and groups that match nothing; MissingLibraryError,
    UnsupportedError, LoadError.
    """
    component, prepared = request.component, prepare(request, load_quantizer_of(request))
    is_default = task.formats == default_formats()
    planned = (_plan_format(prepared, config, is_default) for config in task.formats)
    formats = {one.name: one for one in planned if one.chosen}
    layers = [name for name, _ in prepared.model.named_modules(remove_duplicate=False)]
    held = {layer for one in formats.values() for layer in one.chosen}
    parts = _joined([names for names in layers_by_weight(prepared.model) if names[0] in held])
    parts = _joined([*parts, *_asked_groups(task.groups, [name for name in layers if name in held], component)])
    groups = [_group(part, formats, prepared.plan) for part in sorted(parts, key=lambda part: layers.index(part[0]))]
    groups = [group for group in groups if group.formats]
    if not groups:
        raise ConfigError(f"'{component}' has no group of layers that one of task.formats can hold; give other formats")
    total = sum(item.result_nbytes for item in prepared.plan.distinct)
    blocks = tuple(request.source.block_lists(prepared.model))
    return ComponentGroups(tuple(groups), formats, total - sum(group.nbytes["none"] for group in groups), blocks)


def _plan_format(prepared: Prepared, config: Any, is_default: bool) -> Format:
    """Find out which layers a format can hold. Raises ConfigError if there are none, and the format was asked for."""
    name, model, dtype, request = format_name(config), prepared.model, prepared.compute_dtype, prepared.request
    component, settings, device = request.component, request.settings, request.device
    quantizer = base.load_quantizer(config.resolved(device.type))
    skip = (*settings.skip_modules, *request.source.skip_modules(component, model))
    in_fp32, unquantized = kept_by_class(model, dtype)
    fp32 = (*settings.keep_in_fp32_modules, *in_fp32)
    try:
        quantizer.validate_environment(device)
        chosen, skipped = choose_modules(model, LayerByLayer(quantizer), skip, fp32, dtype, unquantized)
    except QexpError as error:
        raise type(error)(f"task.formats: {name}: {error}") from error
    if not chosen and is_default:
        say(f"left out: {name}: no layer of '{component}' can be in it")
    elif not chosen:
        layer, why = next(iter(skipped.items()), ("", "it has no linear layers"))
        example = f"'{layer}': {why}" if layer else why
        raise ConfigError(f"task.formats: no layer of '{component}' can be in {name} ({example}); leave it out")
    return Format(name, config, quantizer, chosen)


class LayerByLayer(base.Quantizer):
    """A quantizer that says of each layer whether it can hold it, also where it would refuse the whole model."""

    def __init__(self, inner: base.Quantizer) -> None:
        super().__init__(inner.config)
        self._inner = inner
        self.refuses_model = False  # so far

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        try:
            return self._inner.reason_to_skip(spec)
        except ConfigError as error:
            self.refuses_model = True
            return str(error)

    @override
    def hides(self, spec: WeightSpec) -> Collection[str]:
        return self._inner.hides(spec)


def _asked_groups(groups: Sequence[str | tuple[str, ...]], layers: Sequence[str], component: str) -> list[list[str]]:
    """Return the layers that `task.groups` puts together. Raises ConfigError for an entry that puts none together."""
    found = []
    for number, entry in enumerate(groups):
        place = f"task.groups[{number}] of '{component}'"
        own = [*_below(entry, layers)] if isinstance(entry, str) else [*_siblings(entry, layers, place)]
        if isinstance(entry, str) and (messages := unmatched_patterns([entry], layers, place, "layer with a format")):
            raise ConfigError(messages[entry])
        if all(len(part) < 2 for part in own):
            raise ConfigError(f"{place}: {entry} puts no two layers together; name their parent, or several of them")
        found += own
    return found


def _below(pattern: str, layers: Sequence[str]) -> Iterator[list[str]]:
    """Yield the layers in each of the modules that a pattern names."""
    modules: dict[str, list[str]] = {}
    for layer in layers:
        ends = [end for end, mark in enumerate(f"{layer}.") if mark == "."]
        named = next((layer[:end] for end in ends if covers(pattern, layer[:end])), None)
        if named is not None:
            modules.setdefault(named, []).append(layer)
    yield from modules.values()


def _siblings(names: Sequence[str], layers: Sequence[str], place: str) -> Iterator[list[str]]:
    """Yield the layers of these names under each parent."""
    parents: dict[str, list[str]] = {}
    for name in names:
        own = [layer for layer in layers if f".{layer}".endswith(f".{name}")]
        if not own:
            raise ConfigError(unmatched_patterns([f"**.{name}"], layers, place, "layer with a format")[f"**.{name}"])
        for layer in own:
            parents.setdefault(layer.removesuffix(name), []).append(layer)
    yield from parents.values()


def _joined(parts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Join parts that have a layer in common, in the order in which they come."""
    found: list[list[str]] = []
    for part in parts:
        touching = [other for other in found if {*other} & {*part}]
        rest = [other for other in found if other not in touching]
        found = [*rest, [*dict.fromkeys([layer for other in (*touching, part) for layer in other])]]
    return found


def _group(layers: Sequence[str], formats: Mapping[str, Format], plan: LoadPlan) -> Group:
    nbytes = {"none": _dense_nbytes(layers, plan)}
    for name, one in formats.items():
        if all(layer in one.chosen for layer in layers):
            distinct = {plan.tied.get(f"{layer}.weight", f"{layer}.weight"): layer for layer in layers}
            nbytes[name] = sum(one.quantizer.quantized_nbytes(one.chosen[layer]) for layer in distinct.values())
    return Group(tuple(layers), nbytes)


def _dense_nbytes(layers: Sequence[str], plan: LoadPlan) -> int:
    """Return bytes that go if these layers are quantized: not those of a weight that an embedding has, too."""
    weights = {f"{layer}.weight" for layer in layers}
    firsts = {plan.tied.get(weight, weight) for weight in weights}
    kept = {plan.tied.get(item.target, item.target) for item in plan.items if item.target not in weights}
    return sum(item.result_nbytes for item in plan.items if item.target in firsts - kept)
