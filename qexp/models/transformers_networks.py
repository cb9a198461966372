"""What every source of transformers models shares: skeletons, and the names that checkpoints have for their weights.

A checkpoint on disk may call a weight by another name than the network does (older names, a base model's prefix).
transformers renames while loading, by rules of its own (`transformers.conversion_mapping`); the same rules are asked
here, about names alone. Rules that compute (merging the experts of a mixture, splitting a fused projection) are not
followed: such a checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qexp.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

    from qexp.loading.conversion import Conversion


# What networks were called inside their class when their checkpoints were published; loading takes both.
PREFIXES_IN_FILES = {"CLIPTextModel": "text_model."}


def transformers_config(config: Mapping[str, Any], folder: Path) -> Any:
    """The architecture's config object from a parsed config.json, without how the checkpoint is quantized."""
    from transformers import AutoConfig

    values = {name: value for name, value in config.items() if name != "quantization_config"}
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise LoadError(f"'{folder}/config.json' has no model_type: it is not a transformers model's; check model.path")
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise LoadError(
            f"'{folder}/config.json': model_type={model_type!r} is unknown to transformers {_version()} "
            "(models with code of their own are not loaded); install a version that knows it"
        ) from error


def skeleton(auto_class: Any, config: Any, folder: Path) -> nn.Module:
    """The network of a config, as one of transformers' Auto classes builds it. Nothing is initialized."""
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model: Any = auto_class.from_config(config)
    except ValueError as error:  # the class has no network for this model_type
        raise LoadError(
            f"'{folder}/config.json': model_type={config.model_type!r} is not a model for {auto_class.__name__}; "
            "choose the model source that fits the checkpoint"
        ) from error
    model.tie_weights()  # part of what was left out
    return cast("nn.Module", model)


def renaming(model: nn.Module) -> Conversion:
    """What turns a checkpoint's tensors into those of `model`, by transformers' rules."""

    def rename(tensors: MutableMapping[str, Any]) -> dict[str, Any]:
        renamed: dict[str, Any] = {}
        for old, name in network_names(model, list(tensors)).items():
            if name in renamed:
                raise LoadError(
                    f"the checkpoint has '{name}' twice, once as '{old}'; it mixes two layouts: get it again"
                )
            renamed[name] = tensors.pop(old)
        return renamed

    return rename


def network_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the checkpoint -> name in the network, for every tensor of the checkpoint.

    Raises LoadError for one that transformers would compute with rather than rename.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):  # a rule may depend on the names before
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known:
            plain, _ = rename_source_key(name, [], [], prefix, known)
            renamed, pattern = (plain, None) if plain in known else (renamed, pattern)
        if pattern is not None:
            rule = next(rule for rule in converters if pattern in rule.source_patterns)
            raise LoadError(_computed_message(model, name, rule))
        names[name] = renamed
    return names


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
    """The outermost module lists that hold the blocks of the architecture: those it must not be split within."""
    from torch import nn

    classes = set(model._no_split_modules or ())
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(type(child).__name__ in classes for child in module)
    ]
    return [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]


def _computed_message(model: Any, name: str, rule: Any) -> str:
    operations = ", ".join(type(operation).__name__ for operation in rule.operations)
    return (
        f"'{name}': transformers computes {', '.join(rule.target_patterns)} of {type(model).__name__} from it "
        f"({operations}), which loading does not do; load a model whose checkpoint holds the weights of its layers"
    )


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")
