"""What is imported before workers are forked: all that experiments import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.sweep.preload import import_modules

BACKENDS = ("quanto", "torchao", "bitsandbytes", "gguf_q4_0", "packed_uint4")
CODE = """
import json, sys
from pathlib import Path
from tests.composing import run_config
from qexp.experiments.reference import reference_config
from qexp.results.run_folder import RunFolder
from qexp.sweep.preload import import_modules, modules_of
from qexp.sweep.reference import prepare_folder
from qexp.sweep.worker import Work, do_work

config = run_config(*sys.argv[2:], "tracking=none", f"paths.outputs={sys.argv[1]}", "device=cpu")
import_modules(modules_of(config))
before = set(sys.modules)
folders = []
for name, each in (("reference", reference_config(config)), ("run", config)):
    folders.append(RunFolder(Path(sys.argv[1], name)))
    folders[-1].path.mkdir(parents=True)
    prepare_folder(folders[-1], each, ())
    reference = folders[0].path if name == "run" else None
    status = do_work(Work(folders[-1].path, "all" if reference else "run", reference))
    assert status.status == "done", status
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.exhaustive  # some ten seconds each
@pytest.mark.parametrize("backend", BACKENDS)
def test_experiment_on_images_imports_no_library_after_the_preload(backend: str, tmp_path: Path) -> None:
    small = ("task.num_images=2", "task.num_inference_steps=2")
    command = [sys.executable, "-c", CODE, str(tmp_path), f"backend={backend}", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    late = json.loads(done.stdout.splitlines()[-1])
    assert [name for name in late if not name.startswith("qexp.")] == []


def test_functions_are_called_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    called: list[str] = []
    monkeypatch.setattr(platform, "node", lambda: called.append("node"))
    import_modules(["platform", "platform:node"])
    assert called == ["node"]
    with pytest.raises(ModuleNotFoundError):
        import_modules(["no_such_module:node"])
