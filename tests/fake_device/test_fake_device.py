"""Runs the tests in `checks/`, of the fake device itself, in a process of their own."""

from pathlib import Path

import pytest

from tests import own_process

CHECKS = Path(__file__).parent / "checks"


@pytest.mark.parametrize("names", own_process.shares(CHECKS, 1), ids="+".join)
def test_on_the_fake_device(names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    if failures := own_process.failures(CHECKS, names, request.config):
        pytest.fail(failures, pytrace=False)
