"""Move the flags of the command line, which are Hydra's, before the overrides.

Hydra parses its arguments with argparse, which fails on `backend=none -m seed=1,2`: overrides on both sides of a flag.
`flags_first` sorts them, and rejects an unknown flag with one message.
"""

from __future__ import annotations

from collections.abc import Sequence

from qexp.config.dataclass_io import field_types
from qexp.config.schema import TopLevelConfig
from qexp.config.yaml_options import group_names
from qexp.errors import ConfigError, choices, did_you_mean

SWITCHES = {
    "--multirun": "-m",
    "--run": "-r",
    "--resolve": "",
    "--hydra-help": "",
    "--version": "",
    "--shell-completion": "-sc",
}
WITH_VALUE = {
    "--cfg": "-c",
    "--package": "-p",
    "--config-path": "-cp",
    "--config-name": "-cn",
    "--config-dir": "-cd",
    "--experimental-rerun": "",
}
WITH_CHOICES = {"--cfg": ("job", "hydra", "all")}
INFO, INFO_TOPICS = ("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return all arguments with flags and their values first, otherwise in order.

    Raises: ConfigError for an unknown flag, or one without its value.
    """
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*flags, *overrides, *rest]
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = _long_name(name)
        if name in WITH_VALUE:
            value = value if equals else (rest.pop(0) if rest else "")
            _check_value(name, value)
            flags.append(f"{name}={value}")
        elif name == INFO[0]:
            topic = value if equals else (rest.pop(0) if rest and rest[0] in INFO_TOPICS else "all")
            flags.append(f"{name}={topic}")
        else:
            flags.append(name)
    _check_together(flags)
    return [*flags, *overrides]


def _check_together(flags: Sequence[str]) -> None:
    """Raise ConfigError for flags that change what --cfg prints, without --cfg."""
    names = {flag.partition("=")[0] for flag in flags}
    for name in ("--resolve", "--package"):
        if name in names and "--cfg" not in names:
            raise ConfigError(f"{name} changes what --cfg prints; add --cfg job, or leave {name} out")


def _long_name(name: str) -> str:
    """Return the long form of a flag. Raises ConfigError for an unknown one."""
    flags = {**SWITCHES, **WITH_VALUE, INFO[0]: INFO[1]}
    found = next((long for long, short in flags.items() if name in (long, short)), None)
    if found is None:
        known = [word for pair in flags.items() for word in pair if word]
        bare = name.lstrip("-").replace("-", "_")
        if bare.partition(".")[0] in (*group_names(), *field_types(TopLevelConfig)):
            raise ConfigError(f"{name} is a setting, not a flag; write {bare}=<value>, without dashes")
        raise ConfigError(
            f"{name} is not a flag{did_you_mean(name, known)}; use {choices(flags)}, or --help for the rest"
        )
    return found


def _check_value(name: str, value: str) -> None:
    if not value or (name in WITH_CHOICES and value not in WITH_CHOICES[name]):
        wanted = f"use {choices(WITH_CHOICES[name])}" if name in WITH_CHOICES else f"write {name} <value>"
        raise ConfigError(f"{name} {value} is unknown; {wanted}" if value else f"{name} needs a value; {wanted}")
