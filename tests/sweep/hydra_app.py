"""A Hydra program around `run_job` and the callback, with fake experiments: `python hydra_app.py <folder> -m ...`."""

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
    "case": None,
    "hydra": {
        "output_subdir": None,
        "run": {"dir": "."},
        "sweep": {"dir": "${paths.outputs}/sweeps/${sweep.name}", "subdir": "."},
        "callbacks": {"qexp": {"_target_": "qexp.sweep.callback.SweepCallback"}},
        "job_logging": {"root": {"level": "WARNING", "handlers": []}, "handlers": {}},
    },
}


DEATHS = {2: "error", 12: "exit", 13: "signal", 22: "oom", 16: "timeout", 23: "disk"}  # behaviour -> reason


def with_case(cfg: DictConfig) -> tuple[int, int, IsolationConfig]:
    """(behaviour, seed, isolation); of 24 cases, each fourth one dies in a way of its own."""
    if cfg.case is None:
        return cfg.behaviour, cfg.seed, IsolationConfig(mode="inline")
    behaviour = [*DEATHS][cfg.case // 4] if cfg.case % 4 == 3 else 1
    return behaviour, 10 + cfg.case, IsolationConfig(timeout_minutes=3 / 60 if behaviour == 16 else None)


def job(cfg: DictConfig) -> None:
    behaviour, seed, isolation = with_case(cfg)
    config = replace(
        run_config(Path(cfg.paths.outputs).parent, behaviour, seed=seed),
        paths=PathsConfig(outputs=cfg.paths.outputs),
        sweep=SweepConfig(name=cfg.sweep.name),
        isolation=isolation,
    )
    run_job(config, list(HydraConfig.get().overrides.task), **FAKES)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    folder.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(CONFIG), folder / "config.yaml")
    hydra.main(config_path=str(folder), config_name="config", version_base="1.3")(job)()
