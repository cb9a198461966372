"""Store weights in host memory: in pinned slabs if the compute device copies faster from pinned memory.

Pinning costs the system a call for each piece, and torch's allocator rounds each piece up to a power of two: a 9 MiB
block would occupy 16. So groups are laid one after the other into slabs of 1 GiB, which is a power of two; only the
last one, as large as what is left, is rounded. A slab is made when it is needed: a model that comes from host
memory is there twice for one slab at a time, not as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from qexp.offloading.group import ALIGNMENT, Pieces

log = logging.getLogger(__name__)

SLAB_BYTES = 2**30


def aligned_buffer(nbytes: int, device: torch.device, *, pinned: bool = False, alignment: int = ALIGNMENT) -> Tensor:
    """Return uninitialized uint8 [nbytes] that starts at a multiple of `alignment` bytes."""
    buffer = torch.empty(nbytes + alignment, dtype=torch.uint8, device=device)
    if pinned:
        try:
            buffer = buffer.pin_memory()
        except RuntimeError as error:
            log.warning("%d bytes of host memory stay pageable, copies of them do not overlap: %s", nbytes, error)
    start = -buffer.data_ptr() % alignment
    return buffer[start : start + nbytes]


class Slabs:
    """Host memory for the groups of one model, handed out in pieces; a slab lives as long as one of its pieces."""

    def __init__(self, nbytes: int, *, pinned: bool, slab_bytes: int = SLAB_BYTES) -> None:
        """nbytes: of all groups together."""
        self.pinned, self.slab_bytes = pinned, slab_bytes
        self._to_come = nbytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Uninitialized uint8 [nbytes] at a 256-byte boundary. Sizes are multiples of that, as those of groups are."""
        slab_bytes = min(self.slab_bytes - ALIGNMENT, self._to_come)
        self._to_come = max(0, self._to_come - nbytes)
        if nbytes > max(slab_bytes, self._free.numel()):
            return self._new(nbytes)
        if nbytes > self._free.numel():
            self._free = self._new(slab_bytes)
        piece, self._free = self._free[:nbytes], self._free[nbytes:]
        if not self._to_come:
            self._free = torch.empty(0, dtype=torch.uint8)  # hold on to no slab
        return piece

    def _new(self, nbytes: int) -> Tensor:
        return aligned_buffer(nbytes, torch.device("cpu"), pinned=self.pinned)


class Arena:
    """A group at rest in host memory. `staged`: it is pageable, and passes through a pinned buffer on its way."""

    in_memory = True

    def __init__(self, flat: Tensor, pieces: Pieces, *, staged: bool = False) -> None:
        self.flat, self.staged = flat, staged
        for offset, piece in pieces:
            self.flat[offset : offset + piece.numel()].copy_(piece)

    def load_into(self, target: Tensor, staging: Callable[[int], Tensor], *, non_blocking: bool) -> None:
        source = staging(self.flat.numel()).copy_(self.flat) if self.staged else self.flat
        target.copy_(source, non_blocking=non_blocking)

    def expect(self) -> None:
        """It is in memory already."""

    def close(self) -> None:
        self.flat = torch.empty(0, dtype=torch.uint8)
