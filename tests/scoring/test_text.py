"""Numbers of language models from saved outputs, against scipy-free formulas written out and torch's own kl_div."""

import csv
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qexp.errors import LoadError
from qexp.metrics import exact_match as exact_match_file
from qexp.metrics import kl_divergence as kl_file
from qexp.metrics import perplexity as perplexity_file
from qexp.metrics.perplexity import perplexity
from qexp.metrics.registry import Samples, all_metrics
from qexp.scoring.text import count_nonfinite_tokens, paired_rows, write_compared_texts
from qexp.tasks.perplexity import LOGPROBS

TOKENS, VOCABULARY = 700, 50  # more rows than are read at a time


def logprobs(seed: int, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def write(folder: Path, full: Tensor, kept: int = VOCABULARY) -> Path:
    folder.mkdir()
    values, ids = full.topk(kept)
    tensors = {"logprobs": full} if kept == VOCABULARY else {"logprobs": values, "ids": ids.int()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / LOGPROBS)
    return folder


def kl_divergence(ours: Path, reference: Path) -> tuple[float | None, float | None]:
    found = kl_file.kl_divergence(paired_rows(ours, reference))
    return found.value, found.also["quality/kl_coverage"]


def exact_match(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float | None:
    return exact_match_file.exact_match(ours, theirs).value


def text_numbers(
    names: tuple[str, ...], outputs: dict[str, Tensor], expected: dict[str, Tensor], ours: Path, reference: Path
) -> dict[str, float | None]:
    """The metrics of a language model as scoring computes them."""
    broken = count_nonfinite_tokens(outputs) + count_nonfinite_tokens(expected)
    tools = {"logprobs": lambda: paired_rows(ours, reference)}
    samples = Samples(outputs, expected, is_comparable=not broken, tools=tools)
    numbers: dict[str, float | None] = {}
    for metric in (all_metrics()[f"quality/{name}"] for name in ("exact", *names)):
        if all(samples.holds(need) for need in metric.needs):
            result = metric.compute(samples)
            numbers |= {**getattr(result, "also", {}), metric.name: getattr(result, "value", result)}
    return {name.removeprefix("quality/"): value for name, value in numbers.items()}


def test_kl_divergence_is_torchs(tmp_path: Path) -> None:
    p, q = logprobs(0), logprobs(1)
    ours, reference = write(tmp_path / "ours", q), write(tmp_path / "reference", p)
    expected = torch.nn.functional.kl_div(q.double(), p.double(), reduction="batchmean", log_target=True).item()
    divergence, coverage = kl_divergence(ours, reference)
    assert divergence == pytest.approx(expected, rel=1e-6) and coverage == 1
    assert kl_divergence(reference, reference) == (0, 1)


@pytest.mark.parametrize("kept", [1, 5, 30, 49])
def test_kl_divergence_of_the_most_probable_tokens(kept: int, tmp_path: Path) -> None:
    """By hand, token by token: common ids one by one, all the others as one."""
    p, q = logprobs(0), (logprobs(0) + 0.3 * logprobs(1)).log_softmax(-1)
    divergence, coverage = kl_divergence(write(tmp_path / "q", q, kept), write(tmp_path / "p", p, kept))
    total = covered = full = 0.0
    for row_p, row_q in zip(p.double(), q.double(), strict=True):
        common = sorted({*row_p.topk(kept).indices.tolist()} & {*row_q.topk(kept).indices.tolist()})
        rest_p, rest_q = 1 - row_p[common].exp().sum().item(), 1 - row_q[common].exp().sum().item()
        total += sum((row_p[i].exp() * (row_p[i] - row_q[i])).item() for i in common)
        total += rest_p * math.log(rest_p / rest_q)
        covered += 1 - rest_p
        full += (row_p.exp() * (row_p - row_q)).sum().item()
    assert divergence == pytest.approx(total / TOKENS, rel=1e-4)
    assert coverage == pytest.approx(covered / TOKENS, rel=1e-6)
    assert 0 < total <= full


def test_a_probability_that_is_not_finite_leaves_it_undefined(tmp_path: Path) -> None:
    broken = logprobs(1)
    broken[600, 3] = torch.nan
    assert kl_divergence(write(tmp_path / "ours", broken), write(tmp_path / "reference", logprobs(0))) == (None, None)


def test_perplexity() -> None:
    assert perplexity(torch.tensor([math.log(2.0), math.log(8.0)])) == pytest.approx(4)
    assert perplexity(torch.tensor([1.0, torch.nan])) is None
    assert perplexity(torch.tensor([1e6])) is None


def test_exact_match_does_not_look_behind_the_end() -> None:
    ours = {"tokens": torch.tensor([[5, 2, 0], [5, 6, 2], [7, 7, 7]]), "lengths": torch.tensor([2, 3, 3])}
    theirs = {
        "tokens": torch.tensor([[5, 2, 9, 9], [5, 6, 7, 2], [7, 7, 7, 7]]),
        "lengths": torch.tensor([2, 4, 3]),
    }
    assert exact_match(ours, theirs) == pytest.approx(2 / 3)
    assert exact_match(theirs, ours) == pytest.approx(2 / 3)
    assert exact_match_file.exact_match(ours, theirs).samples == [1, 0, 1]


def test_numbers_of_a_run(tmp_path: Path) -> None:
    outputs = {"nll": torch.ones(4), "top1": torch.tensor([1, 2, 3, 4]), "targets": torch.zeros(4)}
    expected = outputs | {"top1": torch.tensor([1, 2, 3, 5])}
    ours, reference = write(tmp_path / "ours", logprobs(0)), write(tmp_path / "reference", logprobs(0))
    names = ("perplexity", "kl_divergence", "top1_agreement", "exact_match")
    numbers = text_numbers(names, outputs, expected, ours, reference)
    assert numbers == {
        "exact": 0, "perplexity": pytest.approx(math.e), "top1_agreement": 0.75, "kl_divergence": 0, "kl_coverage": 1,
    }  # fmt: skip
    with pytest.raises(LoadError, match=r"logprobs\.safetensors is missing, and KL divergence needs it"):
        text_numbers(names, outputs, expected, tmp_path, reference)


def test_texts_stand_beside_the_references(tmp_path: Path) -> None:
    for name, text in (("ours", "a,\nb"), ("reference", "c")):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "texts.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["prompt", "text"], ["x", text], ["y", "same"]])
    write_compared_texts(tmp_path / "ours", tmp_path / "reference")
    with (tmp_path / "ours" / "compared_texts.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [["prompt", "text", "reference", "same"], ["x", "a,\nb", "c", "0"], ["y", "same", "same", "1"]]


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("name", "value"), [("nll", [1.0, math.nan]), ("nll", [math.inf, 1.0]), ("nonfinite", [0, 1])], ids=str
)
def test_probabilities_that_are_not_finite_agree_with_nothing(
    name: str, value: list[float], side: str, tmp_path: Path
) -> None:
    good = {
        "nll": torch.ones(2), "top1": torch.zeros(2), "tokens": torch.zeros(2, 3), "lengths": torch.tensor([3, 3]),
        "nonfinite": torch.zeros(2),
    }  # fmt: skip
    bad = good | {name: torch.tensor(value)}
    ours, theirs = (bad, good) if side == "ours" else (good, bad)
    places = [write(tmp_path / place, logprobs(0)) for place in ("a", "b")]
    names = ("exact_match", "top1_agreement", "kl_divergence")
    numbers = text_numbers(names, ours, theirs, *places)
    assert numbers == {"exact": 0, **dict.fromkeys((*names, "kl_coverage"))}
    assert count_nonfinite_tokens(bad) == 1 and count_nonfinite_tokens(good) == 0


def test_error_of_perplexity_is_that_of_windows() -> None:
    """Windows of unequal length whose means differ: the standard deviation of perplexity over many such texts."""
    generator = torch.Generator().manual_seed(0)

    def text(windows: int = 40) -> dict[str, Tensor]:
        sizes = torch.randint(5, 40, (windows,), generator=generator)
        means = torch.rand(windows, generator=generator).repeat_interleave(sizes)
        numbers = torch.arange(windows).repeat_interleave(sizes)
        nll = 1 + means + 0.1 * torch.rand(len(numbers), generator=generator)
        return {"nll": nll, "windows": numbers, "bytes": torch.full_like(numbers, 3)}

    found = [perplexity_file._compute(Samples(text())) for _ in range(400)]
    for name, value in (("perplexity", None), ("byte_perplexity", "quality/byte_perplexity")):
        values = torch.tensor([one.value if value is None else one.also[value] for one in found])
        errors = torch.tensor([one.also[f"quality/{name}_stderr"] for one in found])
        assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.1)
    assert perplexity_file._compute(Samples(text(1))).also["quality/perplexity_stderr"] is None  # one window


def test_perplexity_by_byte_counts_bytes() -> None:
    outputs = {
        "nll": torch.tensor([1.0, 2.0, 3.0]),
        "windows": torch.tensor([0, 0, 1]),
        "bytes": torch.tensor([2, 0, 4]),
    }
    found = perplexity_file._compute(Samples(outputs)).also
    assert found["quality/bits_per_byte"] == pytest.approx(1 / math.log(2))  # 6 nats in 6 bytes
    assert found["quality/byte_perplexity"] == pytest.approx(math.e)
    broken = perplexity_file._compute(Samples(outputs | {"nll": torch.tensor([1.0, math.inf, 3.0])}))
    assert {*broken.also.values(), broken.value} == {None}
