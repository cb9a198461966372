"""Choose the weight files of a folder or of a hub's repository, in the libraries' order.

transformers opens `model.safetensors`, and `model.safetensors.index.json` only without it: its save_pretrained leaves
the index of an earlier sharded save behind. diffusers opens `diffusion_pytorch_model.safetensors.index.json` first.
config.json identifies the library: `_class_name` is diffusers, `model_type` and `architectures` are transformers
(`PreTrainedModel.from_pretrained` and `ModelMixin.from_pretrained`; tests compare with both). Other files, such as
`consolidated.safetensors` or variants, hold the same weights again and are ignored. A folder without these names must
have one index, one safetensors file or one GGUF file, with any name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from qexp.errors import LoadError, first_names

ReadJson = Callable[[str], Mapping[str, Any]]  # the object in a file of the folder, by the file's name
INDEX_SUFFIX = ".safetensors.index.json"
OF_DIFFUSERS = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
OF_TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json")


def weight_files(names: Collection[str], read: ReadJson, place: str) -> list[str]:
    """Return the files to open: an index and its shards, or one file; [] if the folder has no weights.

    names: of all files in the folder. place: the folder or repository, for messages.
    Raises: LoadError if the choice is ambiguous, or a shard is missing.
    """
    config = read("config.json") if "config.json" in names else {}
    chosen = _named_by_config(names, config, place) or _standard_name(names, config, place) or _only_name(names, place)
    if chosen is None or not chosen.endswith(".json"):
        return [] if chosen is None else [chosen]
    return [chosen, *shard_files(chosen, names, read, place)]


def shard_files(index: str, names: Collection[str], read: ReadJson, place: str) -> list[str]:
    """Return the files that an index names. Raises LoadError if one is not in `names`, its folder's files."""
    where = f"{place}, {index}"
    shards = sorted({*weight_map(read(index), where).values()})
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadError(
                f"{where} names {name!r}; shards must be .safetensors files in the same folder: download it again"
            )
    if missing := [name for name in shards if name not in names]:
        whole = index.removesuffix(".index.json")
        rest = f", or delete the index: {whole} is beside it" if whole in names else ""
        raise LoadError(f"{where} names {missing[0]!r}, which is missing; download it again{rest}")
    return shards


def weight_map(index: Mapping[str, Any], place: str) -> dict[str, str]:
    """Return the file of each tensor from a parsed index."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise LoadError(f"{place} has no weight_map; download it again")
    for name, shard in found.items():
        if not isinstance(shard, str):
            raise LoadError(f"{place} names {brief(shard)} for '{name}', not a file; download it again")
    return found


def _named_by_config(names: Collection[str], config: Mapping[str, Any], place: str) -> str | None:
    """Return the file that transformers' config names itself, which takes precedence."""
    name = config.get("transformers_weights") if _is_of_transformers(config) else None
    if name is None:
        return None
    if name not in names or not str(name).endswith((".safetensors", INDEX_SUFFIX)):
        raise LoadError(
            f"{place}: config.json has transformers_weights={brief(name)}, but the folder has no such safetensors file "
            "or index; download it again"
        )
    return str(name)


def _standard_name(names: Collection[str], config: Mapping[str, Any], place: str) -> str | None:
    """Return the first standard name of weights that exists, in the order of the model's library."""
    of_diffusers = next((name for name in OF_DIFFUSERS if name in names), None)
    of_transformers = next((name for name in OF_TRANSFORMERS if name in names), None)
    if "_class_name" in config:
        return of_diffusers or of_transformers
    if _is_of_transformers(config):
        return of_transformers or of_diffusers
    if of_diffusers and of_transformers:
        raise LoadError(
            f"{place} has {of_diffusers} and {of_transformers}, and its config.json does not say which library's model "
            "it is (_class_name or model_type); keep one of them"
        )
    return of_diffusers or of_transformers


def _is_of_transformers(config: Mapping[str, Any]) -> bool:
    return "_class_name" not in config and ("model_type" in config or "architectures" in config)


def _only_name(names: Collection[str], place: str) -> str | None:
    """Return the only index, safetensors file or GGUF file, in this order, of a folder without a standard name."""
    for ending, what in ((INDEX_SUFFIX, "indices"), (".safetensors", "safetensors files"), (".gguf", ".gguf files")):
        found = sorted(name for name in names if name.endswith(ending))
        if len(found) > 1:
            raise LoadError(
                f"{place} has several {what} ({first_names(found)}): different models, or shards without their index; "
                "set model.path to one of them (from a repository: hf download user/name file)"
            )
        if found:
            return found[0]
    return None
