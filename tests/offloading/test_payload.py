import gc
import weakref

import pytest
import torch
from torch import nn

from qexp.offloading.group import ALIGNMENT, Group
from qexp.offloading.host import Arena, aligned_buffer
from qexp.offloading.payload import as_bytes, flatten, leaves, module_nbytes, sites, span_bytes, true_nbytes
from tests.offloading import model_zoo as zoo

# A weight [128, 64] has 8192 elements. What its leaves occupy, by hand:
WEIGHT_BYTES = {
    "fp32": 8192 * 4,
    "bf16": 8192 * 2,
    "bitsandbytes_nf4": 4096 + 8192 // 64 * 4 + 16 * 4,  # nibbles, absmax of blocks of 64 in fp32, code
    "bitsandbytes_nf4_nested": 4096 + 128 + 16 * 4 + 4 + 1 * 4 + 256 * 4,  # uint8 absmax, code, offset, state2
    "bitsandbytes_int8": 8192 + 128 * 4,  # CB is the data itself, SCB a row
    "torchao_float8wo_e4m3": 8192 + 128 * 4,
    "quanto_int4": 4096 + 128 * (4 + 4),  # groups of 64: scale and shift in fp32
    "gguf_q8_0": 8192 // 32 * 34,  # 32 values and an fp16 scale
}


@pytest.mark.parametrize("kind", WEIGHT_BYTES)
def test_true_bytes_of_a_weight(kind: str) -> None:
    weight = zoo.make(kind).blocks[0].fc1.weight
    assert true_nbytes(weight) == WEIGHT_BYTES[kind]
    assert all(type(leaf) is torch.Tensor for leaf in leaves(weight))


def test_module_bytes_include_states_and_count_shared_memory_once() -> None:
    model = zoo.make("bitsandbytes_int8")
    before = module_nbytes(model)
    zoo.outputs(model, zoo.inputs(model, 1))  # moves CB and SCB from the weight into the module's state
    assert model.blocks[0].fc1.weight.SCB is None
    assert module_nbytes(model) == before
    tied = nn.Linear(16, 16, bias=False)
    assert module_nbytes(nn.Sequential(tied, tied)) == 16 * 16 * 4


@pytest.mark.parametrize("kind", zoo.QUANTIZERS)
def test_values_are_rebuilt_around_other_leaves_and_the_recipe_holds_no_bytes(kind: str) -> None:
    module = zoo.make(kind).blocks[0].fc1
    values = [store[name] for store, name in sites(module)]
    parts, rebuild = flatten(values)
    originals = [weakref.ref(part.untyped_storage()) for part in parts]
    copies = {part.data_ptr(): part.clone() for part in parts}
    for (store, name), old, new in zip(
        sites(module), values, rebuild([copies[p.data_ptr()] for p in parts]), strict=True
    ):
        assert type(new) is type(old) and isinstance(new, nn.Parameter) == isinstance(old, nn.Parameter)
        assert not hasattr(old, "__dict__") or vars(new).keys() == vars(old).keys()
        assert true_nbytes(new) == true_nbytes(old)
        for part, other in zip(leaves(new), leaves(old), strict=True):
            assert part.data_ptr() == copies[other.data_ptr()].data_ptr()
        store[name] = new
    del values, parts, old, other
    gc.collect()
    assert all(reference() is None for reference in originals)


def test_one_object_stays_one_object() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parts, rebuild = flatten([parameter, torch.zeros(2), parameter])
    first, _, last = rebuild(parts)
    assert first is last and len(parts) == 2
    linear = zoo.make("bitsandbytes_nf4_nested").embed
    parts, rebuild = flatten([linear.weight, linear.quant_state])
    weight, state = rebuild(parts)
    assert weight.quant_state is state and state is not linear.quant_state
    assert state.state2.absmax.data_ptr() == linear.quant_state.state2.absmax.data_ptr()


@pytest.mark.parametrize(
    "leaf",
    [
        torch.arange(24).reshape(4, 6).t(),
        torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)[:, 1:4],
        torch.ones(1, 5).expand(7, 5),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.ones(3, dtype=torch.float8_e4m3fn),
    ],
    ids=["transposed", "slice", "expanded", "scalar", "empty", "bool", "complex", "float8"],
)
def test_any_strided_tensor_survives_a_group(leaf: torch.Tensor) -> None:
    module = nn.Module()
    module.register_buffer("odd", torch.ones(3))  # 12 bytes: what follows must start at 256 all the same
    module.register_buffer("leaf", leaf)
    group = Group("test", [(module, [module])])
    group.pack(lambda name, nbytes, pieces: Arena(aligned_buffer(nbytes, torch.device("cpu")), pieces))
    restored = {name: value for (_, name), value in group.restore()}
    for found in (module.leaf, restored["leaf"]):
        assert found.shape == leaf.shape and found.stride() == leaf.stride() and found.dtype == leaf.dtype
        assert torch.equal(found.to(torch.complex64), leaf.to(torch.complex64))
        assert leaf.numel() == 0 or found.data_ptr() != leaf.data_ptr()
    assert leaf.numel() == 0 or module.leaf.data_ptr() % ALIGNMENT == 0
    assert as_bytes(leaf).numel() == span_bytes(leaf)
