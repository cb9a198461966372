"""These tests run in a process of their own: see tests/own_process.py."""

import pytest

from tests import own_process


@pytest.hookimpl(trylast=True)  # imports torch: after the environment is set
def pytest_configure(config: pytest.Config) -> None:
    own_process.register(config, __file__)


def pytest_ignore_collect() -> bool | None:
    return None if own_process.is_registered() else True
