"""These tests run in a process of their own: see tests/own_process.py."""

import gc

import pytest

from tests import own_process


@pytest.hookimpl(trylast=True)  # imports torch: after the environment is set
def pytest_configure(config: pytest.Config) -> None:
    own_process.register(config, __file__)


def pytest_ignore_collect() -> bool | None:
    return None if own_process.is_registered() else True


@pytest.fixture(autouse=True)
def no_garbage() -> None:
    """Device memory is what the test itself allocates: copies under way from before it are done, and cycles collected.

    What libraries have imported is not looked at again, which takes half a second.
    """
    from tests.fake_device import streams

    streams.forget()
    gc.collect()
    gc.freeze()
