"""The package as others get it: the wheel, its metadata, the pins, and nothing in the files that holds here only."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qexp
from tests.products import exhaustive

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ELSEWHERE = re.compile(
    r"(?<![\w.{}~$])/(home|root|Users|work|mnt|opt|tmp)/\w"  # paths of one machine
    r"|(pypi|pythonhosted|anaconda|ghcr|docker)\.(org|io)|download\.pytorch|index-url"  # registries
)


def run(*command: str | Path, cwd: Path, path: Path) -> str:
    """The output of a command that finds Python modules in `path` first."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    child = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT, path=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-compile", "--no-index", "--target", folder)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder, path=folder)
    return folder


def files_below(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_wheel_holds_the_package_its_assets_and_conf(wheel: Path) -> None:
    expected = {f"qexp/{name}" for name in files_below(ROOT / "qexp")}
    expected |= {f"qexp/conf/{name}" for name in files_below(ROOT / "conf")}
    expected |= {f"hydra_plugins/{name}" for name in files_below(ROOT / "hydra_plugins")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"qexp/conf/config.yaml", "qexp/conf/backend/none.yaml", "qexp/assets/digits/config.json"} <= expected
    assert found == expected


def test_the_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"qexp-{qexp.__version__}-")


@pytest.mark.parametrize(
    "arguments",
    [("--help",), exhaustive(("--cfg", "job")), exhaustive(("backend=quanto", "offload=leaf", "--cfg", "job"))],
)
def test_the_wheel_answers_like_the_checkout(installed: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    checkout = run(sys.executable, "-m", "qexp", *arguments, cwd=ROOT, path=ROOT)
    assert run(sys.executable, "-m", "qexp", *arguments, cwd=tmp_path, path=installed) == checkout
    assert run(sys.executable, installed / "bin/qexp", *arguments, cwd=tmp_path, path=installed) == checkout


def test_the_wheel_is_what_was_tested_above(installed: Path, tmp_path: Path) -> None:
    code = "import qexp.config.yaml_options; print(qexp.__file__, qexp.config.yaml_options.conf_folder())"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=installed).count(str(installed)) == 2


@pytest.mark.exhaustive
def test_the_wheel_runs_an_experiment(installed: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "qexp", "tracking=none", "task.num_images=2", "task.num_inference_steps=2",
        cwd=tmp_path, path=installed)  # fmt: skip
    assert len(list(tmp_path.glob("outputs/runs/*/result.json"))) == 1
    assert len(list(tmp_path.glob("outputs/runs/*/images/grid.png"))) == 1


def requirements(*extras: str) -> list[Requirement]:
    """The package's own dependencies and those of its extras, `qexp[other]` replaced by what it stands for."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += EXTRAS[extra]
    own = {item for line in lines for item in Requirement(line).extras if Requirement(line).name == "qexp"}
    nested = requirements(*own) if own else []
    return [*nested, *(item for item in map(Requirement, lines) if item.name != "qexp")]


def names_of(items: list[Requirement]) -> set[str]:
    return {canonicalize_name(item.name) for item in items}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in parsed), "only exact pins, without local suffix"
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in parsed}


def closure(items: list[Requirement]) -> set[str]:
    """The names of everything that these requirements install here, by the metadata of what is installed."""
    todo = [(canonicalize_name(item.name), extra) for item in items for extra in {"", *item.extras}]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        for item in map(Requirement, importlib.metadata.distribution(name).requires or []):
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                new = {(canonicalize_name(item.name), more) for more in {"", *item.extras}} - seen
                todo.extend(new)
                seen |= new
    return {name for name, _ in seen}


def test_every_range_contains_its_pin() -> None:
    pinned = pins()
    for item in requirements(*EXTRAS):
        assert item.specifier.contains(pinned[canonicalize_name(item.name)]), str(item)


def test_everything_that_is_installed_is_pinned() -> None:
    names = closure(requirements(*(name for name in EXTRAS if name not in LARGE or find_spec(name))))
    assert {"torch", "antlr4-python3-runtime", "scikit-learn", "sentencepiece", "mdurl"} <= names
    assert names - pins().keys() == set()


LARGE = {"lm_eval"}  # extras, and modules of their name, that development goes without
FOR_FILES = {"torchmetrics"}  # not imported: LPIPS reads the weights that come with it


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that may be an import, without the expressions, which are most of a tree."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, name, ()):
            yield child
            yield from statements(child)


def third_party_imports(folder: str) -> set[str]:
    """The distributions that the Python files of a folder import, as normalized names."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).split(".")[0])
    owners = importlib.metadata.packages_distributions()
    own = {"qexp", "scripts", "tests", *(path.stem for path in (ROOT / "scripts").iterdir())}
    foreign = names - sys.stdlib_module_names - own - (LARGE - owners.keys())
    assert foreign <= owners.keys(), f"not installed: {foreign - owners.keys()}"
    return {canonicalize_name(owner) for name in foreign for owner in owners[name]}


def test_every_import_is_declared_and_every_dependency_imported() -> None:
    imported = third_party_imports("qexp")
    assert imported - names_of(requirements("diffusers", *LARGE)) == set()
    assert names_of(requirements()) - imported == FOR_FILES
    assert third_party_imports("scripts") - names_of(requirements("dev")) == set()
    assert third_party_imports("tests") - names_of(requirements(*EXTRAS)) == set()


def project_files() -> list[Path]:
    ignored = {"outputs", "__pycache__", "wandb", "multirun", "build", "dist"}
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ignored]
    folders = [path for path in folders if not path.name.startswith(".") or path.name in (".ci", ".github")]
    below = (path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return [path for path in [*below, *ROOT.iterdir()] if path.is_file() and path != Path(__file__)]


def test_files_name_no_machine_and_no_registry() -> None:
    assert ELSEWHERE.search("cd /home/someone") and ELSEWHERE.search("https://pypi.org/simple")
    texts = {path: path.read_bytes().decode("utf-8", errors="replace") for path in project_files()}
    assert ROOT / ".ci" / "run" in texts
    assert {str(path): match[0] for path, text in texts.items() if (match := ELSEWHERE.search(text))} == {}
