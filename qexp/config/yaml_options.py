"""Read the yaml files in conf/ as text: groups, options and their comments."""

from __future__ import annotations

import re
from pathlib import Path

# in the order of --help; folders that are not named here come behind
GROUP_ORDER = ("model", "backend", "offload", "task", "metrics", "tracking", "isolation", "experiment", "sweep")


def conf_folder() -> Path:
    """Return conf/ inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if (installed / "config.yaml").is_file() else package.parent / "conf"


def group_names() -> list[str]:
    folders = [path.name for path in sorted(conf_folder().iterdir()) if path.is_dir() and any(path.glob("*.yaml"))]
    return sorted(folders, key=lambda name: GROUP_ORDER.index(name) if name in GROUP_ORDER else len(GROUP_ORDER))


def option_files(group: str) -> list[Path]:
    return sorted((conf_folder() / group).glob("*.yaml"))


def option_names(group: str) -> list[str]:
    return [path.stem for path in option_files(group)]


def options_of_plugin(group: str, plugin: str) -> list[str]:
    """Return the options of a group that inherit a plugin's schema: for torchao, torchao_int8dq and others."""
    inherits = f"/schema/{group}/{plugin}@"
    return [path.stem for path in option_files(group) if inherits in path.read_text(encoding="utf-8")]


def description(path: Path) -> str:
    """Return the first line of a yaml's opening comment, without Hydra's `# @package` line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#") and line[:3] != "# @"), "")


def default_options() -> dict[str, str]:
    """Return the default option of each group in config.yaml."""
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (\w+): (\w+)", text, flags=re.MULTILINE))


def top_level_settings() -> str:
    """Return the settings of config.yaml with their comments, between the defaults list and Hydra's own."""
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    return text.partition("\n\n")[2].partition("\nhydra:")[0].strip("\n")
