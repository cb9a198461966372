"""The settings that all model sources share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from qexp.config.dataclass_io import check_path


@dataclass(frozen=True)
class ModelConfig:
    """Settings of a model.

    source: the model source, the name of its file. path: the checkpoint: a folder, a file, or a hub's user/name;
    revision: its branch, tag or commit (null: main). reference_path: the unquantized original, if `path` is already
    quantized. skip_modules: patterns of modules to leave unquantized.
    """

    source: str = ""
    path: str | None = None
    revision: str | None = None
    reference_path: str | None = None
    skip_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("path", "reference_path"):
            check_path(getattr(self, name), f"model.{name}", "give a folder or a file")

    @property
    def has_original(self) -> bool:
        """Whether the settings name the unquantized original of a quantized checkpoint."""
        return self.reference_path is not None

    def unquantized(self) -> Self:
        """Return the settings of the unquantized original, to compare with a quantized checkpoint."""
        return replace(self, path=self.reference_path, reference_path=None)

    def with_paths(self, absolute: Callable[[str], str]) -> Self:
        """Return the settings with `absolute` applied to each path but `path` and `reference_path`, which a run stores
        as absolute ones anyway, if they are no names of a hub.
        """
        return self

    def input_files(self) -> dict[str, Path]:
        """Return field -> file beside the checkpoint that defines the model; its content is part of a run's key."""
        return {}
