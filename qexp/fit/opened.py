"""The model that a fit is for: its configuration, and whether its weights are here or its published shape alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.config.hydra_schema import compose_settings
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, LoadError
from qexp.experiments.resolve import plain_settings, to_run_config
from qexp.experiments.stored import absolute_path
from qexp.fit.layers import chosen_components
from qexp.fit.request import Request
from qexp.hub.download import hub_id, local_folder
from qexp.models.architectures import architecture, architecture_names
from qexp.models.base import ModelSource, load_source
from qexp.predict.__main__ import local_models, published_overrides, resolved
from qexp.results.labels import model_label

UNQUANTIZED = "backend=none"


@dataclass(frozen=True)
class OpenedModel:
    """overrides: of the experiment; config: of it, unquantized; chosen: the components to choose formats for;
    is_published: only the headers of a published model are here, and no weights."""

    name: str
    overrides: tuple[str, ...]
    config: RunConfig
    chosen: tuple[str, ...]
    is_published: bool

    @property
    def source(self) -> ModelSource:
        return load_source(self.config.model)


@contextmanager
def open_model(request: Request) -> Iterator[OpenedModel]:
    """Resolve the experiment; a published model that is not on this machine is there as headers, while this is open.

    Raises: QexpError, or what Hydra raises.
    """
    overrides = _with_published_name(request.overrides)
    settings = plain_settings(compose_settings([*overrides, UNQUANTIZED]))
    with local_models() as headers_of:
        is_published = _is_shape_alone(settings["model"])
        config = resolved([*overrides, UNQUANTIZED], headers_of)[0] if is_published else to_run_config(settings)
        own = _own_backends(settings)
        chosen = tuple(chosen_components(load_source(config.model), own))
        name = model_label({"model": settings["model"]})
        yield OpenedModel(name, tuple(overrides), config, chosen, is_published)


def find_save_folder(opened: OpenedModel, request: Request) -> Path | None:
    """Return the folder of save.path=, None if nothing is to be saved. Raises: ConfigError for settings of `save`."""
    if not request.saving:
        return None
    save = to_run_config(compose_settings([*opened.overrides, *request.saving])).save
    if save.path is None:
        raise ConfigError(f"{' '.join(request.saving)}: fit checks the files that it saved; add save.path=<folder>")
    if save.layout is not None and request.bits is not None:
        raise ConfigError(
            f"bits={request.bits:g} is checked on the layers in the saved files, which save.layout={save.layout} joins "
            "and renames; use weights= instead of bits=, or leave save.layout= out"
        )
    return Path(absolute_path(save.path))


def _with_published_name(overrides: Sequence[str]) -> list[str]:
    """Resolve a published model's name to all of its components but the autoencoder, as in predict."""
    names = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if not names:
        return list(overrides)
    architecture(names[0])  # raises for one that is unknown
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)} are {len(names)} models; fit one at a time")
    others = [word for word in overrides if word not in names]
    return [*published_overrides(names[0], "bfloat16"), *others]


def _is_shape_alone(model: Mapping[str, Any]) -> bool:
    """Return whether a model is a published one that is not on this machine."""
    found = hub_id(model.get("path") or "")
    if found is None or not any(architecture(name).repository == found.repo for name in architecture_names()):
        return False
    try:
        local_folder(model["path"])
    except LoadError:
        return True
    return False


def _own_backends(settings: Mapping[str, Any]) -> list[str]:
    """Return the components with a backend of their own, which they keep."""
    parts = settings.get("components") or {}
    return [name for name, values in parts.items() if isinstance(values, Mapping) and "backend" in values]
