"""A pipeline of diffusers on disk, read without diffusers: model_index.json, and a folder for each component.

model_index.json names the pipeline's class (`_class_name`), the library and class of each component
(`"vae": ["diffusers", "AutoencoderKL"]`, or `[null, null]` for one that this pipeline does without), and other
arguments of the class. A component is a model if its folder has config.json; schedulers, tokenizers and processors have
a file of their own (scheduler_config.json, tokenizer_config.json, preprocessor_config.json).
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
# what a folder of something else than a model holds; a tokenizer of old has its vocabulary alone
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
        """The pipeline's class. Raises: LoadError if it is not one of diffusers' own."""
        name = self.index.get("_class_name")
        if not isinstance(name, str):
            raise LoadError(
                f"'{self.path / INDEX}' has _class_name={name!r}, which is no class of diffusers: pipelines with code "
                f"of their own are not loaded; use one that diffusers has"
            )
        return name

    @cached_property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Component -> (library, class), without those that the pipeline does without."""
        return {
            name: (str(value[0]), str(value[1]))
            for name, value in self.index.items()
            if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value
        }

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The components that have weights. Raises: LoadError for a component whose folder is missing or empty."""
        return tuple(name for name in self.parts if self._is_model(name))

    @property
    def others(self) -> tuple[str, ...]:
        """Schedulers, tokenizers, processors."""
        return tuple(name for name in self.parts if name not in self.models)

    @property
    def arguments(self) -> dict[str, Any]:
        """What else the pipeline's class is made with; None for components that it does without."""
        return {
            name: None if isinstance(value, list) and value == [None, None] else value
            for name, value in self.index.items()
            if not name.startswith("_") and name not in self.parts
        }

    def weights(self, name: str, variant: str | None) -> Path:
        """The folder of a component's weights, or of a variant that it has the file, or the index of the shards."""
        folder = self.path / name
        files = [file.name for file in folder.iterdir() if file.is_file()] if variant is not None else []
        found = variant_file(files, variant, f"'{folder}'")
        return folder if found is None else folder / found

    def side_files(self) -> list[Path]:
        """All files that are no model's: the index, and those of the other components."""
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


def variant_names(variant: str | None) -> list[str]:
    """What the file of a variant, or the index of its shards, may be called; the first that is there is taken.

    The last ones are of diffusers before 0.32. Source: `variant_compatible_siblings` of diffusers.
    """
    stems = ("diffusion_pytorch_model", "model") if variant is not None else ()
    ends = (f"{variant}.safetensors", f"safetensors.index.{variant}.json", f"safetensors.{variant}.index.json")
    return [f"{stem}.{end}" for stem in stems for end in ends]


def variant_file(names: Collection[str], variant: str | None, place: str) -> str | None:
    """The file to open of a variant among those of a component, or None if it has none of the variant.

    Raises: LoadError for files of the variant that nothing says how to open.
    """
    found = next((name for name in variant_names(variant) if name in names), None)
    if variant is None or found is not None:
        return found
    other = [name for name in names if name.endswith(".safetensors") and {variant} & {*re.split("[.-]", name)}]
    if other:
        raise LoadError(
            f"{place} has {first_names(sorted(other))} of the variant {variant}, but neither of the files that open "
            f"them: {choices(variant_names(variant))}; download it again, or leave the variant out"
        )
    return None


def open_pipeline(path: Path, place: str) -> PipelineFolder:
    """Read a pipeline's index. place: what names the path, for messages.

    Raises: ConfigError for something else than a pipeline, LoadError for an index that cannot be read.
    """
    if not path.exists():
        raise LoadError(f"{place}: '{path}' does not exist; give the folder of a pipeline, the one with {INDEX}")
    if not (path / INDEX).is_file():
        raise ConfigError(f"{place}: {_what_else(path)}; give the folder of a pipeline, the one with {INDEX}")
    index = read_object(path / INDEX)
    folder = PipelineFolder(path, index)
    if not folder.parts:
        raise LoadError(f"'{path / INDEX}' names no component; download it again")
    return folder


def _what_else(path: Path) -> str:
    if path.is_file():
        return f"'{path}' is a file; of a pipeline's denoiser, set it with +model.checkpoints.transformer={path}"
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
