"""Runs the tests in `on_fake_device/`, of offloading to an accelerator, in a process of their own."""

from pathlib import Path

import pytest

from tests import own_process

FOLDER = Path(__file__).parent / "on_fake_device"


@pytest.mark.parametrize("names", own_process.shares(FOLDER, 1), ids="+".join)
def test_on_the_fake_device(names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    if failures := own_process.failures(FOLDER, names, request.config):
        pytest.fail(failures, pytrace=False)
