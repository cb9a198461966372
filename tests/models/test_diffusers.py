"""Pipelines loaded by us: unquantized they are what diffusers loads, quantized what it loads quantized, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from qexp.loading.lifecycle import load_component
from qexp.models.diffusers import DiffusersConfig, Source
from qexp.models.pipeline_call import run_pipeline
from qexp.settings import ComponentConfig, LoaderConfig
from qexp.tasks.generate import GenerateConfig
from tests.backends import CPU, backend_config
from tests.pipelines import ARGUMENTS, PIPELINES

PROMPTS = ["a red cube", "two trees"]


def load_ours(folder: Path, backend: Any = None, **config: Any) -> tuple[Source, dict[str, Any]]:
    source = Source(DiffusersConfig(path=str(folder), **config))
    dense, chosen = backend_config("none"), backend or backend_config("none")
    quantized = source.quantized_components()
    models = {
        name: load_component(
            source, name, ComponentConfig(chosen if name in quantized else dense), device=CPU, loader=LoaderConfig()
        ).model
        for name in source.components()
    }
    return source, models


def load_theirs(folder: Path, **options: Any) -> Any:
    absent = {
        name: None
        for name, value in Source(DiffusersConfig(path=str(folder))).folder.arguments.items()
        if value is None
    }
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, **absent, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)  # or a convolution in bf16 rounds otherwise, even under no_grad
    return pipeline


def call_theirs(pipeline: Any, name: str, seed: int = 3) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(PROMPTS))]
    arguments = dict(ARGUMENTS[name])
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    output = pipeline(prompt=PROMPTS, generator=generators, output_type="pt", **arguments)
    images = output.images if hasattr(output, "images") else output.frames.flatten(0, 1)
    return 2 * images.float() - 1


def task_of(name: str, **changes: Any) -> GenerateConfig:
    arguments = dict(ARGUMENTS[name])
    fields = {key: arguments.pop(key) for key in list(arguments) if hasattr(GenerateConfig, key)}
    task = GenerateConfig(prompt=PROMPTS, pipeline_arguments=arguments, batch_size=2, **fields, **changes)
    return task.resolved()


@pytest.mark.parametrize("name", PIPELINES)
def test_unquantized_it_is_what_diffusers_loads(name: str, pipeline_folder: Callable[[str], Path]) -> None:
    theirs = load_theirs(pipeline_folder(name))
    source, models = load_ours(pipeline_folder(name))
    ours = source.pipeline(models)
    assert type(ours).__name__ == type(theirs).__name__ and ours.components.keys() == theirs.components.keys()
    assert set(models) == {name for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)}
    for component, model in models.items():
        expected = {
            **dict(theirs.components[component].named_parameters()),
            **dict(theirs.components[component].named_buffers()),
        }
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert found.keys() == expected.keys()
        wrong = [
            key
            for key, value in expected.items()
            if not torch.equal(found[key], value) or found[key].dtype != value.dtype
        ]
        assert not wrong, [
            (
                component,
                key,
                found[key].dtype,
                expected[key].dtype,
                (found[key].float() - expected[key].float()).abs().max(),
            )
            for key in wrong
        ]
    outputs = run_pipeline(ours, PROMPTS, task_of(name), seed=3, on_step=lambda step, state: None)
    assert torch.equal(outputs["images"], call_theirs(theirs, name))
