"""How an override is typed so that its value is a text as it stands: quoted for Hydra, and around that for the shell.

Hydra's grammar takes letters without accents, digits and `_ / - \\ + . $ % * @ ? | :` without quotes; `${…}` refers to
another setting, unless a backslash is before it.
"""

from __future__ import annotations

import re
import shlex


def quoted(argument: str) -> str:
    """`key=value` as it is to be typed in a shell. A quote that opens the value and is not closed is left out."""
    key, _, text = argument.partition("=")
    if text[:1] in ('"', "'") and (len(text) == 1 or text[-1] != text[0]):
        text = text[1:]
    text = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    text = re.sub(r"(?<!\\)\$\{", r"\\${", text)
    return shlex.quote(f'{key}="{text}"')


def is_unbalanced(argument: str) -> bool:
    """Whether the value begins with a quote that is not closed, or has one that opens none."""
    text = argument.partition("=")[2]
    return any(text.count(quote) % 2 for quote in ('"', "'"))
