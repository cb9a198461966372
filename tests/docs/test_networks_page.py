"""docs/networks.md as a user follows it: the file it shows, the commands it gives, and what they say."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "nets.py").write_text(code[1])
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(code[1], namespace)
    torch.manual_seed(0)
    save_file(namespace["Net"]().state_dict(), tmp_path / "weights.safetensors")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 64)))
    return tmp_path


@pytest.mark.exhaustive
def test_the_commands_of_the_page_run(project: Path) -> None:
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    round_trip, sweep = re.findall(r"^\$ python -m (.*)$", page, re.MULTILINE)
    for command in (round_trip, f"{sweep} isolation=inline"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-m", *command.split(), "tracking=none", "device=cpu"]
        done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = [path.parent for path in sorted(project.glob("outputs/runs/*/result.json"))]
    metrics = {path: json.loads((path / "result.json").read_text())["metrics"] for path in runs}
    (layers,) = [path / "layers.csv" for path in runs if (path / "layers.csv").exists()]
    assert len(list(csv.DictReader(layers.open()))) == 5
    errors = sorted(found["quality/relative_l2"] for found in metrics.values() if "quality/relative_l2" in found)
    assert errors[0] == 0 and 0 < errors[1] < 0.02  # unquantized, and int8
    outputs = [list(csv.DictReader((path / "outputs.csv").open())) for path in runs if (path / "outputs.csv").exists()]
    assert [[row["output"] for row in rows] for rows in outputs] == [["hidden", "logits"]] * 2
