"""The name of quantized weights in a cache: a hash of everything that decides their bytes.

The content of the checkpoint; which of its tensors becomes which weight, and from which dtype; the backend's settings,
for each layer its format; the device, and the instructions of its CPU; the versions of the libraries; and the source
code that reads and quantizes, since a version does not change with every edit.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qexp.checkpoints.content import content_digest
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.config.dataclass_io import to_plain
from qexp.config.plugins import PACKAGE_FOLDER
from qexp.loading.component import Prepared
from qexp.loading.work_item import WorkItem
from qexp.quantizers.rows import WeightSpec
from qexp.results.environment import RESULT_PACKAGES, device_name, versions_of

SCHEMA = 1
ROOMS = ("checkpoints", "loading", "models", "quantizers")  # whose code decides what is read, and made of it
PACKAGES = (*RESULT_PACKAGES, "numba", "diffusers", "transformers")
KEY_DIGITS = 32


def cache_key(prepared: Prepared, *, is_full: bool) -> str:
    """Return the key of the weights that a load would quantize. is_full: read large checkpoint files completely."""
    request, quantizer = prepared.request, prepared.quantizer
    parts = {layer: quantizer.part_of(layer) for layer in prepared.chosen}
    required = {package for part in parts.values() for package in part.required_packages}
    values = {
        "schema": SCHEMA,
        "content": request.checkpoint.content_hash(full=is_full),
        "weights": [_describe_item(item, item.spec) for item in prepared.plan.distinct if item.spec is not None],
        "formats": {layer: to_plain(replace(part.config, label=None)) for layer, part in parts.items()},
        "device": [device_name(str(request.device)), torch.backends.cpu.get_cpu_capability()],
        "versions": versions_of(sorted({*PACKAGES, *required})),
        "code": [_code_digest(), *_source_digest(type(request.source))],
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def _describe_item(item: WorkItem, spec: WeightSpec) -> list[Any]:
    return [item.target, spec.shape, str(spec.dtype), spec.transposed, *map(_describe, item.entries)]


def _describe(entry: TensorEntry) -> list[Any]:
    """Return what of an entry decides which numbers it stands for; the files count by their content."""
    pieces = [[piece.name, piece.dtype, piece.offset, piece.nbytes] for piece in entry.pieces]
    return [entry.name, entry.dtype, entry.shape, entry.offset, entry.nbytes, entry.transform is not None, pieces]


@cache
def _code_digest() -> str:
    files: Iterable[Path] = (file for room in ROOMS for file in PACKAGE_FOLDER.joinpath(room).rglob("*.py"))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _source_digest(kind: type) -> list[str]:
    """Return the digest of the file that defines a model source: one of a user's may convert tensors as it likes."""
    file = inspect.getsourcefile(kind)
    return [] if file is None else [content_digest(Path(file))]
