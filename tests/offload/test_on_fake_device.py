"""Runs the tests in `on_fake_device/`, of offloading to an accelerator, each file in a process of its own."""

from pathlib import Path

import pytest

from tests import own_process

FOLDER = Path(__file__).parent / "on_fake_device"


@pytest.mark.parametrize("module", own_process.modules(FOLDER))
def test_on_the_fake_device(module: str, request: pytest.FixtureRequest) -> None:
    if failures := own_process.failures(FOLDER / module, request.config):
        pytest.fail(failures, pytrace=False)
