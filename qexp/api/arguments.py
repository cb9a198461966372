"""Convert the arguments of the Python API to paths, devices and backend configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.config.backend_options import backend_of
from qexp.config.plugins import plugin_config, plugin_module, plugin_names
from qexp.config.schema import LoaderConfig
from qexp.config.yaml_options import option_names
from qexp.errors import ConfigError, choices
from qexp.quantizers.configs import BackendConfig
from qexp.system.devices import resolve_device_map, resolve_max_memory

if TYPE_CHECKING:
    import torch

SOURCE = "_qexp_source"  # attribute of a pipeline that `load_pipeline` returned: what it was loaded from


def loader_settings(*, cache: str | Path | None, **settings: Any) -> LoaderConfig:
    """Return the loader's settings. cache: a folder, or None for none. Raises: ConfigError."""
    return LoaderConfig(cache=None if cache is None else str(expanded(cache, "cache")), **settings)


def expanded(path: str | Path, name: str) -> Path:
    """Return the path with `~` expanded. Raises ConfigError for an unknown user, or a value that is not a path."""
    try:
        return Path(path).expanduser()
    except TypeError:
        raise ConfigError(f"{name}={path!r} must be a path: a string or a pathlib.Path") from None
    except RuntimeError as error:
        raise ConfigError(f"{name}={str(path)!r} names no folder: {error}; write the path in full") from None


def places_of(device: str | torch.device, device_map: Any, max_memory: Any) -> tuple[torch.device, Any, Any]:
    """Return (device, device_map, max_memory) as load_component expects them.

    Device types other than cpu and cuda pass unchecked.
    """
    import torch

    device = named(device)
    if isinstance(device, torch.device):
        return device, device_map, max_memory
    main, places = resolve_device_map(device, device_map)
    limits = resolve_max_memory(max_memory, device_map)
    if limits is not None and places is None:
        return torch.device(main), {"": main}, limits  # one device, and a limit to check
    return torch.device(main), places, limits


def named(device: Any) -> Any:
    """Return the name of a device; types other than cpu and cuda unchanged."""
    kind = getattr(device, "type", None)
    if kind is None or kind == "cuda":
        return str(device)
    return "cpu" if kind == "cpu" else device


def backend_config(backend: Any, place: str = "backend") -> Any:
    """Return the config dataclass of a backend, from any of the ways to name one. place: its place in the arguments."""
    if backend is None or isinstance(backend, str):
        return backend_of(backend or "none")
    if isinstance(backend, BackendConfig):
        return backend
    values = backend if isinstance(backend, Mapping) else getattr(backend, "to_dict", dict)()
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    if method not in plugin_names("backend"):
        raise ConfigError(
            f"{place}={backend!r} is no backend; use a name ({choices(option_names('backend'))}), a backend's config, "
            f"or a mapping whose quant_method is {choices(plugin_names('backend'))}"
        )
    if isinstance(backend, Mapping):
        return plugin_config("backend", backend, place)
    return plugin_module("backend", method).Config.from_dict(values)


def check_model(model: Any, function: str) -> None:
    """Raise ConfigError for a value that is not a network. function: of the API, for the message."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError(f"{function}: model={model!r} must be a torch.nn.Module; qexp.load() returns one")
