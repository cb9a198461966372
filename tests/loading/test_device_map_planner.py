"""The planner is accelerate's, module for module, where all tensors have the bytes that accelerate counts."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import pytest
import torch
from torch import nn

from qexp.loading.device_map_planner import Plan, balanced_limits, build_tree, merge_entries
from qexp.system.memory import without_collector

KINDS = ["Block", "Layer", "Part", "Other"]
CLASSES = {kind: type(kind, (nn.Module,), {}) for kind in KINDS}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # there are no such devices


def random_tree(rng: random.Random, depth: int, path: str = "m") -> nn.Module:
    """Names are unique: accelerate looks for tied ones by substring."""
    module = CLASSES[rng.choice(KINDS)]()
    for index in range(rng.choice([0, 0, 1, 2])):
        size = rng.choice([1, 5, 40, 200])
        module.register_parameter(f"{path}p{index}", nn.Parameter(torch.empty(size, device="meta")))
    for index in range(rng.choice([0, 0, 0, 1])):
        module.register_buffer(f"{path}b{index}", torch.empty(rng.choice([1, 30]), device="meta"))
    for index in range(rng.randint(1, 4) if depth else 0):
        module.add_module(f"{path}{index}", random_tree(rng, rng.randint(0, depth - 1), f"{path}{index}x"))
    return module


def tie(rng: random.Random, model: nn.Module) -> None:
    owners = [(m, n) for _, child in model.named_children() for m in child.modules() for n in m._parameters]
    if len(owners) > 1:
        (first, name), (second, other) = rng.sample(owners, 2)
        second._parameters[other] = first._parameters[name]


def limits_for(rng: random.Random, total: int) -> dict[Any, int]:
    devices = [*range(rng.randint(0, 3)), *rng.choice([[], ["cpu"], ["cpu", "disk"]])]
    return {device: int(total * rng.choice([0.05, 0.2, 0.4, 0.7, 1.1])) for device in devices} or {"cpu": total}


def dense_nbytes(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.nbytes for name, tensor in tensors}


def device_of(devices: dict[str, Any], name: str) -> Any:
    while name and name not in devices:
        name = name.rpartition(".")[0]
    return devices.get(name)


@pytest.mark.filterwarnings("ignore:Current model requires")
@pytest.mark.parametrize("ties", [0, 1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_the_plan_is_that_of_accelerate(seed: int, ties: int) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import find_tied_parameters

    rng = random.Random(f"{seed} {ties}")
    model = random_tree(rng, 4)
    for _ in range(ties):
        tie(rng, model)
    no_split = rng.sample(KINDS, rng.randint(0, 2))
    nbytes = dense_nbytes(model)
    root = build_tree(model, nbytes.__getitem__, no_split)
    assert root.nbytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    limits = limits_for(rng, max(root.nbytes, 1))
    found = Plan(root, limits, find_tied_parameters(model)).devices
    assert all(device_of(found, name) is not None for name in nbytes)
    assert all(device_of(merge_entries(found), name) == device_of(found, name) for name in nbytes)
    assert all(len({device_of(found, name) for name in names}) == 1 for names in find_tied_parameters(model))
    try:
        expected = infer_auto_device_map(model, dict(limits), no_split_module_classes=no_split, clean_result=False)
    except IndexError:
        assert ties  # it cannot place what is tied to a parameter of a module that it has split
        return
    extra = {name for name in found if name not in expected}
    assert {name: device for name, device in found.items() if name not in extra} == expected
    assert all(model.get_submodule(name.rpartition(".")[0])._buffers.keys() for name in extra)  # it forgets these
    merged = merge_entries({name: device for name, device in found.items() if name not in extra})
    assert merged == infer_auto_device_map(model, dict(limits), no_split_module_classes=no_split)


@pytest.mark.parametrize("low_zero", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_balanced_limits_are_those_of_accelerate(seed: int, low_zero: bool) -> None:
    from accelerate.utils import get_balanced_memory

    rng = random.Random(seed)
    model = random_tree(rng, 3)
    if seed % 2:
        tie(rng, model)
    no_split = rng.sample(KINDS, rng.randint(0, 2))
    root = build_tree(model, dense_nbytes(model).__getitem__, no_split)
    limits = limits_for(rng, root.nbytes)
    limits.pop("disk", None)  # it takes that for the name of a torch device
    expected = get_balanced_memory(model, dict(limits), no_split, low_zero=low_zero)
    assert balanced_limits(root, limits, no_split, low_zero=low_zero) == expected


def test_each_tensor_counts_the_bytes_that_it_will_have() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    dense = build_tree(model, lambda name: 40_000, [])
    packed = build_tree(model, lambda name: 5_000, [])
    assert set(Plan(dense, {0: 12_000, "cpu": 200_000}, []).devices.values()) == {"cpu"}
    assert set(Plan(packed, {0: 12_000, "cpu": 200_000}, []).devices.values()) == {0}


def test_tied_parameters_of_the_model_itself() -> None:
    from accelerate.utils import find_tied_parameters

    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model.register_parameter("own", model[1].weight)
    nbytes = dense_nbytes(model)
    plan = Plan(build_tree(model, nbytes.__getitem__, []), {0: 1000, "cpu": 10_000}, find_tied_parameters(model))
    assert plan.devices["own"] == plan.devices["1"]


def cpu_seconds_of_planning(blocks: int) -> float:
    """For a model of 20 tensors in each block, the least of three."""
    linear = [[nn.Linear(8 + i, 8, device="meta") for i in range(10)] for _ in range(blocks)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(*one) for one in linear), "head": nn.Linear(8, 8)})
    nbytes, seconds = dense_nbytes(model), []
    assert len(nbytes) > 20 * blocks
    for _ in range(3):
        started = time.process_time()
        root = build_tree(model, nbytes.__getitem__, [])
        third = root.nbytes // 3
        limits = balanced_limits(root, {0: third, 1: third, "cpu": root.nbytes}, [], low_zero=False)
        merge_entries(Plan(root, limits, []).devices)
        seconds.append(time.process_time() - started)
    return min(seconds)


@pytest.mark.own_process
def test_ten_thousand_tensors_take_less_than_a_second_and_time_is_linear() -> None:
    with without_collector():  # as a load plans
        seconds = cpu_seconds_of_planning(500)
        assert seconds < 1
        assert seconds < 9 * cpu_seconds_of_planning(125)  # four times; squares would be 16
