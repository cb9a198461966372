"""Quality of a language model's saved outputs, alone and against the unquantized model's.

    perplexity       exp(mean nll) over the scored tokens
    kl_divergence    mean over tokens of Σ p ln(p / q), in nats: p the reference's distribution over next tokens, q ours
    top1_agreement   how often both models have the same most probable next token
    exact_match      how many prompts are continued by exactly the reference's tokens

Where only the most probable next tokens are kept, KL divergence is that of coarser distributions: tokens that both
have kept, and one entry for all the others. That is never more than the full one (data processing inequality), and
close to it if the entry is rare; `kl_coverage` is the mean probability that the reference gives to the tokens compared
one by one, 1 where the whole vocabulary is kept. Sums are in fp64, over some rows at a time.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qexp.errors import LoadError
from qexp.metrics.tensors import count_nonfinite
from qexp.system.files import to_csv, write_text
from qexp.tasks.perplexity import LOGPROBS
from qexp.tasks.text import TEXTS

ROWS = 512  # positions whose log-probabilities are in memory at a time
Rows = tuple[Tensor, Tensor | None]  # ln p [rows, kept] and ids [rows, kept], falling; without ids: the vocabulary


def perplexity(nll: Tensor) -> float | None:
    mean = nll.double().mean().item()
    return math.exp(mean) if mean < 700 else None  # NaN is not below 700 either


def exact_match(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The fraction of rows with equal tokens, [prompts, longest]; padding behind their lengths does not count."""
    longest = max(ours["tokens"].shape[1], theirs["tokens"].shape[1])
    place = torch.arange(longest)
    rows = [
        torch.nn.functional.pad(side["tokens"], (0, longest - side["tokens"].shape[1])).where(
            place < side["lengths"][:, None], -1
        )
        for side in (ours, theirs)
    ]
    return (rows[0] == rows[1]).all(-1).double().mean().item()


def count_nonfinite_tokens(outputs: Mapping[str, Tensor]) -> int:
    """How many tokens, new ones and those of a text, have probabilities that are not finite."""
    new = int(outputs["nonfinite"].sum()) if "nonfinite" in outputs else 0
    return new + (count_nonfinite(outputs["nll"]) if "nll" in outputs else 0)


def kl_divergence(folder: Path, reference: Path) -> tuple[float | None, float | None]:
    """(mean KL divergence, coverage) of the log-probabilities in two folders; None where a value is not finite."""
    total = covered = 0.0
    count = 0
    for ours, theirs in zip(read_rows(folder), read_rows(reference), strict=True):
        divergence, coverage = divergence_of_rows(theirs, ours)
        total, covered, count = total + divergence.sum().item(), covered + coverage.sum().item(), count + len(coverage)
    mean = total / count
    return (max(mean, 0.0), covered / count) if math.isfinite(mean) else (None, None)


def divergence_of_rows(reference: Rows, ours: Rows) -> tuple[Tensor, Tensor]:
    """(KL divergence, probability of the tokens compared one by one) of each row, in fp64."""
    log_p, log_q = reference[0].double(), ours[0].double()
    p = log_p.exp()
    if reference[1] is None or ours[1] is None:  # the whole vocabulary, in its own order
        return (p * (log_p - log_q)).sum(-1), torch.ones(len(p), dtype=torch.float64)
    order = ours[1].argsort(-1)
    ids, log_q = ours[1].gather(1, order), log_q.gather(1, order)
    place = torch.searchsorted(ids, reference[1]).clamp(max=ids.shape[1] - 1)
    common = ids.gather(1, place) == reference[1]
    log_q = log_q.gather(1, place)
    p_common, q_common = (torch.where(common, x, 0.0).sum(-1) for x in (p, log_q.exp()))
    one_by_one = torch.where(common, p * (log_p - log_q), 0.0).sum(-1)
    p_rest, q_rest = (1 - p_common).clamp(min=1e-12), (1 - q_common).clamp(min=1e-12)
    return one_by_one + p_rest * (p_rest / q_rest).log(), p_common


def read_rows(folder: Path) -> Iterator[Rows]:
    """The log-probabilities in a run's folder, some rows at a time. Raises LoadError if they are missing."""
    from safetensors import SafetensorError, safe_open

    path = folder / LOGPROBS
    if not path.is_file():
        raise LoadError(f"{path} is missing, and KL divergence needs it; run it again with resume=none")
    try:
        with safe_open(path, "pt") as file:
            logprobs = file.get_slice("logprobs")
            ids = file.get_slice("ids") if "ids" in file.keys() else None  # noqa: SIM118
            for start in range(0, logprobs.get_shape()[0], ROWS):
                stop = start + ROWS
                yield logprobs[start:stop], ids[start:stop] if ids is not None else None
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged ({error}); run it again with resume=none") from error


def write_samples(folder: Path, reference: Path | None) -> None:
    """samples.csv: texts.csv with the reference's continuations beside ours, and 1 where they are the same."""
    rows = _read_texts(folder)
    for row, other in zip(rows, _read_texts(reference), strict=True) if reference is not None else ():
        row |= {"reference": other["text"], "same": str(int(row["text"] == other["text"]))}
    write_text(folder / "samples.csv", to_csv(list(rows[0]), rows))


def _read_texts(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / TEXTS).open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except FileNotFoundError:
        raise LoadError(f"{folder / TEXTS} is missing; run it again with resume=none") from None


def text_numbers(
    names: Sequence[str],
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor] | None,
    folder: Path,
    reference: Path | None,
) -> dict[str, float | None]:
    """The metrics among `names` that these outputs have, exact and kl_coverage.

    Comparisons are None if probabilities of either side are not finite: the most probable token of NaN is always 0.
    """
    numbers: dict[str, float | None] = {}
    if "nll" in outputs:
        numbers["perplexity"] = perplexity(outputs["nll"])
    if expected is not None and reference is not None:
        comparable = not count_nonfinite_tokens(outputs) + count_nonfinite_tokens(expected)
        same = all(torch.equal(outputs[name], expected[name]) for name in expected if name in outputs)
        numbers["exact"] = float(comparable and same)
        if "tokens" in outputs:
            numbers["exact_match"] = exact_match(outputs, expected) if comparable else None
        if "nll" in outputs:
            agreement = (outputs["top1"] == expected["top1"]).double().mean().item()
            numbers["top1_agreement"] = agreement if comparable else None
        if "nll" in outputs and "kl_divergence" in names:
            divergence = kl_divergence(folder, reference)
            numbers["kl_divergence"], numbers["kl_coverage"] = divergence if comparable else (None, None)
    always = ("exact", "kl_coverage")
    return {name: value for name, value in numbers.items() if name in names or name in always}
