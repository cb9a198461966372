"""qexp's sweepers, where Hydra looks for plugins: below a top-level package `hydra_plugins`, without an __init__.py.

Hydra takes classes that it finds in these modules alone, and imports them for every command: what a sweeper needs is
imported where it is used.
"""

from typing import Any

from hydra.core.config_store import ConfigStore

from qexp.cli.sweeper import SweepAsItComes
from qexp.errors import ConfigError


class QexpSweeper(SweepAsItComes):
    """hydra/sweeper=qexp, the default of conf/default_sweeper.yaml."""


class ParetoSweeper(SweepAsItComes):
    """hydra/sweeper=qexp_pareto, of conf/experiment/mixed_pareto.yaml: models as they are swept over, for each of them
    the settings of its front. The plots of the report are drawn at the end.

    budgets: of the mixes, evenly in ratio from the smallest one to the dense model.
    """

    def __init__(self, max_batch_size: int | None, params: Any, budgets: int) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)
        if budgets < 1:
            raise ConfigError(f"hydra.sweeper.budgets={budgets} must be 1 or more")
        self._budgets = budgets

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
        """Return one batch: the experiments of every combination of the swept overrides, as Hydra splits them."""
        from qexp.fit.pareto import front_jobs

        assert self.config is not None
        is_dry = bool(self.config.sweep.get("dry_run"))
        (jobs,) = super().split_arguments(overrides, None) or [[]]
        return [[words for job in jobs for words in front_jobs(job, self._budgets, is_dry=is_dry)]]

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Run all experiments, then draw the plots; returns what each returned."""
        from qexp.report.__main__ import write_report
        from qexp.report.comparison import prepare_compared
        from qexp.report.selection import select
        from qexp.sweep.log_writer import WRITER

        found = super().sweep(arguments)
        assert self.config is not None
        if not self.config.sweep.get("dry_run"):
            WRITER.close()
            selection = select(self.config.paths.outputs, [self.config.sweep.name])
            for path in write_report(selection, prepare_compared(selection.rows, None), selection.folder):
                print(f"wrote {path}")
        return found


def _store(name: str, sweeper: type[SweepAsItComes], **settings: Any) -> None:
    target = f"{__name__}.{sweeper.__name__}"
    node = {"_target_": target, "max_batch_size": None, "params": None, **settings}
    ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="qexp")


_store("qexp", QexpSweeper)
_store("qexp_pareto", ParetoSweeper, budgets=12)
