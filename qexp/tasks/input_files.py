"""The settings of `task=forward`, and its input file, checked by its header without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qexp.config.task import TaskConfig
from qexp.errors import ConfigError, LoadError, choices
from qexp.system import text_files

Shapes = dict[str, tuple[int, ...]]
HOW = "a .safetensors file with a tensor for each argument of forward, a .npy file, or a .txt file"
SUFFIXES = (".safetensors", ".npy", ".txt")


@dataclass(frozen=True)
class ForwardConfig(TaskConfig):
    """inputs: a .safetensors file (tensors by the names of forward's arguments), a .npy file (the first argument), or a
    .txt file (a line each, through the model's tokenizer); batch_size: rows, along the first dimension, at a time;
    component: of a model with several, null is the only one."""

    name: str = "forward"
    inputs: str | None = None
    batch_size: int = 8
    component: str | None = None

    FILES: ClassVar[tuple[str, ...]] = ("inputs",)

    def __post_init__(self) -> None:
        self.check_least(batch_size=1)

    @property
    def path(self) -> Path:
        return Path(str(self.inputs)).expanduser()

    @property
    def is_text(self) -> bool:
        return self.inputs is not None and self.path.suffix.lower() == ".txt"

    def resolved(self) -> ForwardConfig:
        """Itself. Raises ConfigError or LoadError for inputs that cannot be read, as far as headers say."""
        check_file(self)
        return self


def check_file(task: ForwardConfig) -> None:
    """Raise ConfigError for a file that is missing, of no known kind, empty, or whose tensors do not go together.

    Reads headers alone, and imports no torch.
    """
    if task.inputs is None:
        raise ConfigError(f"task.inputs=null names no inputs to call the network with; set it to {HOW}")
    suffix = task.path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"task.inputs={task.inputs} must end with {choices(SUFFIXES)}; give {HOW}")
    if not task.path.is_file():
        raise ConfigError(f"task.inputs={task.inputs} is no file; give {HOW}")
    if suffix == ".txt":
        read_lines(task)
        return
    shapes = _stored_shapes(task) if suffix == ".safetensors" else _array_shape(task)
    if not shapes:
        raise ConfigError(f"task.inputs={task.inputs} holds no tensors; give {HOW}")
    rows = {name: shape[0] for name, shape in shapes.items() if shape}
    if len(set(rows.values())) > 1 or 0 in rows.values():
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ConfigError(
            f"task.inputs={task.inputs}: tensors must have the same number of rows, 1 or more (their first dimension): "
            f"{counts}"
        )


def _stored_shapes(task: ForwardConfig) -> Shapes:
    from qexp.checkpoints.checkpoint import read_header

    try:
        return {entry.name: entry.shape for entry in read_header(task.path).entries}
    except LoadError as error:
        raise ConfigError(f"task.inputs: {error}") from error


def _array_shape(task: ForwardConfig) -> Shapes:
    array = open_array(task)
    if array.dtype.kind not in "fiub":
        raise ConfigError(
            f"task.inputs={task.inputs} holds {array.dtype}, which are no numbers for a network; save floats or "
            "integers"
        )
    return {"": tuple(array.shape)}


def open_array(task: ForwardConfig) -> Any:
    import numpy as np

    try:
        return np.load(task.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(
            f"task.inputs={task.inputs} is no .npy file of numbers: {error}; write it with numpy.save"
        ) from error


def read_lines(task: ForwardConfig) -> list[str]:
    """Return the lines of a text that are not empty. Raises ConfigError if there are none."""
    place = f"task.inputs={task.inputs}"
    lines = [line for line in text_files.read_lines(task.path, place, "give a text file") if line.strip()]
    if not lines:
        raise ConfigError(f"task.inputs={task.inputs} has no lines of text; write one for each row")
    return lines
