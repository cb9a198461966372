from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.wandb_server import WandbServer, use_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A running server that wandb uses, with an account."""
    with WandbServer() as running:
        use_server(monkeypatch, tmp_path, running.url)
        yield running
