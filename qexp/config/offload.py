"""Settings of offloading: where weights are stored, how they are grouped, and how groups are copied to the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qexp.errors import ConfigError, choices

STRATEGIES = ("none", "model", "sequential", "leaf", "block")
STREAMED = ("leaf", "block")  # the strategies that can fetch groups ahead on a stream of their own
DESTINATIONS = ("auto", "cpu", "disk")
WITHOUT_STREAMS = ("cpu", "mps")  # device types


@dataclass(frozen=True)
class OffloadConfig:
    """One schema for all strategies, so that `offload=none,leaf,block offload.to=disk` composes.

    strategy: none (resident), model (whole components, one at a time), sequential (module by module, when it runs),
        leaf (module by module, fetched ahead) or block (`num_blocks_per_group` blocks at a time, fetched ahead).
    to: where weights are stored; auto is cpu with an accelerator, else disk.
    use_stream: copy on a stream of its own, while the groups before run; null means where the device has streams. On
        the CPU, a thread that reads from disk is the stream; for what rests in memory there is none.
    prefetch_depth: slots for groups, with a stream: for the one that runs, and those that are fetched ahead. Each slot
        is as large as the largest group. On the CPU a slot may hold several smaller groups.
    record_stream: tell the allocator which stream uses the memory. The slots of the ring are announced when they are
        made, and not freed while offloading lasts: so this changes nothing.
    non_blocking: without a stream, do not let the host wait for each copy.
    resident_gib: keep as many bytes of groups on the device as fit, and offload the rest.
    low_cpu_mem: pin a staging buffer for each slot instead of all weights; the host then waits for the copies.
    """

    strategy: str = "none"
    to: str = "auto"
    num_blocks_per_group: int = 1
    use_stream: bool | None = None
    prefetch_depth: int = 2
    record_stream: bool = False
    non_blocking: bool = True
    resident_gib: float = 0.0
    low_cpu_mem: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"offload.strategy={self.strategy!r} is unknown; use {choices(STRATEGIES)}")
        if self.to not in DESTINATIONS:
            raise ConfigError(f"offload.to={self.to!r} is unknown; use {choices(DESTINATIONS)}")
        self._check_kinds()
        if self.num_blocks_per_group is None or self.num_blocks_per_group < 1:
            shown = "null" if self.num_blocks_per_group is None else self.num_blocks_per_group
            raise ConfigError(
                f"offload.num_blocks_per_group={shown} must be 1 or more blocks; use 1, or offload=leaf for less"
            )
        if self.prefetch_depth < 2:
            raise ConfigError(
                f"offload.prefetch_depth={self.prefetch_depth} must be 2 or more: the group that runs and the next "
                "one; use offload.use_stream=false to fetch nothing ahead"
            )
        if not 0 <= self.resident_gib < math.inf:
            raise ConfigError(
                f"offload.resident_gib={self.resident_gib} must be a size in GiB, 0 or more; "
                "use offload=none to keep everything on the device"
            )

    def _check_kinds(self) -> None:
        """Raise ConfigError for a value of the wrong type; ranges are checked separately."""
        for name in ("num_blocks_per_group", "prefetch_depth"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"offload.{name}={value!r} must be a whole number; use {getattr(DEFAULTS, name)}")
        if isinstance(self.resident_gib, bool) or not isinstance(self.resident_gib, int | float):
            raise ConfigError(f"offload.resident_gib={self.resident_gib!r} must be a number of GiB, such as 4.0")

    def resolved(self, device_type: str) -> OffloadConfig:
        """Resolve the fields that depend on the compute device, and reset those that strategy and device ignore.

        Raises: ConfigError for settings that conflict, or that this device does not support.
        """
        if self.strategy == "none":
            return OffloadConfig()
        to = self.to if self.to != "auto" else ("disk" if device_type == "cpu" else "cpu")
        use_stream = self.strategy in STREAMED and self._streams_on(device_type, to)
        matters = {
            "use_stream": self.strategy in STREAMED and has_streams(device_type, to),
            "num_blocks_per_group": self.strategy == "block",
            "prefetch_depth": use_stream,
            "record_stream": False,
            "non_blocking": device_type != "cpu" and not use_stream,
            "resident_gib": self.strategy != "model",
            "low_cpu_mem": device_type != "cpu" and to == "cpu",
        }
        settled: dict[str, Any] = {"to": to, "use_stream": use_stream}
        settled |= {name: getattr(DEFAULTS, name) for name, does in matters.items() if not does}
        return replace(self, **settled)

    def _streams_on(self, device_type: str, to: str) -> bool:
        """Return whether copies run on a separate stream. Raises ConfigError for a conflict."""
        if self.use_stream and not has_streams(device_type, to):
            remedy = "offload.to=disk, which a thread reads ahead, or " * (device_type == "cpu")
            raise ConfigError(
                f"offload.use_stream=true needs a device with streams, and device={device_type} has none; "
                f"use {remedy}offload.use_stream=null for streams where there are any, or run on an accelerator"
            )
        if self.use_stream and not self.non_blocking and device_type != "cpu":
            raise ConfigError(
                "offload.use_stream=true with offload.non_blocking=false makes the host wait for each copy, so that "
                "copies do not overlap; leave out one of them"
            )
        is_possible = has_streams(device_type, to) and (self.non_blocking or device_type == "cpu")
        use_stream = is_possible if self.use_stream is None else self.use_stream
        if self.record_stream and (device_type in WITHOUT_STREAMS or not use_stream):
            why = f"device={device_type} has none" if device_type in WITHOUT_STREAMS else "offload uses none here"
            raise ConfigError(
                f"offload.record_stream=true needs a stream, and {why}; leave it out (the memory of the ring "
                "is safe without), or use offload.use_stream=true on an accelerator"
            )
        return use_stream


def has_streams(device_type: str, to: str) -> bool:
    """Return whether copies can overlap with compute: on streams, or from disk to the CPU by a reader thread."""
    return device_type not in WITHOUT_STREAMS or (device_type, to) == ("cpu", "disk")


DEFAULTS = OffloadConfig()
