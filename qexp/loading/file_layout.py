"""The layout of the file that a model was loaded from, to save the model in it.

Files of single models, as their authors publish them and ComfyUI reads them, name and group tensors in another way than
the network of diffusers: q, k and v in one, shift before scale. What their conversion does is recorded without reading
a byte (`checkpoints/conversion.py`). Here the record is read backwards: of which rows of the network's tensors each
tensor of the file is made.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import ConfigError, first_names
from qexp.loading.component import Prepared
from qexp.quantizers.base import Quantizer
from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

SETTING = "save.layout=file"
COMFYUI_NAMES = {  # class of diffusers -> general.architecture, by which ComfyUI-GGUF knows a model
    "AuraFlowTransformer2DModel": "aura", "CosmosTransformer3DModel": "cosmos", "FluxTransformer2DModel": "flux",
    "HiDreamImageTransformer2DModel": "hidream", "HunyuanVideoTransformer3DModel": "hyvid",
    "LTXVideoTransformer3DModel": "ltxv", "Lumina2Transformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image", "SD3Transformer2DModel": "sd3", "WanTransformer3DModel": "wan",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Values `start` to `stop` of one of the network's tensors, flattened. offset, nbytes: where the file has them;
    is_computed: whether the network's tensor is more than such parts, one behind the other."""

    name: str
    start: int
    stop: int
    offset: int
    nbytes: int
    is_computed: bool


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file. parts: of the network's tensors, in order; is_whole: whether they are all of it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_whole: bool


FileLayout = Mapping[str, FileTensor]


def read_layout(file: Checkpoint, named: Checkpoint) -> FileLayout:
    """Return the tensors of a file that the network's tensors are made of; empty if they have the network's names.

    named: the same checkpoint under the names of the network.
    """
    if not named.converted_names:
        return {}
    found: dict[Path, list[Part]] = defaultdict(list)
    for name, entry in named.entries.items():
        for path, part in _parts_of(name, entry):
            found[path].append(part)
    for parts in found.values():
        parts.sort(key=lambda part: (part.offset, -part.nbytes))
    return {
        entry.name: FileTensor(entry.shape, parts, is_whole)
        for entry in file.entries.values()
        for parts, is_whole in [_cover(entry, found[entry.file])]
        if parts
    }


def _parts_of(name: str, entry: TensorEntry) -> Iterator[tuple[Path, Part]]:
    start = 0
    for piece in entry.pieces or (entry,):
        stop = start + math.prod(piece.shape)
        yield piece.file, Part(name, start, stop, piece.offset, piece.nbytes, entry.transform is not None)
        start = stop


def _cover(entry: TensorEntry, parts: Sequence[Part]) -> tuple[tuple[Part, ...], bool]:
    """Return the parts that lie in a file's tensor, each of its bytes once, and whether that is all of it."""
    at, end, found = entry.offset, entry.offset + entry.nbytes, list[Part]()
    for part in parts[bisect_left(parts, at, key=lambda part: part.offset) :]:
        if part.offset >= end:
            break
        if part.offset == at and part.nbytes:
            found.append(part)
            at += part.nbytes
    is_whole = at == end and not any(part.is_computed for part in found)
    return tuple(found), is_whole


def check_file_layouts(components: Iterable[Prepared]) -> None:
    """Raise ConfigError if models cannot be saved in the layout of their files, before a weight is read.

    Those that are not quantized have the network's; one at least must be GGUF.
    """
    quantized = [one for one in components if one.quantizer.quantization_method != "none"]
    for prepared in quantized:
        formats = {prepared.quantizer.layer_format(layer) for layer in prepared.chosen}  # a mix has no file's yet
        if not all(one.startswith("gguf ") for one in formats):
            raise not_for(prepared.quantizer)
        _check_groups(prepared)
    if not quantized:
        raise not_for(None)


def _check_groups(prepared: Prepared) -> None:
    quantizer, file = prepared.quantizer, prepared.request.checkpoint
    groups = InFileLayout(prepared.model.state_dict(keep_vars=True), read_layout(file, prepared.named))
    for name in groups:
        layers = [part.removesuffix(".weight") for part in groups.parts_of(name)]
        formats = {quantizer.layer_format(one) if one in prepared.chosen else "unquantized" for one in layers}
        if len(formats) > 1:
            raise _different(name, layers, formats)


def not_for(quantizer: Quantizer | None) -> ConfigError:
    """Return the error for a format that is not saved as GGUF."""
    name = "none" if quantizer is None else quantizer.quantization_method
    return ConfigError(
        f"{SETTING} is for GGUF, not for {name}; use backend=gguf, or mixed with GGUF alone, or leave it out"
    )


def _different(name: str, parts: Sequence[str], formats: Collection[str]) -> ConfigError:
    return ConfigError(
        f"{SETTING}: {first_names(parts)} are one tensor of the file ('{name}'), and cannot be in "
        f"{' and '.join(sorted(formats))}; give them one format"
    )


class InFileLayout(Mapping[str, Tensor]):
    """Tensors of a network under the names, and in the groups, of the file: each is made when it is asked for.

    Raises: ConfigError for a tensor that the file cannot hold: of parts in several types, or computed on load.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: FileLayout) -> None:
        if not layout:
            raise ConfigError(
                f"{SETTING}: the checkpoint has the network's own names; load the file of the model's authors "
                "(or of ComfyUI), or leave save.layout out"
            )
        self._tensors, self._layout, used = tensors, dict[str, FileTensor](), set[str]()
        for name, one in layout.items():
            own = {part.name for part in one.parts}
            if own.isdisjoint(tensors):
                continue  # of another model in the file
            if not one.is_whole or not own <= tensors.keys():
                raise ConfigError(
                    f"{SETTING}: '{name}' of the file is not made of the network's {first_names(sorted(own))} row by "
                    "row; leave save.layout out"
                )
            self._layout[name] = one
            used |= own
        held = {_identity(tensors[name]) for name in used}
        if missing := [name for name in tensors if name not in used and _identity(tensors[name]) not in held]:
            raise ConfigError(f"{SETTING}: the file has no place for {first_names(missing)}; leave save.layout out")

    @override
    def __getitem__(self, name: str) -> Tensor:
        one = self._layout[name]
        parts = [_rows(self._tensors[part.name], part) for part in one.parts]
        kinds = {part.quant_type if isinstance(part, GGUFTensor) else str(part.dtype) for part in parts}
        if len(kinds) > 1:
            raise _different(name, self.parts_of(name), kinds)
        first = parts[0]
        if not isinstance(first, GGUFTensor):
            return (first if len(parts) == 1 else torch.cat([part.flatten() for part in parts])).reshape(one.shape)
        if len(one.shape) != 2 or one.shape[1] != first.shape[1]:
            raise ConfigError(
                f"{SETTING}: '{name}' of the file has the shape {list(one.shape)}, and no rows for blocks of "
                f"{first.quant_type}; add '{one.parts[0].name.removesuffix('.weight')}' to skip_modules"
            )
        raws: list[Any] = [part.raw for part in parts if isinstance(part, GGUFTensor)]
        return first if len(parts) == 1 else first.around(torch.cat(raws))

    def parts_of(self, name: str) -> list[str]:
        """Return the names of the network's tensors that a tensor of the file is made of."""
        return list(dict.fromkeys(part.name for part in self._layout[name].parts))

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    @override
    def __len__(self) -> int:
        return len(self._layout)


def _identity(tensor: Tensor) -> object:
    """Return what tied tensors have in common: their memory, or the object where there is none."""
    address = 0 if tensor.is_meta or isinstance(tensor, GGUFTensor) else tensor.data_ptr()
    return (address, tensor.shape) if address else id(tensor)


def _rows(tensor: Tensor, part: Part) -> Tensor:
    """Return a part of a tensor: rows of a quantized one, values of any other."""
    if (part.start, part.stop) == (0, tensor.numel()):
        return tensor
    if not isinstance(tensor, GGUFTensor):
        return tensor.flatten()[part.start : part.stop]
    columns = tensor.shape[1]
    if part.start % columns or part.stop % columns:
        raise ConfigError(f"{SETTING}: the file cuts rows of '{part.name}', which blocks cannot; leave save.layout out")
    return tensor.around(tensor.raw[part.start // columns : part.stop // columns])
