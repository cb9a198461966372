"""One contract for every backend and type that runs here: load, run, save, load again, dequantize, and find damage."""

import copy
import io
import json
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qexp.config.schema import ComponentConfig
from qexp.errors import LoadError
from qexp.loading.plan import LoadPlan
from qexp.loading.saving import save_model
from qexp.offloading.payload import flatten, leaves, module_nbytes, sites, true_nbytes
from qexp.quantizers.base import Quantizer, load_quantizer
from qexp.quantizers.rows import SLICE_WEIGHTS, WeightSpec
from tests.backends import CPU, QUANTIZING, REPRESENTATIVES, can_hold
from tests.loading.toys import WIDTH, Toy, load_toy, random_state, save_state, settings
from tests.products import representatives
from tests.quantizers.kinds import KINDS, SERIALIZABLE, error_bound

DTYPE = torch.bfloat16
SKIP = ("head",)
LAYER = "blocks.0.fc1"
FILE = "diffusion_pytorch_model.safetensors"
# By default: every option, and of the types beside them those whose inner tensors no option has.
TYPES = [f"torchao {name}" for name in ("int4dq asymmetric", "int8wo g32", "intx4 row", "nvfp4", "by name")]
KEPT = [*QUANTIZING, *TYPES]
HELD = [kind for kind in KEPT if kind in REPRESENTATIVES or kind == "torchao nvfp4"]  # one for each way to hold bytes
OPTIONAL_PARTS = ("weight_format", "input_scale", "output_scale")  # without them a weight is still the same


class Case(NamedTuple):
    model: Any
    plan: LoadPlan
    folder: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("kinds") / "dense", random_state(Toy, DTYPE))


@pytest.fixture(params=representatives(KINDS, HELD))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=representatives(SERIALIZABLE, [kind for kind in HELD if kind in SERIALIZABLE]))
def storable(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def loaded(kind: str, folder: Path) -> Case:
    """Loaded once; a test that changes the model takes a copy."""
    result = load_toy(folder, ComponentConfig(KINDS[kind], SKIP), workers=1)
    return Case(result.model, result.plan, folder)


@cache
def saved(kind: str, folder: Path) -> Path:
    path = folder.parent / re.sub(r"\W", "-", kind)
    save_model(loaded(kind, folder).model, path)
    return path


def reload(folder: Path) -> Any:
    return load_toy(folder, settings("none"), workers=1).model


def inputs() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).to(DTYPE)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(inputs())
    return output


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Every byte that either has, after both have run: LLM.int8 then keeps its scales somewhere else."""
    assert torch.equal(run(one), run(other))
    for ours, theirs in zip(one.modules(), other.modules(), strict=True):
        assert type(ours) is type(theirs)
        mine, others = ([store[name] for store, name in sites(module)] for module in (ours, theirs))
        assert_same_bytes(flatten(mine)[0], flatten(others)[0])


def assert_same_bytes(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def quantizer_of(model: Any) -> Quantizer:
    quantizer: Quantizer = model.hf_quantizer
    return quantizer


@pytest.mark.parametrize("kind", representatives(KINDS, {*HELD, *TYPES}))  # test_formulas.py has the other options
def test_an_answer_is_within_the_bound_and_takes_the_bytes_that_were_planned(kind: str, folder: Path) -> None:
    case = loaded(kind, folder)
    layer, planned = case.model.get_submodule(LAYER), case.plan.quantized_nbytes
    dense = load_file(folder / "model.safetensors")
    x = inputs()
    with torch.no_grad():
        answer = layer(x).float()
    exact = nn.functional.linear(x.float(), dense[f"{LAYER}.weight"].float(), dense[f"{LAYER}.bias"].float())
    assert (answer - exact).norm() / exact.norm() < error_bound(kind)
    assert planned.keys() == {"embed", *(f"blocks.{i}.fc{j}" for i in range(2) for j in (1, 2))}
    for name, nbytes in planned.items():
        module = case.model.get_submodule(name)
        others = [module.bias, *module.buffers(recurse=False)]
        assert module_nbytes(module) == nbytes + true_nbytes(*(tensor for tensor in others if tensor is not None))
    assert not any(leaf.is_meta for tensor in case.model.state_dict().values() for leaf in leaves(tensor))
    assert torch.equal(run(case.model), run(case.model))


def test_what_was_saved_comes_back_bit_for_bit(storable: str, folder: Path) -> None:
    model, again = loaded(storable, folder).model, reload(saved(storable, folder))
    assert_same_weights(again, model)
    assert type(again.embed.weight) is type(model.embed.weight)
    assert again.quantization_method == model.quantization_method
    config = json.loads((saved(storable, folder) / "config.json").read_text())
    assert config.get("quantization_config", {"quant_method": "gguf"})["quant_method"] == model.quantization_method
    assert "_pre_quantization_dtype" not in str(config)


def test_copies_are_the_same_and_apart(kind: str, folder: Path) -> None:
    model = loaded(kind, folder).model
    copies = []
    if any(leaf.dtype.itemsize == 1 and leaf.is_floating_point() for leaf in leaves(model.embed.weight)):
        torch.save(model, stream := io.BytesIO())  # torch pickles float8 in no other way
        stream.seek(0)
        copies.append(torch.load(stream, weights_only=False))
    else:
        copies.append(pickle.loads(pickle.dumps(model)))
    copies.append(copy.deepcopy(model))
    for one in copies:
        assert_same_weights(one, model)
        mine, theirs = leaves(one.embed.weight), leaves(model.embed.weight)
        assert not {leaf.data_ptr() for leaf in mine} & {leaf.data_ptr() for leaf in theirs}


def test_dequantized_models_are_plain_and_can_be_saved(kind: str, folder: Path, tmp_path: Path) -> None:
    model = load_toy(folder, ComponentConfig(KINDS[kind], SKIP), workers=1).model
    quantizer: Any = quantizer_of(model)
    expected = quantizer.dequantize_param(model.embed.weight, DTYPE)
    dense = quantizer.dequantize(model)
    assert type(dense.embed) is nn.Linear and dense.embed.weight.dtype == DTYPE
    assert torch.equal(dense.embed.weight, expected)
    assert {type(module) for module in dense.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    save_state(tmp_path, dense.state_dict())
    assert torch.equal(run(reload(tmp_path)), run(dense))


def test_what_is_skipped_or_kept_in_fp32_stays_as_it_is(kind: str, folder: Path) -> None:
    component = ComponentConfig(KINDS[kind], (*SKIP, "blocks.0"), keep_in_fp32_modules=("blocks.1.fc2",))
    case = load_toy(folder, component, workers=1)
    dense = load_file(folder / "model.safetensors")
    assert case.plan.quantized_nbytes.keys() == {"embed", "blocks.1.fc1"}
    assert case.plan.skipped.keys() == {"head", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc2"}
    for name in case.plan.skipped:
        weight = case.model.get_submodule(name).weight
        assert weight.dtype == (torch.float32 if name == "blocks.1.fc2" else DTYPE)
        assert torch.equal(weight.to(DTYPE), dense[f"{name}.weight"])
    assert run(case.model).isfinite().all()


def test_a_file_without_a_tensor_with_another_name_or_an_end_is_refused(
    storable: str, folder: Path, tmp_path: Path
) -> None:
    source = saved(storable, folder)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (file,) = (path for path in source.iterdir() if path.name != "config.json")
    if file.name == FILE:
        damage_parts(source, tmp_path)
    content, name = file.read_bytes(), f"{LAYER}.".encode()
    assert name in content
    (tmp_path / file.name).write_bytes(content.replace(name, b"?" * len(name)))
    with pytest.raises(LoadError):
        reload(tmp_path)
    (tmp_path / file.name).write_bytes(content[:-64])  # more than the padding of a GGUF file
    with pytest.raises(LoadError, match=r"truncated|ends"):
        reload(tmp_path)


def damage_parts(source: Path, target: Path) -> None:
    """Each tensor of a layer goes missing once, and one has another name."""
    tensors = load_file(source / FILE)
    with safe_open(source / FILE, "pt") as file:
        metadata = file.metadata()
    parts = [name for name in tensors if name.startswith(f"{LAYER}.") and not name.endswith(OPTIONAL_PARTS)]
    assert len(parts) > 2  # a bias, and more than one inner tensor
    for part in parts:
        rest = {name: tensor for name, tensor in tensors.items() if name != part}
        save_file(rest, target / FILE, metadata)
        with pytest.raises(LoadError):
            reload(target)
    save_file({**rest, f"{parts[-1]}_": tensors[parts[-1]]}, target / FILE, metadata)
    with pytest.raises(LoadError):
        reload(target)


@pytest.mark.parametrize("kind", representatives(KINDS, KEPT))  # codes, not only how they are held
def test_slices_of_every_kind_give_the_bytes_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = load_quantizer(KINDS[kind])
    quantizer.validate_environment(CPU)
    weight = torch.randn(144, 128, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    spec, made = WeightSpec("blocks.0", (144, 128), DTYPE), []
    if not can_hold(quantizer, spec):
        pytest.skip("its blocks do not divide this shape")
    for size in (1 << 30, 3000):
        monkeypatch.setitem(SLICE_WEIGHTS, "cpu", size)
        with torch.no_grad():
            made.append(leaves(quantizer.create_quantized_param(spec, [weight], {}, CPU)))
    whole, sliced = made
    assert true_nbytes(*whole) == quantizer.quantized_nbytes(spec)
    assert_same_bytes(whole, sliced)
