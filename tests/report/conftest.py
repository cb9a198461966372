from typing import Any

import pytest

from qexp.report import pareto_plot
from tests.tracking.wandb_server import server as server

DRAWN: dict[str, bytes] = {}  # by what it is drawn of; the same points are the same bytes, see test_pareto.py


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same points once for all tests of a process: a drawing takes longer than the rest of a report."""
    draw = pareto_plot.draw_pareto

    def draw_once(*arguments: Any) -> bytes:
        name = repr(arguments)
        if name not in DRAWN:
            DRAWN[name] = draw(*arguments)
        return DRAWN[name]

    monkeypatch.setattr(pareto_plot, "draw_pareto", draw_once)
