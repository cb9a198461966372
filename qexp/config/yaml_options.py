"""The yaml files in conf/, read as text: which groups and options there are, and what their comments say."""

from __future__ import annotations

import re
from pathlib import Path

# in the order of --help; folders that are not named here come behind
GROUP_ORDER = ("model", "backend", "offload", "task", "metrics", "tracking", "isolation", "experiment", "sweep")


def conf_folder() -> Path:
    """conf/ inside an installed package, else beside the package in a checkout."""
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
    """The options of a group that inherit one plugin's schema: torchao has torchao, torchao_int8dq and others."""
    inherits = f"/schema/{group}/{plugin}@"
    return [path.stem for path in option_files(group) if inherits in path.read_text(encoding="utf-8")]


def description(path: Path) -> str:
    """The first line of a yaml's opening comment, Hydra's own `# @package` line left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").rstrip()
    return ""


def default_options() -> dict[str, str]:
    """The option that config.yaml chooses for each group."""
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (\w+): (\w+)", text, flags=re.MULTILINE))


def top_level_settings() -> str:
    """The settings of config.yaml with their comments: what stands between the defaults list and Hydra's own."""
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    return text.partition("\n\n")[2].partition("\nhydra:")[0].strip("\n")
