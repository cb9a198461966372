"""Planned maps: accelerate's for dense models, and within the limits for all."""

import logging
import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from qexp.loading.device_map_planner import plan_devices
from qexp.system.memory import without_collector

KINDS = ["Block", "Layer", "Part", "Other"]
CLASSES = {kind: type(kind, (nn.Module,), {}) for kind in KINDS}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # there are no such devices


def random_tree(rng: random.Random, depth: int, *, buffers: bool = True) -> nn.Module:
    """Names at different depths are alike, as in real models."""
    module = CLASSES[rng.choice(KINDS)]()
    for index in range(rng.choice([0, 0, 1, 2])):
        size = rng.choice([1, 5, 40, 200])
        module.register_parameter(f"p{index}", nn.Parameter(torch.empty(size, device="meta")))
    for index in range(rng.choice([0, 0, 0, 1]) if buffers else 0):
        module.register_buffer(f"b{index}", torch.empty(rng.choice([1, 30]), device="meta"))
    for index in range(rng.randint(1, 4) if depth else 0):
        module.add_module(f"m{index}", random_tree(rng, rng.randint(0, depth - 1), buffers=buffers))
    return module


def tie(rng: random.Random, model: nn.Module) -> None:
    owners = [(m, n) for _, child in model.named_children() for m in child.modules() for n in m._parameters]
    if len(owners) > 1:
        (first, name), (second, other) = rng.sample(owners, 2)
        second._parameters[other] = first._parameters[name]


def limits_for(rng: random.Random, total: int) -> dict[Any, int]:
    devices = [*range(rng.randint(0, 3)), *rng.choice([[], ["cpu"], ["cpu", "disk"]])]
    return {device: int(total * rng.choice([0.05, 0.2, 0.4, 0.7, 1.1])) for device in devices} or {"cpu": total}


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def device_of(devices: dict[str, Any], name: str) -> Any:
    while name and name not in devices:
        name = name.rpartition(".")[0]
    return devices[name]


@pytest.mark.parametrize("device_map", ["sequential", "auto", "balanced_low_0"])
@pytest.mark.parametrize("seed", range(15))
def test_a_dense_model_is_placed_as_accelerate_places_it(seed: int, device_map: str) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    rng = random.Random(seed)
    model = random_tree(rng, 4, buffers=False)
    no_split = rng.sample(KINDS, rng.randint(0, 2))
    nbytes = {name: tensor.nbytes for name, tensor in named_tensors(model).items()}
    limits = limits_for(rng, max(sum(nbytes.values()), 1))
    limits.pop("disk", None)  # get_balanced_memory takes that for the name of a torch device
    expected = dict(limits)
    if device_map != "sequential":
        expected = get_balanced_memory(model, expected, no_split, low_zero=device_map == "balanced_low_0")
    found = plan_devices(model, nbytes, {}, device_map, limits, no_split)
    assert found == infer_auto_device_map(model, expected, no_split_module_classes=no_split)


@pytest.mark.parametrize("ties", [0, 1, 3])
@pytest.mark.parametrize("seed", range(40))
def test_a_plan_keeps_limits_blocks_and_ties(seed: int, ties: int) -> None:
    rng = random.Random(f"{seed} {ties}")
    model = random_tree(rng, 4)
    for _ in range(ties):
        tie(rng, model)
    no_split, tensors = rng.sample(KINDS, rng.randint(0, 2)), named_tensors(model)
    sizes = {id(tensor): rng.choice([1, 7, 40, 333]) for tensor in tensors.values()}
    total = sum(sizes.values())
    limits = limits_for(rng, max(total, 1))
    device_map = rng.choice(["sequential", "auto", "balanced_low_0"])
    nbytes = {name: sizes[id(tensor)] for name, tensor in tensors.items()}
    found = plan_devices(model, nbytes, {}, device_map, limits, no_split)
    places: dict[int, set[Any]] = {}
    for name, tensor in tensors.items():
        places.setdefault(id(tensor), set()).add(device_of(found, name))
    assert all(len(devices) == 1 for devices in places.values())  # what is tied is together
    used: Counter[Any] = Counter()
    for number, (device,) in places.items():
        used[device] += sizes[number]
    assert all(used[device] <= room for device, room in limits.items() if device != "disk")
    for path, module in model.named_modules():
        if path and type(module).__name__ in no_split:
            below = {device_of(found, name) for name in tensors if name.startswith(f"{path}.")}
            assert len(below) <= 1, path


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta")


def test_each_tensor_counts_the_bytes_that_it_will_have() -> None:
    model, limits = nn.Sequential(linear(100, 100), linear(100, 100)), dict[Any, int]({0: 12_000, "cpu": 200_000})
    for nbytes, device in ((40_000, "cpu"), (5_000, 0)):
        sizes = {"0.weight": nbytes, "1.weight": nbytes}
        assert set(plan_devices(model, sizes, {}, "sequential", limits, []).values()) == {device}


def test_what_is_tied_by_name_alone_is_together_and_counts_once() -> None:
    """Room for two and a half of 100 bytes, of which 100 are kept while a layer of that size is still to come."""
    names = ("embed", "body", "more", "head")
    model, nbytes = nn.ModuleDict({name: linear(10, 10) for name in names}), {f"{name}.weight": 100 for name in names}
    limits: dict[Any, int] = {0: 250, "cpu": 1000}
    rest = {"body": "cpu", "more": "cpu"}
    tied = plan_devices(model, nbytes, {"head.weight": "embed.weight"}, "sequential", limits, [])
    assert tied == {"embed": 0, **rest, "head": 0}
    assert plan_devices(model, nbytes, {}, "sequential", limits, []) == {"embed": 0, **rest, "head": "cpu"}


def test_chains_of_ties_are_together() -> None:
    """a.x with b.x, b.y with c.y: b has been placed with a when it is c's turn."""
    model = nn.ModuleDict({name: CLASSES["Part"]() for name in "abc"})
    x, y = (nn.Parameter(torch.empty(10, device="meta")) for _ in range(2))
    for name, own, tensor in (("a", "x", x), ("b", "x", x), ("b", "y", y), ("c", "y", y)):
        model[name].register_parameter(own, tensor)
    found = plan_devices(model, dict.fromkeys(named_tensors(model), 40), {}, "sequential", {0: 10, "cpu": 500}, [])
    assert found == {"": "cpu"}


def test_a_module_whose_name_is_a_part_of_a_tied_ones_is_not_tied() -> None:
    tied, again = linear(2, 2), linear(2, 2)
    again.weight = tied.weight
    parts = {"x": nn.ModuleDict({"head": tied}), "y": again, "head": linear(2, 2), "z": linear(2, 2)}
    model = nn.ModuleDict(parts)
    nbytes = dict.fromkeys(named_tensors(model), 10)
    found = plan_devices(model, nbytes, {}, "sequential", {0: 25, "cpu": 90}, [])
    assert found == {"x": 0, "y": 0, "head": "cpu", "z": "cpu"}


def test_accelerators_may_begin_with_any_number() -> None:
    model = nn.Sequential(*(linear(10, 10) for _ in range(4)))
    limits, nbytes = dict[Any, int]({1: 300, 3: 300, "cpu": 900, "disk": 900}), dict.fromkeys(named_tensors(model), 100)
    assert set(plan_devices(model, nbytes, {}, "balanced", limits, []).values()) == {1, 3}
    assert set(plan_devices(model, nbytes, {}, "balanced_low_0", {1: 600, 3: 600}, []).values()) == {3}


def test_five_thousand_tensors_take_a_second() -> None:
    blocks = [nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(10))) for _ in range(250)]
    model = nn.Sequential(*blocks)
    nbytes = {name: tensor.nbytes for name, tensor in named_tensors(model).items()}
    third = sum(nbytes.values()) // 3
    started = time.process_time()
    with without_collector():  # as a load plans
        plan_devices(model, nbytes, {}, "auto", {0: third, 1: third, "cpu": 3 * third}, [])
    assert len(nbytes) == 5_000 and time.process_time() - started < 2
