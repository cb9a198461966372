"""Families of language models: unquantized they are what transformers loads, bit for bit; quantized they answer nearly
the same, are refused, or leave layers alone and say why."""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qexp
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.loading.component import LoadedComponent
from qexp.loading.lifecycle import load_component
from qexp.models.folder import FolderSource
from tests.backends import CPU, backend_config
from tests.contracts.comparing import assert_same_tensors, relative_error
from tests.contracts.transformers_networks import NETWORKS, build
from tests.products import representatives

BF16 = torch.bfloat16
# Backend -> the largest relative error of the output. Measured over 160 families, median and 90th percentile: nf4 0.19
# and 0.31, LLM.int8 0.020 and 0.035, int8 of torchao 0.016 and 0.025, Q8_0 0.015 and 0.025.
BOUNDS = {"bitsandbytes": 0.5, "bitsandbytes_int8": 0.05, "torchao": 0.05, "gguf": 0.05}
# A token that goes to another expert, or attention without a scale, makes more of the same rounding: twice the bound.
DOUBLED = (
    "AfmoeForCausalLM", "GptOssForCausalLM", "JetMoeForCausalLM", "MT5ForConditionalGeneration",
    "MixtralForCausalLM", "PhimoeForCausalLM", "UMT5ForConditionalGeneration",
)  # fmt: skip
# Buffers that no file holds. tests/models/test_networks.py has plain layers, Conv1D, merged experts, tied embeddings.
KEPT = ("XGLMForCausalLM",)
Dense = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("without_repacking")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """The folder of a network as its library saves it in bf16, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).to(BF16).save_pretrained(made[name])
        return made[name]

    return folder


def load_theirs(name: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, name).from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module")
def dense_answer(dense: Dense) -> Callable[[str], Tensor]:
    """What the network that transformers loads answers, computed once."""
    return cache(lambda name: answer(load_theirs(name, dense(name))))


def load_ours(folder: Path, backend: str) -> LoadedComponent:
    source, settings = FolderSource(folder, None), ComponentConfig(backend_config(backend))
    return load_component(source, "model", settings, device=CPU, loader=LoaderConfig(workers=1))


def answer(model: Any) -> Tensor:
    """The logits, or what else comes first."""
    tokens = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": tokens[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens, **decoder)[0]
    return output


@pytest.mark.parametrize("name", representatives(NETWORKS, KEPT))
def test_unquantized_it_is_what_transformers_loads(name: str, dense: Dense) -> None:
    ours, theirs = qexp.load(dense(name), device="cpu", workers=1), load_theirs(name, dense(name))
    assert type(ours).__name__ == type(theirs).__name__
    assert_same_tensors(ours, theirs)
    expected = answer(theirs)
    assert expected.isfinite().all() and expected.std() > 1e-3
    assert torch.equal(answer(ours), expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    representatives(
        product(NETWORKS, BOUNDS),
        [
            *product(KEPT, ["bitsandbytes"]),
            ("MixtralForCausalLM", "bitsandbytes_int8"),
            ("FalconForCausalLM", "torchao"),
            ("LlamaForCausalLM", "gguf"),
        ],
    ),
)
def test_quantized_it_answers_nearly_the_same(
    name: str, backend: str, dense: Dense, dense_answer: Callable[[str], Tensor]
) -> None:
    loaded = load_ours(dense(name), backend)
    linear = [path for path, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(linear) <= {*loaded.plan.quantized_nbytes, *loaded.plan.skipped}
    assert all(loaded.plan.skipped.values())
    error = relative_error(answer(loaded.model), dense_answer(name))
    assert 0 < error < BOUNDS[backend] * (2 if name in DOUBLED else 1)
