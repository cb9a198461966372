"""Presets of published models: at true size on the meta device, and composed over tiny pipelines of the same class."""

import importlib
import inspect
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qexp.config.module_patterns import unmatched_patterns
from qexp.config.yaml_options import options_of_plugin
from qexp.experiments.stored import run_config_from_container
from qexp.loading.components import plan_components, request_components
from qexp.models.architectures import architecture, network
from qexp.models.base import load_source
from qexp.models.diffusers import DENOISERS
from qexp.offloading.grouping import outermost_lists
from qexp.predict.__main__ import forecast
from qexp.predict.tables import GIB
from tests.assigning import run_config
from tests.composing import CONF
from tests.products import representatives

PRESETS = [name for name in options_of_plugin("model", "diffusers") if name != "diffusers"]
TINY = {
    "flux_dev": "flux", "flux_schnell": "flux", "sd3_medium": "sd3", "sd35_large": "sd3", "qwen_image": "qwen_image",
    "sdxl": "sdxl", "pixart_sigma": "pixart", "wan": "wan",
}  # fmt: skip
BLOCKS = {
    "FluxTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "SD3Transformer2DModel": ["transformer_blocks"],
    "QwenImageTransformer2DModel": ["transformer_blocks"],
    "UNet2DConditionModel": ["down_blocks", "up_blocks", "mid_block.attentions", "mid_block.resnets"],
    "PixArtTransformer2DModel": ["transformer_blocks"],
    "WanTransformer3DModel": ["blocks"],
}


def written(preset: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CONF / "model" / f"{preset}.yaml").read_text())
    return values


def header(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


@cache
def denoiser(preset: str) -> torch.nn.Module:
    components = architecture(preset).components
    return network(components[next(name for name in DENOISERS if name in components)].config)


def test_there_are_presets() -> None:
    assert set(PRESETS) == set(TINY)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_architecture_of_its_name(preset: str) -> None:
    model = architecture(preset)
    assert written(preset)["path"] == model.repository
    for library, kind in (value for value in model.model_index.values() if isinstance(value, list)):
        assert hasattr(importlib.import_module(library), kind)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_says_what_the_download_takes_and_whether_it_is_gated(preset: str) -> None:
    model, text = architecture(preset), header(CONF / "model" / f"{preset}.yaml")
    nbytes = sum(part.parameters * getattr(torch, part.dtype).itemsize for part in model.components.values())
    assert f"# Expect {nbytes / GIB:.1f} GiB of download" in text
    assert ("not gated" not in text) == model.gated and ("HF_TOKEN" in text) == model.gated
    assert f"model={preset} " in text and "task.prompt=" in text


@pytest.mark.parametrize("preset", representatives(PRESETS, ("flux_dev", "wan")))
def test_patterns_and_blocks_are_there_at_true_size(preset: str) -> None:
    model = denoiser(preset)
    names = [name for name, _ in model.named_modules()]
    assert unmatched_patterns(written(preset).get("skip_modules", ()), names, preset) == {}
    lists = outermost_lists(model)
    assert lists == BLOCKS[type(model).__name__]
    in_blocks = sum(parameter.numel() for name in lists for parameter in model.get_submodule(name).parameters())
    assert in_blocks > 0.8 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_its_task_is_one_that_the_pipeline_takes(preset: str) -> None:
    import diffusers

    kind = getattr(diffusers, architecture(preset).model_index["_class_name"])
    assert written(preset)["task_defaults"].keys() <= inspect.signature(kind.__call__).parameters.keys()


@pytest.mark.parametrize("preset", representatives(PRESETS, ("flux_dev", "sd3_medium", "wan")))
def test_it_composes_and_the_command_line_wins(preset: str, pipeline_folder: Callable[[str], Path]) -> None:
    place = (f"model={preset}", f"model.path={pipeline_folder(TINY[preset])}", "task.prompt=[a,b]")
    config = run_config(*place)
    container = config.to_container()
    assert run_config_from_container(yaml.safe_load(yaml.safe_dump(container))) == config
    assert run_config_from_container(json.loads(json.dumps(container))) == config
    expected = written(preset)["task_defaults"]
    found = {name: getattr(config.task, name) for name in expected}
    assert found == {
        **expected,
        **({"negative_prompt": (expected["negative_prompt"],)} if "negative_prompt" in expected else {}),
    }
    changed = run_config(*place, "task.num_inference_steps=3", "task.guidance_scale=0").task
    assert (changed.num_inference_steps, changed.guidance_scale, changed.height) == (3, 0, expected["height"])
    skipped = {name: part.skip_modules for name, part in config.components.items() if part.skip_modules}
    assert skipped == ({"transformer": ("proj_out",)} if preset == "sd3_medium" else {})


@pytest.mark.parametrize(
    ("quantize", "transformer"),
    [
        ("model.quantize=null", ("proj_out",)),
        ("model.quantize=[text_encoder_2]", ()),
        ("model.quantize=[text_encoder_2,transformer]", ("proj_out",)),
    ],
)
def test_a_presets_patterns_are_the_denoisers(
    quantize: str, transformer: tuple[str, ...], pipeline_folder: Callable[[str], Path]
) -> None:
    config = run_config("model=sd3_medium", f"model.path={pipeline_folder('sd3')}", "task.prompt=[a]", quantize)
    assert config.components["transformer"].skip_modules == transformer
    requests = request_components(load_source(config.model), config.components, device=torch.device("cpu"))
    planned = plan_components(requests)  # no pattern is without a module
    assert ("proj_out" in planned["transformer"].prepared.plan.skipped) == bool(transformer)


def test_a_denoiser_with_a_backend_of_its_own_has_them_too(pipeline_folder: Callable[[str], Path]) -> None:
    own = ("model.quantize=[text_encoder_2]", "+backend@components.transformer.backend=quanto")
    config = run_config("model=sd3_medium", f"model.path={pipeline_folder('sd3')}", "task.prompt=[a]", *own)
    assert config.components["transformer"].skip_modules == ("proj_out",)


def test_flux_on_less_than_16_gb(pipeline_folder: Callable[[str], Path]) -> None:
    config = run_config("experiment=flux_dev_16gb", f"model.path={pipeline_folder('flux')}", "task.prompt=[a]")
    assert config.reference.offload == "block"  # the unquantized pipeline would not fit
    labels = {name: part.backend.label for name, part in config.components.items()}
    assert labels["transformer"] == "nf4" and labels["text_encoder_2"] == "llm.int8"
    assert {config.components[name].backend.quant_method for name in ("vae", "text_encoder")} == {"none"}
    assert config.offload.strategy == "model" and config.task.num_inference_steps == 50
    columns = forecast("flux", ["experiment=flux_dev_16gb"], ["bitsandbytes"]).columns["bitsandbytes"]
    sizes = {name: part.result_bytes / GIB for name, part in columns.items()}
    text = header(CONF / "experiment" / "flux_dev_16gb.yaml")
    stated = [float(number) for number in re.findall(r"(?:transformer|T5|CLIP|VAE|together) (\d+\.\d)", text)]
    in_order = [sizes[name] for name in ("transformer", "text_encoder_2", "text_encoder", "vae")]
    assert stated == [pytest.approx(size, abs=0.051) for size in (*in_order, sum(in_order))]
    assert sum(in_order) < 16
