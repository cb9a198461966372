"""qexp's sweepers, where Hydra looks for plugins: below a top-level package `hydra_plugins`, without an __init__.py."""

from typing import Any

from hydra.core.config_store import ConfigStore

from qexp.cli.sweeper import SweepAsItComes


class QexpSweeper(SweepAsItComes):
    """hydra/sweeper=qexp, the default of conf/config.yaml."""


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="qexp",
    node={"_target_": f"{__name__}.{QexpSweeper.__name__}", "max_batch_size": None, "params": None},
    provider="qexp",
)


def pareto_sweeper(**settings: Any) -> Any:
    """Return hydra/sweeper=qexp_pareto, of conf/experiment/mixed_pareto.yaml. It is imported where it is used."""
    from qexp.fit.pareto_sweeper import ParetoSweeper

    return ParetoSweeper(**settings)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="qexp_pareto",
    node={"_target_": f"{__name__}.{pareto_sweeper.__name__}", "max_batch_size": None, "params": None, "budgets": 12},
    provider="qexp",
)
