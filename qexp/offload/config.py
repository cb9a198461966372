"""Settings of offloading: where weights rest and in which groups they travel to the compute device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qexp.errors import ConfigError, choices

STRATEGIES = ("none", "leaf", "block")
DESTINATIONS = ("auto", "cpu", "disk")


@dataclass(frozen=True)
class OffloadConfig:
    """One schema for all strategies, so that `offload=none,leaf,block offload.to=disk` composes.

    strategy: none (resident), leaf (module by module) or block (`num_blocks_per_group` blocks at a time).
    to: where weights rest; auto is cpu where there is an accelerator and disk elsewhere.
    """

    strategy: str = "none"
    to: str = "auto"
    num_blocks_per_group: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"offload.strategy={self.strategy!r} is unknown; use {choices(STRATEGIES)}")
        if self.to not in DESTINATIONS:
            raise ConfigError(f"offload.to={self.to!r} is unknown; use {choices(DESTINATIONS)}")
        if self.num_blocks_per_group < 1:
            raise ConfigError(f"offload.num_blocks_per_group={self.num_blocks_per_group} must be 1 or more")

    def resolved(self, device_type: str) -> OffloadConfig:
        """Settle `to=auto` for a compute device type and reset the fields that the strategy ignores."""
        if self.strategy == "none":
            return OffloadConfig()
        to = self.to if self.to != "auto" else ("disk" if device_type == "cpu" else "cpu")
        blocks = self.num_blocks_per_group if self.strategy == "block" else 1
        return replace(self, to=to, num_blocks_per_group=blocks)
