"""The screen of an experiment has the lines of this program alone; what its libraries print is in the log."""

import subprocess
import sys
from pathlib import Path

import pytest

from qexp.config.yaml_options import option_names
from tests.products import exhaustive
from tests.screen import foreign_lines

OPTIONS = [name for name in option_names("backend") if name != "mixed"]  # which needs a recipe
CASES = [  # in a process, a worker prints into its log whatever its model
    ("bitsandbytes_int8", "arithmetic", "inline"),
    ("quanto", "digits", "inline"),
    *((name, model, "process") for name in OPTIONS for model in ("digits", "arithmetic")),
]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qexp", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


# By default tests/hub/test_download.py asks this of the run that it starts.
@pytest.mark.parametrize(("option", "model", "isolation"), [exhaustive(*case) for case in CASES])
def test_screen_has_own_lines_alone(option: str, model: str, isolation: str, tmp_path: Path) -> None:
    done = run(tmp_path, f"model={model}", f"backend={option}", "task=roundtrip", f"isolation={isolation}")
    assert done.returncode == 0, done.stderr
    assert foreign_lines(done.stdout + done.stderr) == []
    assert "done in" in done.stdout + done.stderr


def test_noise_of_libraries_is_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "import logging, os, warnings\n"
        "def experiment(config, folder):\n"
        "    print('a bar'); os.write(2, b'from C\\n'); logging.getLogger('library').error('an error')\n"
        "    warnings.warn('deprecated')\n"
        "    raise RuntimeError('crashed')\n"
    )
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from qexp.config.schema import IsolationConfig; from qexp.sweep.job import run_job\n"
        "from qexp.tasks.roundtrip import RoundtripConfig; from tests.sweep.fake_experiment import FAKES\n"
        "from tests.sweep.settings import run_config\n"
        "for mode in ('process', 'inline'):\n"
        "    config = run_config(Path(sys.argv[1], mode), isolation=IsolationConfig(mode=mode))\n"
        "    config = replace(config, task=RoundtripConfig())  # has no reference\n"
        "    print(run_job(config, (), **(FAKES | {'experiment': 'noisy:experiment'})).status)\n"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    shown = done.stdout + done.stderr
    assert done.stdout.splitlines().count("failed") == 2 and "crashed; traceback in" in shown
    for words in ("a bar", "from C", "an error", "deprecated", "Traceback"):
        assert words not in shown
        for mode in ("process", "inline"):
            log = next((tmp_path / mode / "outputs/runs").glob("*/worker.log")).read_text()
            assert words in log, (words, mode)
