"""Memory over time in a bounded number of points, however long it takes: the highest value of each slot of time.

Slots are equally long. When there are too many, each two become one, so that a trace has between half and all of MOST
slots of what has passed, and no peak is lost.
"""

from __future__ import annotations

MOST = 256  # slots
FIRST_SLOT_SECONDS = 0.002


class MemoryTrace:
    """The highest value in each slot of time since a beginning."""

    def __init__(self) -> None:
        self.slot_seconds = FIRST_SLOT_SECONDS
        self._highest: dict[int, int] = {}

    def add(self, seconds: float, nbytes: int) -> None:
        """Note a value at a time since the beginning."""
        while (slot := int(seconds / self.slot_seconds)) >= MOST:
            self.slot_seconds *= 2
            halved: dict[int, int] = {}
            for old, value in self._highest.items():
                halved[old // 2] = max(halved.get(old // 2, 0), value)
            self._highest = halved
        self._highest[slot] = max(self._highest.get(slot, 0), nbytes)

    def points(self) -> list[tuple[float, int]]:
        """Return (seconds at the middle of a slot, its highest value) of the slots that have one, in order."""
        return [((slot + 0.5) * self.slot_seconds, value) for slot, value in sorted(self._highest.items())]
