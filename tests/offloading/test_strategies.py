"""An offloaded model is the resident model, on every backend and for every strategy; and it really is offloaded."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError
from qexp.offloading.payload import leaves, module_nbytes, sites
from qexp.offloading.strategies import Offload, apply_offload
from tests.offloading import model_zoo as zoo
from tests.products import representatives

GIB = 2**30
CPU = torch.device("cpu")
STRATEGIES = {
    "leaf_cpu": OffloadConfig("leaf", "cpu"),
    "leaf_disk": OffloadConfig("leaf", "disk"),
    "block_disk": OffloadConfig("block", "disk"),
    "block_of_two_disk": OffloadConfig("block", "disk", num_blocks_per_group=2),
    "sequential_disk": OffloadConfig("sequential", "disk"),
}


def offload(model: nn.Module, config: OffloadConfig, store: Path | None = None) -> Offload:
    return apply_offload(model, config, device=CPU, block_lists=["blocks"], store=store)


def snapshot(model: nn.Module) -> list[tuple[str, type, list[Tensor]]]:
    """Name, type and bytes of every value of every module."""
    return [
        (f"{name}.{key}", type(store[key]), [leaf.clone() for leaf in leaves(store[key])])
        for name, module in model.named_modules()
        for store, key in sites(module)
    ]


def assert_same(found: list[tuple[str, type, list[Tensor]]], expected: list[tuple[str, type, list[Tensor]]]) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (name, _, parts), (_, _, others) in zip(found, expected, strict=True):
        layouts = [[(leaf.dtype, leaf.shape, leaf.stride()) for leaf in row] for row in (parts, others)]
        assert layouts[0] == layouts[1], name
        for part, other in zip(parts, others, strict=True):
            assert torch.equal(part.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


HELD_APART = (  # kinds that differ in how their bytes are held; others differ from one of these in their codes
    "fp32", "bitsandbytes_nf4_nested", "bitsandbytes_nf4_repacked", "bitsandbytes_int8_outliers", "torchao_int8wo",
    "torchao_intx", "quanto_int4", "gguf_q8_0",
)  # fmt: skip


def cases() -> list[Any]:
    """By default, every strategy of one kind, two of each other way to hold bytes; models that have run or not."""
    kept = [
        (kind, strategy, (row + column) % 2 == 0)
        for row, kind in enumerate(HELD_APART)
        for column, strategy in enumerate(STRATEGIES)
        if kind == "torchao_int8wo" or (column - row) % len(STRATEGIES) in (0, 3)
    ]
    return representatives(product(zoo.QUANTIZERS, STRATEGIES, [False, True]), kept)


@cache
def resident_outputs(kind: str) -> list[Tensor]:
    model = zoo.make(kind)
    return zoo.outputs(model, zoo.inputs(model))


@pytest.mark.parametrize(("kind", "strategy", "used_before"), cases())
def test_output_is_bit_identical_and_the_way_back_is_exact(
    kind: str, strategy: str, used_before: bool, tmp_path: Path
) -> None:
    model, expected = zoo.make(kind), resident_outputs(kind)
    batches = zoo.inputs(model)
    if used_before:  # the first forward moves LLM.int8 weights into the module's state and may repack 4-bit weights
        zoo.outputs(model, batches[:1])
    before = snapshot(model)
    handle = offload(model, STRATEGIES[strategy], tmp_path)
    found = zoo.outputs(model, batches)
    statistics = handle.statistics()
    handle.remove()

    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    repacks_now = kind.endswith("repacked") and not used_before
    reads_ahead = STRATEGIES[strategy].resolved("cpu").use_stream  # into slots that may hold several groups
    if repacks_now:  # then the group's bytes change after their first transfer
        assert statistics["offload/copies"] >= (1 if reads_ahead else 3) * statistics["offload/groups"]
    elif reads_ahead:
        assert statistics["offload/copies"] >= statistics["offload/groups"]
        assert statistics["offload/transferred_gib"] >= statistics["offload/payload_gib"]
    else:
        assert statistics["offload/copies"] == 3 * statistics["offload/groups"]
        assert statistics["offload/transferred_gib"] == pytest.approx(3 * statistics["offload/payload_gib"])
    if not repacks_now:
        assert_same(snapshot(model), before)
    assert torch.equal(zoo.outputs(model, batches[:1])[0], expected[0])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", representatives(zoo.QUANTIZERS, HELD_APART))
def test_payload_is_every_byte_of_the_groups_and_nothing_stays_behind(kind: str, tmp_path: Path) -> None:
    model = zoo.make(kind)
    total = module_nbytes(model)
    top_level = 2 * zoo.WIDTH * model.scale.element_size()  # scale and shift: no forward of their own
    handle = offload(model, STRATEGIES["block_disk"], tmp_path)
    statistics = handle.statistics()
    count = sum(len(group.places) for group in handle.groups)
    handle.remove()
    payload = statistics["offload/payload_gib"] * GIB
    assert total - top_level <= payload <= total - top_level + 255 * count  # each leaf is padded to 256 bytes
    assert statistics["offload/groups"] == 5  # embed, three blocks, head
    assert statistics["offload/resident_gib"] * GIB == top_level
    assert statistics["offload/at_rest_device_gib"] == 0


def test_what_somebody_else_holds_counts_as_left_on_the_device(tmp_path: Path, log_lines: list[str]) -> None:
    model = zoo.make("torchao_int8wo")
    kept = model.blocks[1].fc1.weight.qdata  # 128 × 64 bytes of one inner tensor
    handle = offload(model, STRATEGIES["leaf_disk"], tmp_path)
    assert handle.statistics()["offload/at_rest_device_gib"] * GIB == kept.numel() == 128 * 64
    assert any("still held" in line for line in log_lines)
    del kept
    assert handle.statistics()["offload/at_rest_device_gib"] == 0


def test_host_memory_is_no_rest_for_a_model_that_computes_there() -> None:
    handle = offload(zoo.make("fp32"), STRATEGIES["leaf_cpu"])
    statistics = handle.statistics()
    assert statistics["offload/at_rest_device_gib"] == statistics["offload/payload_gib"] > 0


def test_a_component_as_a_whole_is_read_once_and_makes_room_for_the_next(tmp_path: Path) -> None:
    models = [zoo.make("bitsandbytes_nf4_nested"), zoo.make("bitsandbytes_nf4_nested")]
    expected = zoo.outputs(zoo.make("bitsandbytes_nf4_nested"), zoo.inputs(models[0]))
    handles = [offload(model, OffloadConfig("model", "disk"), tmp_path / str(i)) for i, model in enumerate(models)]
    for _ in range(2):
        for number, model in enumerate(models):
            found = zoo.outputs(model, zoo.inputs(model))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            rings = [handle.statistics()["offload/ring_gib"] > 0 for handle in handles]
            assert rings == [number == 0, number == 1]
    assert [handle.statistics()["offload/copies"] for handle in handles] == [2, 2]  # one for each turn, of 3 forwards
    for handle in handles:
        handle.remove()


def test_a_budget_keeps_groups_in_memory(tmp_path: Path) -> None:
    model, resident = zoo.make("quanto_int4"), zoo.make("quanto_int4")
    blocks = offload(zoo.make("quanto_int4"), OffloadConfig("block", "disk"), tmp_path / "all").groups
    budget = 2 * max(group.nbytes for group in blocks) + 4096
    handle = offload(model, OffloadConfig("block", "disk", resident_gib=budget / GIB), tmp_path / "some")
    travelling = [group.name for group in handle.groups]
    assert 0 < len(travelling) <= len(blocks) - 2
    batches = zoo.inputs(model)
    assert all(
        torch.equal(a, b) for a, b in zip(zoo.outputs(model, batches), zoo.outputs(resident, batches), strict=True)
    )
    assert handle.statistics()["offload/resident_gib"] * GIB <= budget


def test_none_moves_nothing() -> None:
    model = zoo.make("fp32")
    handle = offload(model, OffloadConfig())
    statistics = handle.statistics()
    assert statistics["offload/groups"] == statistics["offload/copies"] == 0
    assert statistics["offload/at_rest_device_gib"] * GIB == module_nbytes(model)
    handle.remove()


def test_apply_again_after_remove(tmp_path: Path) -> None:
    model = zoo.make("bitsandbytes_nf4_nested")
    batches = zoo.inputs(model)
    expected = zoo.outputs(model, batches)
    for strategy in ("leaf_disk", "block_disk"):
        handle = offload(model, STRATEGIES[strategy], tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(zoo.outputs(model, batches), expected, strict=True))
        handle.remove()
        handle.remove()  # a second time does nothing
    assert not any(hasattr(module, "_qexp_offload") for module in model.modules())


def test_conflicts_are_refused_and_leave_the_model_alone(tmp_path: Path) -> None:
    model = zoo.make("fp32")
    before = snapshot(model)
    leaf = STRATEGIES["leaf_disk"]
    handle = offload(model, leaf, tmp_path)
    with pytest.raises(ConfigError, match="'embed' is offloaded already"):
        offload(model, leaf, tmp_path)
    handle.remove()
    model.blocks[0]._hf_hook = object()
    with pytest.raises(ConfigError, match=r"'blocks\.0' has a hook of accelerate"):
        offload(model, leaf, tmp_path)
    del model.blocks[0]._hf_hook
    with pytest.raises(ConfigError, match="needs a folder"):
        offload(model, leaf, None)
    with pytest.raises(ConfigError, match="not settled"):
        offload(model, OffloadConfig("leaf", "auto"), tmp_path)
    assert_same(snapshot(model), before)


def test_hooks_of_other_libraries_are_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload
    from diffusers.hooks import apply_group_offloading

    hooked = zoo.make("fp32")
    cpu_offload(hooked, execution_device=CPU)
    with pytest.raises(ConfigError, match=r"has a hook of accelerate \(_hf_hook\); remove it, or use offload=none"):
        offload(hooked, STRATEGIES["leaf_disk"], tmp_path)
    hooked = zoo.make("fp32")
    apply_group_offloading(hooked, CPU, offload_type="leaf_level")
    with pytest.raises(ConfigError, match=r"has a hook of diffusers \(_diffusers_hook\); remove it"):
        offload(hooked, STRATEGIES["block_disk"], tmp_path)
    assert not any(tmp_path.iterdir())


CONFLICTS = {
    "offload.use_stream=true needs a device with streams": OffloadConfig("leaf", "cpu", use_stream=True),
    "offload.record_stream=true needs a stream": OffloadConfig("block", "cpu", record_stream=True),
}


@pytest.mark.parametrize("rule", CONFLICTS)
def test_streams_without_an_accelerator_are_refused_and_leave_the_model_alone(rule: str) -> None:
    model = zoo.make("torchao_int8wo")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=rule):
        offload(model, CONFLICTS[rule])
    assert_same(snapshot(model), before)
    assert not any(hasattr(module, "_qexp_offload") for module in model.modules())


def test_weights_repacked_for_the_cpu_are_refused_elsewhere() -> None:
    model = zoo.make("bitsandbytes_nf4_repacked")
    zoo.outputs(model, zoo.inputs(model, 1))
    with pytest.raises(ConfigError, match="'embed' has 4-bit weights that bitsandbytes repacked for the CPU"):
        apply_offload(model, OffloadConfig("leaf", "cpu"), device=torch.device("cuda:0"), block_lists=[], store=None)


def test_block_lists_that_do_not_fit_are_refused() -> None:
    block = OffloadConfig("block", "cpu")
    with pytest.raises(ConfigError, match="names none; use blocks, or offload=leaf"):
        apply_offload(zoo.make("fp32"), block, device=CPU, block_lists=[], store=None)
    with pytest.raises(ConfigError, match=r"'layers' is not an nn.ModuleList of Net; use blocks"):
        apply_offload(zoo.make("fp32"), block, device=CPU, block_lists=["layers"], store=None)
    with pytest.raises(ConfigError, match=r"'embed' is not an nn.ModuleList"):
        apply_offload(zoo.make("fp32"), block, device=CPU, block_lists=["embed"], store=None)
    with pytest.raises(ConfigError, match=r"Linear has no nn.ModuleList"):
        apply_offload(nn.Linear(2, 2), block, device=CPU, block_lists=["blocks"], store=None)
    with pytest.raises(ConfigError, match="GELU has no weights"):
        apply_offload(nn.GELU(), OffloadConfig("leaf", "cpu"), device=CPU, block_lists=[], store=None)


def test_a_meta_tensor_is_refused_and_what_was_moved_comes_back(tmp_path: Path) -> None:
    model = zoo.make("fp32")
    model.head = nn.Linear(zoo.WIDTH, zoo.WIDTH, device="meta")
    embed = model.embed.weight.clone()
    with pytest.raises(ConfigError, match="'head' is on the meta device"):
        offload(model, STRATEGIES["leaf_disk"], tmp_path)
    assert torch.equal(model.embed.weight, embed)
    assert not any(tmp_path.iterdir())
    model.embed(torch.zeros(1, zoo.WIDTH))  # no hook is left
