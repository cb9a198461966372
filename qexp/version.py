"""The version, in the one place that has it: pyproject.toml reads it here, and CHANGELOG.md opens with it.

A module of its own, so that rooms can import it without the package's `__init__`, which names `qexp.api`.
"""

__version__ = "0.2.0"
