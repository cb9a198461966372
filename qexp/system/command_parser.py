"""The parser of `qexp report`, `doctor`, `predict`, `clean` and `rerun`: one line for each mistake, with its remedy.

argparse alone does not take words on both sides of a flag, and its messages name no valid flags.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import override

from qexp.errors import choices, did_you_mean


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser for `main` of a command.

    settings: names of settings, key=value, that the command takes and that may be typed with dashes by mistake.
    """

    settings: Sequence[str] = ()

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse flags and words in any order. Exits with 2 after one line that says what is wrong."""
        options, rest = self.parse_known_intermixed_args(arguments)
        if rest:
            self.error(self._describe_rest(rest))
        return options

    @override
    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): expected (at least )?one argument$", r"\1 needs a value", message)
        usage = " ".join(self.format_usage().split())
        print(f"error: {message}; {usage}", file=sys.stderr)
        sys.exit(2)

    def _describe_rest(self, rest: Sequence[str]) -> str:
        flag = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
        if flag is None:
            return f"{rest[0]} is one argument too many"
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        bare = flag.lstrip("-").replace("-", "_")
        if bare.partition(".")[0] in self.settings:
            return f"{flag} is a setting, not a flag; write {bare}=<value>, without dashes"
        return f"{flag} is not a flag{did_you_mean(flag, known)}; use {choices(known)}"
