"""Where each module and tensor of a model rests, and where it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qexp.system.device_names import Place, key_of


@dataclass(frozen=True)
class Placement:
    """places, computes: map entry -> where it rests, where it computes; an entry is a module, a tensor, or "" for all.

    nbytes: tensor -> its bytes (each name of a tied one); room: device -> bytes that its limit leaves to what travels.
    """

    main: torch.device
    places: Mapping[str, Place]
    computes: Mapping[str, torch.device]
    nbytes: Mapping[str, int]
    room: Mapping[torch.device, float]
    tied: Mapping[str, str] = field(default_factory=dict)  # parameter -> the one that it is the same as

    def entry(self, name: str) -> str:
        """Return the entry that a module or tensor belongs to."""
        while name and name not in self.places:
            name = name.rpartition(".")[0]
        return name

    def place_of(self, name: str) -> Place:
        return self.places[self.entry(name)]

    def device_of(self, name: str) -> torch.device:
        """Return the compute device of a module or tensor."""
        return self.computes[self.entry(name)]

    def shared(self) -> dict[str, str]:
        """Return the tied parameters that are one in memory: they stay together on their compute device."""
        return {
            name: first
            for name, first in self.tied.items()
            if self.place_of(name) == self.place_of(first) == self.device_of(name) == self.device_of(first)
        }

    @property
    def is_spread(self) -> bool:
        """Whether anything has to travel."""
        return len({self.main, *self.places.values(), *self.computes.values()}) > 1

    @property
    def is_default(self) -> bool:
        """Whether everything is on one device, as without a map."""
        return set(self.places) == {""} and not self.is_spread

    def bytes_by_place(self) -> dict[str, int]:
        counted, shared = Counter[str](), self.shared()
        for name in (name for name in self.nbytes if name not in shared):
            counted[str(self.place_of(name))] += self.nbytes[name]
        return dict(counted)

    def to_container(self) -> dict[str, Any]:
        """Return the placement as JSON-able data, for plan.json."""
        places = {name: str(place) for name, place in self.places.items()}
        elsewhere = {
            name: str(self.computes[name]) for name, place in self.places.items() if self.computes[name] != place
        }
        return {"device_map": places, "computed_on": elsewhere, "bytes": self.bytes_by_place()}

    def hf_device_map(self) -> dict[str, int | str]:
        """Return the map as other libraries write it: accelerators by their index."""
        return {name: key_of(place) for name, place in self.places.items()}
