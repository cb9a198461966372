"""The plan of a load: which layers, from where, in which dtype, how many bytes; and what does not fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrizations import weight_norm

from qexp.errors import ConfigError, LoadError
from qexp.loading.work_item import WorkItem
from tests.backends import EVERY_WAY_TO_QUANTIZE
from tests.loading.toys import WIDTH, Toy, prepare_toy, random_state, save_state, settings

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LINEARS = ["embed", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("toy"), random_state(Toy, BF16))


def items(folder: Path, *arguments: Any, build: Callable[[], nn.Module] = Toy, **fields: Any) -> dict[str, WorkItem]:
    plan = prepare_toy(folder, settings(*arguments, **fields), build).plan
    return {item.target: item for item in plan.items}


# What is planned


def test_every_tensor_has_one_item_in_file_order(folder: Path) -> None:
    plan = prepare_toy(folder, settings()).plan
    state = random_state(Toy, BF16)
    assert {item.target for item in plan.items} == set(state)
    assert [item.source.offset for item in plan.items] == sorted(item.source.offset for item in plan.items)
    assert {item.target for item in plan.quantized} == {f"{name}.weight" for name in LINEARS}
    assert plan.skipped == {} and plan.unused == ()
    assert {item.target: item.source.shape for item in plan.items} == {n: tuple(t.shape) for n, t in state.items()}


def test_each_tensor_is_read_in_the_way_that_it_is_used(folder: Path) -> None:
    """What is quantized by rows, what stays as in the file into its final memory, what is cast through a buffer."""
    kept = prepare_toy(folder, settings("bitsandbytes", skip_modules=("head",), compute_dtype="bfloat16")).plan
    quantized = {f"{name}.weight" for name in LINEARS if name != "head"}
    assert {item.target for item in kept.items if item.read == "rows"} == quantized
    assert {item.read for item in kept.items if item.target not in quantized} == {"in_place"}
    cast = items(folder, "bitsandbytes", compute_dtype="float32")
    assert {item.read for name, item in cast.items() if not name.endswith(("weight", "steps"))} == {"staged"}
    assert cast["steps"].read == "in_place"  # whole numbers are not cast
    placed = kept.placed(lambda name: torch.device("meta" if name == "scale" else "cpu"))
    reads = {item.target: (item.device.type, item.read) for item in placed.items}
    assert reads["scale"] == ("meta", "staged")  # a device without streams
    assert reads["shift"] == ("cpu", "in_place") and reads["embed.weight"] == ("cpu", "rows")


def test_nothing_is_quantized_without_a_quantizer(folder: Path) -> None:
    plan = prepare_toy(folder, settings("none")).plan
    assert plan.quantized == [] and plan.skipped == {}
    assert plan.to_container()["result_bytes"] == plan.to_container()["dense_bytes"]


def test_the_plan_as_data(folder: Path) -> None:
    container = prepare_toy(folder, settings(skip_modules=("head",))).plan.to_container()
    assert json.loads(json.dumps(container)) == container
    assert set(container["quantized"]) == set(LINEARS) - {"head"}
    assert container["quantized"]["embed"] == WIDTH * WIDTH + 5 * WIDTH  # int8, and per row a scale and a zero point
    assert set(container["skipped"]) == {"head"}
    state = random_state(Toy, BF16)
    assert container["dense_bytes"] == sum(tensor.nbytes for tensor in state.values())
    saved = sum(state[f"{name}.weight"].numel() - 5 * len(state[f"{name}.weight"]) for name in set(LINEARS) - {"head"})
    assert container["result_bytes"] == container["dense_bytes"] - saved


# Which layers


def test_patterns_of_user_and_backend_are_united(folder: Path) -> None:
    prepared = prepare_toy(
        folder, settings("torchao", "modules_to_not_convert=[head]", skip_modules=("blocks.0", "**.fc2"))
    )
    assert set(prepared.chosen) == {"embed", "blocks.1.fc1"}
    assert dict(prepared.plan.skipped) == {
        "blocks.0.fc1": "skip_modules has 'blocks.0'",
        "blocks.0.fc2": "skip_modules has 'blocks.0'",
        "blocks.1.fc2": "skip_modules has '**.fc2'",
        "head": "skip_modules has 'head'",
    }


@pytest.mark.parametrize(
    ("backend", "override"),
    [
        ("torchao", "modules_to_not_convert=[hed]"),
        ("quanto", "modules_to_not_convert=[hed]"),
        ("bitsandbytes", "llm_int8_skip_modules=[hed]"),
    ],
)
def test_a_backends_pattern_that_matches_nothing(backend: str, override: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="'hed' matches no module; did you mean head"):
        prepare_toy(folder, settings(backend, override))


@pytest.mark.parametrize("field", ["skip_modules", "keep_in_fp32_modules"])
def test_a_users_pattern_that_matches_nothing(field: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{field} of 'toy': the pattern 'block.0' matches no module; did you mean"):
        prepare_toy(folder, settings(**{field: ("block.0",)}))


class KeepsFp32(Toy):
    _keep_in_fp32_modules = ("norm", "fc2", "scale", "no such module")


def test_modules_kept_in_fp32(folder: Path) -> None:
    """By the model's own attribute, at any depth, and by the setting; parameters may be named, too."""
    plan = prepare_toy(folder, settings(keep_in_fp32_modules=("head",)), KeepsFp32).plan
    assert dict(plan.skipped) == {
        "blocks.0.fc2": "kept in fp32 by '**.fc2'",
        "blocks.1.fc2": "kept in fp32 by '**.fc2'",
        "head": "kept in fp32 by 'head'",
    }
    assert {item.target for item in plan.items if item.dtype == FP32} == {
        "blocks.0.fc2.weight", "blocks.1.fc2.weight", "head.weight", "head.bias", "scale",
        *(f"blocks.{n}.norm.{name}" for n in (0, 1) for name in ("weight", "bias")),
    }  # fmt: skip
    kept = next(item for item in plan.items if item.target == "head.weight")
    assert kept.result_nbytes == 2 * kept.source.nbytes == 4 * 10 * WIDTH


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnName(nn.Linear):
    """A subclass that computes as its parent does."""


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH)
        self.named = OwnName(WIDTH, WIDTH)
        self.scaled = OwnForward(WIDTH, WIDTH)
        self.marked = NonDynamicallyQuantizableLinear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4)
        self.normed = weight_norm(nn.Linear(WIDTH, WIDTH))
        self.bilinear = nn.Bilinear(4, 4, 4)


def test_layers_that_do_not_compute_as_linear_ones_are_left_alone(tmp_path: Path) -> None:
    save_state(tmp_path, random_state(Unusual))
    for backend in ("torchao", "bitsandbytes", "quanto"):
        prepared = prepare_toy(tmp_path, settings(backend), Unusual)
        assert set(prepared.chosen) == {"plain", "named"}
        assert dict(prepared.plan.skipped) == {
            "scaled": "OwnForward does not compute as nn.Linear does",
            "marked": "NonDynamicallyQuantizableLinear does not compute as nn.Linear does",
            "attention.out_proj": "NonDynamicallyQuantizableLinear does not compute as nn.Linear does",
            "normed": "its weight is computed from other parameters",
        }


def test_a_shape_that_the_format_cannot_hold_is_skipped_with_its_reason(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 8))

    save_state(tmp_path, random_state(build))
    plan = prepare_toy(tmp_path, settings("bitsandbytes"), build).plan
    assert dict(plan.skipped) == {"0": "bitsandbytes needs an even in_features"}


def nothing() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4), nn.Conv1d(4, 4, 1))


def root() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (nothing, "it has no linear layers; "),
        (root, r"every linear layer is skipped: '' \(the model itself is a linear layer\)"),
    ],
)
@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_a_backend_with_nothing_to_quantize_is_an_error(
    build: Callable[[], nn.Module], message: str, backend: str, tmp_path: Path
) -> None:
    save_state(tmp_path, random_state(build))
    with pytest.raises(LoadError, match=message) as caught:
        prepare_toy(tmp_path, settings(backend), build)
    assert "of 'toy'" in str(caught.value) and "use backend=none" in str(caught.value)
    assert len(items(tmp_path, "none", build=build)) == len(random_state(build))


def test_skipping_everything_is_an_error_that_says_why(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"'embed' \(skip_modules has '\*\*'\), .* …; loosen skip_modules"):
        prepare_toy(folder, settings(skip_modules=("**",)))


# In which dtype


def test_the_dtype_is_the_one_most_bytes_are_in(tmp_path: Path) -> None:
    state = random_state(Toy, FP16)
    for name in ("embed.weight", "head.weight", "scale"):
        state[name] = state[name].float()
    save_state(tmp_path, state)
    prepared = prepare_toy(tmp_path, settings("none"))
    assert prepared.compute_dtype == FP16
    assert {item.dtype for item in prepared.plan.items} == {FP16, torch.int64}


def test_the_dtype_asked_for_wins(folder: Path) -> None:
    planned = items(folder, "none", compute_dtype="float32")
    assert {item.dtype for item in planned.values()} == {FP32, torch.int64}
    assert all(item.result_nbytes == 2 * item.source.nbytes for item in planned.values() if item.dtype == FP32)


def test_a_checkpoint_without_floating_point_numbers_needs_a_dtype(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("counts", torch.arange(3))

    save_state(tmp_path, {"counts": torch.arange(3)})
    with pytest.raises(ConfigError, match="set compute_dtype"):
        prepare_toy(tmp_path, settings("none"), Counts)
    assert items(tmp_path, "none", build=Counts, compute_dtype="float32")["counts"].dtype == torch.int64


# What does not fit


def test_many_missing_keys_are_counted_and_the_nearest_name_is_shown(tmp_path: Path) -> None:
    names = random_state(Toy)
    state = {name if name == "head.bias" else f"model.{name}": tensor for name, tensor in names.items()}
    with pytest.raises(LoadError) as caught:
        prepare_toy(save_state(tmp_path, state), settings())
    assert str(caught.value).count("'") < 20
    assert f"and {len(state) - 6} more; it has 'model.scale', which the model has not" in str(caught.value)


@pytest.mark.parametrize("name", ["scale", "shift", "steps", "head.bias", "blocks.1.norm.weight", "embed.weight"])
def test_any_kind_of_tensor_may_be_missing(name: str, tmp_path: Path) -> None:
    state = random_state(Toy)
    del state[name]
    for backend in ("none", "torchao", "bitsandbytes", "bitsandbytes_int8", "quanto"):
        with pytest.raises(LoadError, match=f"'{tmp_path}' lacks '{name}'; it is incomplete, or belongs to another"):
            prepare_toy(save_state(tmp_path, state), settings(backend))


def test_a_surplus_key_is_reported_and_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {**random_state(Toy), "position": torch.zeros(WIDTH), "old.weight": torch.zeros(3)}
    plan = prepare_toy(save_state(tmp_path, state), settings()).plan
    assert set(plan.unused) == {"position", "old.weight"}
    assert {item.source.name for item in plan.items}.isdisjoint(plan.unused)
    message = capsys.readouterr().err
    assert message.startswith("toy: 2 tensors of the checkpoint have no place in the model and are not read: '")
    assert "'old.weight'" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [("head.weight", (11, WIDTH)), ("head.weight", (WIDTH, 10)), ("head.bias", (10, 1)), ("scale", (1,)),
     ("steps", (6,)), ("embed.weight", (WIDTH * WIDTH,)), ("shift", (0,))],
)  # fmt: skip
def test_a_wrong_shape_is_an_error(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    state = random_state(Toy)
    expected = list(state[name].shape)
    state[name] = torch.zeros(shape, dtype=state[name].dtype)
    save_state(tmp_path, state)
    for backend in ("torchao", "bitsandbytes", "quanto"):
        with pytest.raises(LoadError) as caught:
            prepare_toy(tmp_path, settings(backend))
        message = str(caught.value)
        assert f"'{name}' has shape {list(shape)}" in message and f"the model expects {expected}" in message
        assert "model.safetensors" in message and "config.json" in message


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.norm.weight", "scale", "shift"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_whole_numbers_in_place_of_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(Toy)
    state[name] = torch.ones(state[name].shape, dtype=dtype)
    with pytest.raises(LoadError, match=rf"'{name}' is [UIB].*expects floating-point numbers.*set model.path"):
        prepare_toy(save_state(tmp_path, state), settings())


def test_weights_in_place_of_whole_numbers(tmp_path: Path) -> None:
    state = {**random_state(Toy), "steps": torch.zeros(5)}
    with pytest.raises(LoadError, match=r"'steps' is F32 .*expects whole numbers"):
        prepare_toy(save_state(tmp_path, state), settings())


def test_a_checkpoint_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    embedded: Any
    for embedded, rule in [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "but no quantized weight"),
        ({"quant_method": "awq"}, "'awq', which is not supported .supported: bitsandbytes.* quanto.* torchao"),
        ({"quant_method": "torchao", "quant_type": "int0wo"}, "of torchao cannot be read: .*int0wo"),
        ([], "must be a JSON object"),
    ]:
        save_state(tmp_path, random_state(Toy), {"quantization_config": embedded})
        with pytest.raises(LoadError, match=rule):
            prepare_toy(tmp_path, settings())


def test_a_group_that_does_not_divide_is_an_error_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"group_size=48 does not divide in_features=256 of 'embed'"):
        prepare_toy(folder, settings("torchao", "group_size=48"))


# Several files


def test_shards_are_planned_file_by_file(tmp_path: Path) -> None:
    state = random_state(Toy)
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    planned = prepare_toy(tmp_path, settings()).plan.items
    order = [(item.source.file.name, item.source.offset) for item in planned]
    assert order == sorted(order)
    assert {item.target: item.source.file.name for item in planned} == weight_map


# Parameters and layers that have two names


class Tied(nn.Module):
    """An output layer that is the embedding, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("backend", ["none", "torchao", "bitsandbytes", "bitsandbytes_int8", "quanto"])
def test_a_tied_parameter_is_read_for_each_of_its_names(backend: str, stored: str, tmp_path: Path) -> None:
    state = random_state(Tied)
    del state["head.weight" if stored == "embed.weight" else "embed.weight"]
    planned = items(save_state(tmp_path, state), backend, build=Tied)
    assert set(planned) == {"embed.weight", "head.weight", "fc.weight", "fc.bias"}
    assert planned["embed.weight"].source == planned["head.weight"].source
    assert planned["embed.weight"].source.name == stored
    assert planned["embed.weight"].spec is None
    assert (planned["head.weight"].spec is None) == (backend == "none")


def test_a_tied_parameter_without_any_of_its_names_is_missing(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in random_state(Tied).items() if name.startswith("fc")}
    with pytest.raises(LoadError, match=r"lacks 'embed\.weight', 'head\.weight'"):
        prepare_toy(save_state(tmp_path, state), settings(), Tied)


class Shared(nn.Module):
    """One layer under two names, and one block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.again = self.block


@pytest.mark.parametrize("backend", ["torchao", "bitsandbytes", "bitsandbytes_int8", "quanto"])
def test_a_layer_used_twice_is_chosen_by_either_name(backend: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in random_state(Shared).items() if not name.startswith(("second", "again"))}
    prepared = prepare_toy(save_state(tmp_path, state), settings(backend), Shared)
    assert set(prepared.chosen) == {"first", "second", "block.0", "again.0"}
    assert set(prepared.plan.quantized_nbytes) == set(prepared.chosen)
    assert {item.target for item in prepared.plan.quantized} == {"first.weight", "block.0.weight"}  # each counts once
