"""What users of diffusers reported of offloading quantized models, done here; and, where it shows, how it fails there.

The numbers are those of https://github.com/huggingface/diffusers. What diffusers 0.42 does is shown where the cause
lies, because its group offloading assigns `param.data` across devices, which tensors of this fake device do not allow.
"""

import gc
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.config.offload import OffloadConfig
from qexp.offloading.payload import leaves, sites
from tests.offloading import model_zoo as zoo
from tests.offloading.on_fake_device.harness import DEVICE, compare, live_bytes, offload, on_device, problems
from tests.products import exhaustive, pairwise, representatives

ON_DEVICE = (
    "bitsandbytes",
    "bitsandbytes_fp4",
    "bitsandbytes_int8",
)  # the library has double quantization for real ones only
LEVELS = ("leaf", "block")
LOADED_SO = representatives(
    product(["model", "sequential", "leaf", "block"], ON_DEVICE),
    [("leaf", "bitsandbytes"), ("block", "bitsandbytes_int8")],
)
QUANTO = [  # by default one whose codes fill bytes and one whose codes are packed
    *pairwise(["quanto_int8", "quanto_int4"], LEVELS, [False, None], [False, True]),
    *(exhaustive(*case) for case in product(["quanto_int2", "quanto_float8"], LEVELS, [False, None], [False, True])),
]


def devices(model: nn.Module) -> set[str]:
    """Where the bytes of all values are, those of inner tensors and quant states included."""
    found = [leaf for module in model.modules() for store, name in sites(module) for leaf in leaves(store[name])]
    return {str(leaf.device) for leaf in found}


def answers(model: nn.Module) -> list[torch.Tensor]:
    return [output.cpu() for output in zoo.outputs(model, [batch.to(DEVICE) for batch in zoo.inputs(model)])]


# Issue 12719: bitsandbytes with a device map raises "Cannot copy out of meta tensor": hooks move quant states that are
# on meta. (Pull request 12799 would turn low-memory loading off.)


@pytest.mark.parametrize(("strategy", "backend"), LOADED_SO)
def test_12719_a_low_memory_load_leaves_nothing_on_meta_that_would_have_to_be_moved(
    backend: str, strategy: str
) -> None:
    before = live_bytes()
    model = zoo.load(backend, depth=2, device=str(DEVICE))  # from a skeleton on meta
    assert devices(model) == {str(DEVICE)}
    expected = answers(model)
    handle = offload(model, OffloadConfig(strategy, "cpu"))
    assert devices(model) == {"cpu", str(DEVICE)} or strategy == "model"  # two parameters of the model itself stay
    assert all(torch.equal(a, b) for a, b in zip(answers(model), expected, strict=True))
    handle.remove()
    assert devices(model) == {str(DEVICE)}
    del model, handle, expected
    gc.collect()
    assert live_bytes() - before < 512  # the library keeps a table of its code values


@pytest.mark.parametrize("backend", representatives(ON_DEVICE, ["bitsandbytes", "bitsandbytes_int8"]))
def test_12719_with_device_map_balanced_the_model_answers_as_on_one_device(backend: str) -> None:
    expected = answers(zoo.load(backend, device=str(DEVICE)))
    model = zoo.load(backend, device=str(DEVICE), device_map="balanced", max_memory={0: 70_000, 1: 10**9})
    assert devices(model) == {"fake:0", "fake:1"}
    assert all(torch.equal(a, b) for a, b in zip(answers(model), expected, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_fp4", "bitsandbytes_nf4_dq"])
def test_12719_the_peer_fails_so(backend: str) -> None:
    from accelerate import cpu_offload

    model = zoo.load(backend)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        cpu_offload(model, execution_device=DEVICE)
        answers(model)


# Issue 12610: quanto int8 with group offloading, "weights on cpu, mat1 on gpu": the wrapper names the new device, while
# its inner tensors stay where they were. Pull request 14038 swaps whole wrappers, at both levels, with and without
# streams, and does not pin them.


def test_12610_the_wrapper_and_its_inner_tensors_are_on_one_device_in_every_forward() -> None:
    model = on_device(zoo.make("quanto_int8"))
    seen: list[set[torch.device]] = []

    def look(module: nn.Module, *_: object) -> None:
        weight = module.weight
        seen.append({weight.device, weight.data.device, weight._data.device, weight._scale.device})

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    offload(model, OffloadConfig("block", "cpu"))
    for layer in layers:  # after the engine's hooks
        layer.register_forward_pre_hook(look)
    answers(model)
    assert len(layers) == 8 and len(seen) == 3 * len(layers)
    assert all(places == {DEVICE} for places in seen)
    assert {leaf.device.type for layer in layers for leaf in leaves(layer.weight)} == {"cpu"}


def test_12610_the_peer_fails_so() -> None:
    """What its group offloading does with every parameter, as `param.data = param.data.to(device)`."""
    param, other = zoo.make("quanto_int8").embed.weight, zoo.make("quanto_int8").embed.weight
    inner = param._data
    param.data = other.data
    assert param._data is inner is not other._data


@pytest.mark.parametrize(("kind", "strategy", "use_stream", "low_cpu_mem"), QUANTO)
def test_14038_quanto_at_both_levels(
    kind: str, strategy: str, use_stream: bool | None, low_cpu_mem: bool, tmp_path: Path
) -> None:
    config = OffloadConfig(strategy, "cpu", use_stream=use_stream, low_cpu_mem=low_cpu_mem)
    pair = compare(kind, config, tmp_path, starts_on_device=True)
    assert problems(pair, config) == []


# Issue 13281: torchao with streams: pinning a wrapper raises, or strips it. Float8 is the reported one; Intx raises
# today. Issue 14433: torchao int8 with streams and low_cpu_mem: the copy on the host is the live parameter itself, and
# pinning meets a device tensor.


@pytest.mark.parametrize(
    ("kind", "strategy", "starts_on_device", "low_cpu_mem"),
    pairwise(["torchao_float8wo_e4m3", "torchao_int8wo", "torchao_intx"], LEVELS, [False, True], [False, True]),
)
def test_13281_and_14433_torchao_with_streams(
    kind: str, strategy: str, starts_on_device: bool, low_cpu_mem: bool
) -> None:
    config = OffloadConfig(strategy, "cpu", low_cpu_mem=low_cpu_mem)
    pair = compare(kind, config, None, starts_on_device=starts_on_device)
    assert problems(pair, config) == []


@pytest.mark.exhaustive
def test_13281_the_peer_fails_so() -> None:
    from diffusers.hooks import apply_group_offloading

    with pytest.raises(NotImplementedError, match=r"is_pinned|pin_memory"):
        apply_group_offloading(zoo.make("torchao_intx"), DEVICE, offload_type="leaf_level", use_stream=True)


@pytest.mark.exhaustive
def test_14433_the_peer_fails_so() -> None:
    """What it keeps on the host is the parameter itself, which it then moves; and what has moved cannot be pinned."""
    from diffusers.hooks.group_offloading import ModuleGroup

    weight = zoo.make("torchao_int8wo").embed.weight
    assert ModuleGroup._to_cpu(weight, low_cpu_mem_usage=True) is weight
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        weight.to(DEVICE).pin_memory()
