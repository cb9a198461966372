"""lm-eval's own library on tasks in files, against probabilities written out. Skipped where it is not installed."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qexp.errors import ConfigError, MissingLibraryError
from qexp.metrics.registry import find_metric, metrics_in
from qexp.models.arithmetic import ASSETS, ArithmeticConfig, Source
from qexp.scoring.answers import answer_numbers, answer_samples
from qexp.tasks import lm_eval
from qexp.tasks.lm_eval import LmEvalConfig, check_tasks, run_lm_eval
from tests.tasks.contexts import context_of

PROBLEMS = [line for line in (ASSETS / "held_out.txt").read_text().splitlines()[:40] if line]


@pytest.fixture
def library() -> None:
    if find_spec("lm_eval") is None:
        pytest.skip("lm-eval is missing; pip install 'qexp[lm_eval]'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks in files: choose the answer of a problem among two, and write it."""
    choices = [[line[8:], f"{(int(line[8]) + 1) % 10}{line[9:]}"] for line in PROBLEMS]
    right = [number % 2 for number in range(len(PROBLEMS))]
    rows = [
        {"question": line[:8], "choices": pair if not label else pair[::-1], "label": label, "answer": line[8:]}
        for line, pair, label in zip(PROBLEMS, choices, right, strict=True)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}", "target_delimiter": "", "metadata": {"version": 3.0},
    }  # fmt: skip
    choose = common | {
        "task": "choose_sums", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    write = common | {
        "task": "write_sums", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    for task in (choose, write):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def logprob(model: Any, source: Source, prompt: str, answer: str) -> float:
    """ln p of an answer behind a prompt, token by token."""
    tokens = torch.tensor([[1, *source.encode(prompt + answer).tolist()]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0].double().log_softmax(-1)
    first = 1 + len(source.encode(prompt))
    return sum(float(logprobs[place - 1, tokens[0, place]]) for place in range(first, tokens.shape[1]))


@pytest.mark.external
def test_answers_are_those_of_the_probabilities(
    library: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = Source(ArithmeticConfig())
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()
    out = tmp_path / "run"
    out.mkdir()
    task = LmEvalConfig(tasks=("choose_sums", "write_sums"), include_path=str(folder), batch_size=7)
    check_tasks(task)
    result = run_lm_eval(context_of(task, source=source, models={"model": model}, folder=out))
    numbers = answer_numbers(out)
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    scores = [[logprob(model, source, row["question"], choice) for choice in row["choices"]] for row in rows]
    right = [float((pair[1] > pair[0]) == bool(row["label"])) for row, pair in zip(rows, scores, strict=True)]
    assert numbers["quality/lm_eval_choose_sums_acc"] == pytest.approx(sum(right) / len(right))
    deviation = torch.tensor(right).double().std().item()
    assert numbers["quality/lm_eval_choose_sums_acc_stderr"] == pytest.approx(deviation / len(right) ** 0.5)
    assert numbers["quality/lm_eval_choose_sums_n"] == numbers["quality/lm_eval_write_sums_n"] == len(PROBLEMS)
    assert result.outputs["choose_sums.acc"].tolist() == right
    expected = torch.tensor([score for pair in scores for score in pair]).double()
    assert torch.allclose(result.outputs["loglikelihoods"], expected, atol=1e-3)
    assert 0.5 < (numbers["quality/lm_eval_write_sums_exact_match"] or 0) <= 1  # it was trained to solve them
    samples = answer_samples(out, result.outputs)["quality/lm_eval_choose_sums_acc"]
    assert [value for value, _ in samples.values()] == right
    assert json.loads((out / "lm_eval.json").read_text())["tasks"]["choose_sums"]["version"] == 3.0
    assert len(result.rows) > 6


@pytest.mark.external
def test_task_that_is_not_there_is_named(library: None, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'chose_sums' is no task of lm-eval \(did you mean choose_sums"):
        check_tasks(LmEvalConfig(tasks=("chose_sums",), include_path=str(folder)))


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda _: None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'qexp\[lm_eval\]'"):
        LmEvalConfig(tasks=("a",)).resolved()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "names no task"),
        ({"tasks": ("a",), "limit": 0}, r"task\.limit=0 must be 1 or more"),
        ({"tasks": ("a",), "num_fewshot": -1}, r"task\.num_fewshot=-1 must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LmEvalConfig(**fields)


def test_folder_of_tasks_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda _: object())
    task = LmEvalConfig(tasks=("a",), include_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no \.yaml of a task"):
        task.resolved()
    (tmp_path / "a.yaml").write_text("task: a")
    first = task.resolved().content
    (tmp_path / "data.jsonl").write_text("{}")
    assert first is not None and task.resolved().content not in (None, first)


def test_metric_of_a_task_has_its_direction_and_column() -> None:
    names = [f"quality/lm_eval_my_task_{end}" for end in ("acc_norm", "acc_norm_stderr", "word_perplexity", "n", "odd")]
    found = {metric.name: metric for metric in metrics_in(names)}
    assert [found[name].better for name in names] == ["higher", "", "lower", "", ""]
    assert found[names[0]].header == "my task acc norm" and not found[names[1]].header
    assert (declared := find_metric(names[1])) is not None and declared.name == "quality/lm_eval_*_stderr"
