"""Short names of experiments, from their configuration as it is stored: the same in tables, plots and trackers.

digits · bitsandbytes nf4 · leaf→disk · generate        model · backend · offload · task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEPARATOR = " · "
AND = " + "  # between the backends of a model's components
SHOWN_GROUPS = ("model", "backend", "offload", "task")  # overrides of these are in the label already


def run_label(config: Mapping[str, Any]) -> str:
    """One experiment in a line; `config` is the container in config.yaml."""
    names = model_label(config), backend_label(config), offload_label(config), str(config["task"]["name"])
    return SEPARATOR.join(names)


def model_label(config: Mapping[str, Any]) -> str:
    """The source, and the checkpoint's name where it is not the source's own."""
    model = config["model"]
    return f"{model['source']} {Path(model['path']).name}" if model.get("path") else str(model["source"])


def backend_label(config: Mapping[str, Any]) -> str:
    """'bitsandbytes nf4'; components with different backends give 'bitsandbytes nf4 + quanto int8', without the 'none'
    of those that are not quantized."""
    backends = [component["backend"] for component in config["components"].values()]
    backends = [backend for backend in backends if backend["quant_method"] != "none"] or backends
    return AND.join(dict.fromkeys(_one_backend(backend) for backend in backends))


def _one_backend(backend: Mapping[str, Any]) -> str:
    method, label = str(backend["quant_method"]), backend.get("label")
    return method if label in (None, "", method) else f"{method} {label}"


def backend_family(label: str) -> str:
    """The libraries of a backend's label: 'bitsandbytes + quanto' of 'bitsandbytes nf4 + quanto int8'."""
    return AND.join(dict.fromkeys(part.partition(" ")[0] for part in label.split(AND)))


def offload_label(config: Mapping[str, Any]) -> str:
    """'none', 'leaf→disk', 'block→cpu' or 'block×2→cpu'."""
    offload = config["offload"]
    if offload["strategy"] == "none":
        return "none"
    blocks = offload.get("num_blocks_per_group", 1)
    return f"{offload['strategy']}{f'×{blocks}' if blocks != 1 else ''}→{offload['to']}"


def settings_labels(overrides: Sequence[Sequence[str]]) -> list[str]:
    """What tells the experiments of a sweep apart beside model, backend, offload and task: 'llm_int8_threshold=4'.

    One label for each list of overrides, '' where nothing is left.
    """
    values = [dict(_split(override) for override in each) for each in overrides]
    names = dict.fromkeys(name for each in values for name in each)
    varying = [name for name in names if name not in SHOWN_GROUPS and len({each.get(name) for each in values}) > 1]
    return [", ".join(f"{name.rpartition('.')[2]}={each[name]}" for name in varying if name in each) for each in values]


def _split(override: str) -> tuple[str, str]:
    name, _, value = override.partition("=")
    return name.lstrip("+~"), value
