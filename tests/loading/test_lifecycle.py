"""Whole loads of small models, by every backend: the right bytes in the right places, and nothing kept beyond need."""

import gc
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError, LoadError
from qexp.loading import lifecycle, prepare
from qexp.loading import weights as weights_module
from qexp.loading.component import plan_statistics
from qexp.loading.device_map import place
from qexp.loading.streaming import arena, stream
from qexp.offloading.payload import leaves, module_nbytes, true_nbytes
from qexp.offloading.placement import Placement
from qexp.quantizers.base import Quantizer, load_quantizer
from qexp.quantizers.rows import WeightSpec
from qexp.quantizers.torchao import TorchAoConfig
from qexp.system.memory import host_memory, release_freed_memory
from tests.backends import (
    BACKENDS,
    CPU,
    EVERY_WAY,
    EVERY_WAY_TO_QUANTIZE,
    QUANTIZING,
    REPRESENTATIVES,
    Stack,
    same_bytes,
    save_alike,
    save_stack,
)
from tests.loading.test_plan import KeepsFp32, Shared, Tied
from tests.loading.toys import WIDTH, Toy, load_toy, random_state, save_state, settings
from tests.products import representatives

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("toy"), random_state(Toy))


def names_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def stack_of(shapes: list[tuple[int, int]]) -> Callable[[], nn.Module]:
    return lambda: Stack(shapes, bias=False)


def fitting(backend: str, shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[int, int]]:
    """Those shapes that do not make a setting of the backend wrong (a group that does not divide)."""
    quantizer = load_quantizer(settings(backend).backend)

    def fits(shape: tuple[int, int]) -> bool:
        try:
            quantizer.reason_to_skip(WeightSpec("layer", shape, dtype))
        except ConfigError:
            return False
        return True

    return [shape for shape in shapes if fits(shape)]


# The right bytes in the right places


def test_without_a_quantizer_a_load_is_exact(folder: Path) -> None:
    model, state = load_toy(folder, settings("none")).model, random_state(Toy)
    tensors = names_of(model)
    assert set(tensors) == {*state, "position"}
    for name, tensor in state.items():
        assert torch.equal(tensors[name], tensor), name
    assert torch.equal(tensors["position"], torch.linspace(0, 1, WIDTH))  # in no checkpoint
    reference = Toy().eval()
    reference.load_state_dict(state)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_what_a_loaded_model_is(backend: str, folder: Path) -> None:
    loaded = load_toy(folder, settings(backend, compute_dtype="bfloat16"))
    tensors, state = names_of(loaded.model), random_state(Toy)
    assert not loaded.model.training and not any(module.training for module in loaded.model.modules())
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert not any(leaf.is_meta for tensor in tensors.values() for leaf in leaves(tensor))
    for name in ("blocks.1.norm.weight", "scale", "shift", "head.bias", "blocks.0.fc1.bias"):
        assert tensors[name].dtype == BF16 and torch.equal(tensors[name], state[name].to(BF16)), name
    assert tensors["steps"].dtype == torch.int64 and torch.equal(tensors["steps"], state["steps"])
    assert torch.equal(tensors["position"], torch.linspace(0, 1, WIDTH))
    assert isinstance(tensors["head.bias"], nn.Parameter) and not isinstance(tensors["shift"], nn.Parameter)
    with torch.no_grad():
        assert loaded.model(torch.ones(2, WIDTH, dtype=BF16)).isfinite().all()


def test_times_of_a_load_are_those_of_its_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow constructor is planning, a slow first use is warming up, and the caller waits for no more than the sum."""
    warm_up, check = lifecycle.warm_up, lifecycle.audit
    monkeypatch.setattr(lifecycle, "warm_up", lambda *arguments: (time.sleep(0.3), warm_up(*arguments)))
    monkeypatch.setattr(lifecycle, "audit", lambda *arguments: (time.sleep(0.2), check(*arguments)))

    def build() -> nn.Module:
        time.sleep(0.4)
        return Toy()

    started = time.perf_counter()
    times = load_toy(folder, settings("torchao"), build).times
    waited = time.perf_counter() - started
    assert times.plan > 0.4 and times.warm_up > 0.3 and times.read > 0.2
    assert times.plan + times.warm_up + times.read == times.total <= waited
    assert waited - times.total < 0.1  # nothing that takes time is left out


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_planned_bytes_are_measured_bytes(backend: str, tmp_path: Path) -> None:
    """Over the whole model, of odd shapes: fewer rows than a slice, no bias, a dimension of 1, a narrow layer."""
    for dtype in (FP32, BF16):
        shapes = fitting(backend, [(96, 64), (33, 96), (17, 34), (64, 17), (256, 256), (1, 256), (130, 2)], dtype)
        save_stack(tmp_path / str(dtype), shapes, dtype=dtype, bias=False)
        loaded = load_toy(tmp_path / str(dtype), settings(backend), stack_of(shapes))
        plan = loaded.plan.to_container()
        assert plan["quantized"] and len(plan["quantized"]) + len(plan["skipped"]) == len(shapes)
        for name, nbytes in plan["quantized"].items():
            assert true_nbytes(loaded.model.get_submodule(name).weight) == nbytes, (dtype, name)
        assert sum(true_nbytes(parameter) for parameter in loaded.model.parameters()) == plan["result_bytes"]


@pytest.mark.parametrize("backend", representatives(QUANTIZING, ["bitsandbytes_nf4_dq", "torchao", "gguf"]))
def test_statistics_of_a_plan(backend: str, folder: Path) -> None:
    loaded = load_toy(folder, settings(backend, skip_modules=("head",)))
    statistics = plan_statistics([loaded.plan], module_nbytes(loaded.model))
    quantized = [item for item in loaded.plan.items if item.spec is not None]
    assert statistics["load/quantized_modules"] == len(quantized) == 5
    assert statistics["load/skipped_modules"] == 1
    numel = sum(tensor.numel() for tensor in random_state(Toy).values())
    nbytes = sum(tensor.nbytes for tensor in random_state(Toy).values())
    assert statistics["memory/dense_weights_gib"] * 2**30 == nbytes
    assert statistics["memory/model_bits_per_weight"] == pytest.approx(8 * module_nbytes(loaded.model) / numel)
    weights = sum(item.source.shape[0] * item.source.shape[1] for item in quantized)
    measured = sum(true_nbytes(loaded.model.get_parameter(item.target)) for item in quantized)
    assert statistics["memory/bits_per_weight"] == pytest.approx(8 * measured / weights)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_workers_change_no_byte(backend: str, folder: Path) -> None:
    one = names_of(load_toy(folder, settings(backend), workers=1).model)
    many = names_of(load_toy(folder, settings(backend), workers=5).model)
    assert list(one) == list(many)
    for name in one:
        assert all(same_bytes(a, b) for a, b in zip(leaves(one[name]), leaves(many[name]), strict=True)), name


def test_shards_give_the_same_model_as_one_file(folder: Path, tmp_path: Path) -> None:
    """Biases in another file than their weights."""
    state = random_state(Toy)
    files = {name: f"part-{'bias' in name}.safetensors" for name in state}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text("{}")
    sharded, single = (names_of(load_toy(path, settings()).model) for path in (tmp_path, folder))
    for name in single:
        assert all(same_bytes(a, b) for a, b in zip(leaves(sharded[name]), leaves(single[name]), strict=True)), name


def test_modules_kept_in_fp32(folder: Path) -> None:
    loaded = load_toy(folder, settings("torchao", compute_dtype="float16", keep_in_fp32_modules=("head",)), KeepsFp32)
    tensors, state = names_of(loaded.model), random_state(Toy)
    for name in ("head.weight", "scale", "blocks.0.norm.bias", "blocks.1.fc2.weight"):
        assert tensors[name].dtype == FP32 and torch.equal(tensors[name], state[name]), name
    assert tensors["embed.bias"].dtype == FP16


LENGTHS = (4, 12, 17, 24, 34, 264)
ROWS = (
    representatives(  # by default, each length for a kernel that crashes on some, two for each other way to hold bytes
        product(BACKENDS, LENGTHS),
        [
            (backend, columns)
            for number, backend in enumerate(REPRESENTATIVES)
            for columns in (LENGTHS if backend.startswith("quanto") else (LENGTHS[number % 3], LENGTHS[3 + number % 3]))
        ],
    )
)


@pytest.mark.parametrize(("backend", "columns"), ROWS)
def test_rows_of_any_length_are_computed_as_they_are_dequantized(backend: str, columns: int, tmp_path: Path) -> None:
    """In bf16, where libraries have kernels of their own; one of them crashes on rows that 16 does not divide."""
    shapes = fitting(backend, [(WIDTH, columns), (24, WIDTH)], BF16)
    if len(shapes) < 2:
        pytest.skip("its groups do not divide these rows")
    save_stack(tmp_path, shapes, dtype=BF16, bias=False)
    model: Any = load_toy(tmp_path, settings(backend), stack_of(shapes)).model
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(BF16)
    with torch.no_grad():
        answer = model(x).float()
        dense = model if backend == "none" else model.hf_quantizer.dequantize(model)
        assert (answer - dense(x).float()).norm() / answer.norm() < 0.05


# Two names


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_a_tied_parameter_gets_its_values_under_both_names(backend: str, tmp_path: Path) -> None:
    state = random_state(Tied)
    del state["head.weight"]
    loaded = load_toy(save_state(tmp_path, state), settings(backend), Tied)
    assert torch.equal(loaded.model.get_parameter("embed.weight"), state["embed.weight"])
    head = loaded.model.get_submodule("head")
    if backend == "none":
        assert head.weight is loaded.model.get_parameter("embed.weight")  # once in memory
    else:
        expected = load_quantizer(settings(backend).backend).create_quantized_param(
            next(item.spec for item in loaded.plan.items if item.target == "head.weight" and item.spec),
            [state["embed.weight"]], {}, CPU,
        )  # fmt: skip
        assert all(same_bytes(a, b) for a, b in zip(leaves(head.weight), leaves(expected), strict=True))


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_a_layer_used_twice_is_quantized_under_both_names(backend: str, tmp_path: Path) -> None:
    state = random_state(Shared)
    stored = {name: tensor for name, tensor in state.items() if not name.startswith(("second", "again"))}
    model: Any = load_toy(save_state(tmp_path, stored), settings(backend), Shared).model
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.first(x), model.second(x))
        assert torch.equal(model.block(x), model.again(x))
        exact = nn.functional.linear(x, state["first.weight"], state["first.bias"])
        assert (model.first(x) - exact).norm() / exact.norm() < (1e-5 if backend == "none" else 0.7)
    if backend != "none":
        quantizer = model.hf_quantizer
        model.dequantize()
        layers = [model.get_submodule(name) for name in ("first", "second", "block.0", "again.0")]
        assert all(type(layer) is nn.Linear for layer in layers)
        assert not any(quantizer.is_quantized(layer) for layer in layers)


# What cannot be loaded


VALUES = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize(
    ("backend", "value"),
    representatives(
        product(QUANTIZING, VALUES), [(name, VALUES[number % 3]) for number, name in enumerate(REPRESENTATIVES[1:])]
    ),
)
def test_a_weight_that_is_not_finite(backend: str, value: float, tmp_path: Path) -> None:
    state = random_state(Toy)
    state["blocks.1.fc1.weight"][77, 3] = value
    with pytest.raises(LoadError, match=r"'blocks\.1\.fc1' is not finite in float\d+ \(rows 0 to 511\).*epair"):
        load_toy(save_state(tmp_path, state), settings(backend))
    with pytest.raises(LoadError, match=r"'blocks\.1\.fc1\.weight' is not finite in float32; repair the checkpoint"):
        load_toy(tmp_path, settings(backend, skip_modules=("blocks.1.fc1",)))


def test_a_weight_that_overflows_fp16(tmp_path: Path) -> None:
    """LLM.int8 casts to fp16, whatever the compute dtype; others do where that is the compute dtype."""
    state = random_state(Toy)
    state["head.weight"][2, 2] = 1e5
    save_state(tmp_path, state)
    for backend, dtype in [("bitsandbytes_int8", "float32"), ("bitsandbytes_int8", "bfloat16"), ("torchao", "float16")]:
        with pytest.raises(LoadError, match=r"'head' is not finite in float16 \(rows 0 to 9\).*compute_dtype"):
            load_toy(tmp_path, settings(backend, compute_dtype=dtype))
    load_toy(tmp_path, settings("torchao", compute_dtype="bfloat16"))


def test_files_are_read_ahead_while_a_load_is_planned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(lifecycle, "read_ahead", asked.extend)

    def build() -> nn.Module:
        assert asked == list(open_checkpoint(folder).files) != []
        return Toy()

    load_toy(folder, settings("none"), build)


def test_errors_before_reading_read_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights_module, "stream", read)
    with pytest.raises(ConfigError):
        load_toy(folder, settings(skip_modules=("nowhere",)))
    with pytest.raises(LoadError, match="no layer"):
        load_toy(folder, settings(skip_modules=("**",)))


@pytest.mark.parametrize("override", ["group_size=48", "group_size=7"])
def test_the_warm_up_fits_a_format_that_fits_the_model(override: str, tmp_path: Path) -> None:
    """A group size may divide every layer and still not a power of two."""
    shapes = [(10, 336), (5, 336)]
    save_stack(tmp_path, shapes, dtype=FP32)
    loaded = load_toy(tmp_path, settings("torchao", override), lambda: Stack(shapes))
    assert len(loaded.plan.quantized) == 2


@pytest.mark.parametrize("backend", representatives(QUANTIZING, ["bitsandbytes_int8", "torchao"]))
def test_the_audit_follows_every_load(backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose last step undoes a layer is found out."""
    kind = type(load_quantizer(settings(backend).backend))
    finish = kind.postprocess_model

    def undo(self: Quantizer, model: nn.Module, device: torch.device) -> None:
        finish(self, model, device)
        model.head = nn.Linear(WIDTH, 10)

    monkeypatch.setattr(kind, "postprocess_model", undo)
    with pytest.raises(LoadError, match="1 layers are not quantized though planned: 'head'"):
        load_toy(folder, settings(backend))


# What is kept in memory


@pytest.mark.parametrize(
    "backend", representatives(["torchao", "quanto", "bitsandbytes_int8", "none"], ["torchao", "none"])
)
def test_dense_weights_are_not_kept(backend: str, tmp_path: Path) -> None:
    """40 layers of 4 MiB with 4 MiB in flight: 160 MiB dense, 40 or 80 MiB afterwards. Both together would be 200."""
    shapes = save_alike(tmp_path, (1024, 1024), 40, FP32)
    gc.collect()
    loaded = load_toy(tmp_path, settings(backend, compute_dtype="bfloat16"), stack_of(shapes))
    result, dense = (loaded.plan.to_container()[f"{name}_bytes"] for name in ("result", "dense"))
    assert dense == 160 * MIB and result < 81 * MIB
    assert loaded.memory.peak_bytes < dense
    assert loaded.memory.peak_file_bytes < 8 * MIB


def test_memory_that_is_freed_is_given_back(tmp_path: Path) -> None:
    """64 layers of 4 MiB, 128 MiB afterwards: the allocator would keep a hole of 0.7 MiB beside each of them."""
    shapes = save_alike(tmp_path, (2048, 1024), 64, BF16)
    gc.collect()
    release_freed_memory()
    loaded = load_toy(tmp_path, settings("torchao"), stack_of(shapes))
    result = loaded.plan.to_container()["result_bytes"]
    left = host_memory().total_bytes - loaded.memory.baseline.total_bytes - result
    assert loaded.memory.peak_bytes < result + 4 * MIB + 40 * MIB
    assert left < 16 * MIB


def test_a_weight_with_one_scale_is_read_whole_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows, it would all be in a buffer that its worker keeps. A type with a scale a row is read by rows."""
    staged: list[int] = []

    class Watched(arena.Arena):
        def acquire(self, nbytes: int) -> tuple[int, Tensor]:
            staged.append(nbytes)
            return super().acquire(nbytes)

    monkeypatch.setattr(stream, "Arena", Watched)
    shapes = [(256, 512)] * 3
    saved = save_stack(tmp_path, shapes, dtype=FP32, bias=False)
    load_toy(tmp_path, settings("torchao"), stack_of(shapes))
    assert staged == []
    per_tensor = ComponentConfig(TorchAoConfig(quant_type_kwargs={"granularity": "PerTensor"}))
    model: Any = load_toy(tmp_path, per_tensor, stack_of(shapes)).model
    assert staged == [256 * 512 * 4] * 3
    for name, tensor in saved.state_dict().items():
        dense = model.hf_quantizer.dequantize_param(model.get_parameter(name), FP32)
        assert (dense - tensor).abs().max() <= tensor.abs().max() / 127, name


def test_the_collector_rests_while_a_load_is_planned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, make_plan = list[bool](), prepare.make_plan

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(gc.isenabled())
        return make_plan(*arguments, **options)

    monkeypatch.setattr(prepare, "make_plan", watched)
    load_toy(folder, settings())
    assert seen == [False] and gc.isenabled()


def test_the_arena_goes_when_the_load_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(arena.Arena):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            alive.append(weakref.ref(self._buffer))

    monkeypatch.setattr(stream, "Arena", Watched)
    gc.collect()
    gc.disable()
    try:
        loaded = load_toy(folder, settings())
        assert [reference() for reference in alive] == [None]
    finally:
        gc.enable()
    assert loaded.model is not None


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_no_tensor_has_more_memory_than_it_shows(backend: str, folder: Path) -> None:
    """A view of something larger would keep all of it."""
    for name, tensor in names_of(load_toy(folder, settings(backend)).model).items():
        for leaf in leaves(tensor):
            assert leaf.untyped_storage().nbytes() == leaf.nbytes, name


def test_what_stays_on_the_cpu_beside_an_accelerator_has_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept as it is, it would otherwise be the place that the next tensors are read through."""

    def beside_another(*arguments: Any, **options: Any) -> Placement:
        found = place(*arguments, **options)
        return replace(found, computes={**found.computes, "elsewhere": torch.device("meta")})

    monkeypatch.setattr(lifecycle, "place", beside_another)
    monkeypatch.setattr(Placement, "is_spread", False)  # nothing is there to travel
    shapes = [(256, 1024)] * 8  # each as large as what may be in flight
    saved = save_stack(tmp_path, shapes, dtype=FP32, bias=False)
    model = load_toy(tmp_path, settings("none"), stack_of(shapes)).model
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.get_parameter(name), tensor), name
