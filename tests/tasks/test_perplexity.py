"""Sliding windows, and what is saved of them, against one forward of the whole text and a loop over single tokens."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qexp.errors import ConfigError
from qexp.models.arithmetic import ArithmeticConfig, Source
from qexp.tasks.perplexity import LOGPROBS, PerplexityConfig, Window, run_perplexity, window_sizes, windows_of
from tests.language import TEXT, save_language_model
from tests.products import exhaustive
from tests.tasks.contexts import context_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_language_model(tmp_path_factory.mktemp("model"), positions=80)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def measure(folder: Path, model: Any, out: Path, **task: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """(outputs, log-probabilities, result) of the task on the text."""
    source = Source(ArithmeticConfig(path=str(folder)))
    config = PerplexityConfig(text=str(folder / "text.txt"), **task)
    result = run_perplexity(context_of(config, source=source, models={"model": model}, folder=out))
    return result.outputs, load_file(out / LOGPROBS), result


def expected_logprobs(model: Any, tokens: list[int], first: int, last: int) -> Tensor:
    """ln p of the token behind tokens[first:last], seen behind <s>."""
    with torch.no_grad():
        logits = model(torch.tensor([[1, *tokens[first:last]]])).logits
    return torch.from_numpy(logits[0, -1].double().numpy()).log_softmax(-1)


def test_one_window_is_the_models_own_loss(folder: Path, model: Any, tmp_path: Path) -> None:
    outputs, saved, _ = measure(folder, model, tmp_path)
    tokens = Source(ArithmeticConfig(path=str(folder))).encode(TEXT)
    inputs = torch.cat([torch.tensor([1]), tokens])[None]
    with torch.no_grad():
        theirs = model(inputs, labels=inputs)
    assert outputs["nll"].mean().item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert torch.equal(outputs["targets"].long(), tokens)
    assert torch.equal(outputs["top1"].long(), theirs.logits[0, :-1].argmax(-1))
    assert set(saved) == {"logprobs"}  # 32 next tokens: all are kept, in their order
    assert torch.allclose(saved["logprobs"], theirs.logits[0, :-1].log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "batch_size"),
    [
        (14, 5, 3),
        (14, 13, 1),
        (80, 7, 3),
        *(exhaustive(*case) for case in ((21, 1, 3), (2, 1, 1), (14, 5, 1), (80, 7, 1))),
    ],
)
def test_every_token_is_scored_once_with_what_its_window_shows(
    window: int, stride: int, batch_size: int, folder: Path, model: Any, tmp_path: Path
) -> None:
    outputs, saved, _ = measure(folder, model, tmp_path, window=window, stride=stride, batch_size=batch_size)
    tokens = Source(ArithmeticConfig(path=str(folder))).encode(TEXT).tolist()
    assert outputs["targets"].tolist() == tokens
    for place, token in enumerate(tokens):
        steps = -(-max(place + 1 - (window - 1), 0) // stride)  # windows that begin before it comes into sight
        expected = expected_logprobs(model, tokens, steps * stride, place)
        assert -outputs["nll"][place].item() == pytest.approx(expected[token].item(), abs=1e-4)
        assert torch.allclose(saved["logprobs"][place].double(), expected, atol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(80, None), (14, 5)])
def test_a_text_without_a_begin_token_is_scored_from_its_second_token(
    window: int, stride: int | None, folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "begin_token", None)
    outputs, saved, _ = measure(folder, model, tmp_path, window=window, stride=stride)
    tokens = Source(ArithmeticConfig(path=str(folder))).encode(TEXT)
    assert torch.equal(outputs["targets"].long(), tokens[1:]) and len(saved["logprobs"]) == len(tokens) - 1
    with torch.no_grad():
        first = model(tokens[None, : min(window, len(tokens)) - 1]).logits[0].log_softmax(-1)
    nll = -first.gather(1, tokens[1 : len(first) + 1, None])[:, 0]
    assert torch.allclose(outputs["nll"][: len(nll)].float(), nll, atol=1e-4)
    assert torch.allclose(saved["logprobs"][: len(nll)], first, atol=1e-4)


def test_only_the_most_probable_are_kept(folder: Path, model: Any, tmp_path: Path) -> None:
    _, every, _ = measure(folder, model, tmp_path / "all", logprobs=None)
    outputs, some, _ = measure(folder, model, tmp_path / "some", logprobs=4)
    values, ids = every["logprobs"].topk(4)
    assert torch.equal(some["logprobs"], values) and torch.equal(some["ids"].long(), ids)
    assert torch.equal(outputs["top1"].long(), ids[:, 0])


def test_rows_metrics_and_max_tokens(folder: Path, model: Any, tmp_path: Path) -> None:
    outputs, saved, result = measure(folder, model, tmp_path, window=14, stride=13, max_tokens=30, batch_size=2)
    assert len(outputs["nll"]) == len(saved["logprobs"]) == 30
    assert [row["step"] for row in result.rows] == [1, 2]  # two windows of 13, one of 4
    assert result.metrics["time/tokens_per_second"] == pytest.approx(30 / result.metrics["time/total_seconds"])


@pytest.mark.parametrize("has_begin", [True, False])
def test_windows_cover_the_text(has_begin: bool) -> None:
    for count, tokens, stride in itertools.product((2, 7, 20, 21), (3, 8), (1, 2, 3)):
        windows = list(windows_of(count, tokens, stride, has_begin))
        scored = [place for window in windows for place in range(window.scored, window.stop)]
        assert scored == list(range(0 if has_begin else 1, count))
        assert all(window.stop - window.begin <= tokens for window in windows)
        assert all(window.scored - window.begin >= tokens - stride for window in windows[1:-1])
    assert list(windows_of(5, 8, 4, True)) == [Window(0, 0, 5)]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"window": 81}, r"task\.window=81 is more than the 80 positions of this model"),
        ({"window": 10, "stride": 10}, r"task\.stride=10 leaves tokens out: it must be at most 9"),
        ({"stride": 0}, r"task\.stride=0 must be 1 or more"),
        ({"max_tokens": 1}, r"task\.max_tokens=1 must be 2 or more"),
    ],
)
def test_windows_that_cannot_be(task: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        window_sizes(model.config, PerplexityConfig(**task), begin_token=1)


def test_a_text_that_is_too_short_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.text has 0 tokens"):
        list(windows_of(0, 8, 4, True))
    with pytest.raises(ConfigError, match=r"task\.text=.*nowhere cannot be read: No such file"):
        Source(ArithmeticConfig()).text(str(tmp_path / "nowhere"))


class WholeLogits(torch.nn.Module):
    """A model whose forward takes neither logits_to_keep nor use_cache; `Heedless` takes them, to no effect."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids)


class Heedless(WholeLogits):
    def forward(self, input_ids: Tensor, use_cache: bool = True, logits_to_keep: int = 0) -> Any:
        return self.inner(input_ids)


class Keywords(WholeLogits):
    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        assert not options  # they would reach layers that take no such thing
        return self.inner(input_ids)


@pytest.mark.parametrize("kind", [WholeLogits, Heedless, Keywords])
def test_models_that_give_all_logits_are_measured_alike(kind: Any, folder: Path, model: Any, tmp_path: Path) -> None:
    outputs, _, _ = measure(folder, kind(model), tmp_path, window=14, stride=5, batch_size=3)
    (tmp_path / "right").mkdir()
    expected, _, _ = measure(folder, model, tmp_path / "right", window=14, stride=5, batch_size=3)
    assert torch.equal(outputs["top1"], expected["top1"]) and torch.allclose(outputs["nll"], expected["nll"])


@pytest.mark.parametrize("text", ["12+34", "", "<s>x"])
def test_a_begin_that_is_written_is_not_scored(text: str, folder: Path) -> None:
    source = Source(ArithmeticConfig(path=str(folder)))
    begin = source.tokenizer.bos_token
    assert source.encode(begin + text).tolist() == source.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_bytes_of_tokens_sum_to_those_of_the_text() -> None:
    """A byte-level tokenizer without merges: a letter of n bytes is n tokens, and the first of them has its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qexp.models.causal_lm import CausalLMConfig, Source

    letters = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    source = Source(CausalLMConfig(path="nowhere"))
    source.__dict__["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "aé 你\nb"
    counts = source.token_bytes(text)
    assert counts is not None and len(counts) == len(source.encode(text)) == len(text.encode())
    assert counts.tolist() == [1, 2, 0, 1, 3, 0, 0, 1, 1]


def test_scored_tokens_have_their_bytes(folder: Path, model: Any, tmp_path: Path) -> None:
    outputs, _, _ = measure(folder, model, tmp_path, max_tokens=30)
    assert outputs["bytes"].tolist() == [1] * 30  # the embedded tokenizer's tokens are characters
