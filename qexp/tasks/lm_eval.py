"""Tasks of EleutherAI's lm-evaluation-harness: its own library asks the loaded model, and counts the answers.

`task.tasks` are its names; `task.include_path` is a folder with tasks of one's own (yaml files as its documentation has
them). Prompts, few-shot examples, tokenization and scores are the library's, so that numbers compare with those of its
own program for the same model.

    outputs.safetensors    <task>.<metric>: the value of each document, where the metric is their mean; loglikelihoods
    lm_eval.json           of each task: n, its version, the documents' checksums, and of each metric value, standard
                           error and whether higher is better

Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from typing_extensions import override

from qexp.config.task import TaskConfig
from qexp.errors import ConfigError, MissingLibraryError, choices, did_you_mean
from qexp.system.files import write_json
from qexp.tasks.recorder import TaskResult

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.tasks.context import RunContext

RESULTS = "lm_eval.json"
BOOTSTRAPS = 1000  # for standard errors of metrics that are no means
SHOWN = 12  # names in a message: the library has thousands


@dataclass(frozen=True)
class LmEvalConfig(TaskConfig):
    """tasks: names of the library, or of the files in include_path; include_path: a folder with tasks of one's own;
    num_fewshot: examples before each question, null for as many as the task has; limit: documents of each task, null is
    all; batch_size: questions at a time; content: checksum of include_path, which is read when the run is planned."""

    name: str = "lm_eval"
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    content: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("task.tasks=[] names no task; give names of lm-eval, task.tasks=[arc_easy,hellaswag]")
        self.check_least(num_fewshot=0, limit=1, batch_size=1)

    @override
    def resolved(self) -> Self:
        """Return the settings with the checksum of include_path.

        Raises: MissingLibraryError without the library, ConfigError for a folder that is not there.
        """
        if find_spec("lm_eval") is None:
            raise MissingLibraryError("task=lm_eval needs lm-eval; pip install 'qexp[lm_eval]'")
        if self.include_path is None:
            return self
        folder = Path(self.include_path).expanduser().absolute()
        if not any(folder.rglob("*.yaml")):
            raise ConfigError(f"task.include_path={self.include_path} has no .yaml of a task; give a folder that has")
        return replace(self, include_path=str(folder), content=_checksum(folder))


Config = LmEvalConfig


def _checksum(folder: Path) -> str:
    """Return a checksum of names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def check_tasks(task: LmEvalConfig) -> None:
    """Raise ConfigError for a name that the library does not know."""
    known = set(_task_manager(task).all_tasks)
    for name in task.tasks:
        if name not in known and not any(letter in name for letter in "*?/"):
            own = sorted(known) if len(known) <= SHOWN else []
            remedy = f"use {choices(own)}" if own else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"task.tasks: {name!r} is no task of lm-eval{did_you_mean(name, known)}; {remedy}")


def run_lm_eval(context: RunContext) -> TaskResult:
    """Ask the model all questions; a step is a call of the network.

    Metrics: those of `Recorder.times`, time/total_seconds. Those of the tasks are in lm_eval.json.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    task, model = context.task, context.models["model"]
    random.seed(context.seed)
    np.random.seed(context.seed)
    torch.manual_seed(context.seed)
    loaded = _load_tasks(task, context.seed)
    recorder, numbers = context.recorder("answering", None), itertools.count(1)
    recorder.begin()
    counting = model.register_forward_hook(lambda *_: recorder.on_step(next(numbers), None))
    try:
        found = evaluate(_adapter(context), loaded, limit=task.limit, bootstrap_iters=BOOTSTRAPS, log_samples=True)
    finally:
        counting.remove()
    times = recorder.times()
    assert found is not None  # None is for further processes of a distributed run
    samples = {name: list(_of_one_filter(rows)) for name, rows in found["samples"].items()}
    outputs = {"loglikelihoods": _loglikelihoods(samples)}
    tasks = {name: _task_result(name, rows, found, outputs) for name, rows in samples.items()}
    write_json(context.folder / RESULTS, {"tasks": tasks})
    return TaskResult(outputs, recorder.rows, times)


def _task_manager(task: LmEvalConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task.include_path)


def _load_tasks(task: LmEvalConfig, seed: int) -> Any:
    """Return the library's tasks with the examples that are asked for, drawn by the seed."""
    loaded = _task_manager(task).load(list(task.tasks))
    for one in loaded["tasks"].values():
        own = one.get_config("num_fewshot")
        if own is None or (task.num_fewshot is not None and own != 0):  # 0 in a task's file is meant, as in the library
            one.set_config(key="num_fewshot", value=task.num_fewshot or 0)
        one.set_fewshot_seed(seed=seed)
    return loaded


def _adapter(context: RunContext) -> Any:
    """Return the library's own wrapper of a model of transformers; on the device that the model computes on."""
    from lm_eval.models.huggingface import HFLM

    source: Any = context.source
    model = context.models["model"]
    with _without_tying(model):
        adapter = HFLM(
            pretrained=model, tokenizer=source.tokenizer, backend="causal", batch_size=context.task.batch_size
        )
    adapter._device = context.device  # the library takes that of the weights, which may rest elsewhere
    return adapter


@contextmanager
def _without_tying(model: Any) -> Iterator[None]:
    """Keep the library from tying weights again, which would replace a quantized head by the embedding."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


def _of_one_filter(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each document; with several filters of an answer, the metrics of all of them, by their names."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        values = {_metric_name(name, row["filter"]): row[name] for name in row["metrics"]}
        merged.setdefault(row["doc_id"], {**row, "values": {}})["values"].update(values)
    yield from merged.values()


def _metric_name(name: str, answer_filter: str) -> str:
    return name if answer_filter == "none" else f"{name}_{answer_filter}"


def _loglikelihoods(samples: Mapping[str, list[dict[str, Any]]]) -> Tensor:
    """Return ln p of every answer that the tasks asked for, [n]; empty where answers are generated."""
    import torch

    answers = (answer for rows in samples.values() for row in rows for found in row["resps"] for answer in found)
    return torch.tensor([float(a[0]) for a in answers if isinstance(a, list | tuple)], dtype=torch.float64)


def _task_result(
    name: str, rows: list[dict[str, Any]], found: Mapping[str, Any], outputs: dict[str, Tensor]
) -> dict[str, Any]:
    """Return a task's part of lm_eval.json; the documents' values go into `outputs` where the metric is their mean."""
    import torch

    values, directions = found["results"][name], (found.get("higher_is_better") or {}).get(name) or {}
    metrics: dict[str, Any] = {}
    for base, answer_filter in (key.split(",", 1) for key in values if "," in key):
        value, error = (values.get(f"{base}{end},{answer_filter}") for end in ("", "_stderr"))
        if base.endswith("_stderr") or not isinstance(value, int | float):
            continue
        metric = _metric_name(base, answer_filter)
        metrics[metric] = {"value": _finite(value), "stderr": _finite(error), "higher_is_better": directions.get(base)}
        each = [row["values"].get(metric) for row in rows]
        if all(isinstance(one, int | float) for one in each) and math.isclose(
            sum(each) / len(each), value, abs_tol=1e-9
        ):
            outputs[f"{name}.{metric}"] = torch.tensor(each, dtype=torch.float64)
    documents = [str(row["doc_hash"])[:8] for row in rows]
    version = (found.get("versions") or {}).get(name)
    return {"n": len(rows), "version": version, "metrics": metrics, "documents": documents}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
