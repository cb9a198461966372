"""Read a diffusers pipeline on disk without diffusers: model_index.json, and a folder for each component.

model_index.json names the pipeline's class (`_class_name`), the library and class of each component
(`"vae": ["diffusers", "AutoencoderKL"]`, or `[null, null]` for an unused one), and other arguments of the class. A
component is a model if its folder has config.json; schedulers, tokenizers and processors have scheduler_config.json,
tokenizer_config.json or preprocessor_config.json instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import read_object
from qexp.errors import ConfigError, LoadError, choices, first_names

INDEX = "model_index.json"
# files of components that are not models; old tokenizers have only a vocabulary
OTHER_FILES = (
    "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "spiece.model", "vocab.json",
)  # fmt: skip


@dataclass(frozen=True)
class PipelineFolder:
    """index: the parsed model_index.json."""

    path: Path
    index: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        """Return the name of the pipeline's class. Raises LoadError if diffusers does not have it."""
        name = self.index.get("_class_name")
        if not isinstance(name, str):
            raise LoadError(
                f"'{self.path / INDEX}' has _class_name={name!r}, which is not a class of diffusers; pipelines with "
                "their own code are not supported: use one of diffusers"
            )
        return name

    @cached_property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Component -> (library, class), without unused ones."""
        return parts_in(self.index)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Return the components with weights. Raises LoadError for a component with a missing or empty folder."""
        return tuple(name for name in self.parts if self._is_model(name))

    @property
    def others(self) -> tuple[str, ...]:
        """Schedulers, tokenizers, processors."""
        return tuple(name for name in self.parts if name not in self.models)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the other arguments of the pipeline's class; None for unused components."""
        return {
            name: None if isinstance(value, list) and value == [None, None] else value
            for name, value in self.index.items()
            if not name.startswith("_") and name not in self.parts
        }

    def weights(self, name: str, variant: str | None) -> Path:
        """Return the folder of a component's weights, or the variant's file or index if it has one."""
        folder = self.path / name
        files = [file.name for file in folder.iterdir() if file.is_file()] if variant is not None else []
        found = variant_file(files, variant, f"'{folder}'")
        return folder if found is None else folder / found

    def side_files(self) -> list[Path]:
        """Return all files apart from models: the index, and those of the other components."""
        folders = [self.path / name for name in self.others]
        return [self.path / INDEX, *sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())]

    def _is_model(self, name: str) -> bool:
        folder, (library, kind) = self.path / name, self.parts[name]
        if (folder / "config.json").is_file():
            return True
        if any((folder / other).is_file() for other in OTHER_FILES):
            return False
        found = "holds no config.json" if folder.is_dir() else "does not exist"
        raise LoadError(
            f"'{self.path / INDEX}' names the component '{name}' ({kind} of {library}), but '{folder}' {found}; "
            f"download the pipeline again"
        )


def parts_in(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Component -> (library, class) of a parsed model_index.json, without unused ones."""
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value
    }


def variant_names(variant: str | None) -> list[str]:
    """Return the possible names of a variant's file or index; the first one that exists is used.

    The last ones were written by diffusers before 0.32. Source: `variant_compatible_siblings` of diffusers.
    """
    stems = ("diffusion_pytorch_model", "model") if variant is not None else ()
    ends = (f"{variant}.safetensors", f"safetensors.index.{variant}.json", f"safetensors.{variant}.index.json")
    return [f"{stem}.{end}" for stem in stems for end in ends]


def variant_file(names: Collection[str], variant: str | None, place: str) -> str | None:
    """Return the file or index of a variant among a component's files, or None if it has none.

    Raises: LoadError for files of the variant without the index that opens them.
    """
    found = next((name for name in variant_names(variant) if name in names), None)
    if variant is None or found is not None:
        return found
    other = [name for name in names if name.endswith(".safetensors") and {variant} & {*re.split("[.-]", name)}]
    if other:
        raise LoadError(
            f"{place} has {first_names(sorted(other))} of the variant {variant}, but none of the files that open "
            f"them: {choices(variant_names(variant))}; download it again, or leave the variant out"
        )
    return None


def open_pipeline(path: Path, place: str) -> PipelineFolder:
    """Read a pipeline's index. place: what names the path, for messages.

    Raises: ConfigError if the path is not a pipeline, LoadError if its index is missing or cannot be read.
    """
    if not path.exists():
        raise LoadError(f"{place}: '{path}' does not exist; give the folder of a pipeline, which has {INDEX}")
    if not (path / INDEX).is_file():
        raise ConfigError(f"{place}: {_what_else(path)}; give the folder of a pipeline, which has {INDEX}")
    folder = PipelineFolder(path, read_object(path / INDEX))
    if not folder.parts:
        raise LoadError(f"'{path / INDEX}' names no component; download it again")
    return folder


def _what_else(path: Path) -> str:
    if path.is_file():
        return f"'{path}' is a file (for a pipeline's denoiser, write +model.checkpoints.transformer={path})"
    if not (path / "config.json").is_file():
        subfolders = [file.parent.name for file in sorted(path.glob(f"*/{INDEX}"))]
        return f"'{path}' has no {INDEX}" + (f", but its subfolder {choices(subfolders)} has" if subfolders else "")
    kind = read_object(path / "config.json")
    name = kind.get("_class_name") or (kind.get("architectures") or ["one model"])[0]
    if "model_type" in kind:
        sources = "model=causal_lm, model=seq2seq or model=transformers"
        return f"'{path}' has no {INDEX}, but the config.json of {name}, a model of transformers: use {sources}"
    return (
        f"'{path}' has no {INDEX}, but the config.json of {name}: it is a component (in a pipeline, set "
        f"+model.checkpoints.transformer={path}; alone, qexp.load() loads it)"
    )
