"""The commands of README.md as a user types them: of sweeps what they compose; of models, tiny ones, that they run."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import qexp.sweep.job
from qexp.cli.commands import COMMANDS
from qexp.models.arithmetic import ASSETS
from tests.backends import BACKENDS
from tests.composing import command_line
from tests.models.test_networks import save_network
from tests.products import representatives

ROOT = Path(__file__).parents[2]
SMALL = ("task.height=32", "task.width=32", "task.num_inference_steps=2", "task.max_sequence_length=16")
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x):
        return super().forward(x)
"""


def commands(section: str) -> list[list[str]]:
    """The words behind `python -m qexp` in the first block of a section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"^## {section}\n.*?^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    found = [words[3:] for words in lines if words[:3] == ["python", "-m", "qexp"]]
    assert len(found) == len(lines), "a line is no command"
    return found


def experiments(section: str) -> list[list[str]]:
    return [words for words in commands(section) if words[0] not in COMMANDS]


COUNTS = [1, 12, 1, 4, 2, 1, len(BACKENDS)]


@pytest.mark.parametrize("number", representatives(range(len(COUNTS)), (0, 2, 4, 5)))
def test_sweeps_compose(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = experiments("Sweeps")
    assert len(found) == len(COUNTS)
    with command_line(monkeypatch, tmp_path) as command:
        command(*found[number])
        assert len(command.configs) == COUNTS[number]


def test_other_commands_are_those_of_the_console_script() -> None:
    others = [words[0] for words in commands("Sweeps") if words[0] in COMMANDS]
    assert sorted(others) == sorted(COMMANDS)


@pytest.fixture
def place(tmp_path: Path, pipeline_folder: Callable[[str], Path]) -> Path:
    """A folder with all that the commands name."""
    (tmp_path / "folder").symlink_to(pipeline_folder("flux"))
    shutil.copytree(ASSETS, tmp_path / "user" / "name")
    text = "".join((ASSETS / "held_out.txt").read_text().splitlines(keepends=True)[:20])
    (tmp_path / "text.txt").write_text(text)
    encoder = save_network("BertModel", tmp_path / "encoder", torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, encoder / name)
    (tmp_path / "lines.txt").write_text("1+1=\n20-3=\n")
    (tmp_path / "nets.py").write_text(NET)
    names = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (4, 64), "2.bias": (4,)}
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in names.items()}, tmp_path / "w.safetensors")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(5, 64)))
    return tmp_path


ADDED = [  # to the commands of the section on models: what makes them small, or is here in place of a hub
    ("model.path=folder", *SMALL),
    SMALL,
    (),
    ("model.path=encoder",),
    (),
]
QUALITY = ["psnr_db", "psnr_db", "kl_divergence", "relative_l2", "relative_l2"]


@pytest.mark.parametrize("number", representatives(range(len(ADDED)), (4,)))
def test_models_run(number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands("Models")
    assert len(found) == len(ADDED)
    words = [*found[number], *ADDED[number], "tracking=none", "device=cpu", "isolation=inline"]
    monkeypatch.syspath_prepend(place)  # as `python -m` does
    run_job = qexp.sweep.job.run_job
    with command_line(monkeypatch, place) as command:
        monkeypatch.setattr(qexp.sweep.job, "run_job", run_job)
        assert command(*words) == 0
    (path,) = place.glob("outputs/runs/*/result.json")
    assert isinstance(json.loads(path.read_text())["metrics"][f"quality/{QUALITY[number]}"], float)
