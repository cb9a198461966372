"""Every denoiser of diffusers, quantized while loading, comes back from its file as it was: to this program, and to
diffusers where that has the format.

The right values are diffusers' own: what a checkpoint holds dense is what `from_pretrained` makes of it.
"""

import inspect
import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qexp
from qexp.loading.quantized_model import registered_quantizer
from qexp.quantizers.base import Quantizer
from tests.backends import backend_config
from tests.contracts.comparing import assert_same_tensors, relative_error
from tests.contracts.diffusers_networks import NETWORKS
from tests.products import representatives

BF16 = torch.bfloat16
# Backend -> the largest relative error of a weight. N(0, 1) weights with rows of 16 to 256: 4 bits are good for 0.1,
# 8 bits for 0.01.
BACKENDS = {
    "torchao": 0.02, "quanto": 0.02, "bitsandbytes": 0.15, "bitsandbytes_int8": 0.02, "packed_uint4": 0.15,
    "gguf": 0.02,
}  # fmt: skip
OVERRIDES = {"packed_uint4": ("group_size=null",)}  # it refuses a group that does not divide every width
READ_BY_DIFFUSERS = ("torchao", "quanto", "bitsandbytes", "bitsandbytes_int8")
# tests/interop saves models with the other backends, and has diffusers load them
KEPT = [("FluxTransformer2DModel", backend) for backend in ("quanto", "bitsandbytes", "packed_uint4")]
KEPT += [("WanAnimateTransformer3DModel", "gguf"), ("SanaTransformer2DModel", "torchao")]
Dense = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("open_gate")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """The folder of a network with weights that nothing initializes to zero, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            model = class_of(name)(**NETWORKS[name])
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
            made[name] = tmp_path_factory.mktemp(name)
            model.to(BF16).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def dense_tensors(dense: Dense) -> Callable[[str], dict[str, Tensor]]:
    """What diffusers makes of such a folder, read once."""
    return cache(lambda name: load_theirs(name, dense(name)).state_dict())


def class_of(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def load_theirs(name: str, folder: Path) -> Any:
    return class_of(name).from_pretrained(folder, torch_dtype=BF16)


def test_every_transformer_that_diffusers_exports_is_here() -> None:
    import diffusers

    exported = [name for name in dir(diffusers) if "Transformer" in name and inspect.isclass(getattr(diffusers, name))]
    networks = {name for name in exported if issubclass(getattr(diffusers, name), diffusers.ModelMixin)}
    assert networks <= NETWORKS.keys()


@pytest.mark.parametrize("name", representatives(NETWORKS, ["FluxTransformer2DModel"]))
def test_unquantized_it_is_what_diffusers_loads(name: str, dense: Dense) -> None:
    assert_same_tensors(qexp.load(dense(name), device="cpu", workers=1), load_theirs(name, dense(name)))


@pytest.mark.parametrize(("name", "backend"), representatives(product(NETWORKS, BACKENDS), KEPT))
def test_what_is_saved_is_reloaded_bit_for_bit(
    name: str, backend: str, dense: Dense, dense_tensors: Callable[[str], dict[str, Tensor]], tmp_path: Path
) -> None:
    ours: Any = qexp.load(dense(name), backend_config(backend, *OVERRIDES.get(backend, ())), device="cpu", workers=1)
    qexp.save(ours, tmp_path)
    again: Any = qexp.load(tmp_path, device="cpu", workers=1)
    assert type(again).__name__ == name
    assert_same_tensors(again, ours)
    if backend in READ_BY_DIFFUSERS:
        assert_read_or_refused(name, backend, tmp_path, ours)
    quantized = [path for path, module in again.named_modules() if quantizer_of(again).is_quantized(module)]
    assert quantized
    assert_close(again.dequantize(), dense_tensors(name), quantized, BACKENDS[backend])


def assert_read_or_refused(name: str, backend: str, folder: Path, ours: nn.Module) -> None:
    """diffusers reads the same model, or refuses it: by the name that is for it alone, or since it takes a weight in
    4 bits for a bias, whose name has "bias" in it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    names = [path for path, module in ours.named_modules() if quantizer_of(ours).is_quantized(module)]
    if config["quant_method"].startswith("qexp_"):
        with pytest.raises(ValueError, match="Unknown quantization type"):
            load_theirs(name, folder)
    elif backend == "bitsandbytes" and any("bias" in path for path in names):
        with pytest.raises(ValueError, match="Expected the flattened shape"):
            load_theirs(name, folder)
    else:
        assert_same_tensors(load_theirs(name, folder), ours)


def quantizer_of(model: nn.Module) -> Quantizer:
    quantizer = registered_quantizer(model)
    assert quantizer is not None
    return quantizer


def assert_close(ours: nn.Module, expected: dict[str, Tensor], quantized: list[str], bound: float) -> None:
    """Quantized weights are near the dense ones, all else is equal."""
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    weights = {f"{path}.weight" for path in quantized}
    wrong = {name: error for name in weights if (error := relative_error(found[name], expected[name])) > bound}
    assert not wrong
    different = [name for name in expected.keys() - weights if not torch.equal(found[name], expected[name])]
    assert not different
