"""Rewrite errors of Hydra and OmegaConf: value, rule, place and remedy, with the valid choices that they omit.

Both have the needed information only in the text of their messages. So each message that lacks the choices or the
remedy has a pattern here, and a function that rewrites it. Other messages are shown without their internal lines.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import takewhile

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from qexp.cli.backend_words import other_word
from qexp.cli.commands import COMMANDS
from qexp.cli.quoting import is_unbalanced, quoted
from qexp.config.dataclass_io import describe, field_types
from qexp.config.offload import DESTINATIONS
from qexp.config.plugins import PLUGINS, plugin_module, plugin_names
from qexp.config.schema import PERCEPTUAL_METRICS, QUALITY_METRICS, TopLevelConfig
from qexp.config.yaml_options import group_names, option_names, options_of_plugin
from qexp.errors import QexpError, choices, did_you_mean

MAPPINGS = (
    "quant_type_kwargs",
    "model.checkpoints",
    "model.task_defaults",
    "task.pipeline_arguments",
)  # fields that take any names
NOISE = ("full_key:", "object_type=", "reference_type=", "Config search path:", "provider=", "See https://hydra.cc")


@dataclass(frozen=True)
class Problem:
    """The text of an error and its cause, the match of its rule, and the command line."""

    text: str
    match: re.Match[str]
    arguments: Sequence[str]

    def __getitem__(self, name: str) -> str:
        return self.match[name]

    def find(self, pattern: str) -> str:
        """Return the first group of a pattern in the text, or ''."""
        found = re.search(pattern, self.text, flags=re.MULTILINE)
        return found[1] if found else ""

    @property
    def key(self) -> str:
        return self.find(r"full_key: *(\S*)")

    @property
    def place(self) -> str:
        """' (in backend/mine.yaml)' if the error is in a yaml file, else ''; follows the value in messages."""
        name = self.find(r"In '([^']+)'")
        return f" (in {name}.yaml)" if name not in ("", "config") else ""

    @property
    def written(self) -> str:
        """The override as the user wrote it, or the bare key if a yaml set it."""
        quoted = self.find(r"Error merging override (.*)") or self.find(r"To append to your config use \+(.*)")
        of_key = [one for one in self.arguments if one.lstrip("+~").partition("=")[0] == self.key]
        return quoted or (of_key[-1] if of_key else self.key)


def print_error(error: Exception, arguments: Sequence[str]) -> None:
    """Print an error of this program or of Hydra as one line; raise any other again, which is a defect."""
    if not isinstance(error, QexpError) and type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf"):
        raise error
    print(f"error: {explain(error, arguments)}", file=sys.stderr)


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return one message for an error between the command line and the typed configuration."""
    if isinstance(error, QexpError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; check the path, or choose another folder with paths.outputs=<folder>"
    text = f"{error}\n{error.__cause__ or ''}"
    for pattern, retell in RULES:
        if match := re.search(pattern, text, flags=re.MULTILINE):
            return retell(Problem(text, match, arguments))
    if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf", "yaml"):
        return _without_noise(text)
    return f"{type(error).__name__}: {_without_noise(text)} (HYDRA_FULL_ERROR=1 shows where)"


def _unknown_option(problem: Problem) -> str:
    group, name = _split_option(problem["option"])
    if group.startswith("schema/"):
        plugins = plugin_names(group.removeprefix("schema/")) if group.removeprefix("schema/") in PLUGINS else ()
        return f"/{group}/{name}{problem.place} is no schema{did_you_mean(name, plugins)}; use {choices(plugins)}"
    names = re.findall(r"^\s+(\w+)$", problem.text, flags=re.MULTILINE) or option_names(group)
    if not names:
        return _no_group(group, problem.place)
    if not name:
        return f"{group}={problem.place} chooses nothing; use {choices(names)}"
    hint = _other_word(group, name) or did_you_mean(name, names)
    return f"{group}={name}{problem.place} is unknown{hint}; use {choices(names)}"


def _split_option(option: str) -> tuple[str, str]:
    """Split 'hydra/launcher/basic' or 'model/user/name' into the group and the option."""
    group = next((group for group in group_names() if option.startswith(f"{group}/")), option.rpartition("/")[0])
    return group, option.removeprefix(f"{group}/")


def _other_word(group: str, name: str) -> str:
    """Return a hint for an option's name that belongs elsewhere, or ''."""
    if group == "backend":
        return other_word(name)
    if group == "offload" and name in DESTINATIONS:
        return f" (it is where weights rest: write offload=leaf offload.to={name})"
    if group == "model" and "/" in name:
        return f" (it is a path or a repository: write model=<kind> model.path={name})"
    if group == "metrics" and name in (*QUALITY_METRICS, *PERCEPTUAL_METRICS):
        return f" (it is a metric: write metrics.names=[{name}])"
    return ""


def _unknown_group(problem: Problem) -> str:
    return _no_group(problem["group"], problem.place)


def _no_group(name: str, place: str) -> str:
    groups = group_names()
    return f"{name}{place} is no group of options{did_you_mean(name, groups)}; use {choices(groups)}"


def _unknown_field(problem: Problem) -> str:
    name, cls = problem["name"], _classes().get(problem["owner"])
    if cls is None and problem.key.startswith("components"):
        return f"{problem.written} adds to components: write +{problem.written}"
    if cls is None and any(name in problem.key for name in MAPPINGS):
        return f"{problem.written} adds to {problem.key.rpartition('.')[0]}: write +{problem.written}"
    if cls is None:
        return f"{problem.written}{problem.place} is not a known field"
    names = [*field_types(cls), *(["experiment"] if cls is TopLevelConfig else [])]
    elsewhere = _options_that_have(name, cls)
    hint = f", only of {elsewhere}: choose from these alone" if elsewhere else did_you_mean(name, names)
    owner = f" of {_owner(cls)}" if _owner(cls) else ""
    return f"{problem.written}{problem.place} is not a known field{owner}{hint}; valid here: {choices(names)}"


def _options_that_have(name: str, cls: type) -> str:
    """Return the options that have a field which the plugin of `cls` lacks: 'backend=torchao or torchao_int8dq'."""
    for group in PLUGINS:
        classes = _plugin_classes(group)
        having = [plugin for plugin, other in classes.items() if name in field_types(other)]
        options = [option for plugin in having for option in options_of_plugin(group, plugin)]
        if cls in classes.values() and options:
            return f"{group}={choices(options)}"
    return ""


def _wrong_type(problem: Problem) -> str:
    cls = _classes().get(problem.find(r"object_type=(\w+)"))
    hint = field_types(cls).get(problem.key.rpartition(".")[2]) if cls else None
    rule = f"must be {describe(hint)}" if hint is not None else f"does not fit: {problem.match[0]}"
    return f"{problem.written}{problem.place} {rule}"


def _wrong_kind(problem: Problem) -> str:
    known = _classes()
    if problem["given"] in known:
        return f"{problem['given']} and {problem['wanted']} cannot be combined: choose one option of their group"
    wanted = known.get(problem["wanted"], TopLevelConfig)
    group, value = _owner(wanted).partition(" ")[0], problem.find(r"\. value: (.*)$")
    remedy = f"; to choose an option write 'override /{group}: {value}' in the yaml's defaults" if group else ""
    return f"{value}{problem.place} stands where a group of fields belongs: {choices(field_types(wanted))}{remedy}"


def _no_group_of_fields(problem: Problem) -> str:
    """Describe a single value in place of a group of fields."""
    name, _, value = problem.written.partition("=")
    if name.lstrip("+") == "components":
        return f"{name}={value} must be a group of fields for each component: +components.{value}.compute_dtype=bf16"
    cls = _classes().get(problem.find(r"is not a subclass of (\w+)"))
    fields = choices(f"{name}.{field}" for field in field_types(cls)) if cls else f"{name}.<field>"
    return f"{name}={value}{problem.place} stands where a group of fields belongs; set {fields}"


def _needs_sweep(problem: Problem) -> str:
    return f"{problem['override']} gives several values to one experiment; add -m to run one for each"


def _sweep_or_list(problem: Problem) -> str:
    key, _, values = problem["override"].partition("=")
    if key in group_names():
        return _needs_sweep(problem)
    return f"{_needs_sweep(problem)}, or write {key}=[{values}] for a list, or '{key}=\"{values}\"' for a text"


def _nothing_chosen(problem: Problem) -> str:
    given = {key.lstrip("+"): value for key, _, value in (one.partition("=") for one in problem.arguments)}
    for group in group_names():
        if re.fullmatch(r"null|~|true|false|[\d.]+", given.get(group, "").lower()):
            remedy = "leave it out, or use" if group == "experiment" else "use"
            return f"{group}={given[group]} chooses nothing; {remedy} {choices(option_names(group))}"
    nameless = [one for one in problem.arguments if one.startswith("=")]
    if nameless:
        return f"{nameless[0]} has no name in front of the =; write key{nameless[0]}"
    return _without_noise(problem.text)


def _nothing_to_delete(problem: Problem) -> str:
    key = problem["key"]
    hint = did_you_mean(key, field_types(TopLevelConfig))
    return f"~{key} deletes nothing{hint}; leave it out, or write {key}=null for the default"


def _option_added(problem: Problem) -> str:
    """Describe `+group=option` or `++group=option` for a group that has an option already."""
    typed = next((one for one in problem.arguments if one.lstrip("+").partition("=")[0] == problem["group"]), "")
    return f"{typed} adds a second option to {problem['group']}; write {typed.lstrip('+')}"


def _no_folder(problem: Problem) -> str:
    return f"--config-dir {problem['path']} is not a folder; give one with options in <group>/<name>.yaml"


def _no_config(problem: Problem) -> str:
    return (
        f"--config-name {problem['name']} is not found; leave it out, or add --config-dir with the folder that has it"
    )


def _unreadable_override(problem: Problem) -> str:
    unread = [argument for argument in problem.arguments if not argument.startswith("-") and not _is_readable(argument)]
    written = unread[0] if unread else problem.find(r"Error parsing override '(.*)'")
    if written and "=" not in written and not written.startswith("~"):
        return _split_value(problem.arguments, written) or _bare_word(written)
    if split := _split_brackets(problem.arguments, written):
        return split
    key, _, value = written.partition("=")
    if value.startswith("="):
        return f"{written} has two =; write {key}{value}"
    if key != key.strip() or value != value.lstrip():
        return f"{written} has spaces around the =; write {key.strip()}={value.strip()}"
    if value.startswith("~/"):
        return f"cannot read {written}: the shell does not expand ~ behind =; write {key}=$HOME{value[1:]}"
    if re.fullmatch(r"(choice|range|interval|glob|sort|shuffle)\(.*\)", value):
        return f"cannot read {written}; write {key}=choice(a,b), {key}=range(0,4) or {key}=glob(*)"
    if value.endswith(",") and value[:1] not in ("[", "{"):
        return f"{written} ends with a comma; write {key}={value.rstrip(',')}, or another value behind it"
    reason = problem.find(r"(?:^|: )(Unknown function.*)$")  # what the parser says of its tokens helps nobody
    given = [
        argument
        for argument in problem.arguments
        if re.match(r"""\+{0,2}device_map=.*[{,]\s*(""|\'\')\s*:""", argument)
    ]
    if given:
        return (
            f"cannot read {given[0]}: on the command line, what device_map does not name is '*': "
            "'device_map={*: cpu}'"
        )
    if is_unbalanced(written):
        reason = "a quote is not closed"
    own = (
        quoted(written) if written.partition("=")[2][:1] not in ("", "[", "{") else """'task.prompt=["1+1=","a, b"]'"""
    )
    return (
        f"cannot read {written or 'the command line'}{f' ({reason})' if reason else ''}: a value with spaces, commas, "
        f"quotes, braces, brackets, =, #, ! or letters such as ü is quoted twice; write {own}"
    )


def _split_value(arguments: Sequence[str], word: str) -> str:
    """Return the message for a word after an override with text: the shell has split a value at its spaces."""
    before = list(arguments[: list(arguments).index(word)])
    start = next((one for one in reversed(before) if "=" in one), "")
    value = start.partition("=")[2]
    is_text = start and before[-1] is start and word not in _known_words() and not word.startswith(("-", "qexp."))
    if not is_text or value == "" or start.partition("=")[0] in group_names():
        return ""
    words = takewhile(lambda one: "=" not in one and not one.startswith("-"), arguments[len(before) :])
    typed = quoted(" ".join([start, *words]))
    return f"{word} has no =: the shell splits a value at its spaces, so it is quoted twice; write {typed}"


def _known_words() -> list[str]:
    options = [name for group in group_names() for name in option_names(group)]
    return [*COMMANDS, *group_names(), *field_types(TopLevelConfig), *options]


def _split_brackets(arguments: Sequence[str], written: str) -> str:
    """Return the message for a list or a group that the shell has split at its spaces, or that is not closed."""
    missing = [close for open_, close in ("[]", "{}") if written.count(open_) > written.count(close)]
    if not missing or written not in arguments:
        return ""
    words = list(arguments[list(arguments).index(written) :])
    for end in range(2, len(words) + 1):
        joined = " ".join(words[:end])
        if joined.count("[") == joined.count("]") and joined.count("{") == joined.count("}"):
            return f"cannot read {written}: the shell splits at spaces; put quotes around it: {shlex.quote(joined)}"
    return f"cannot read {written}: a {missing[0]} is missing; put quotes around the override if it has spaces"


def _is_readable(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _bare_word(word: str) -> str:
    """Return the message for a word without =: a command, a group, an option, a field, or unknown."""
    name = word.removeprefix("qexp.").rstrip(":")
    if name in COMMANDS:
        return f"{word} is a command and comes first; write python -m qexp {name}"
    if name in group_names():
        return f"{name} is a group and needs an option: {name}=<name>; use {choices(option_names(name))}"
    groups = [group for group in group_names() if name in option_names(group)]
    fields = field_types(TopLevelConfig)
    remedy = f"write {choices(f'{group}={name}' for group in groups)}" if groups else ""
    if name in fields:
        remedy = f"write {name}=<value>"
    if name in ("help", "version"):
        remedy = f"write --{name}"
    if name == "qexp":
        remedy = "leave it out: python -m qexp comes only once"
    if (group := name.partition(":")[0]) in group_names() and group != name:
        remedy = f"write {group}={name.partition(':')[2].strip()}"
    hint = did_you_mean(name, dict.fromkeys([*COMMANDS, *group_names(), *fields]))
    rest = remedy or f"use key=value, or a command: {choices(COMMANDS)} (--help lists everything)"
    return f"{word} is not a setting (key=value){'' if remedy else hint}; {rest}"


RULES: tuple[tuple[str, Callable[[Problem], str]], ...] = (
    (r"Could not (?:find|load) '(?P<option>[^']+/[^'/]*)'", _unknown_option),
    (r"Could not override '(?P<group>[^']+)'\. No match in the defaults list", _unknown_group),
    (r"Key '(?P<name>[^']+)'(?: is)? not in (?:')?(?P<owner>\w+)", _unknown_field),
    (r"Ambiguous value for argument '(?P<override>.+)'$", _sweep_or_list),
    (r"Sweep parameters '(?P<override>.+)' requires --multirun", _needs_sweep),
    (r"Multiple values for (?P<group>\S+)\. To override", _option_added),
    (r"force-add of config groups is not supported: '\++(?P<group>[^=']+)", _option_added),
    (r"Additional config directory '(?P<path>.*)' not found", _no_folder),
    (r"Cannot find primary config '(?P<name>[^']+)'", _no_config),
    (r"Config group override must be a string or a list", _nothing_chosen),
    (r"Could not delete from config\. '(?P<key>[^']+)' does not exist", _nothing_to_delete),
    (r"Merge error: (?P<given>\w+) is not a subclass of (?P<wanted>\w+)", _wrong_kind),
    (r"Invalid type assigned: \w+ is not a subclass of|Cannot assign \w+ to Dict\[str, Any\]", _no_group_of_fields),
    (r"could not be converted to \w+|is not a valid bool|is not Optional", _wrong_type),
    (r"Cannot (?:convert|merge) .*|Invalid value assigned.*", _wrong_type),
    (r"Error parsing override|no viable alternative|(mismatched|extraneous) input|missing EQUAL", _unreadable_override),
    (r"token recognition error|LexerNoViableAltException", _unreadable_override),
)


def _plugin_classes(group: str) -> dict[str, type]:
    return {name: plugin_module(group, name).Config for name in plugin_names(group)}


def _classes() -> dict[str, type]:
    """Return the dataclasses of the configuration by their schemas' names in messages."""
    nested = [hint for hint in field_types(TopLevelConfig).values() if is_dataclass(hint) and isinstance(hint, type)]
    plugins = [cls for group in PLUGINS for cls in _plugin_classes(group).values()]
    known: list[type] = [TopLevelConfig, *nested, *plugins]
    return {cls.__name__: cls for cls in known}


def _owner(cls: type) -> str:
    """Return 'backend none' for a plugin's config, '' for settings without a plugin."""
    names = [f"{group} {name}" for group in PLUGINS for name, other in _plugin_classes(group).items() if other is cls]
    return names[0] if names else ""


def _without_noise(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line and line != "None" and not line.startswith(NOISE)))
