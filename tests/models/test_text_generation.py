"""Continuing prompts: transformers' own `generate`, one prompt at a time, gives the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError
from qexp.models.arithmetic import ASSETS, ArithmeticConfig, Source
from tests.language import save_language_model

PROMPTS = ("5", "543+870=", "12-", "000+000=0000\n1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def generate(folder: Path, **task: Any) -> tuple[dict[str, torch.Tensor], list[int], Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    steps: list[int] = []
    source = Source(ArithmeticConfig(path=str(folder)))
    config = GenerateConfig(prompt=PROMPTS, **task)
    outputs = source.generate(
        {"model": model}, config, seed=3, device=torch.device("cpu"), on_step=lambda step, _: steps.append(step)
    )
    return outputs, steps, model


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_each_prompt_is_continued_as_if_alone(batch_size: int, folder: Path) -> None:
    outputs, steps, model = generate(folder, max_new_tokens=20, batch_size=batch_size)
    tokenizer = Source(ArithmeticConfig(path=str(folder))).tokenizer
    for prompt, tokens, length in zip(PROMPTS, outputs["tokens"], outputs["lengths"], strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(inputs["input_ids"], max_new_tokens=20, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert tokens[:length].tolist() == alone.tolist()
        assert length == 20 or tokens[length - 1] == 2  # the line's end
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= outputs["tokens"].shape[1]


def test_beams_are_the_librarys(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.num_beams = 3
    source = Source(ArithmeticConfig(path=str(folder)))
    task = GenerateConfig(prompt=PROMPTS[1:2], max_new_tokens=9)
    outputs = source.generate({"model": model}, task, seed=0, device=torch.device("cpu"), on_step=lambda step, _: None)
    inputs = source.tokenizer(PROMPTS[1], return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    assert outputs["tokens"][0, : outputs["lengths"][0]].tolist() == theirs[: outputs["lengths"][0]].tolist()


def test_it_draws_the_same_numbers_from_the_same_seed(folder: Path) -> None:
    first, second = (generate(folder, do_sample=True, temperature=3.0, max_new_tokens=12)[0] for _ in range(2))
    greedy = generate(folder, max_new_tokens=12)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tokens"][:, :2], greedy["tokens"][:, :2])


def test_settings_are_the_models_but_for_what_the_task_sets() -> None:
    from transformers import GenerationConfig

    from qexp.models.text_generation import DEFAULT_NEW_TOKENS, generation_settings

    base = GenerationConfig(temperature=0.3, top_k=7, do_sample=True, eos_token_id=2, pad_token_id=0)
    settings = generation_settings(base, GenerateConfig(top_k=4, max_new_tokens=9), None)
    assert (settings.temperature, settings.top_k, settings.do_sample, settings.max_new_tokens) == (0.3, 4, True, 9)
    assert base.top_k == 7
    assert generation_settings(base, GenerateConfig(), None).max_new_tokens == DEFAULT_NEW_TOKENS
    several = GenerationConfig(num_beams=3, num_return_sequences=3, pad_token_id=0)
    with pytest.raises(ConfigError, match="num_return_sequences=3, but a prompt is continued in one way only"):
        generation_settings(several, GenerateConfig(), None)


def test_a_prompt_ends_with_the_end_token_and_is_padded_behind_it() -> None:
    """The embedded model ends an answer with the line; the short prompt has digits to write before that."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS).eval()
    task = GenerateConfig(prompt=("543+870=", "54"), max_new_tokens=9)
    outputs = Source(ArithmeticConfig()).generate(
        {"model": model}, task, seed=0, device=torch.device("cpu"), on_step=lambda step, state: None
    )
    assert outputs["lengths"].tolist() == [5, 9]
    assert outputs["tokens"][0, 4:].tolist() == [2, 0, 0, 0, 0]
