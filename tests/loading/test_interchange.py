"""diffusers and this program open each other's quantized checkpoints, and write the same bytes.

diffusers refuses bitsandbytes without a GPU though the library runs on CPUs; that gate is patched open here.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.loading.lifecycle import load_component
from qexp.loading.saving import save_model
from qexp.models.folder import FolderSource
from qexp.quantizers.bitsandbytes_support.config import QUANT_STORAGES
from qexp.quantizers.bitsandbytes_support.stored import BLOCK_SIZES
from tests.backends import CPU, REPRESENTATIVES, backend_config
from tests.products import representatives

BF16 = torch.bfloat16


def bitsandbytes(**fields: Any) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(bnb_4bit_compute_dtype=BF16, llm_int8_skip_modules=["plain"], **fields)


def torchao(name: str, **fields: Any) -> Any:
    import torchao.quantization
    from diffusers import TorchAoConfig

    config = getattr(torchao.quantization, name)(set_inductor_config=False, **fields)
    return TorchAoConfig(config, modules_to_not_convert=["plain"])


def quanto(dtype: str) -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(dtype, modules_to_not_convert=["plain"])


CASES: dict[tuple[str, ...], Callable[[], Any]] = {
    ("bitsandbytes",): lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ("bitsandbytes_fp4",): lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    ("bitsandbytes_nf4_dq",): lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    ("bitsandbytes_int8",): lambda: bitsandbytes(load_in_8bit=True),
    ("torchao",): lambda: torchao("Int8WeightOnlyConfig"),
    ("torchao_int8dq",): lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    ("torchao_float8wo",): lambda: torchao("Float8WeightOnlyConfig"),
    ("torchao_float8wo_e5m2",): lambda: torchao("Float8WeightOnlyConfig", weight_dtype=torch.float8_e5m2),
    ("quanto",): lambda: quanto("int8"),
    ("quanto_int4",): lambda: quanto("int4"),
    ("quanto_int2",): lambda: quanto("int2"),
    ("quanto_float8",): lambda: quanto("float8"),
}


pytestmark = pytest.mark.usefixtures("open_gate")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    from tests.loading.tiny_diffusers import Tiny

    torch.manual_seed(0)
    model = Tiny()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(BF16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load_tiny(folder: Path, config: Any, skip: tuple[str, ...] = (), dtype: str | None = None) -> Any:
    from tests.loading.tiny_diffusers import Tiny

    settings = ComponentConfig(config, skip, compute_dtype=dtype)
    return load_component(FolderSource(folder, Tiny), "model", settings, device=CPU, loader=LoaderConfig()).model


def load_ours(folder: Path, *backend: str, skip: tuple[str, ...] = ()) -> Any:
    return load_tiny(folder, backend_config(*backend), skip)


def load_theirs(folder: Path, config: Any = None) -> Any:
    from tests.loading.tiny_diffusers import Tiny

    return Tiny.from_pretrained(folder, quantization_config=config, torch_dtype=BF16)


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as bytes with its shape and dtype."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def assert_same_files(one: Path, other: Path) -> None:
    a, b = stored(one), stored(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


def assert_same_answer(one: Any, other: Any) -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(BF16)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


def embedded(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("backend", CASES, ids=lambda backend: backend[0])
def test_both_programs_write_and_read_the_same(backend: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    ours, theirs = load_ours(dense, *backend, skip=("plain",)), load_theirs(dense, CASES[backend]())
    save_model(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert embedded(tmp_path / "ours") == embedded(tmp_path / "theirs")
    assert_same_answer(ours, theirs)
    assert_same_answer(load_ours(tmp_path / "theirs", "none"), theirs)
    again = load_theirs(tmp_path / "ours")
    again.save_pretrained(tmp_path / "again")
    if backend != ("quanto_int4",):  # in bf16 its kernel's layout loses bits of the shift each time it is entered
        assert_same_files(tmp_path / "ours", tmp_path / "again")
    if "quanto" not in backend[0]:  # whose kernels depend on where diffusers' mapping of the file puts the weight
        assert_same_answer(again, ours)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(backend, id=backend[0], marks=() if backend[0] in REPRESENTATIVES else pytest.mark.exhaustive)
        for backend in CASES
    ],
)
def test_shards_that_part_a_weight_from_its_scales(backend: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    """diffusers fails on those of bitsandbytes; both open each other's where it does not."""
    ours = load_ours(dense, *backend, skip=("plain",))
    save_model(ours, tmp_path / "shards", max_shard_bytes=4000)
    index = json.loads((tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    of_first = {file for name, file in index["weight_map"].items() if name.startswith("first.")}
    assert len(of_first) > 1
    assert_same_answer(load_ours(tmp_path / "shards", "none"), ours)
    save_model(ours, tmp_path / "whole")
    assert_same_files(tmp_path / "shards", tmp_path / "whole")
    theirs = load_theirs(dense, CASES[backend]())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_same_answer(load_ours(tmp_path / "theirs", "none"), theirs)


def test_diffusers_opens_quantized_activations_as_weights_alone(dense: Path, tmp_path: Path) -> None:
    """It has no place for them, but keeps their scales; nor have its files any that a load would have to find."""
    ours = load_ours(dense, "quanto", "activations_dtype=int8", skip=("plain",))
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)).to(BF16)
    ours.hf_quantizer.calibrate(ours, lambda: ours(x))
    save_model(ours, tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours")
    assert torch.equal(theirs.first.input_scale, ours.first.input_scale)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert_same_answer(load_ours(tmp_path / "ours", "none"), ours)


@pytest.mark.parametrize(
    ("storage", "double_quant"),
    representatives(
        product(QUANT_STORAGES, [False, True]),
        [("uint8", False), ("int8", True), ("bfloat16", True), ("float32", False)],
    ),
)
def test_every_quant_storage_is_the_same_both_ways(
    double_quant: bool, storage: str, dense: Path, tmp_path: Path
) -> None:
    """diffusers saves them all, and reloads what is stored in whole numbers."""
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    theirs = load_theirs(dense, bitsandbytes(**fields, bnb_4bit_quant_storage=getattr(torch, storage)))
    theirs.save_pretrained(tmp_path / "theirs")
    overrides = (f"bnb_4bit_use_double_quant={double_quant}", f"bnb_4bit_quant_storage={storage}")
    ours = load_ours(dense, "bitsandbytes", *overrides, skip=("plain",))
    in_memory = torch.bfloat16 if storage == "uint8" else getattr(torch, storage)  # uint8 would be what networks see
    assert ours.first.weight.dtype == in_memory
    save_model(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert embedded(tmp_path / "ours") == embedded(tmp_path / "theirs")
    reloaded = load_ours(tmp_path / "theirs", "none")
    assert reloaded.first.weight.dtype == in_memory
    assert_same_answer(reloaded, ours)
    assert_same_answer(theirs, ours)
    if storage in ("uint8", "int8"):
        assert_same_answer(load_theirs(tmp_path / "ours"), ours)
    save_model(reloaded, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "ours")
    assert embedded(tmp_path / "again") == embedded(tmp_path / "ours")


@pytest.mark.parametrize(
    ("blocksize", "double_quant"),
    representatives(product(BLOCK_SIZES, [False, True]), [(32, True), (128, False), (4096, True)]),
)
def test_every_block_size_is_the_same_both_ways(
    blocksize: int, double_quant: bool, dense: Path, tmp_path: Path
) -> None:
    """diffusers has no field for it, and finds it in the quant states."""
    overrides = (f"bnb_4bit_blocksize={blocksize}", f"bnb_4bit_use_double_quant={double_quant}")
    ours = load_ours(dense, "bitsandbytes", *overrides, skip=("plain",))
    save_model(ours, tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours")
    assert theirs.first.weight.quant_state.blocksize == blocksize
    assert_same_answer(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    for folder in ("theirs", "ours"):
        reloaded = load_ours(tmp_path / folder, "none")
        assert reloaded.first.weight.quant_state.blocksize == blocksize
        assert_same_answer(reloaded, ours)
    assert reloaded.hf_quantizer.config.bnb_4bit_blocksize == blocksize
