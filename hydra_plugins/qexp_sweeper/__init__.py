"""qexp's sweeper, where Hydra looks for plugins: below a top-level package `hydra_plugins`, without an __init__.py."""

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
