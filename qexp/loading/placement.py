"""Where each part of a model goes: `device_map`, with the values that accelerate gives it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexp.errors import ConfigError

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device] | None


def one_device(device_map: DeviceMap, device: torch.device) -> torch.device:
    """The one device of a map, or `device` where the map is null. An index is one of the kind of `device`.

    Raises: ConfigError for a map over several devices.
    """
    if device_map is None:
        return device
    named = device_map.get("") if isinstance(device_map, Mapping) and len(device_map) == 1 else device_map
    if isinstance(named, int) and not isinstance(named, bool):
        kind = device.type if device.type != "cpu" else "cuda"
        return torch.device(kind, named)
    try:
        return torch.device(named)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device_map={device_map} spreads a model over several devices, and models are kept on one; "
            "use a device, or device_map=null"
        ) from error
