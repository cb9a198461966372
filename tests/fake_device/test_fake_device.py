"""Runs the tests in `checks/`, of the fake device itself, each file in a process of its own."""

from pathlib import Path

import pytest

from tests import own_process

CHECKS = Path(__file__).parent / "checks"


@pytest.mark.parametrize("module", own_process.modules(CHECKS))
def test_on_the_fake_device(module: str, request: pytest.FixtureRequest) -> None:
    if failures := own_process.failures(CHECKS / module, request.config):
        pytest.fail(failures, pytrace=False)
