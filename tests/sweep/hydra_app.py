"""A Hydra program around `run_job` and the callback, with fake experiments: `python hydra_app.py <folder> -m ...`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qexp.config.schema import IsolationConfig, PathsConfig, SweepConfig
from qexp.sweep.job import run_job
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config

CONFIG = {
    "paths": {"outputs": "???"},
    "sweep": {"name": "test", "notes": None},
    "behaviour": 1,
    "seed": 0,
    "hydra": {
        "output_subdir": None,
        "run": {"dir": "."},
        "sweep": {"dir": "${paths.outputs}/sweeps/${sweep.name}", "subdir": "."},
        "callbacks": {"qexp": {"_target_": "qexp.sweep.callback.SweepCallback"}},
        "job_logging": {"root": {"level": "WARNING", "handlers": []}, "handlers": {}},
    },
}


def job(cfg: DictConfig) -> None:
    config = replace(
        run_config(Path(cfg.paths.outputs).parent, cfg.behaviour, seed=cfg.seed),
        paths=PathsConfig(outputs=cfg.paths.outputs),
        sweep=SweepConfig(name=cfg.sweep.name),
        isolation=IsolationConfig(mode="inline"),
    )
    run_job(config, list(HydraConfig.get().overrides.task), **FAKES)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    folder.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(CONFIG), folder / "config.yaml")
    hydra.main(config_path=str(folder), config_name="config", version_base="1.3")(job)()
