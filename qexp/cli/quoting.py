"""Quote an override for Hydra and the shell, so that its value is read as plain text.

Hydra's grammar takes letters without accents, digits and `_ / - \\ + . $ % * @ ? | :` without quotes; `${…}` refers to
another setting, unless a backslash is before it.
"""

from __future__ import annotations

import re
import shlex


def quoted(argument: str) -> str:
    """Return `key=value` quoted for a shell, without an unclosed quote at the start of the value."""
    key, _, text = argument.partition("=")
    if text[:1] in ('"', "'") and (len(text) == 1 or text[-1] != text[0]):
        text = text[1:]
    text = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    text = re.sub(r"(?<!\\)\$\{", r"\\${", text)
    return shlex.quote(f'{key}="{text}"')


def is_unbalanced(argument: str) -> bool:
    """Return whether the value has an odd number of quotes."""
    return any(argument.partition("=")[2].count(quote) % 2 for quote in ('"', "'"))
