"""Continuing prompts: transformers' own `generate`, one prompt at a time, gives the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError, LoadError
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


def broken_model(kind: str) -> Any:
    """A tiny model whose input embedding of the character 5 is beyond fp32 as soon as anything is computed with it."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "Llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        "T5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes[kind], **tokens, tie_word_embeddings=False)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "T5" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    row = Source(ArithmeticConfig()).tokenizer("5", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[row] = 3e38
    return model


@pytest.mark.parametrize(("kind", "beams"), [("GPT2", 1), ("Llama", 1), ("Llama", 3), ("T5", 1)])
def test_tokens_that_follow_from_nan_are_counted_prompt_by_prompt(kind: str, beams: int) -> None:
    model, source = broken_model(kind), Source(ArithmeticConfig())
    model.generation_config.update(num_beams=beams, do_sample=False)
    task = GenerateConfig(prompt=("12", "5", "345+1=", "000"), max_new_tokens=3, batch_size=2)
    outputs = source.generate({"model": model}, task, seed=0, device=torch.device("cpu"), on_step=lambda step, _: None)
    counts, lengths = outputs["nonfinite"].tolist(), outputs["lengths"].tolist()
    assert counts[1:3] == lengths[1:3]  # each of their tokens comes behind a 5
    assert counts[0] < lengths[0] and counts[3] < lengths[3]
    assert not model._forward_hooks


def test_nothing_is_drawn_from_nan() -> None:
    source = Source(ArithmeticConfig())
    task = GenerateConfig(prompt=("5",), max_new_tokens=3, do_sample=True)
    with pytest.raises(LoadError, match=r"token 1 are not finite, so none can be drawn.*do_sample=false"):
        source.generate(
            {"model": broken_model("Llama")}, task, seed=0, device=torch.device("cpu"), on_step=lambda step, _: None
        )
