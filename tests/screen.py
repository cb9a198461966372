"""The lines that an experiment may show: those of this program, none of its libraries."""

import re

OWN = (
    r".* · \S+ · \w+: (started|done in|the reference \(unquantized\) is run first).*",
    r"\w+: step \d+(/\d+)?, \d+ ms a step",
    r"\w+: (loading|round trip|scoring) \d+/\d+ tensors, .*",
    r"warning: .*",
    r"W&B run: outputs/.*",
    r"  outputs/runs/[0-9a-f]{16}",
    r"[\w/-]+: downloading \d+ files?, .*",
)


def foreign_lines(shown: str) -> list[str]:
    """Return the lines that this program does not print itself."""
    return [line for line in shown.splitlines() if line and not any(re.fullmatch(own, line) for own in OWN)]
