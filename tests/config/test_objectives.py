"""What an experiment returns to Hydra's sweeper, and which objectives are refused before anything runs."""

import math
from typing import Any

import pytest

from qexp.config.objectives import check_measured, check_objectives, check_sweeper, objective_values
from qexp.errors import ConfigError

PSNR, WEIGHTS = "quality/psnr_db", "memory/weights_gib"


def test_values_are_those_of_the_metrics_in_the_order_of_the_objectives() -> None:
    metrics: dict[str, float | None] = {WEIGHTS: 0.5, PSNR: 31.2, "quality/exact": 0}
    assert objective_values([PSNR], metrics) == 31.2
    assert objective_values([WEIGHTS, PSNR], metrics) == (0.5, 31.2)
    assert objective_values([WEIGHTS, PSNR], {WEIGHTS: 0.5, PSNR: None, "quality/exact": 0}) is None
    assert objective_values([PSNR], {}) is None  # of one that failed
    assert objective_values([PSNR], {PSNR: None, "quality/exact": 1}) == math.inf  # equal to its reference
    assert objective_values([WEIGHTS], {WEIGHTS: 0.0}) == 0.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["quality/psnr"], "sweep.objectives=quality/psnr is unknown (did you mean quality/psnr_db"),
        (["psnr_db"], "sweep.objectives=psnr_db is unknown"),
        ([PSNR, "quality/nonsense"], "sweep.objectives=quality/nonsense is unknown"),
        (["quality/exact"], "neither more nor less of it is better"),
        ([PSNR, WEIGHTS, PSNR], "sweep.objectives=quality/psnr_db is there 2 times"),
    ],
)
def test_objectives_that_are_no_metrics_with_a_direction_are_refused(names: list[str], message: str) -> None:
    check_objectives([PSNR, WEIGHTS])
    with pytest.raises(ConfigError) as caught:
        check_objectives(names)
    assert message in str(caught.value)


class Direction:
    """As optuna's sweeper has it: an enum's member."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("names", "sweeper"),
    [
        ([], {"max_batch_size": None, "params": None}),  # Hydra's own, which searches nothing
        ([PSNR], {"max_batch_size": None, "params": None}),
        ([PSNR], {"direction": "maximize"}),
        ([WEIGHTS], {"direction": Direction("minimize")}),
        ([PSNR, WEIGHTS], {"direction": ["maximize", Direction("minimize")]}),
        ([PSNR], {"optim": {"maximize": True}}),
        ([WEIGHTS], {"ax_config": {"experiment": {"minimize": True}}}),
    ],
)
def test_sweeper_that_searches_where_metrics_get_better_is_taken(names: list[str], sweeper: dict[str, Any]) -> None:
    check_sweeper(names, sweeper, dry_run=False)


@pytest.mark.parametrize(
    ("names", "sweeper", "words"),
    [
        (
            [PSNR],
            {"direction": Direction("minimize")},
            ("hydra.sweeper.direction is to minimize", "set it to maximize"),
        ),
        ([PSNR, WEIGHTS], {"direction": "maximize"}, ("set it to [maximize,minimize]",)),
        ([PSNR], {"optim": {"maximize": False}}, ("hydra.sweeper.optim.maximize is to minimize",)),
        ([PSNR], {"ax_config": {"experiment": {"minimize": True}}}, ("experiment.minimize is to minimize",)),
        ([], {"direction": "minimize"}, ("sweep.objectives=[] names no metric",)),
    ],
)
def test_sweeper_that_searches_elsewhere_is_refused(
    names: list[str], sweeper: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sweeper(names, sweeper, dry_run=False)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(ConfigError, match="dry_run"):
        check_sweeper(names, sweeper, dry_run=True)


def test_objectives_that_an_experiment_does_not_measure_are_refused() -> None:
    check_measured([PSNR, WEIGHTS], "generate", ["psnr_db"], "process")
    for arguments, words in (
        (([PSNR], "roundtrip", ["psnr_db"], "process"), "not measured by task=roundtrip"),
        (([PSNR], "generate", ["ssim"], "process"), "add psnr_db to metrics.names"),
        ((["memory/run_peak_host_gib"], "generate", [], "inline"), "use isolation=process"),
    ):
        with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
            check_measured(*arguments)
