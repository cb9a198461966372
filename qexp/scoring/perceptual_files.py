"""What the perceptual metrics need on this machine, looked up before anything runs: no torch, and no network.

lpips       the classifier's weights as torchvision has them, where torch.hub keeps downloads
clip_score  a CLIP of transformers: a folder, or a repository in huggingface_hub's cache
fid         the weights of Inception v3 as torch-fidelity or pytorch-fid has them, where torch.hub keeps downloads
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qexp.config.schema import MetricsConfig
from qexp.errors import ConfigError, LoadError, MissingLibraryError, first_names
from qexp.hub.download import hub_id, local_folder
from qexp.system.screen import say

BACKBONE_SOURCES = {
    "alex": "torchvision's models/alexnet-owt-7be5be79.pth",
    "vgg": "torchvision's models/vgg16-397923af.pth",
}
INCEPTION_SOURCES = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIP_FILES = (  # any one of each line; the first is what a message names
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("*.safetensors",),
    ("tokenizer.json", "vocab.json"),
)


def available_metrics(metrics: MetricsConfig, source: Any, task: Any) -> MetricsConfig:
    """Return the metrics without those that lack their files or prompts, if `metrics.missing` says to leave them out.

    Each that is left out is said once. Only for a task that leaves images: other outputs have none of these metrics.
    Raises: ConfigError, LoadError or MissingLibraryError for what is missing.
    """
    if source.modality != "images" or not task.saves_outputs:
        return metrics
    checks: dict[str, Callable[[], object]] = {
        "lpips": lambda: (backbone_file(metrics.lpips_net), heads_file(metrics.lpips_net)),
        "clip_score": lambda: _clip_of_prompts(task, metrics.clip_model),
        "fid": lambda: (metrics.fid_images is None or image_files(metrics.fid_images), inception_file()),
    }
    left_out = set()
    for name in (name for name in checks if name in metrics.names):
        try:
            checks[name]()
        except (LoadError, _NoPromptError) as error:
            is_own_folder = name == "clip_score" and hub_id(metrics.clip_model) is None  # a mistake, and no download
            if metrics.missing == "error" or (is_own_folder and not isinstance(error, _NoPromptError)):
                raise
            _say_once(f"note: quality/{name} is left out: {error}")
            left_out.add(name)
    return replace(metrics, names=tuple(name for name in metrics.names if name not in left_out))


class _NoPromptError(ConfigError):
    """CLIP score of images without prompts."""


def _clip_of_prompts(task: Any, model: str) -> Path:
    if getattr(task, "prompt", None) is None:
        raise _NoPromptError(
            "metrics.names: clip_score compares images with their prompts, and task.prompt is null; leave "
            "clip_score out, or set task.prompt for a model that takes one"
        )
    return clip_folder(model)


@cache
def _say_once(line: str) -> None:
    """Say a line once in a sweep, not for each of its experiments."""
    say(line)


def torch_hub_folder() -> Path:
    """Return the folder in which torch.hub, and torchvision with it, keeps files of weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser() / "hub" / "checkpoints"


def backbone_file(net: str) -> Path:
    """Return the classifier's weights. Raises: LoadError."""
    return _find_downloaded("lpips", (BACKBONE_SOURCES[net],))


def inception_file() -> Path:
    """Return the weights of FID's Inception. Raises: LoadError."""
    return _find_downloaded("fid", INCEPTION_SOURCES)


def heads_file(net: str) -> Path:
    """Return the file of LPIPS' learned weights, which comes with torchmetrics. Raises: MissingLibraryError."""
    spec = find_spec("torchmetrics")  # finds it without importing it
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder, "functional", "image", "lpips_models", f"{net}.pth")
        if path.is_file():
            return path
    raise MissingLibraryError(
        f"metrics.names: lpips needs torchmetrics with its lpips_models/{net}.pth; pip install torchmetrics, or leave "
        "lpips out"
    )


def clip_folder(name: str) -> Path:
    """Return the folder of CLIP. Raises: LoadError."""
    place = f"metrics.clip_model={name}"
    remedy = f"download it (`hf download {name}`), set metrics.clip_model to a folder, or leave clip_score out"
    try:
        folder = local_folder(name)
    except LoadError as error:
        raise LoadError(f"{place}: {error}; {remedy}") from error
    if not folder.is_dir():
        raise LoadError(f"{place}: there is no such folder; {remedy}")
    missing = [files[0] for files in CLIP_FILES if not any(any(folder.glob(file)) for file in files)]
    if missing:
        raise LoadError(f"{place}: '{folder}' lacks {first_names(missing)}; {remedy}")
    return folder


def image_files(folder: str) -> list[Path]:
    """Return the images in a folder. Raises: ConfigError unless there are two."""
    place = Path(folder).expanduser()
    found = sorted(path for path in place.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < 2:
        raise ConfigError(
            f"metrics.fid_images={folder} holds {len(found)} images ({', '.join(IMAGE_SUFFIXES)}); give a folder with "
            "at least two, or null to compare with the reference's images"
        )
    return found


def _find_downloaded(metric: str, sources: tuple[str, ...]) -> Path:
    """Return the file of one of `sources` in torch.hub's folder."""
    folder = torch_hub_folder()
    for source in sources:
        path = folder / source.rpartition("/")[2]
        if path.is_file():
            return path
    name = sources[0].rpartition("/")[2]
    raise LoadError(
        f"metrics.names: {metric} needs '{folder / name}', which is not there; download it "
        f"(`{_fetch_command(sources[0], folder / name)}`; TORCH_HOME names another place than {folder.parents[1]}), or "
        f"leave {metric} out"
    )


def _fetch_command(source: str, path: Path) -> str:
    """Return the command that puts a file of weights in its place; torchvision's are known by its own names."""
    if source.startswith("https:"):
        return f"curl -L --create-dirs -o {shlex.quote(str(path))} {source}"
    model = next(name for name in ("alexnet", "vgg16") if name in source)
    code = f"from torchvision.models import {model}; {model}(weights='DEFAULT')"
    return f'pip install torchvision && python -c "{code}"'
