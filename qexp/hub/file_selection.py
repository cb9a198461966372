"""Choose the files of a hub's repository that a model needs: pure functions of its list of files.

A repository with one model needs config.json, the tokenizer's files, and the weights that would be opened in a local
folder (`checkpoints/weight_files.py`), or those of the requested variant (fp16). Weights in other formats (.bin, .ckpt,
.msgpack, .onnx), other variants, and documentation are not downloaded.

A pipeline (it has a model_index.json) is that file and a folder for each component that it names; single-file
checkpoints beside them, such as flux1-dev.safetensors, hold the same weights again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from qexp.checkpoints.foreign_files import PICKLE_SUFFIXES
from qexp.checkpoints.pipeline_folder import INDEX, parts_in, variant_file, variant_names
from qexp.checkpoints.weight_files import ReadJson, shard_files, weight_files
from qexp.errors import LoadError, first_names

SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm", ".bpe", ".tiktoken")  # configs, tokenizers
OPENED = (".safetensors", ".gguf")
NOT_OPENED = (*PICKLE_SUFFIXES, ".msgpack", ".h5", ".onnx", ".onnx_data")


def needed_files(names: Collection[str], read: ReadJson, place: str, variant: str | None = None) -> list[str]:
    """Return the needed files among `names`, all files of a repository, weights last.

    place: the repository, for messages. variant: of the weights, for each model that has it.
    Raises: LoadError if it has no readable weights, or no file of the variant.
    """
    wanted = variant_names(variant)
    if wanted and not any(PurePosixPath(name).name in wanted for name in names):
        raise LoadError(
            f"{place}: it has no files of the variant {variant}, such as model.{variant}.safetensors; leave the "
            "variant out"
        )
    if INDEX not in names:
        return _model_files("", names, read, place, variant, needs_weights=True)
    files = [INDEX]
    for component in parts_in(read(INDEX)):
        found = _model_files(f"{component}/", names, read, place, variant, needs_weights=False)
        if not found:
            raise LoadError(
                f"{place}: {INDEX} names '{component}', but the repository has no file of it; use another one"
            )
        files += found
    return sorted(files, key=lambda name: (name.endswith(OPENED), name))


def _model_files(
    folder: str, names: Collection[str], read: ReadJson, place: str, variant: str | None, *, needs_weights: bool
) -> list[str]:
    """Return the files of one model, in the root or in 'folder/'. needs_weights: False for a tokenizer and the like."""
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
        f"{where}: it has no safetensors, {what}; use a repository or a revision that has them, or save the model "
        "with save_pretrained, which writes them"
    )
