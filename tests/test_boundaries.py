"""Who may import what, read from the syntax trees; and that the process which composes experiments stays light."""

import ast
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.fresh_process import run_python

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qexp"
# top-level module -> the only files of the package that may import it
ONLY_IN = {
    "bitsandbytes": "qexp/quantizers/*",
    "torchao": "qexp/quantizers/*",
    "optimum": "qexp/quantizers/*",
    "gguf": ("qexp/quantizers/*", "qexp/checkpoints/*", "qexp/models/*", "qexp/loading/gguf_saving.py"),
    "huggingface_hub": ("qexp/hub/*", "qexp/models/*"),
    "wandb": ("qexp/tracking/*", "qexp/report/wandb_report.py"),
    "wandb_workspaces": "qexp/report/wandb_report.py",
    "diffusers": ("qexp/models/*", "qexp/interop/*"),
    "transformers": ("qexp/models/*", "qexp/interop/*"),
    "hydra": (
        "qexp/cli/command_line.py",
        "qexp/cli/hydra_errors.py",
        "qexp/cli/sweeper.py",
        "qexp/config/hydra_schema.py",
        "qexp/sweep/callback.py",
        "qexp/sweep/job.py",
    ),
}
HEAVY = {"torch", "bitsandbytes", "torchao", "optimum", "diffusers", "transformers", "accelerate", "torchmetrics"}
# What the parent process imports; qexp.sweep.worker and what only it imports compute, and may be heavy.
PARENT = (
    *("cli/*", "config/*", "hub/*", "rerun", "sweep/*", "results/*", "tracking/*", "report/*", "doctor/*"),
    *("experiments/resolve", "experiments/checks", "experiments/stored", "experiments/reference"),
    *("system/files", "**/__init__"),
)
PLUGINS = ("models", "quantizers", "tasks")


def modules_imported(source: str) -> Iterator[str]:
    """The dotted names that a module imports anywhere, `importlib.import_module("name")` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def trespasses(path: str, source: str) -> list[str]:
    """The imports of a file that belong elsewhere."""
    found = []
    for name in modules_imported(source):
        allowed = ONLY_IN.get(name.split(".")[0], "*")
        if not any(fnmatch(path, pattern) for pattern in ([allowed] if isinstance(allowed, str) else allowed)):
            found.append(f"{path} imports {name}, which only {allowed} may")
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def parent_modules() -> list[str]:
    paths = [path for pattern in PARENT for path in PACKAGE.glob(f"{pattern}.py")]
    plugins = [path for folder in PLUGINS for path in (PACKAGE / folder).glob("*.py") if binds_config(path)]
    return sorted({dotted(path) for path in paths + plugins} - {"qexp.report.__main__"})


def binds_config(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "Config" for node in tree.body)


def test_libraries_stay_in_their_rooms() -> None:
    files = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(files) > 300
    assert [found for path, source in files.items() for found in trespasses(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("qexp/loading/plan.py", "def f():\n    from torchao.utils import x", 1),
        ("qexp/quantizers/torchao.py", "import torchao, bitsandbytes.nn", 0),
        ("qexp/report/table.py", "import wandb.sdk", 1),
        ("qexp/report/wandb_report.py", "import wandb_workspaces.reports.v2 as wr", 0),
        ("qexp/experiments/run.py", "import importlib\nimportlib.import_module('diffusers.models')", 1),
        ("qexp/experiments/run.py", "from qexp.quantizers import bitsandbytes", 0),
    ],
)
def test_trespasses_are_seen(path: str, source: str, count: int) -> None:
    assert len(trespasses(path, source)) == count


def test_the_root_holds_few_files() -> None:
    files = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert "__main__.py" in files and len(files) <= 6, files


def test_parent_modules_import_nothing_heavy() -> None:
    names = parent_modules()
    assert {"qexp.cli.command_line", "qexp.sweep.job", "qexp.quantizers.torchao", "qexp.models.digits"} <= set(names)
    code = f"""
import importlib, json, sys
blame = {{}}
for name in {names!r}:
    before = set(sys.modules)
    importlib.import_module(name)
    if heavy := sorted({HEAVY!r} & (set(sys.modules) - before)):
        blame[name] = heavy
print(json.dumps(blame))
"""
    assert json.loads(run_python(code).splitlines()[-1]) == {}
