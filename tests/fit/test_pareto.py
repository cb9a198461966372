"""experiment=mixed_pareto: uniform formats and mixes of each model, on samples that no score was made with."""

from pathlib import Path

import pytest

from qexp.errors import ConfigError
from qexp.fit.opened import open_model
from qexp.fit.pareto import front_jobs
from qexp.fit.request import Request
from qexp.fit.scores import sensitivity_words
from qexp.system.files import to_yaml, write_text
from tests.assigning import commands_assign as commands_assign
from tests.assigning import run_config
from tests.composing import CommandLine
from tests.composing import command as command
from tests.fit.made_scores import OPTIONS, write_scores

pytestmark = pytest.mark.usefixtures("commands_assign")


def store_question(folder: Path, job: list[str], *more: str) -> None:
    """Store the settings of the sensitivity run that a table is said to be of."""
    request = Request(tuple(job))
    with open_model(request) as opened:
        words = sensitivity_words(opened, request, "exact")
    write_text(folder / "config.yaml", to_yaml(run_config(*words, *more).to_container()))


def test_front_of_a_model_is_every_uniform_format_and_mixes_between_them(tmp_path: Path) -> None:
    job = ["experiment=mixed_pareto", "model=digits", f"paths.outputs={tmp_path}", "seed=4"]
    with pytest.raises(ConfigError, match="has no scores of this model"):
        front_jobs(job, 6, is_dry=True)  # a dry run makes none
    write_scores(tmp_path / "runs" / "made", ["model=digits"])
    store_question(tmp_path / "runs" / "made", job, "seed=4")
    jobs = front_jobs(job, 6, is_dry=True)
    assert all(words[:4] == job and "seed=5" in words for words in jobs)
    store_question(tmp_path / "runs" / "made", job, "seed=7")
    assert all("seed=8" in words for words in front_jobs(job, 6, is_dry=True))  # no score was made with it
    for other in ("skip_modules=[blocks.0]", "task.groups=[[to_q,to_k,to_v]]", "task.num_inference_steps=3"):
        store_question(tmp_path / "runs" / "made", job, other)
        with pytest.raises(ConfigError, match="has no scores of this model with these settings"):
            front_jobs(job, 6, is_dry=True)
    store_question(tmp_path / "runs" / "made", job, "task.score=final")  # the kind of score is the table's matter
    jobs = front_jobs(job, 6, is_dry=True)
    configs = [run_config(*words) for words in jobs]
    backends = [config.components["transformer"].backend for config in configs]
    uniform = [one.quant_method for one in backends[: len(OPTIONS) + 1]]
    assert sorted(uniform) == ["gguf", "gguf", "gguf", "none", "qexp_packed", "qexp_packed"]
    mixes = backends[len(OPTIONS) + 1 :]
    assert 3 <= len(mixes) <= 6 and all(one.quant_method == "mixed" for one in mixes)
    assert len({one.label for one in mixes}) == len(mixes)
    assert all(str(config.components["transformer"].compute_dtype) == "float32" for config in configs)


def test_the_preset_plans_its_fronts_in_hydras_command_line(
    command: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sweeper is the preset's own, is found by Hydra, and composes while Hydra runs."""
    job = ["experiment=mixed_pareto", "model=digits", f"paths.outputs={tmp_path}"]
    write_scores(tmp_path / "runs" / "made", ["model=digits"])
    store_question(tmp_path / "runs" / "made", job)
    assert command(*job, "hydra.sweeper.budgets=6", "sweep.dry_run=true") == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    uniform, mixes = lines[: len(OPTIONS) + 1], lines[len(OPTIONS) + 1 :]
    assert len(mixes) >= 3 and all("mixed mix_of_" in line for line in mixes)
    assert not any("mixed" in line for line in uniform)


def test_backend_of_a_front_is_refused(tmp_path: Path) -> None:
    for word in ("backend=gguf", "backend.quant_type=Q4_0", "+backend@components.transformer.backend=gguf"):
        with pytest.raises(ConfigError, match="goes through the backends itself"):
            front_jobs(["model=digits", f"paths.outputs={tmp_path}", word], 3, is_dry=True)
