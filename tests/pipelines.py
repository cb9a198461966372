"""Tiny pipelines of diffusers with random weights, in the layout that hubs hold: one folder for each component."""

from pathlib import Path
from typing import Any

import torch

PIPELINES = ("flux", "sd3", "qwen_image", "pixart", "sdxl", "wan")
MORE_PIPELINES = ("sd", "lumina2", "sana", "ltx")
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
ARGUMENTS: dict[str, dict[str, Any]] = {  # of a call that takes no time
    "flux": {**SMALL, "max_sequence_length": 16},
    "sd3": SMALL,
    "qwen_image": {**SMALL, "max_sequence_length": 16, "negative_prompt": "blur"},
    "pixart": {**SMALL, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    "sdxl": SMALL,
    "wan": {**SMALL, "num_frames": 5, "max_sequence_length": 16},
    "sd": SMALL,
    "lumina2": {**SMALL, "max_sequence_length": 64, "system_prompt": "s"},
    "sana": {
        **SMALL, "max_sequence_length": 64, "use_resolution_binning": False, "complex_human_instruction": None,
    },
    "ltx": {**SMALL, "num_frames": 9, "max_sequence_length": 32},
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return a builder of parts (`clip`, `vae`), which import their libraries: not before somebody asks for one."""
    if name.startswith("__"):
        raise AttributeError(name)
    from tests import pipeline_networks

    return getattr(pipeline_networks, name)


def build_pipeline(name: str) -> Any:
    return __getattr__(name)()


def save_pipeline(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A pipeline as its library saves it, with the weights of its seed in one dtype."""
    torch.manual_seed(0)
    pipeline = build_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def load_components(folder: Path | str, backend: Any = None, **config: Any) -> tuple[Any, dict[str, Any]]:
    """(the model source, each component loaded by us), the denoiser quantized as `backend` says."""
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.loading.lifecycle import load_component
    from qexp.models.diffusers import DiffusersConfig, Source
    from tests.backends import CPU, backend_config

    source, dense = Source(DiffusersConfig(path=str(folder), **config)), backend_config("none")
    options: dict[str, Any] = {"device": CPU, "loader": LoaderConfig()}
    quantized = source.quantized_components()
    settings = {n: ComponentConfig((backend or dense) if n in quantized else dense) for n in source.components()}
    return source, {name: load_component(source, name, one, **options).model for name, one in settings.items()}
