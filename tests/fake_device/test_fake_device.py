"""Runs the tests in `checks/`, of the fake device itself, in a process of their own."""

from pathlib import Path

import pytest

from tests import own_process

CHECKS = Path(__file__).parent / "checks"


@pytest.mark.parametrize("module", own_process.modules(CHECKS))
def test_on_the_fake_device(module: str) -> None:
    if failures := own_process.failures(CHECKS, module):
        pytest.fail(failures, pytrace=False)
