"""Find the file behind a worker's SIGBUS: one that was mapped, and truncated while the worker ran."""

from __future__ import annotations

from pathlib import Path

from qexp.checkpoints.checkpoint import open_components
from qexp.errors import QexpError
from qexp.experiments.stored import run_config_from_container
from qexp.models.base import load_source
from qexp.system.files import read_yaml

UNKNOWN = (
    "a file that it had mapped was truncated, or the disk or the memory is damaged; the checkpoint's files are whole "
    "now, and with loader.map=false none is mapped"
)


def find_changed_file(folder: Path) -> str:
    """Say which file of a run's checkpoints is damaged now. folder: of the run."""
    try:
        open_components(load_source(run_config_from_container(read_yaml(folder / "config.yaml") or {}).model))
    except QexpError as error:
        return f"it had mapped a file that was changed while it ran: {error}"
    return UNKNOWN
