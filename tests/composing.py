"""The real configuration, composed as Hydra does it, and a command line that stops where an experiment would run."""

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import qexp.__main__
import qexp.sweep.job
from qexp.config.hydra_schema import compose_settings
from qexp.config.schema import RunConfig
from qexp.experiments.resolve import to_run_config
from qexp.results.manifest import JobRow
from qexp.system import devices

CONF = Path(__file__).parents[1] / "conf"


def composed(*overrides: str) -> DictConfig:
    """What the command line would hand over, but for the sweep's name, which is the time of day otherwise."""
    return compose_settings(["++sweep.name=test", *overrides])


def run_config(*overrides: str) -> RunConfig:
    return to_run_config(composed(*overrides))


@dataclass
class CommandLine:
    """Call it with arguments for the exit code; `configs` and `keys` are of what came as far as `run_job`."""

    monkeypatch: pytest.MonkeyPatch
    configs: list[RunConfig] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    failed_seed: int = 13
    unsupported_seed: int = 14

    def __call__(self, *arguments: str) -> int:
        self.monkeypatch.setattr(sys, "argv", ["qexp", *arguments])
        try:
            qexp.__main__.main()
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        return 0

    def refusal(self, *arguments: str) -> str:
        """The one line of a command that runs nothing, behind 'error: '."""
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            assert self(*arguments) == 1
        (line,) = err.getvalue().splitlines()
        assert line.startswith("error: ") and out.getvalue() == "" and self.configs == []
        return line.removeprefix("error: ")

    def run_job(self, config: RunConfig, overrides: Sequence[str], *, key: str) -> JobRow:
        self.configs.append(config)
        self.keys.append(key)
        status = {self.failed_seed: "failed", self.unsupported_seed: "unsupported"}.get(config.seed, "done")
        number = len(self.configs)
        return JobRow(number, f"key{number}", tuple(overrides), "label", status)


@contextmanager
def command_line(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[CommandLine]:
    """A command line in `folder` on a machine without a GPU; what Hydra leaves behind globally is put back."""
    command = CommandLine(monkeypatch)
    monkeypatch.setattr(qexp.sweep.job, "run_job", command.run_job)
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield command
    finally:
        root.handlers[:], root.level = handlers, level
        HydraConfig.instance().cfg = None


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CommandLine]:
    with command_line(monkeypatch, tmp_path) as line:
        yield line
