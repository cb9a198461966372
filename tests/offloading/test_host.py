"""Host memory for groups: few pieces of memory, aligned, and no longer there than their groups."""

import weakref

import pytest
import torch

from qexp.offloading import host
from qexp.offloading.host import Slabs


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the slabs that are made."""
    sizes: list[int] = []
    make = host.aligned_buffer

    def note(nbytes: int, device: torch.device, *, pinned: bool) -> torch.Tensor:
        sizes.append(nbytes)
        return make(nbytes, device, pinned=pinned)

    monkeypatch.setattr(host, "aligned_buffer", note)
    return sizes


def test_small_models_have_one_slab_of_their_size(made: list[int]) -> None:
    slabs = Slabs(256 * 10, pinned=False)
    pieces = [slabs.take(256 * size) for size in (1, 2, 3, 4)]
    assert made == [256 * 10]
    assert [piece.numel() for piece in pieces] == [256, 512, 768, 1024]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 256 == 0
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in pieces] == [[0], [1], [2], [3]]  # they do not overlap


def test_slabs_are_powers_of_two_but_for_the_last_and_for_large_groups(made: list[int]) -> None:
    sizes = [256 * size for size in (9, 6, 3, 40, 5)]
    slabs = Slabs(sum(sizes), pinned=False, slab_bytes=4096)
    for size in sizes:
        slabs.take(size)
    # 256 are added for the alignment; 9 and 6 fill the first slab, 3 and 5 are in the second
    assert made == [4096 - 256, 4096 - 256, 256 * 40]


def test_more_than_was_planned_gets_memory_of_its_own(made: list[int]) -> None:
    slabs = Slabs(512, pinned=False)
    for size in (512, 256, 0):
        assert slabs.take(size).numel() == size
    assert made == [512, 256]


def test_a_slab_lives_as_long_as_its_pieces() -> None:
    slabs = Slabs(512, pinned=False)
    one, two = slabs.take(256), slabs.take(256)
    gone: list[int] = []
    weakref.finalize(one.untyped_storage(), gone.append, 1)
    del one
    assert gone == []
    del two
    assert gone == [1]
