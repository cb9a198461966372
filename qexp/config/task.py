"""The settings that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from qexp.errors import ConfigError


@dataclass(frozen=True)
class TaskConfig:
    """name: the task, which is the name of its file."""

    name: str = ""

    saves_outputs: ClassVar[bool] = True  # False: there is nothing to compare with a reference, or to score
    is_seeded: ClassVar[bool] = True  # False: its result does not depend on the seed
    FILES: ClassVar[tuple[str, ...]] = ()  # fields that name a file

    def resolved(self) -> Self:
        """Return the settings with their files read. Raises ConfigError or LoadError for one that cannot be read."""
        return self

    def input_files(self) -> dict[str, Path]:
        """Return field -> file that the task reads; its content is part of a run's key."""
        paths = {name: getattr(self, name) for name in self.FILES}
        return {name: Path(path).expanduser() for name, path in paths.items() if path is not None}

    def check_least(self, **least: int) -> None:
        """Raise ConfigError for a field below its least value; null, which has a meaning of its own, is let through."""
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ConfigError(f"task.{name}={value} must be {bound} or more")
