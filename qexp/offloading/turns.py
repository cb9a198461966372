"""Taking turns: of the components that are offloaded as a whole, one at a time is on a device.

A component comes to the device when its forward starts, and stays there (a transformer runs in every step) until
another one needs the place.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch


class Guest(Protocol):
    def give_up(self) -> None:
        """Free the device memory that is not in use now."""


_guests: dict[torch.device, weakref.ref[Guest]] = {}


def take_turn(device: torch.device, guest: Guest) -> None:
    """Let the component that is on the device make room for another."""
    before = _guests[device]() if device in _guests else None
    if before is not None and before is not guest:
        before.give_up()
    _guests[device] = weakref.ref(guest)
