"""What a quantizer tells planners of other libraries: upstream's answers, and sizes that come near the truth."""

import warnings
from typing import Any

import pytest
import torch

from qexp.offloading.payload import module_nbytes
from qexp.quantizers.base import load_quantizer
from tests.backends import backend_config
from tests.loading.toys import Toy, load_toy, random_state, save_state, settings

LIMITS = {0: 1000, "cpu": 20_000}


UPSTREAM: dict[str, tuple[str, str, dict[str, Any]]] = {  # classes of a quantizer and its config, and their arguments
    "bitsandbytes": ("BnB4BitDiffusersQuantizer", "BitsAndBytesConfig", {"load_in_4bit": True}),
    "bitsandbytes_int8": ("BnB8BitDiffusersQuantizer", "BitsAndBytesConfig", {"load_in_8bit": True}),
    "quanto": ("QuantoQuantizer", "QuantoConfig", {"weights_dtype": "int8"}),
    "quanto_int4": ("QuantoQuantizer", "QuantoConfig", {"weights_dtype": "int4"}),
    "quanto_int2": ("QuantoQuantizer", "QuantoConfig", {"weights_dtype": "int2"}),
}


def upstream_of(name: str) -> Any:
    from diffusers.quantizers import auto

    kind, config, arguments = UPSTREAM[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(auto, kind)(getattr(auto, config)(**arguments))


@pytest.mark.parametrize("name", UPSTREAM)
def test_answers_are_upstream_s(name: str) -> None:
    ours, theirs = load_quantizer(backend_config(name)), upstream_of(name)
    assert ours.adjust_target_dtype(torch.bfloat16) == theirs.adjust_target_dtype(torch.bfloat16)
    assert ours.adjust_max_memory(LIMITS) == theirs.adjust_max_memory(LIMITS)
    assert ours.update_device_map({"": 0}) == theirs.update_device_map({"": 0}) == {"": 0}


def test_without_quantization_nothing_changes() -> None:
    none = load_quantizer(backend_config("none"))
    assert none.adjust_target_dtype(torch.float16) == torch.float16
    assert none.adjust_max_memory(LIMITS) == LIMITS
    assert none.update_device_map(None) is None


@pytest.mark.parametrize(
    "name", ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto_int4", "packed_uint4", "gguf"]
)
def test_accelerate_then_counts_about_the_true_bytes(name: str, tmp_path: Any) -> None:
    from accelerate.utils import compute_module_sizes

    loaded = load_toy(save_state(tmp_path, random_state(Toy)), settings(name, skip_modules=("head",)))
    ours = load_quantizer(backend_config(name))
    dense = Toy().requires_grad_(False)
    special = ours.get_special_dtypes_update(loaded.model, torch.float32)
    assert set(special) == {name for name, _ in dense.named_parameters()} - {
        f"{module}.weight" for module in loaded.plan.quantized_nbytes
    }
    sizes = compute_module_sizes(dense, dtype=ours.adjust_target_dtype(torch.float32), special_dtypes=special)
    assert sizes[""] == pytest.approx(module_nbytes(loaded.model), rel=0.15)
