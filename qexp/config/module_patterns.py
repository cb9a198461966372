"""Match modules by dotted patterns, anchored at segment borders.

`*` matches one segment and `**` any number of them, also none. A pattern covers the modules that it matches and
everything below them: `blocks.0.attn` covers `blocks.0.attn.to_q`, but not `extra_blocks.0.attn`. Settings give
patterns as a list, or as `@file` with one per line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qexp.config.dataclass_io import convert
from qexp.errors import ConfigError, first_names
from qexp.system.text_files import read_lines


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Return a regex over names whose segments all end with a dot, so that no segments are the empty string."""
    segments = (
        r"(?:[^.]+\.)*" if segment == "**" else re.escape(segment).replace(r"\*", "[^.]*") + r"\."
        for segment in pattern.split(".")
    )
    return re.compile("".join(segments))


def covers(pattern: str, name: str) -> bool:
    """Return whether `pattern` covers the module `name` ('' is the model itself), or a module above it."""
    return _compiled(pattern).match(f"{name}." if name else "") is not None


def covering(patterns: Iterable[str], name: str) -> str | None:
    """Return the first of `patterns` that covers `name`, or None."""
    return next((pattern for pattern in patterns if covers(pattern, name)), None)


def anywhere(name: str) -> str:
    """Return the pattern of a `_keep_in_fp32_modules` entry: a module of that name at any depth."""
    return f"**.{name}"


def unmatched_patterns(
    patterns: Iterable[str], names: Iterable[str], place: str, kind: str = "module"
) -> dict[str, str]:
    """Return the patterns that match no name, each with its message. kind: of the named things, for the message."""
    known, messages = [name for name in names if name], dict[str, str]()
    for pattern in patterns:
        if any(covers(pattern, name) for name in known):
            continue
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
        near += [name for name in known if name.split(".")[-1] == pattern.split(".")[-1]][: 3 - len(near)]
        hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else f"top-level modules are {_top(known)}"
        messages[pattern] = (
            f"{place}: the pattern {pattern!r} matches no {kind}; {hint} ('**.name' matches at any depth)"
        )
    return messages


def _top(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names))


def patterns_lost(patterns: Sequence[str], quantized: Iterable[str]) -> str | None:
    """Return a warning about patterns for layers that the checkpoint holds quantized, or None."""
    covered = {name: pattern for name in quantized if (pattern := covering(patterns, name)) is not None}
    if not covered:
        return None
    shown = first_names(list(covered))
    asked = ", ".join(sorted(set(covered.values())))
    return f"the checkpoint holds {shown} quantized, so they stay quantized; without effect on them: {asked}"


def patterns(value: Any, place: str) -> tuple[str, ...]:
    """Skip patterns: any iterable of them, or "@file" with one pattern a line and # comments."""
    if not isinstance(value, str):
        is_iterable = isinstance(value, Iterable) and not isinstance(value, Mapping)
        return convert(tuple[str, ...], list(value) if is_iterable else value, place)
    if not value.startswith("@"):
        raise ConfigError(f"{place}={value} must be a list, such as [{value}], or @file with one pattern per line")
    lines = read_lines(value[1:], f"{place}={value}", f"give a path from {Path.cwd()}, or a list of patterns")
    return tuple(pattern for line in lines if (pattern := line.partition("#")[0].strip()))


def check_patterns(patterns: Iterable[str], place: str) -> None:
    """Raise ConfigError for a pattern that cannot match a module: an empty segment, or characters of a regex."""
    for pattern in patterns:
        segments = pattern.split(".")
        if all(segments) and not re.search(r"[\\^$()|+?\[\]{}\s/,]", pattern) and "***" not in pattern:
            continue
        raise ConfigError(
            f"{place}: {pattern!r} can match no module; a pattern is a dotted name, not a regex or a path: "
            "'blocks.0.attn', with '*' for one segment and '**' for any number of them: '**.attn'"
        )


def union(*lists: tuple[str, ...]) -> tuple[str, ...]:
    """Merge lists of patterns, sorted: their order has no effect, so equal sets give the same run key."""
    return tuple(sorted({pattern for patterns in lists for pattern in patterns}))
