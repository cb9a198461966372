"""Weights on disk, computed with on the CPU: read ahead by a thread, in bounded memory, whatever happens meanwhile."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qexp.config.offload import OffloadConfig
from qexp.errors import DiskError
from qexp.offloading import disk
from qexp.offloading.disk import PAGE, DiskStore, WeightFile
from qexp.offloading.host import aligned_buffer
from qexp.offloading.reader import Reader
from qexp.offloading.strategies import Offload, apply_offload
from tests.fresh_process import run_python
from tests.offloading import model_zoo as zoo

LEAF = OffloadConfig("leaf", "disk")
CPU = torch.device("cpu")
SIZES = (8, 300, 700, 40, 40, 1000, 3, 640, 640, 90)  # KiB of the layers, about; the largest says how large a slot is


class Layers(nn.Module):
    """Layers of very different sizes, called in the order of `path`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, size, bias=size % 3 == 0) for size in SIZES)
        self.path: list[int] = list(range(len(SIZES)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layers[number](x).sum() for number in self.path])


def make() -> Layers:
    torch.manual_seed(0)
    return Layers().eval().requires_grad_(False)


def offload(model: nn.Module, store: Path, config: OffloadConfig = LEAF) -> Offload:
    return apply_offload(model, config, device=CPU, block_lists=["blocks"], store=store)


@pytest.fixture(autouse=True)
def no_garbage() -> None:
    """A model that another test dropped keeps its reader until it is collected."""
    gc.collect()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "qexp-offload-reader"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(group, name of the thread) of every reading."""
    seen: list[tuple[str, str]] = []
    read = WeightFile.read

    def note(file: WeightFile, buffer: torch.Tensor) -> None:
        seen.append((file.name, threading.current_thread().name))
        read(file, buffer)

    monkeypatch.setattr(WeightFile, "read", note)
    return seen


X = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_any_order_gives_the_resident_outputs_in_the_memory_of_the_ring(depth: int, tmp_path: Path) -> None:
    resident, model = make(), make()
    handle = offload(model, tmp_path, OffloadConfig("leaf", "disk", prefetch_depth=depth))
    largest = max(group.nbytes for group in handle.groups)
    generator = torch.Generator().manual_seed(2)
    everything = list(range(len(SIZES)))
    paths = [everything] * 3 + [everything[::-1], [5, 5, 1], [], everything[::2]] + [everything] * 2
    paths += [torch.randint(len(SIZES), (12,), generator=generator).tolist() for _ in range(40)]
    for path in paths:
        resident.path = model.path = path or [0]
        assert torch.equal(model(X), resident(X)), path
        assert handle._engine.ring.nbytes == depth * largest
    handle.remove()
    assert torch.equal(model(X), resident(X))
    assert readers() == []


def test_every_group_is_read_by_the_thread_and_once_a_step(reads: list[tuple[str, str]], tmp_path: Path) -> None:
    model = make()
    handle = offload(model, tmp_path)
    for _ in range(3):
        model(X)
    handle._engine.streams.compute_waits_for(handle._engine.ring.slots[-1].copied)
    reads.clear()
    copies = handle.statistics()["offload/copies"]
    for _ in range(4):
        model(X)
    assert {thread for _, thread in reads} == {"qexp-offload-reader"}
    # what a slot still holds is not read again, and nothing is read twice
    assert 2 * len(SIZES) < handle.statistics()["offload/copies"] - copies <= 4 * len(SIZES) + 1
    handle.remove()


def test_the_next_groups_are_on_their_way_while_one_computes(reads: list[tuple[str, str]], tmp_path: Path) -> None:
    model = make()
    handle = offload(model, tmp_path)
    model(X)
    model(X)
    found: list[int] = []
    ring = handle._engine.ring

    def count(*_: object) -> None:
        found.append(sum(len(slot.stays) for slot in ring.slots))

    model.layers[1].register_forward_pre_hook(count)
    model(X)
    assert found[0] >= 4  # layers 1 to 4 fit beside each other
    handle.remove()


def test_bindings_are_built_once_in_a_steady_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qexp.offloading.group import Group

    model = make()
    handle = offload(model, tmp_path)
    for _ in range(6):
        model(X)
    built: list[str] = []
    bindings = Group.bindings

    def note(group: Group, *arguments: Any, **options: Any) -> Any:
        built.append(group.name)
        return bindings(group, *arguments, **options)

    monkeypatch.setattr(Group, "bindings", note)
    for _ in range(4):
        model(X)
    assert built == []
    handle.remove()


def weights_file(handle: Offload, name: str) -> Path:
    rest = next(group.rest for group in handle.groups if group.name == name)
    assert isinstance(rest, WeightFile)
    return rest.path


def damage(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (Path.unlink, "could not read the weights of 'layers.5' .*No such file"),
    "other content": (damage, "no longer holds the weights of 'layers.5'"),
    "shorter": (lambda path: os.truncate(path, 5000), r"'layers.5' .*ends after 5000 of \d+ bytes"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_goes_wrong_in_the_thread_is_raised_by_the_forward_that_needs_it(kind: str, tmp_path: Path) -> None:
    harm, message = DAMAGES[kind]
    resident, model = make(), make()
    handle = offload(model, tmp_path)
    for _ in range(2):
        model(X)
    resident.path = model.path = [6, 7, 8, 9, 0]  # so that the damaged group is in no slot
    model(X)
    model.path = Layers().path
    path = weights_file(handle, "layers.5")
    content = path.read_bytes()
    harm(path)
    for _ in range(2):
        with pytest.raises(DiskError, match=message):
            model(X)
    resident.path = model.path = [0, 1, 2, 3, 4]  # announces the damaged group, and does not need it
    assert torch.equal(model(X), resident(X))
    path.write_bytes(content)
    resident.path = model.path = Layers().path
    assert torch.equal(model(X), resident(X))  # what failed ahead of time is read again
    handle.remove()
    assert readers() == []


def test_the_thread_ends_with_the_model_or_its_offloading(tmp_path: Path) -> None:
    model = make()
    handle = offload(model, tmp_path)
    assert readers() == []  # it starts with the first reading
    model(X)
    assert len(readers()) == 1
    handle.remove()
    assert readers() == []
    model = make()
    handle = offload(model, tmp_path)
    model(X)
    del model, handle
    gc.collect()
    assert readers() == []
    assert not any(tmp_path.iterdir())


def test_readings_run_in_order_and_dropped_ones_when_they_are_waited_for() -> None:
    reader, done, gate, begun = Reader(), list[str](), threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        gate.wait()
        done.append("first")

    running = reader.run(first)
    second, third = reader.run(lambda: done.append("second")), reader.run(lambda: done.append("third"))
    begun.wait()
    reader.drop_pending()
    assert reader.is_lost(second) and reader.is_lost(third) and not reader.is_lost(running)
    gate.set()
    reader.compute_waits_for(third)
    assert done == ["first", "third"]
    assert not reader.is_lost(third) and not reader.is_lost(running)
    reader.close()
    reader.compute_waits_for(second)  # starts a thread again
    assert done == ["first", "third", "second"]
    reader.close()
    assert readers() == []


FORKS = """
import os, sys, threading, torch
from pathlib import Path
from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import apply_offload
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork either
model, x = torch.nn.Sequential(*(torch.nn.Linear(99, 99) for _ in range(12))).requires_grad_(False), torch.ones(1, 99)
expected = model(x)
config, place = OffloadConfig("leaf", "disk"), Path(sys.argv[1])
handle = apply_offload(model, config, device=torch.device("cpu"), block_lists=[], store=place)
for _ in range(2):
    assert torch.equal(model(x), expected)
child = os.fork()
if child == 0:
    assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
    assert sum(thread.name == "qexp-offload-reader" for thread in threading.enumerate()) == 1
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert torch.equal(model(x), expected)
print("done", flush=True)  # and exits with the thread at work
"""


def test_a_forked_child_reads_for_itself_and_an_exit_ends_the_thread(tmp_path: Path) -> None:
    assert run_python(FORKS, tmp_path / "store") == "done\n"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("nbytes", [0, 256, PAGE, 3 * PAGE + 512])
def test_files_are_read_past_the_page_cache(nbytes: int, tmp_path: Path) -> None:
    store = DiskStore(tmp_path, nbytes, direct=True)
    content = torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    file = store.write("layer", nbytes, [(0, content)] if nbytes else [])
    if not file.direct:
        pytest.skip("this file system has no O_DIRECT")
    buffer = aligned_buffer(nbytes, CPU, alignment=PAGE).fill_(0xFF)
    file.read(buffer)
    assert torch.equal(buffer, content)
    unaligned = torch.empty(nbytes + 1, dtype=torch.uint8)[1:]
    file.read(unaligned)  # through the page cache
    assert torch.equal(unaligned, content)
    store.remove()


def test_a_file_system_that_cannot_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    def refuse(handle: int, buffers: Any, offset: int) -> int:
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "preadv", refuse)
        store = DiskStore(tmp_path, 1024, direct=True)
    said = "is read through the page cache, not past it (O_DIRECT): Invalid argument"
    assert any(said in line for line in log_lines)
    assert [path.suffix for path in store.folder.iterdir()] == [".lock"]
    file = store.write("layer", 1024, [(0, torch.ones(1024, dtype=torch.uint8))])
    assert not file.direct
    store.remove()


def test_what_still_runs_keeps_its_place_when_its_group_changes(tmp_path: Path) -> None:
    handle = offload(make(), tmp_path)
    ring, groups = handle._engine.ring, handle.groups
    stays = []
    for group in sorted(groups, key=lambda group: -group.nbytes)[:2]:  # one in each slot
        stay = ring.room_for(group, ())
        assert stay is not None
        ring.arrive(stay)
        stay.users = 1
        stays.append(stay)
    assert {id(stay.slot) for stay in stays} == {id(slot) for slot in ring.slots}
    ring.forget(stays[0].group)
    assert ring.stay_of(stays[0].group) is None
    assert ring.room_for(stays[0].group, ()) is None  # both slots are in use
    stays[0].users = 0
    again = ring.room_for(stays[0].group, (stays[0].group,))
    assert again is not None and again.slot is stays[0].slot
    stays[1].users = 0
    handle.remove()


def test_two_models_read_with_a_thread_each(tmp_path: Path) -> None:
    kinds = ("fp32", "bitsandbytes_nf4_nested")
    models = [zoo.make(kind) for kind in kinds]
    batches = zoo.inputs(models[0], 3)
    expected = [zoo.outputs(zoo.make(kind), batches) for kind in kinds]
    handles = [offload(model, tmp_path) for model in models]
    for step, batch in enumerate(batches):
        for model, outputs in zip(models, expected, strict=True):
            assert torch.equal(zoo.outputs(model, [batch])[0], outputs[step])
    assert len(readers()) == 2
    for handle in handles:
        handle.remove()
    assert readers() == []
