"""Short names of experiments, from their configuration as it is stored: the same in tables, plots and trackers.

digits · bitsandbytes nf4 · leaf→disk · generate            model · backend · offload · task
digits · bitsandbytes nf4 · none · generate · seed=1        in a sweep, with the other settings that vary in it
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEPARATOR = " · "
AND = " + "  # between the backends of a model's components
PATH = re.compile(r"@?[^\s,\[\](){}'\"]*/[^\s,\[\](){}'\"/]+")
RECIPE = "backend.recipe"
SHOWN_GROUPS = ("model", "backend", "offload", "task")  # overrides of these are in the label already


def run_label(config: Mapping[str, Any]) -> str:
    """Return one experiment in a line; `config` is the container in config.yaml."""
    names = model_label(config), backend_label(config), offload_label(config), str(config["task"]["name"])
    return SEPARATOR.join(names)


def model_label(config: Mapping[str, Any]) -> str:
    """Return the source, and the checkpoint's name where it is not the source's own."""
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
    """Return the libraries of a backend's label: 'bitsandbytes + quanto' of 'bitsandbytes nf4 + quanto int8'."""
    return AND.join(dict.fromkeys(part.partition(" ")[0] for part in label.split(AND)))


def offload_label(config: Mapping[str, Any]) -> str:
    """'none', 'leaf→disk', 'block→cpu' or 'block×2→cpu'."""
    offload = config["offload"]
    if offload["strategy"] == "none":
        return "none"
    blocks = offload.get("num_blocks_per_group", 1)
    return f"{offload['strategy']}{f'×{blocks}' if blocks != 1 else ''}→{offload['to']}"


def experiment_name(label: str, settings: str) -> str:
    """Return the name of an experiment of a sweep: its label, and what `settings_label` says."""
    return SEPARATOR.join(filter(None, (label, settings)))


def settings_labels(overrides: Sequence[Sequence[str]], labels: Sequence[str] = ()) -> list[str]:
    """Return the label of the settings for each experiment of a sweep, by those that vary between these.

    A path is its last part, where that tells it from the others; a recipe that its experiment's label names is left
    out. labels: of the experiments, see `run_label`.
    """
    varying, each = varying_settings(overrides), [_values(one) for one in overrides]
    recipes = {
        (label, one[RECIPE]) for one, label in zip(each, labels or [""] * len(each), strict=True) if RECIPE in one
    }
    is_named = all(Path(recipe).stem in label.split() for label, recipe in recipes)
    if is_named and len({label for label, _ in recipes}) == len({recipe for _, recipe in recipes}) == len(recipes):
        varying = [name for name in varying if name != RECIPE]
    for name in varying:
        values = {one[name] for one in each if name in one}
        if len({_last_part(value) for value in values}) == len(values):
            each = [one | {name: _last_part(one[name])} if name in one else one for one in each]
    return [_settings_label(one, varying) for one in each]


def _last_part(value: str) -> str:
    """Return the last part of a path, with its @; any other value as it is."""
    return "@" * value.startswith("@") + Path(value).name if PATH.fullmatch(value) else value


def varying_settings(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Return the settings that have several values in these lists of overrides, or that only some of them set."""
    values = [_values(each) for each in overrides]
    names = dict.fromkeys(name for each in values for name in each)
    return [name for name in names if len({each.get(name) for each in values}) > 1]


def settings_label(overrides: Sequence[str], varying: Sequence[str]) -> str:
    """Name an experiment's settings beside model, backend, offload and task: 'llm_int8_threshold=4, seed=1'.

    '' where nothing is left. A name is as short as it can be without being another setting's that varies.
    """
    return _settings_label(_values(overrides), varying)


def _settings_label(values: Mapping[str, str], varying: Sequence[str]) -> str:
    names = [name for name in varying if name not in SHOWN_GROUPS]
    return ", ".join(f"{_short_name(name, names)}={values[name]}" for name in names if name in values)


def _short_name(name: str, others: Sequence[str]) -> str:
    """Return the last parts of a dotted name, as many as tell it from the others, and from the groups in a label."""
    parts = name.split(".")
    taken = [other.split(".") for other in (*SHOWN_GROUPS, *others) if other != name]
    count = next(n for n in range(1, len(parts) + 1) if n == len(parts) or all(t[-n:] != parts[-n:] for t in taken))
    return ".".join(parts[-count:])


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """Setting -> value; of one that is given twice, the last."""
    return {name.lstrip("+~"): value for name, _, value in (override.partition("=") for override in overrides)}
