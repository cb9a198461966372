"""Continuing prompts: transformers' own `generate`, one prompt at a time, gives the same tokens."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError, LoadError
from qexp.models.arithmetic import ASSETS, ArithmeticConfig, Source
from tests.backends import CPU
from tests.language import save_language_model
from tests.products import diagonal, representatives

PROMPTS = ("5", "543+870=", "12-", "000+000=0000\n1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def run(source: Any, model: Any, task: GenerateConfig, seed: int = 0, on_step: Any = None) -> dict[str, torch.Tensor]:
    on_step = on_step or (lambda step, state: None)
    outputs: dict[str, torch.Tensor] = source.generate({"model": model}, task, seed=seed, device=CPU, on_step=on_step)
    return outputs


def library_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def generate(folder: Path, **task: Any) -> tuple[dict[str, torch.Tensor], list[int], Any]:
    model, steps = library_model(folder), list[int]()
    source, config = Source(ArithmeticConfig(path=str(folder))), GenerateConfig(prompt=PROMPTS, **task)
    return run(source, model, config, seed=3, on_step=lambda step, _: steps.append(step)), steps, model


@pytest.mark.parametrize("batch_size", representatives([1, 3, 4], [3]))
def test_each_prompt_is_continued_as_if_alone(batch_size: int, folder: Path) -> None:
    outputs, steps, model = generate(folder, max_new_tokens=20, batch_size=batch_size)
    tokenizer = Source(ArithmeticConfig(path=str(folder))).tokenizer
    for prompt, tokens, length in zip(PROMPTS, outputs["tokens"], outputs["lengths"], strict=True):
        (alone,) = own_answers(model, tokenizer, [prompt], max_new_tokens=20)
        assert tokens[:length].tolist() == alone
        assert length == 20 or tokens[length - 1] == 2  # the line's end
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= outputs["tokens"].shape[1]


def test_beams_are_the_librarys(folder: Path) -> None:
    model, source = library_model(folder), Source(ArithmeticConfig(path=str(folder)))
    model.generation_config.num_beams = 3
    (ours,) = our_answers(model, source, PROMPTS[1:2], max_new_tokens=9)
    inputs = source.tokenizer(PROMPTS[1], return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    assert ours == theirs[: len(ours)].tolist()


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
    task = GenerateConfig(prompt=("543+870=", "54"), max_new_tokens=9)
    outputs = run(Source(ArithmeticConfig()), library_model(ASSETS), task)
    assert outputs["lengths"].tolist() == [5, 9]
    assert outputs["tokens"][0, 4:].tolist() == [2, 0, 0, 0, 0]


def broken_model(kind: str) -> Any:
    """A tiny model whose input embedding of the character 5 has overflown."""
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
    model.set_output_embeddings(torch.nn.Linear(32, 32, bias=False))  # not tied to it
    with torch.no_grad():
        model.get_input_embeddings().weight[row] = torch.inf
    return model


@pytest.mark.parametrize(("kind", "beams"), [("GPT2", 1), ("Llama", 1), ("Llama", 3), ("T5", 1)])
def test_tokens_that_follow_from_nan_are_counted_prompt_by_prompt(kind: str, beams: int) -> None:
    model, source = broken_model(kind), Source(ArithmeticConfig())
    model.generation_config.update(num_beams=beams, do_sample=False)
    task = GenerateConfig(prompt=("12", "5", "345+1=", "000"), max_new_tokens=3, batch_size=2)
    outputs = run(source, model, task)
    counts, lengths = outputs["nonfinite"].tolist(), outputs["lengths"].tolist()
    assert counts[1:3] == lengths[1:3]  # each of their tokens comes behind a 5
    assert counts[0] < lengths[0] and counts[3] < lengths[3]
    assert not model._forward_hooks


def test_nothing_is_drawn_from_nan() -> None:
    task = GenerateConfig(prompt=("5",), max_new_tokens=3, do_sample=True)
    with pytest.raises(LoadError, match=r"token 1 are not finite, so none can be drawn.*do_sample=false"):
        run(Source(ArithmeticConfig()), broken_model("Llama"), task)


def own_answers(model: Any, tokenizer: Any, prompts: Any, **settings: Any) -> list[list[int]]:
    """Each prompt by itself, by transformers: without padding."""
    answers = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model.generate(tokens, do_sample=False, pad_token_id=0, **settings)[0]
        answers.append(found[1 if model.config.is_encoder_decoder else tokens.shape[1] :].tolist())
    return answers


def our_answers(model: Any, source: Any, prompts: Any, **task: Any) -> list[list[int]]:
    outputs = run(source, model, GenerateConfig(prompt=tuple(prompts), **task))
    return [row[:length].tolist() for row, length in zip(outputs["tokens"], outputs["lengths"], strict=True)]


FAMILIES: dict[str, dict[str, Any]] = {
    "Rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "CTRL": {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 64, "n_positions": 64},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "OPT": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
    },
    "Bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
}  # fmt: skip
LONE = ("Rwkv",)  # that read padding, as if it were text


def random_model(family: str) -> Any:
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[family]
    )
    auto = transformers.AutoModelForSeq2SeqLM if family == "Bart" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


@pytest.mark.parametrize(("batch_size", "family"), diagonal([1, 4], FAMILIES))
def test_an_answer_does_not_depend_on_the_other_prompts(
    family: str, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model, source = random_model(family), Source(ArithmeticConfig())
    source.padding_side = "right" if family == "Bart" else "left"
    expected = own_answers(model, source.tokenizer, PROMPTS, max_new_tokens=12)
    assert our_answers(model, source, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected
    assert ("one at a time: this model reads" in capsys.readouterr().err) == (family in LONE and batch_size > 1)


def test_a_batch_is_padded_to_its_own_longest() -> None:
    from qexp.models.prompt_tokens import padded_inputs

    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    inputs = padded_inputs([[1, 5], [1, 5, 6]], 0, model)
    assert inputs["input_ids"].tolist() == [[0, 1, 5], [1, 5, 6]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    model.config.is_encoder_decoder = True
    assert padded_inputs([[1, 5], [1, 5, 6]], None, model)["input_ids"].tolist() == [[1, 5, 0], [1, 5, 6]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_draws_of_a_prompt_do_not_depend_on_the_others(batch_size: int) -> None:
    """Of the same length, too, and whatever is drawn for the prompt before."""
    model, source = random_model("OPT"), Source(ArithmeticConfig())
    settings = {"do_sample": True, "temperature": 2.0, "batch_size": batch_size}
    first, second = (
        our_answers(model, source, (other, "34"), max_new_tokens=6, **settings)[1] for other in ("12", "99")
    )
    assert first == second
    long, short = (our_answers(model, source, ("12", "34"), max_new_tokens=n, **settings)[1] for n in (9, 4))
    assert long[:4] == short


@pytest.mark.parametrize(
    ("row", "own", "expected"),
    [
        ([1, 1, 7, 8], [1, 7, 8], [1, 7, 8]),  # a begin that the text has already
        ([101, 101, 7, 102, 102], [101, 7, 102], [101, 7, 102]),  # BERT's at both ends
        ([7, 2, 2], [7, 2], [7, 2]),  # T5's end
        ([1, 7, 1], [7, 1], [1, 7, 1]),  # elsewhere it is text
        ([1, 1, 1, 7], [1, 1, 7], [1, 1, 7]),  # written twice
        ([7, 8], [7, 8], [7, 8]),  # none are added
        ([1], [], [1]),
    ],
)
def test_a_special_token_that_is_written_is_not_added(row: list[int], own: list[int], expected: list[int]) -> None:
    from qexp.models.prompt_tokens import once_each

    assert once_each(row, own) == expected


@pytest.mark.parametrize(
    "entry", [{"return_dict_in_generate": True}, {"output_scores": True, "return_dict_in_generate": True}], ids=str
)
def test_what_generate_returns_besides_tokens_is_left_out(entry: dict[str, Any]) -> None:
    model, source = random_model("OPT"), Source(ArithmeticConfig())
    expected = own_answers(model, source.tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config.update(**entry)
    assert our_answers(model, source, PROMPTS, max_new_tokens=8) == expected


def letters_tokenizer() -> Any:
    """One with a token for each of 29 letters, as transformers needs it to look for stop strings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", ".", " ", "1"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("letters", [slice(1, 3), slice(0, 1), slice(2, 5)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_answer_ends_with_a_stop_string(batch_size: int, letters: slice) -> None:
    """One that is made of some letters of the first prompt's own answer."""
    model, source, prompts = random_model("OPT"), Source(ArithmeticConfig()), ("ab", "once upon", "x.")
    source.__dict__["tokenizer"] = tokenizer = letters_tokenizer()
    model.generation_config.eos_token_id = 2
    own = own_answers(model, tokenizer, prompts, max_new_tokens=8)
    stop = tokenizer.decode(own[0][letters])
    model.generation_config.stop_strings = [stop]
    answers = our_answers(model, source, prompts, max_new_tokens=8, batch_size=batch_size)
    for answer, whole in zip(answers, own, strict=True):
        ends = [n for n in range(1, len(whole) + 1) if stop in tokenizer.decode(whole[:n])]
        assert answer == whole[: min(ends, default=len(whole))]
    assert len(answers[0]) < 8


def test_stop_strings_that_the_library_cannot_look_for_are_refused() -> None:
    """The embedded tokenizer has no letters."""
    source, model = Source(ArithmeticConfig()), random_model("OPT")
    model.generation_config.stop_strings = ["12"]
    with pytest.raises(ConfigError, match=r"generation_config\.json has stop_strings=\['12'\], which .*remove"):
        source.check_run({"model": model}, GenerateConfig(prompt=("12",)))


@pytest.mark.parametrize(
    "entry", [{"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}], ids=str
)
def test_searches_whose_tokens_cannot_be_compared_are_refused(entry: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    from qexp.models.text_generation import generation_settings

    base = GenerationConfig(pad_token_id=0, **entry)
    with pytest.raises(ConfigError, match=r"generation_config\.json asks for .*cannot be compared token by token"):
        generation_settings(base, GenerateConfig(), None)


@pytest.mark.parametrize("prompts", [("12",), ("12", "34"), PROMPTS])
def test_without_tokens_to_pad_with_prompts_are_continued_all_the_same(prompts: tuple[str, ...]) -> None:
    model, source = random_model("OPT"), Source(ArithmeticConfig())
    expected = own_answers(model, source.tokenizer, prompts, max_new_tokens=6)
    source.tokenizer.pad_token = source.tokenizer.eos_token = None
    model.generation_config.update(eos_token_id=None, pad_token_id=None)
    ours = our_answers(model, source, prompts, max_new_tokens=6)
    assert [answer[: len(own)] for answer, own in zip(ours, expected, strict=True)] == expected


@pytest.mark.parametrize("task", ["generate", "perplexity"])
def test_a_token_beyond_the_vocabulary_is_refused_before_weights(task: str, folder: Path, tmp_path: Path) -> None:
    from qexp.tasks.perplexity import PerplexityConfig

    source, model = Source(ArithmeticConfig(path=str(folder))), random_model("OPT")
    source.tokenizer.add_tokens(["new"])
    (tmp_path / "text").write_text("12new")
    text = str(tmp_path / "text")
    config: Any = GenerateConfig(prompt=("12new",)) if task == "generate" else PerplexityConfig(text=text)
    model.resize_token_embeddings(source.tokenizer.convert_tokens_to_ids("new"))  # one too few
    with pytest.raises(LoadError, match=r"task\.(prompt|text).*makes token \d+ of it \('new'\), but the network has"):
        source.check_run({"model": model}, config)


@pytest.mark.parametrize("change", [('"type": "', '"type": "Newer'), ("{", ""), ('"vocab"', '"words"')], ids=str)
def test_a_tokenizer_that_cannot_be_opened_is_named_with_a_remedy(
    change: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    source = Source(ArithmeticConfig(path=str(tmp_path / "model")))
    with pytest.raises(
        LoadError, match=r"tokenizer\.json': transformers 5.* cannot open this tokenizer: .*download it"
    ):
        source.check_run({"model": random_model("OPT")}, GenerateConfig(prompt=("12",)))


def test_lines_are_not_padded_for_a_network_that_cannot_be_told_of_it() -> None:
    from transformers import BertConfig, BertModel, FNetConfig, FNetModel

    from qexp.models.prompt_tokens import encode_lines

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 32}
    tokenizer, network = Source(ArithmeticConfig()).tokenizer, FNetModel(FNetConfig(**sizes))
    for lines in (["1", "12"], ["12", "345", "6"], ["", "1"]):
        with pytest.raises(ConfigError, match=r"FNetModel takes no attention_mask.*give lines of one length"):
            encode_lines(network, tokenizer, lines)
        encoded = encode_lines(BertModel(BertConfig(**sizes, num_attention_heads=2)), tokenizer, lines)
        assert encoded["attention_mask"].sum(1).tolist() == [len(line) + 1 for line in lines]
    assert set(encode_lines(network, tokenizer, ["12", "34"])) == {"input_ids"}


def test_special_tokens_that_a_line_has_written_are_not_added_to_it() -> None:
    from qexp.models.prompt_tokens import encode_lines

    tokenizer = Source(ArithmeticConfig()).tokenizer
    begin = tokenizer.bos_token
    encoded = encode_lines(random_model("OPT"), tokenizer, [begin + "12", "12", "345"])
    assert encoded["input_ids"][0].tolist() == encoded["input_ids"][1].tolist()
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
