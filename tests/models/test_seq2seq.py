"""Sequence-to-sequence models end to end: answers are those of transformers' own `generate`, prompt by prompt."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qexp.errors import ConfigError
from qexp.experiments.run import run_experiment
from qexp.models.arithmetic import ASSETS
from tests.assigning import run_config
from tests.models.test_networks import save_network
from tests.products import exhaustive

PROMPTS = ("543+870=", "5")


@pytest.fixture(scope="module", params=["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GenerationConfig

    folder = save_network(request.param, tmp_path_factory.mktemp("model"), torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / name)
    GenerationConfig(
        decoder_start_token_id=1, eos_token_id=2, pad_token_id=0, num_beams=3, max_new_tokens=7
    ).save_pretrained(folder)
    return folder


def config(folder: Path, *overrides: str) -> object:
    return run_config("model=seq2seq", f"model.path={folder}", "device=cpu", *overrides)


@pytest.mark.parametrize("beams", [exhaustive(1), 3])  # tests/models/test_text_generation.py has answers without beams
def test_answers_are_the_librarys(beams: int, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

    prompts = f"task.prompt=[{','.join(f'{chr(39)}{prompt}{chr(39)}' for prompt in PROMPTS)}]"
    shutil.copytree(folder, tmp_path / "model")
    settings = GenerationConfig.from_pretrained(folder)
    settings.num_beams = beams
    settings.save_pretrained(tmp_path / "model")
    metrics = run_experiment(config(tmp_path / "model", "backend=none", prompts), tmp_path)  # type: ignore[arg-type]
    outputs = load_file(tmp_path / "outputs.safetensors")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, tokens, length in zip(PROMPTS, outputs["tokens"], outputs["lengths"], strict=True):
        theirs = model.generate(tokenizer(prompt, return_tensors="pt")["input_ids"], generation_config=settings)[0, 1:]
        assert tokens[:length].tolist() == theirs[:length].tolist() and length <= len(theirs)
    assert [row["prompt"] for row in csv.DictReader((tmp_path / "texts.csv").open())] == list(PROMPTS)
    assert (metrics["time/tokens_per_second"] or 0) > 0


def test_text_has_no_perplexity_here(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"task=perplexity is not for model\.source=seq2seq, which has forward, gen"):
        config(folder, "task=perplexity", f"task.text={ASSETS / 'held_out.txt'}")
    with pytest.raises(ConfigError, match=r"task\.text=.* is a text to measure perplexity on, which .* has not"):
        config(folder, "task.prompt=[a]", f"task.text={ASSETS / 'held_out.txt'}")


def test_a_decoder_begins_with_its_start_token(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("543+870=\n12-\n")
    chosen = ("task=forward", f"task.inputs={tmp_path / 'lines.txt'}", "backend=torchao")
    run_experiment(config(folder, *chosen), tmp_path)  # type: ignore[arg-type]
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert outputs["logits"].shape == (2, 1, 64) and torch.isfinite(outputs["logits"]).all()
