"""Every type of every backend: bits per weight, error, and where it runs; writes docs/backends.md.

    python scripts/backend_table.py            measure on this machine and write the table (one or two minutes)
    python scripts/backend_table.py --print    only print it

A row is an option of backend=, or a type that its fields can be set to beside. Weights are N(0, 1) in bf16, SHAPE, from
torch's generator with SEED; each is quantized and decoded by the real quantizer, and the error is SQNR against the bf16
weights. A device's column says whether a layer runs there, as `python -m qexp.doctor` found by running one; a device
that this machine has not is "not measured here".
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qexp.doctor.__main__ import describe_machine, rows_of
from qexp.doctor.options import trials
from qexp.metrics.tensors import compare
from qexp.offloading.payload import true_nbytes
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.rows import WeightSpec

DOCUMENT = Path(__file__).parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- begin: python scripts/backend_table.py -->", "<!-- end -->"
SHAPE, SEED = (1024, 4096), 0
ABSENT = "not measured here"
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure every type of every backend.")
    parser.add_argument("--print", action="store_true", help="print the table, leave the document alone")
    arguments = parser.parse_args()
    text = table(describe_machine(), rows(), datetime.datetime.now(datetime.UTC).date())
    if arguments.print:
        print(text)
    else:
        DOCUMENT.write_text(inserted(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")
        print(f"written to {DOCUMENT}", file=sys.stderr)
    return 0


def rows() -> Iterator[Row]:
    """{"option", "backend", "label", "bits_per_weight", "sqnr_db", "cpu", "cuda"} of each type."""
    found: dict[str, Row] = {}
    for result in rows_of([], timeout=120):
        row = found.setdefault(result["option"], {"cpu": ABSENT, "cuda": ABSENT, **result})
        runs = result["status"] == "runs"
        row[result["device"].partition(":")[0]] = "runs" if runs else f"{result['status']}: {result['message']}"
    weight = gaussian()
    for name, config in trials([]).items():
        ran = found[name]["cpu"] == "runs"
        yield {**found[name], **(measure(config, weight) if ran else {"bits_per_weight": None, "sqnr_db": None})}


def gaussian() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED)).to(torch.bfloat16)


def measure(config: Any, weight: torch.Tensor) -> dict[str, float | None]:
    """Quantize a weight [out, in] and decode it. sqnr_db is None for what comes back exactly."""
    if config.quant_method == "none":
        return {"bits_per_weight": 8.0 * weight.itemsize, "sqnr_db": None}
    device = torch.device("cpu")
    quantizer = load_quantizer(config.resolved(device.type))
    spec = WeightSpec("layer", (weight.shape[0], weight.shape[1]), weight.dtype)
    with torch.no_grad():
        parameter = quantizer.create_quantized_param(spec, [weight], {}, device)
        restored = quantizer.dequantize_param(parameter, torch.float32)
    bits = 8 * true_nbytes(parameter) / weight.numel()
    return {"bits_per_weight": bits, "sqnr_db": compare(weight.float(), restored).sqnr_db}


def table(machine: Mapping[str, Any], measured: Iterator[Row] | Sequence[Row], date: datetime.date) -> str:
    """Return the generated part of the document, in Markdown."""
    versions = {"torch": machine["torch"], **machine["versions"]}
    devices = ", ".join(f"{device} ({name})" for device, name in machine["devices"].items())
    head = [
        f"Measured {date} on {devices}, {machine['cores']} cores; python {machine['python']}, "
        + ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
        + f". Weights: N(0, 1), bf16, {SHAPE[0]} × {SHAPE[1]}, seed {SEED}.",
        "",
        "| backend | type | `backend=` | bits / weight | SQNR dB | CPU | CUDA |",
        "|---|---|---|--:|--:|---|---|",
    ]
    notes: list[str] = []
    lines = [_line(row, notes) for row in measured]
    return "\n".join([*head, *lines, *([""] if notes else []), *notes])


def _line(row: Row, notes: list[str]) -> str:
    bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
    error = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
    error = "exact" if row["backend"] == "none" else error
    places = [_place(row[device], notes) for device in ("cpu", "cuda")]
    option, *fields = row["option"].split(" ")
    typed = " ".join([option, *(f"backend.{field}" for field in fields)])
    return f"| {row['backend']} | {row['label'] or ''} | `{typed}` | {bits} | {error} | {' | '.join(places)} |"


def _place(found: str, notes: list[str]) -> str:
    """'runs', or 'needs' with the number of a note that says what."""
    verdict, _, message = found.partition(": ")
    if not message:
        return verdict
    note = message.replace("|", "\\|")
    numbers = [number for number, line in enumerate(notes, 1) if line == f"{number}. {note}"]
    if not numbers:
        notes.append(f"{len(notes) + 1}. {note}")
    return f"{verdict} ({numbers[0] if numbers else len(notes)})"


def inserted(document: str, text: str) -> str:
    """Return the document with its generated part replaced."""
    before, _, rest = document.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{DOCUMENT} has not the lines {BEGIN} and {END}; put them where the table belongs")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
