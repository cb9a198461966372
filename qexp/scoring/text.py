"""What language models leave: log-probabilities of next tokens, and continuations beside the reference's."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from qexp.errors import LoadError
from qexp.metrics.tensors import count_nonfinite
from qexp.results.samples import shorten_text
from qexp.system.files import read_csv, to_csv, write_text
from qexp.tasks.perplexity import LOGPROBS
from qexp.tasks.text import TEXTS

COMPARED = "compared_texts.csv"
ROWS = 512  # positions whose log-probabilities are in memory at a time
Rows = tuple[Tensor, Tensor | None]  # ln p [rows, kept] and ids [rows, kept], falling; without ids: the vocabulary


def count_nonfinite_tokens(outputs: Mapping[str, Tensor]) -> int:
    """Return how many tokens, new ones and those of a text, have probabilities that are not finite."""
    new = int(outputs["nonfinite"].sum()) if "nonfinite" in outputs else 0
    return new + (count_nonfinite(outputs["nll"]) if "nll" in outputs else 0)


def paired_rows(folder: Path, reference: Path) -> Iterator[tuple[Rows, Rows]]:
    """Return the log-probabilities of (reference, run), some rows at a time."""
    return zip(read_rows(reference), read_rows(folder), strict=True)


def read_rows(folder: Path) -> Iterator[Rows]:
    """Yield the log-probabilities in a run's folder, some rows at a time. Raises LoadError if they are missing."""
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


def write_compared_texts(folder: Path, reference: Path | None) -> None:
    """Write compared_texts.csv: texts.csv, the reference's continuations, and 1 where they are the same."""
    rows = read_texts(folder)
    for row, other in zip(rows, read_texts(reference), strict=True) if reference is not None else ():
        row |= {"reference": other["text"], "same": str(int(row["text"] == other["text"]))}
    write_text(folder / COMPARED, to_csv(list(rows[0]), rows))


def text_names(folder: Path, outputs: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the name of the sample of each prompt and of each scored token: 'tokens 64-127 (9a3f5b1c)' is a window."""
    names: dict[str, list[str]] = {}
    if "tokens" in outputs:
        prompts = enumerate(row["prompt"] for row in read_texts(folder))
        names["prompts"] = [f"prompt {number}: {shorten_text(prompt)}" for number, prompt in prompts]
    if "windows" in outputs:
        names["tokens"] = []
        for targets in outputs["targets"].split(outputs["windows"].bincount().tolist()):
            start, checksum = len(names["tokens"]), zlib.crc32(targets.long().numpy().tobytes())
            names["tokens"] += [f"tokens {start}-{start + len(targets) - 1} ({checksum:08x})"] * len(targets)
    return names


def read_texts(folder: Path) -> list[dict[str, str]]:
    """Return the rows of texts.csv, {prompt, text}. Raises LoadError if it is missing."""
    if (rows := read_csv(folder / TEXTS)) is None:
        raise LoadError(f"{folder / TEXTS} is missing; run it again with resume=none")
    return rows
