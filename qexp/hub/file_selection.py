"""Which files of a hub's repository a model is made of: pure functions of the list of its files.

A repository of one model is its config.json, its tokenizer's files, and the weights that are opened in a folder with
the same files (`checkpoints/weight_files.py`); or those of a variant (fp16) that is asked for, where it has them. Left
behind are weights in other formats (.bin, .ckpt, .msgpack, .onnx), other variants of them, and documentation.

A pipeline (it has a model_index.json) is that file and a folder for each component that it names; single-file
checkpoints beside them, such as flux1-dev.safetensors, hold the same weights once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from qexp.checkpoints.foreign_files import PICKLE_SUFFIXES
from qexp.checkpoints.pipeline_folder import variant_file, variant_names
from qexp.checkpoints.weight_files import ReadJson, shard_files, weight_files
from qexp.errors import LoadError, first_names

PIPELINE_INDEX = "model_index.json"
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm", ".bpe", ".tiktoken")  # configs, tokenizers
OPENED = (".safetensors", ".gguf")
NOT_OPENED = (*PICKLE_SUFFIXES, ".msgpack", ".h5", ".onnx", ".onnx_data")


def needed_files(names: Collection[str], read: ReadJson, place: str, variant: str | None = None) -> list[str]:
    """The files to have of a repository with these `names`, weights last.

    place: the repository, for messages. variant: of the weights of each model that has it.
    Raises: LoadError if it has no weights that can be opened, or nothing of the variant.
    """
    wanted = variant_names(variant)
    if wanted and not any(PurePosixPath(name).name in wanted for name in names):
        raise LoadError(
            f"{place}: it has no files of the variant {variant}, such as model.{variant}.safetensors; leave the "
            "variant out"
        )
    if PIPELINE_INDEX not in names:
        return _model_files("", names, read, place, variant, needs_weights=True)
    files = [PIPELINE_INDEX]
    for component in component_names(read(PIPELINE_INDEX)):
        found = _model_files(f"{component}/", names, read, place, variant, needs_weights=False)
        if not found:
            raise LoadError(f"{place}: {PIPELINE_INDEX} names '{component}', but no file is there; it is not complete")
        files += found
    return sorted(files, key=lambda name: (name.endswith(OPENED), name))


def component_names(index: Mapping[str, Any]) -> list[str]:
    """The components of a pipeline's model_index.json: the entries that name a library and a class."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and all(value)
    ]


def _model_files(
    folder: str, names: Collection[str], read: ReadJson, place: str, variant: str | None, *, needs_weights: bool
) -> list[str]:
    """The files of one model, in the root or in 'folder/'. needs_weights: a tokenizer, say, has none."""
    here = sorted(name.removeprefix(folder) for name in names if name.startswith(folder))
    here = [name for name in here if "/" not in name]
    side = [name for name in here if name.endswith(SIDE_SUFFIXES) and ".index." not in name]
    where = f"{place}, {folder.rstrip('/')}" if folder else place
    return [folder + name for name in side + _weights_in_folder(folder, here, read, where, variant, needs_weights)]


def _weights_in_folder(
    folder: str, here: list[str], read: ReadJson, where: str, variant: str | None, needs_weights: bool
) -> list[str]:
    def read_here(name: str) -> Mapping[str, Any]:
        return read(folder + name)

    of_variant = variant_file(here, variant, where)
    if of_variant is not None:
        if of_variant.endswith(OPENED):
            return [of_variant]
        return [of_variant, *shard_files(of_variant, here, read_here, where)]
    if found := weight_files(here, read_here, where):
        return found
    others = [name for name in here if PurePosixPath(name).suffix in NOT_OPENED]
    if not needs_weights and not others:
        return []
    what = f"only {first_names(others)}" if others else "and no other weights"
    raise LoadError(
        f"{where}: it has no safetensors, {what}; take a repository or a revision that has them, or save the model "
        "with save_pretrained, which writes them"
    )
