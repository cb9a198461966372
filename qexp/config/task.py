"""The settings that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self


@dataclass(frozen=True)
class TaskConfig:
    """name: the task, which is the name of its file."""

    name: str = ""

    saves_outputs: ClassVar[bool] = True  # False: there is nothing to compare with a reference, or to score
    is_seeded: ClassVar[bool] = True  # False: its result does not depend on the seed

    def resolved(self) -> Self:
        """Return the settings with their files read. Raises ConfigError or LoadError for one that cannot be read."""
        return self

    def input_files(self) -> dict[str, Path]:
        """Return field -> file that the task reads; its content is part of a run's key."""
        return {}
