"""Models over several devices: the answer of the resident model, bytes where the plan says, and nothing moved twice."""

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.offloading import borders
from qexp.offloading.engine import Engine
from qexp.offloading.group import Group
from qexp.offloading.streams import Streams
from tests.backends import BACKENDS, REPRESENTATIVES
from tests.fake_device import counters
from tests.fake_device.counters import measure
from tests.loading.toys import WIDTH, Block, load_toy, random_state, save_state, settings
from tests.products import exhaustive, representatives

GIB = 2**30
DEVICES = [torch.device("fake", index) for index in range(counters.DEVICES)]
OUT = 64  # rows, so that every weight fills bitsandbytes' nested blocks


class Net(nn.Module):
    """Own parameters and buffers that meet activations of several devices, and a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, OUT)
        self.register_buffer("shift", torch.randn(OUT))
        self.register_buffer("position", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor, *, skip: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        first = self.embed(x) * self.scale + self.position.to(x.dtype)
        hidden = first
        for block in [*self.blocks, self.blocks[0]]:
            hidden = block(hidden)
        hidden += first  # from another device
        if skip is not None:
            hidden = torch.cat([hidden, skip["x"]])
        return self.head(hidden) + self.shift.to(x.dtype), hidden


class Tied(Net):
    """The first and the last layer have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(WIDTH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("net"), random_state(Net))


@pytest.fixture(scope="module", autouse=True)
def tables(folder: Path) -> None:
    """bitsandbytes makes the table of nested scales once for each device; what a model takes is measured after that."""
    for device in DEVICES:
        load(folder, "bitsandbytes_nf4_dq", {"": str(device)})


def load(
    folder: Path,
    backend: str,
    device_map: Any = None,
    limits: Any = None,
    store: Path | None = None,
    *overrides: str,
    build: type[nn.Module] = Net,
    **fields: Any,
) -> Any:
    options = {"device": DEVICES[0], "device_map": device_map, "max_memory": limits, "store": store}
    return load_toy(folder, settings(backend, *overrides, **fields), build, **options)


def batch(model: nn.Module) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).to(model.scale.dtype)


def answers(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = [output for _ in range(2) for output in model(x, skip={"x": x})]
    assert all(output.device == x.device for output in outputs)
    return [output.cpu() for output in outputs]


def live() -> list[int]:
    gc.collect()
    return list(counters.total.live_bytes)


MAPS: dict[str, Callable[[int], tuple[Any, Any]]] = {  # by the bytes of the model
    "balanced": lambda total: ("balanced", {0: total // 2, 1: total // 2, 2: total}),
    "balanced_low_0": lambda total: ("balanced_low_0", {0: total, 1: total // 2, 2: total // 2}),
    "auto_cpu": lambda total: ("auto", {0: total // 2, "cpu": total}),
    "sequential_disk": lambda total: ("sequential", {0: total * 3 // 5, "cpu": total // 4, "disk": total}),
    "explicit": lambda total: (
        {"": 0, "blocks.0": 1, "blocks.1": "cpu", "blocks.2.fc1": "disk", "blocks.2.fc2": 2, "shift": 1, "head": "cpu"},
        None,
    ),
}
CROSSED = [
    (backend, name)
    for number, backend in enumerate(BACKENDS)
    for index, name in enumerate(MAPS)
    if backend in ("none", "bitsandbytes", "torchao", "quanto_int4", "gguf") or (number + index) % 3 == 0
]
KEPT = [
    (backend, name)
    for backend, name in CROSSED
    if (backend == "torchao" and name != "balanced_low_0")  # planned as accelerate plans it: test_device_map_planner.py
    or (backend in REPRESENTATIVES[1:] and (BACKENDS.index(backend) + [*MAPS].index(name)) % 6 == 0)
]


@cache
def run_resident(folder: Path, backend: str) -> tuple[Tensor, list[Tensor], int]:
    """Run a model on one device, once for all maps: (an input on the CPU, what the model answers, its bytes)."""
    resident = load(folder, backend)
    x = batch(resident.model)
    return x, answers(resident.model, x.to(DEVICES[0])), sum(resident.placement.nbytes.values())


@pytest.mark.parametrize(("backend", "name"), representatives(CROSSED, KEPT))
def test_spread_is_resident(backend: str, name: str, folder: Path, tmp_path: Path) -> None:
    x, expected, resident_bytes = run_resident(folder, backend)
    device_map, limits = MAPS[name](resident_bytes)
    before = live()
    with measure() as loading:
        loaded = load(folder, backend, device_map, limits, tmp_path)
    dispatch = loaded.dispatch
    assert dispatch is not None and loaded.placement.is_spread
    ring = [
        sum(slot.flat.untyped_storage().nbytes() for slot in o._engine.ring.slots) for o in dispatch._offloads.values()
    ]
    at_rest, planned = dispatch.bytes_at_rest(), loaded.placement.bytes_by_place()
    # what the plan puts on a device is there; what it puts elsewhere is not, but for tensors without a forward
    grown = [after - then for after, then in zip(live(), before, strict=True)]
    on_devices = sum(nbytes for place, nbytes in at_rest.items() if place.startswith("fake"))
    assert sum(grown) - sum(ring) == pytest.approx(on_devices, abs=1024)  # libraries keep tables for each device
    for place, nbytes in planned.items():
        assert at_rest.get(place, 0) == pytest.approx(nbytes, rel=0.05, abs=12_000), place
    assert loading.races == []
    if limits is not None:
        for device, limit in limits.items():
            if isinstance(device, int):
                assert grown[device] <= limit  # the ring included
    wanted = {f"memory/weights_{place.replace(':', '_')}_gib" for place in at_rest}
    assert wanted <= dispatch.statistics().keys()
    assert [torch.equal(a, b) for a, b in zip(answers(loaded.model, x), expected, strict=True)] == [True] * 4
    # in a steady state each travelling group goes to its device once a call, and one may be fetched in vain
    x = x.to(DEVICES[0])
    with measure() as seen, torch.no_grad():
        loaded.model(x, skip={"x": x})
    groups = [group for offload in dispatch._offloads.values() for group in offload.groups]
    calls = [group.nbytes * (1 + group.name.startswith("blocks.0")) for group in groups]
    assert seen.races == [] and seen.h2d_copies <= 2 * len(groups) + 8  # int8dq makes scales on the host
    assert seen.h2d_bytes <= sum(calls) + max(calls, default=0) + 10_000
    assert seen.d2h_bytes < 10_000  # no weights
    statistics = dispatch.statistics()
    assert statistics["offload/transferred_gib"] >= statistics["offload/payload_gib"]
    dispatch.remove()
    assert not list(tmp_path.iterdir()) and not any("forward" in vars(module) for module in loaded.model.modules())
    again = dispatch.again()
    again_at_rest = again.bytes_at_rest()
    for place in at_rest.keys() | again_at_rest:  # quanto's scales of activations may be at another place, or new
        assert again_at_rest.get(place, 0) == pytest.approx(at_rest.get(place, 0), abs=9000), place
    assert all(torch.equal(a, b) for a, b in zip(answers(loaded.model, x.cpu()), expected, strict=True))
    again.remove()


@pytest.mark.parametrize("planned", [False, True])
def test_modules_kept_in_fp32_on_the_cpu(planned: bool, folder: Path, tmp_path: Path) -> None:
    """`llm_int8_enable_fp32_cpu_offload`: what a map puts on the CPU is not quantized, and computed there."""
    flag = "llm_int8_enable_fp32_cpu_offload=true"
    half = {"compute_dtype": "bfloat16"}
    device_map: Any = {"": 0, "blocks.1": "cpu"}
    limits = {0: 700_000, "cpu": GIB} if planned else None
    spread = load(folder, "bitsandbytes_int8", "auto" if planned else device_map, limits, None, flag, **half)
    on_cpu = sorted(name for name, place in spread.placement.places.items() if str(place) == "cpu")
    assert on_cpu and (planned or on_cpu == ["blocks.1"])
    modules = [module for name in on_cpu if "." in name or name in ("blocks", "head", "embed") for module in
               spread.model.get_submodule(name).modules()]  # fmt: skip
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    assert linear and all(type(module) is nn.Linear for module in linear)
    assert {(m.weight.dtype, m.weight.device.type) for m in linear} == {(torch.float32, "cpu")}
    assert not spread.dispatch.bytes_at_rest().get("disk") and spread.dispatch.statistics()["offload/groups"] == 0
    kept = tuple(name for name in on_cpu if name in dict(spread.model.named_modules()))
    resident = load(folder, "bitsandbytes_int8", skip_modules=kept, keep_in_fp32_modules=kept, **half)
    x = batch(resident.model)
    assert x.dtype == torch.bfloat16
    expected = answers(resident.model, x.to(DEVICES[0]))
    assert all(torch.equal(a, b) for a, b in zip(answers(spread.model, x), expected, strict=True))
    # without the flag, quantized weights rest on the CPU: upstream refuses that, for its hooks cannot move them
    travelling = load(folder, "bitsandbytes_int8", device_map, **half)
    assert "blocks.1.fc1" in travelling.plan.quantized_nbytes
    assert travelling.dispatch.statistics()["offload/groups"] == 1


@pytest.mark.parametrize(
    ("device_map", "kept"),
    [
        exhaustive({"": 0, "blocks": "cpu"}, ["blocks"]),
        ({"": 0, "blocks": "cpu", "blocks.1": 1}, ["blocks.0", "blocks.2"]),
        ({"": "cpu", "blocks.1": 0}, ["embed", "blocks.0", "blocks.2", "head"]),
    ],
)
def test_what_is_kept_in_fp32_is_what_the_whole_map_puts_on_the_cpu(
    device_map: Any, kept: list[str], folder: Path
) -> None:
    flag, half = "llm_int8_enable_fp32_cpu_offload=true", {"compute_dtype": "bfloat16"}
    spread = load(folder, "bitsandbytes_int8", device_map, None, None, flag, **half)
    resident = load(folder, "bitsandbytes_int8", skip_modules=tuple(kept), keep_in_fp32_modules=tuple(kept), **half)
    assert spread.plan.quantized_nbytes.keys() == resident.plan.quantized_nbytes.keys() != set()
    for name, module in spread.model.named_modules():
        if isinstance(module, nn.Linear):
            on_cpu = str(spread.placement.place_of(name)) == "cpu"
            assert (type(module) is nn.Linear and module.weight.dtype == torch.float32) == on_cpu, name
    x = batch(resident.model).bfloat16()
    expected = answers(resident.model, x.to(DEVICES[0]))
    assert all(torch.equal(a, b) for a, b in zip(answers(spread.model, x), expected, strict=True))


@pytest.mark.parametrize(
    ("device_map", "copies"),
    [
        ({"": 0, "blocks": 1}, 1),
        ({"": 0, "blocks": 1, "head": 1}, 2),
        ({"": 0, "embed": "cpu", "head": "cpu"}, 2),
        ({"": 0, "head": "cpu", "blocks": 1}, 2),
        ("balanced", 1),
    ],
)
def test_tied_parameters_are_one_where_they_stay_together(device_map: Any, copies: int, tmp_path: Path) -> None:
    folder = save_state(tmp_path, {k: v for k, v in random_state(Tied).items() if k != "head.weight"})
    resident = load(folder, "none", build=Tied)
    assert resident.model.head.weight is resident.model.embed.weight
    x = batch(resident.model)
    expected = answers(resident.model, x.to(DEVICES[0]))
    total = sum(tensor.nbytes for tensor in [*Tied().parameters(), *Tied().buffers()])
    assert resident.placement.bytes_by_place() == {"fake:0": total}
    limits = {0: total * 2 // 3, 1: total} if device_map == "balanced" else None
    loaded = load(folder, "none", device_map, limits, build=Tied)
    assert (loaded.model.head.weight is loaded.model.embed.weight) == (copies == 1)
    weight = WIDTH * WIDTH * 4
    assert sum(loaded.placement.bytes_by_place().values()) == total + (copies - 1) * weight
    at_rest = loaded.dispatch.bytes_at_rest()
    assert sum(at_rest.values()) == pytest.approx(total + (copies - 1) * weight, abs=5000)
    assert all(torch.equal(a, b) for a, b in zip(answers(loaded.model, x), expected, strict=True))
    assert loaded.dispatch.statistics()["offload/at_rest_device_gib"] * GIB <= sum(
        nbytes for place, nbytes in at_rest.items() if place.startswith("fake")
    )


def test_each_device_has_a_ring_of_its_own(folder: Path, tmp_path: Path) -> None:
    device_map = {"": 0, "blocks.0": "cpu", "blocks.1": 1, "blocks.2": "cpu", "head": "disk"}
    loaded = load(folder, "torchao", device_map, None, tmp_path)
    engines = {device.index: offload._engine for device, offload in loaded.dispatch._offloads.items()}
    names = {index: [group.name for group in engine.groups] for index, engine in engines.items()}
    assert names == {0: ["blocks.0"], 1: ["blocks.2", "head"]}
    assert {slot.flat.device.index for slot in engines[1].ring.slots} == {1}
    assert len(engines[1].ring.slots) == 2 and engines[1].streams.asynchronous


def test_less_room_for_the_ring_means_smaller_groups(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, "none", "auto", {0: 5_000_000, "cpu": 10_000_000})
    assert loaded.placement.is_default
    block, linear = sum(p.nbytes for p in Block().parameters()), 2 * WIDTH * WIDTH * 4
    device_map = {"": 0, "blocks": "cpu"}
    resident = sum(p.nbytes for p in [*Net().parameters(), *Net().buffers()]) - 3 * block
    for room, groups, slots in ((3 * block, 3, 2), (2.5 * linear, 9, 2), (1.2 * linear, 9, 1)):
        loaded = load(folder, "none", device_map, {0: int(resident + room), "cpu": GIB})
        (engine,) = [offload._engine for offload in loaded.dispatch._offloads.values()]
        assert (len(engine.groups), len(engine.ring.slots)) == (groups, slots), room
        loaded.dispatch.remove()


def test_loading_holds_no_more_than_the_groups_under_way(folder: Path, tmp_path: Path) -> None:
    """What travels passes through the device when it is quantized, and leaves it group by group."""
    loaded = load(folder, "none", {"": 0, "blocks": "disk"}, None, tmp_path)
    block = sum(p.nbytes for p in Block().parameters())
    loaded.dispatch.remove()
    del loaded
    before = live()[0]
    with measure() as seen:
        kept = load(folder, "none", {"": 0, "blocks": "disk"}, None, tmp_path)
    assert kept.dispatch and seen.peak_bytes[0] - before < live()[0] - before + 1.5 * block  # at rest, with the ring


def test_an_exception_in_the_middle_and_a_user_s_own_mode(folder: Path) -> None:
    resident = load(folder, "none")
    x = batch(resident.model).to(DEVICES[0])
    expected = answers(resident.model, x)
    loaded = load(folder, "none", {"": 0, "blocks.1": 1, "head": 2, "shift": 1})

    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    handle = loaded.model.blocks[1].register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(Stop):
            loaded.model(x)
        assert torch.overrides._get_current_function_mode() is None
        assert torch.get_device_module("fake").current_device() == 0
    handle.remove()
    block = loaded.model.blocks[1].forward

    def within(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):  # a mode of somebody else, above ours
            return block(*args, **kwargs)

    loaded.model.blocks[1].forward = within
    assert all(torch.equal(a, b) for a, b in zip(answers(loaded.model, x), expected, strict=True))


def test_operands_go_where_they_are_needed() -> None:
    alignment = borders.Alignment()
    owner = nn.Module()
    owner.register_buffer("total", torch.zeros(2, device=DEVICES[1]))
    alignment.owners.append(owner)
    one, two = torch.ones(2, device=DEVICES[0]), torch.full((2,), 2.0, device=DEVICES[2])
    with alignment.active():
        assert (one + two).device == DEVICES[0] and (two + one).device == DEVICES[2]
        assert (owner.total + two).device == DEVICES[2]  # a buffer follows the activation
        owner.total.add_(two)  # but for what changes it
        owner.total += one
        assert torch.add(one, one, out=two).device == DEVICES[2]
        assert torch.stack([one, two]).device == DEVICES[0]
        assert one.to(DEVICES[2]).device == DEVICES[2]
        owner.total[0] = one[0]
    assert owner.total.cpu().tolist() == [1.0, 3.0]
    with pytest.raises(RuntimeError, match="same device"):
        one + two


def test_inputs_and_outputs_of_every_shape_travel() -> None:
    from collections import OrderedDict, namedtuple

    Pair = namedtuple("Pair", "a b")
    x, y = torch.ones(2, device=DEVICES[0]), torch.ones(2, device=DEVICES[1])
    value = {"list": [x, 1, None], "pair": Pair(x, y), "ordered": OrderedDict(inner=(x, "text"))}
    moved = borders.travel(value, DEVICES[1])
    assert moved["list"][0].device == moved["pair"].a.device == moved["ordered"]["inner"][0].device == DEVICES[1]
    assert moved["pair"].b is y and type(moved["pair"]) is Pair and type(moved["ordered"]) is OrderedDict
    assert borders.travel(moved, DEVICES[1]) is moved


def no_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borders, "travel", lambda value, device: value)


def no_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    def unaligned(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(borders.Alignment, "__torch_function__", unaligned)


def slot_reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "copy_waits_for", lambda self, event: None)


def wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay where they were quantized."""
    monkeypatch.setattr(Group, "pack", lambda group, make_rest: None)
    monkeypatch.setattr(Engine, "attach", lambda engine, model: None)


@pytest.mark.parametrize("bug", [no_borders, no_alignment, slot_reused_too_early, wrong_device])
def test_the_bug_is_caught(bug: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with pytest.raises((RuntimeError, AssertionError)):
        for name in ("explicit", "auto_cpu"):
            test_spread_is_resident("none", name, folder, tmp_path)
