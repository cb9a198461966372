"""The embedded language model end to end: it adds and subtracts, and every backend runs it."""

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qexp.config.generate import GenerateConfig
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError
from qexp.experiments.reference import reference_config
from qexp.experiments.run import run_experiment
from qexp.models.arithmetic import ASSETS, ArithmeticConfig, Source, solution
from qexp.scoring.score import score
from qexp.sweep.run_key import run_key
from tests.assigning import run_config
from tests.backends import BACKENDS
from tests.language import TEXT, save_language_model
from tests.products import representatives

SMALL = ("model=arithmetic", "model.problems=24", "device=cpu")
Generated = Callable[[str], tuple[dict[str, Any], Path]]


def run(folder: Path, *overrides: str, reference: Path | None = None) -> dict[str, Any]:
    """One experiment and its scores."""
    folder.mkdir(parents=True, exist_ok=True)
    config = run_config(*SMALL, *overrides)
    return {**run_experiment(config, folder), **score(config, folder, reference)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 of the held-out lines."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join((ASSETS / "held_out.txt").read_text().splitlines(keepends=True)[:20]))
    return path


@pytest.fixture(scope="module")
def reference(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("reference")
    run_experiment(reference_config(run_config(*SMALL, f"task.text={text}")), folder)
    return folder


@pytest.fixture(scope="module")
def generated(text: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Generated:
    """The result and the folder of a run with a backend, and nothing else, which is made once."""

    @cache
    def run_once(backend: str) -> tuple[dict[str, Any], Path]:
        folder: Path = tmp_path_factory.mktemp(backend)
        return run(folder, f"backend={backend}", f"task.text={text}", reference=reference), folder

    return run_once


# tests/models/test_causal_lm.py loads every way to hold bytes; here: none, and one each that costs little and much
@pytest.mark.parametrize("backend", representatives(BACKENDS, ["none", "bitsandbytes", "torchao"]))
def test_every_backend_runs_it_and_shows_what_it_costs(backend: str, generated: Generated) -> None:
    result, _ = generated(backend)
    assert result["load/quantized_modules"] == (0 if backend == "none" else 28)  # 4 layers of 7; not lm_head
    if backend == "none":
        assert (result["quality/exact"], result["quality/kl_divergence"], result["quality/exact_match"]) == (1, 0, 1)
        assert result["quality/answer_accuracy"] >= 0.9 and result["quality/top1_agreement"] == 1
    else:
        assert result["quality/exact"] == 0 and result["quality/kl_divergence"] > 0
        gentle = result["memory/bits_per_weight"] > 7.9
        assert not gentle or result["quality/kl_divergence"] < 0.01
        assert not gentle or result["quality/top1_agreement"] > 0.9
    # operands are random digits: ln 10 for 6 of 13 characters, half a bit for the sign, and nothing for the answer
    assert backend != "none" or result["quality/perplexity"] == pytest.approx(10 ** (6 / 13) * 2 ** (1 / 13), rel=0.08)


def test_its_training_is_on_record() -> None:
    record = json.loads((ASSETS / "training.json").read_text())
    assert record["held_out_exact_match"] >= 0.95
    assert record["parameters"] == sum(tensor.numel() for tensor in load_file(ASSETS / "model.safetensors").values())
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 12 << 20


@pytest.mark.parametrize("strategy", representatives(["leaf", "block"], ["leaf"]))
def test_offloaded_it_says_the_same(strategy: str, text: Path, generated: Generated, tmp_path: Path) -> None:
    _, folder = generated("bitsandbytes")
    result = run(tmp_path, "backend=bitsandbytes", f"offload={strategy}", "offload.to=disk", f"task.text={text}")
    assert result["offload/transferred_gib"] > 0
    for file in ("outputs.safetensors", "logprobs.safetensors"):
        resident, offloaded = (load_file(place / file) for place in (folder, tmp_path))
        assert resident.keys() == offloaded.keys()
        assert all(torch.equal(resident[name], offloaded[name]) for name in resident)


def test_the_perplexity_task_says_what_generate_says_of_the_text(
    text: Path, generated: Generated, tmp_path: Path
) -> None:
    result = run(tmp_path, "backend=torchao", "task=perplexity", f"task.text={text}")
    assert "quality/exact_match" not in result
    assert result["quality/perplexity"] == generated("torchao")[0]["quality/perplexity"]
    # 260 characters: a window scores 52, and 8 more 26 each, 4 windows at a time
    assert [row["step"] for row in csv.DictReader((tmp_path / "memory.csv").open())] == ["1", "2", "3"]


def test_samples_are_readable(generated: Generated) -> None:
    _, folder = generated("bitsandbytes")
    rows = list(csv.DictReader((folder / "compared_texts.csv").open()))
    lines = (ASSETS / "held_out.txt").read_text().splitlines()
    assert [row["prompt"] for row in rows] == [line[:8] for line in lines[:24]]
    assert sum(row["reference"].strip() == line[8:] for row, line in zip(rows, lines, strict=False)) >= 22


def test_prompts_of_ones_own_and_sampling(text: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("543+870=\n543-870=\n")
    own = ("backend=none", "task.do_sample=true", "task.temperature=5.0", "task.max_new_tokens=8", f"task.text={text}")
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, f"task.prompt=@{tmp_path / 'prompts'}", *own, f"seed={seed}")
        texts.append((tmp_path / name / "texts.csv").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_solution() -> None:
    for line in TEXT.splitlines():
        assert line[:8] + solution(line[:8]) == line


def test_only_problems_count_as_answered() -> None:
    source = Source(ArithmeticConfig())
    tokens = {line: source.encode(line).int() for line in ("543+870=", "543+8701", "3240\n", "3241\n")}

    def accuracy(prompts: list[str], answers: list[str]) -> float | None:
        outputs = {name: torch.stack([tokens[line] for line in lines]) for name, lines in
                   (("prompts", prompts), ("tokens", answers))}  # fmt: skip
        return source.scores(outputs)["answer_accuracy"]

    assert accuracy(["543+870=", "543+870="], ["3240\n", "3241\n"]) == 0.5
    assert accuracy(["543+870=", "543+8701"], ["3240\n", "3240\n"]) == 1
    assert accuracy(["543+8701"], ["3240\n"]) is None


def key(*overrides: str) -> str:
    config: RunConfig = run_config(*SMALL, *overrides)
    return run_key(config)


def test_the_text_counts_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a", TEXT), ("b", TEXT), ("c", TEXT[13:])):
        (tmp_path / name).write_text(content)
    first, same, other = (key("task=perplexity", f"task.text={tmp_path / name}") for name in "abc")
    assert first == same != other
    assert key() == key("model.path=null") != key("task.batch_size=7")


def test_another_checkpoint_of_its_kind(text: Path, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "model")
    result = run(tmp_path / "run", f"model.path={folder}", "backend=none", f"task.text={text}")
    assert result["quality/answer_accuracy"] < 0.5
    assert Source(ArithmeticConfig(path=str(folder))).prompts(GenerateConfig()) != []


def test_activations_are_calibrated_on_prompts(text: Path, reference: Path, tmp_path: Path) -> None:
    calibrated = (
        "backend=quanto",
        "backend.activations_dtype=int8",
        "backend.calibration_samples=8",
        f"task.text={text}",
    )
    result = run(tmp_path / "generate", *calibrated, reference=reference)
    assert 0 < result["quality/kl_divergence"] < 1 and result["quality/answer_accuracy"] > 0.5
    with pytest.raises(ConfigError, match="calibrated on samples of the task, and task=perplexity has none"):
        run(tmp_path / "perplexity", *calibrated, "task=perplexity")


@pytest.mark.parametrize("backend", representatives(["gguf_q4_0", "torchao"], ["gguf_q4_0"]))
def test_what_was_saved_is_a_whole_language_model(backend: str, text: Path, tmp_path: Path) -> None:
    saved, few = tmp_path / "saved", ("model.problems=4", f"task.text={text}")
    first = run(tmp_path / "one", f"backend={backend}", f"save.path={saved}", *few)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (ASSETS / name).read_bytes()
    assert not (saved / "held_out.txt").exists()
    second = run(tmp_path / "two", f"model.path={saved}", *few)
    assert second["quality/answer_accuracy"] == first["quality/answer_accuracy"]
    one, two = (load_file(tmp_path / name / "outputs.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
