"""What every model source's settings have in common, and what the rest of the program asks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class ModelConfig:
    """source: the model source, which is the name of its file; path: the checkpoint, a folder, a file, or user/name of
    a hub's repository, of which revision is a branch, tag or commit (null: main); reference_path: the unquantized
    checkpoint to compare with where `path` is quantized already; skip_modules: patterns to leave unquantized."""

    source: str = ""
    path: str | None = None
    revision: str | None = None
    reference_path: str | None = None
    skip_modules: tuple[str, ...] = ()

    @property
    def has_original(self) -> bool:
        """Whether the settings name the unquantized checkpoint that a quantized one was made from."""
        return self.reference_path is not None

    def unquantized(self) -> Self:
        """The model to compare with where `path` is quantized already."""
        return replace(self, path=self.reference_path, reference_path=None)

    def with_paths(self, absolute: Callable[[str], str]) -> Self:
        """Return the settings with `absolute` applied to each path but `path` and `reference_path`, which a run stores
        as absolute ones anyway, if they are no names of a hub.
        """
        return self

    def input_files(self) -> dict[str, Path]:
        """Field -> file beside the checkpoint that defines the model; its content is part of a run's key."""
        return {}
