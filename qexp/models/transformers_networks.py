"""What every source of transformers models shares: skeletons, and the names that checkpoints have for their weights.

A checkpoint on disk may call a weight by another name than the network does (older names, a base model's prefix).
transformers renames while loading, by rules of its own (`transformers.conversion_mapping`), and computes: it stacks the
experts of a mixture, which checkpoints keep one by one, and splits or joins projections. The same rules are asked here,
and what they compute is recorded (`checkpoints/lazy_tensor.py`), to be done while the weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError, LoadError, MissingLibraryError, did_you_mean
from qexp.system.imports import quiet

if TYPE_CHECKING:
    from torch import nn

    from qexp.checkpoints.conversion import Conversion


# What networks were called inside their class when their checkpoints were published; loading takes both.
PREFIXES_IN_FILES = {"CLIPTextModel": "text_model."}


def transformers_config(config: Mapping[str, Any], folder: Path, kind: Any = None) -> Any:
    """Return the library's config object for a parsed config.json, without how the checkpoint is quantized.

    The library reads it from a file, since what it does there is more than its class of configs does: it picks another
    architecture for some entries, resolves parts of composite models, and decodes infinity.

    Args:
        config: the parsed config.json.
        folder: the model's folder, for messages, and where other files that config.json names are.
        kind: a class of configs; None is the one that the library finds by model_type.

    Raises: LoadError if the library does not know the architecture, or refuses a value.
    """
    from transformers import AutoConfig

    values = {name: value for name, value in config.items() if name != "quantization_config"}
    options = {} if kind is not None else {"trust_remote_code": False}
    try:
        with TemporaryDirectory() as place, quiet():
            (Path(place) / "config.json").write_text(json.dumps(values), encoding="utf-8")
            is_elsewhere = "configuration_files" in values and (folder / "config.json").is_file()
            read_from = folder if is_elsewhere else place
            parsed = (kind or AutoConfig).from_pretrained(read_from, local_files_only=True, **options)
    except Exception as error:  # of the library's own checks there are many kinds
        raise LoadError(_config_message(config, folder, error)) from error
    vars(parsed).pop("quantization_config", None)
    parsed._name_or_path = str(folder)
    return parsed


def _config_message(config: Mapping[str, Any], folder: Path, error: Exception) -> str:
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type is None:
        return f"'{folder}/config.json' has no model_type: it is not a transformers model's; check model.path"
    if model_type not in CONFIG_MAPPING:
        return (
            f"'{folder}/config.json': model_type={model_type!r} is unknown to transformers {_version()} "
            "(models with code of their own are not loaded); install a version that knows it"
        )
    kind = f"{type(error).__name__} " * isinstance(error, LookupError)  # whose text is the key alone
    reason = kind + " ".join(str(error).split())[:300]
    return (
        f"'{folder}/config.json' cannot be read as that of a {model_type!r} by transformers {_version()}: {reason}; "
        "download it again, or install the version that wrote it"
    )


def network(config: Mapping[str, Any], folder: Path, class_name: str | None = None) -> Any:
    """Return the network of a parsed config.json, as transformers builds it. Nothing is initialized.

    class_name: an Auto class of transformers, or a network's; None is the first of config.json's architectures.
    Raises: LoadError if transformers has no such class, it is not for this config, or refuses a value of it.
    """
    from transformers.initialization import no_init_weights

    from qexp.models.skeletons import as_from_pretrained

    kind, parsed = network_class(config, folder, class_name), transformers_config(config, folder)
    is_auto = hasattr(kind, "from_config")
    if is_auto:
        _check_auto_class(kind, parsed, folder)
    else:
        kind = _class_for(kind, parsed) if class_name is None else kind
        parsed = _config_for(kind, parsed, folder)
    try:
        with quiet(), no_init_weights(), as_from_pretrained():
            model: Any = kind.from_config(parsed) if is_auto else kind._from_config(parsed)
    except ImportError as error:
        raise MissingLibraryError(f"'{folder}/config.json' needs a package that is not there: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # networks check and compute with their values in many ways
        raise LoadError(_config_message(config, folder, error)) from error
    compute_buffers(model, model)
    compute_positions(model)
    _tie(model)
    return model


def _check_auto_class(kind: Any, config: Any, folder: Path) -> None:
    """Raise LoadError if an Auto class has no network for a config: the library's own message imports every model."""
    if type(config) not in kind._model_mapping:
        fitting = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal_lm"
        raise LoadError(
            f"'{folder}/config.json': model_type={config.model_type!r} is not a model for {kind.__name__}; use "
            f"model={fitting}, or model=transformers with model.auto_class=AutoModel"
        )


def compute_buffers(module: Any, owner: Any) -> None:
    """Compute the buffers that no file holds as transformers does after loading: in fp32, rounded to their dtype.

    owner: the model, outermost or inside of another, whose class says how `module` is initialized. Parameters are on
    the meta device, where that changes nothing.
    """
    import torch

    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        compute_buffers(child, owner)
    if module._non_persistent_buffers_set:
        with torch.no_grad():
            owner._init_weights(module)


def compute_positions(model: Any) -> None:
    """Compute the sinusoidal positions that are parameters, and which files need not have (Marian's, Pegasus')."""
    import torch

    from qexp.models.skeletons import COMPUTED

    for module in model.modules():
        if hasattr(module, "create_weight") and module.weight.is_meta:
            positions = torch.empty(module.weight.shape, dtype=module.weight.dtype, device="cpu")
            with torch.no_grad():
                positions.copy_(module.create_weight())
            parameter = torch.nn.Parameter(positions, requires_grad=False)
            setattr(parameter, COMPUTED, True)
            module._parameters["weight"] = parameter  # registered, it would become one on the meta device


def _tie(model: Any) -> None:
    """Make tied parameters one, which is part of what was left out, and what copies on the meta device undo."""
    model.tie_weights()
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        path, _, own = target.rpartition(".")
        parameters, tied = model.get_submodule(path)._parameters, model.get_parameter_or_buffer(source)
        if own in parameters and isinstance(tied, type(parameters[own])):
            parameters[own] = tied


def network_class(config: Mapping[str, Any], folder: Path, class_name: str | None) -> Any:
    """Return the class that builds a network. Raises ConfigError or LoadError if transformers has none so called."""
    import transformers

    names = config.get("architectures") or [None]
    name = class_name or (names[0] if isinstance(names, list) else names)
    if name is None:
        raise LoadError(
            f"'{folder}/config.json' names no architectures, so nothing says which network it is; "
            "set model.auto_class to a class of transformers, such as AutoModel"
        )
    with quiet():  # it imports the module of the class, and all that this one may need
        found = getattr(transformers, str(name), None)
    if isinstance(found, type) and (issubclass(found, transformers.PreTrainedModel) or hasattr(found, "from_config")):
        return found
    if class_name is not None:
        known = [name for name in dir(transformers) if "Model" in name or "For" in name]
        raise ConfigError(
            f"model.auto_class={name}{did_you_mean(name, known)} is no class of transformers {_version()} that builds "
            "a network; use AutoModel, AutoModelForCausalLM, …, a class of a network, or null for config.json's own"
        )
    raise LoadError(
        f"'{folder}': config.json has architectures={name!r}, which transformers {_version()} has not; install "
        "a version that has it, or pass skeleton=, a class or a function that builds the network"
    )


def _class_for(kind: Any, config: Any) -> Any:
    """Return the class with the job of `kind` for the architecture that the library reads config.json as.

    That may be another one than architectures says: a Mistral with layer_types is a Ministral. The job is that of the
    Auto class which lists `kind`.
    """
    from transformers.models.auto import modeling_auto

    if isinstance(config, kind.config_class) or kind.config_class in _part_classes(config):
        return kind
    for auto in vars(modeling_auto).values():
        known = getattr(auto, "_model_mapping", None)
        if known is not None and type(config) in known and kind in _listed_networks(known, kind.config_class):
            return _listed_networks(known, type(config))[0]
    return kind


def _listed_networks(classes: Any, config_class: Any) -> tuple[Any, ...]:
    """Return the networks that an Auto class has for a class of configs."""
    found = classes.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def _part_classes(config: Any) -> set[type]:
    """Return the classes of a composite model's parts."""
    return {type(getattr(config, name, None)) for name in getattr(config, "sub_configs", {})}


def _config_for(kind: Any, config: Any, folder: Path) -> Any:
    """Return the config of a network's class: the whole, or the part of it that describes such a network."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    found = next((part for part in parts if isinstance(part, kind.config_class)), None)
    if found is None:
        raise LoadError(
            f"'{folder}/config.json': model_type={config.model_type!r} is not a model for {kind.__name__}, which is "
            f"built from a {kind.config_class.__name__}; set model.auto_class to a class that fits the checkpoint"
        )
    return found


def with_generation_config(model: Any, folder: Path) -> Any:
    """Return the model with the folder's generation_config, if it generates and there is one."""
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def output_embedding(model: Any) -> tuple[str, ...]:
    """Return the name of the layer that makes logits over a vocabulary, if there is one."""
    head = model.get_output_embeddings()
    return tuple(name for name, module in model.named_modules() if module is head and head is not None)


def renaming(model: nn.Module) -> Conversion:
    """Return the conversion of a checkpoint's tensors to those of `model`, by transformers' rules."""

    def rename(tensors: MutableMapping[str, Any]) -> dict[str, Any]:
        renamed: dict[str, Any] = {}
        for target in targets_of(model, list(tensors)):
            stored = {pattern: [tensors.pop(name) for name in names] for pattern, names in target.sources.items()}
            made = {target.name: stored[""][0]} if target.rule is None else computed(model, target, stored)
            for name, tensor in made.items():
                if name in renamed:
                    old = next(iter(target.sources.values()))[0]
                    raise LoadError(
                        f"the checkpoint has '{name}' twice, once as '{old}'; it mixes two layouts: get it again"
                    )
                renamed[name] = tensor
        return renamed

    return rename


@dataclass
class Target:
    """A tensor of the network, or the first of several that a rule makes: of which tensors of the checkpoint, by the
    patterns that found them (without a rule: one, by "")."""

    name: str
    rule: Any
    sources: dict[str, list[str]]


def targets_of(model: Any, stored: Iterable[str]) -> list[Target]:
    """Return the targets of every tensor of a checkpoint; one that the network has no place for keeps its name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    by_rule: dict[str, Target] = {}
    targets: list[Target] = []
    for name in sorted(stored, key=dot_natural_key):  # experts in their order; a rule may depend on the names before
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known:
            plain, _ = rename_source_key(name, [], [], prefix, known)
            renamed, pattern = (plain, None) if plain in known else (renamed, pattern)
        if pattern is None:
            targets.append(Target(renamed, None, {"": [name]}))
        elif renamed not in known:
            targets.append(Target(name, None, {"": [name]}))
        else:
            if renamed not in by_rule:
                by_rule[renamed] = Target(renamed, rule_of[pattern], {})
                targets.append(by_rule[renamed])
            by_rule[renamed].sources.setdefault(pattern, []).append(name)
    return targets


def computed(model: Any, target: Target, tensors: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the tensors that a rule makes, by their names. tensors: of the checkpoint, by the rule's patterns."""
    rule, name = target.rule, target.name
    for operation in rule.operations:
        made = operation.convert(
            tensors,
            source_patterns=rule.source_patterns,
            target_patterns=rule.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
        tensors = {pattern: found if isinstance(found, list) else [found] for pattern, found in made.items()}
    results = {pattern: found[0] for pattern, found in tensors.items()}
    whole = name.replace("*.", "0.")  # a rule with several targets names the first of them
    pattern = next((pattern for pattern in results if pattern in whole), None)
    if pattern is None:
        return results
    before, _, after = whole.partition(pattern)
    return {before + pattern + after: tensor for pattern, tensor in results.items()}


def published_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Name in the network -> name in the files of published checkpoints, which keep the names of older versions.

    Raises LoadError for a network whose weights transformers would compute with before it saves them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = dict(model.state_dict())
    published = {id(tensor): name for name, tensor in revert_weight_conversion(model, tensors).items()}
    computed = [name for name in names if id(tensors[name]) not in published]
    if computed:
        raise LoadError(f"'{computed[0]}': transformers saves {type(model).__name__} in another form")
    prefix = PREFIXES_IN_FILES.get(type(model).__name__, "")
    return {name: prefix + published[id(tensors[name])] for name in names}


def block_lists(model: Any) -> list[str]:
    """Return the outermost module lists that hold the blocks of the architecture: those it must not be split within."""
    from torch import nn

    classes = set(model._no_split_modules or ())
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(type(child).__name__ in classes for child in module)
    ]
    return [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")
