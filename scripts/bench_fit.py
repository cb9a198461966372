"""Mixes against uniform formats at equal bytes: `qexp fit` on the embedded models, at 3.5, 4.5 and 5.5 bits a weight.

    python scripts/bench_fit.py                      # digits and arithmetic, GGUF and packed formats: half an hour
    python scripts/bench_fit.py --quick              # digits at 4.5 bits, one seed, few formats
    python scripts/bench_fit.py --table              # the table of docs/bench/fit.json as markdown

Scores are made once a model, in fp32; each proof runs on images of other seeds, or the text behind the scored windows.
`gain` is the mix's advantage over the best uniform format that fits the budget: dB of PSNR, or percent of the
KL divergence.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benching import bench_parser, machine, write_result

BITS = (3.5, 4.5, 5.5)
MODELS: dict[str, tuple[str, ...]] = {
    "digits": ("model=digits", "compute_dtype=fp32", "reference.dtype=fp32"),
    "digits, no layer skipped": ("model=digits", "model.skip_modules=[]", "compute_dtype=fp32", "reference.dtype=fp32"),
    "arithmetic fp32": ("model=arithmetic", "task=perplexity", "compute_dtype=fp32", "reference.dtype=fp32"),
    "arithmetic bf16": ("model=arithmetic", "task=perplexity", "compute_dtype=bf16"),
}
METRICS = {
    name: "quality/psnr_db" if "model=digits" in words else "quality/kl_divergence" for name, words in MODELS.items()
}


def main() -> None:
    parser = bench_parser(__doc__, "fit.json")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--formats", default="null", help="of the fit (default: all that are tried by default)")
    parser.add_argument("--images", type=int, default=200, help="of each seed, of the digits model")
    parser.add_argument("--outputs", help="keep the runs in this folder; default: a temporary one")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the stored table, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]))
        return
    if arguments.quick:
        arguments.models, arguments.bits, arguments.seeds = ["digits"], [4.5], 1
        arguments.formats = "[gguf_q4_0,gguf_q5_0,gguf,packed_uint3]"
    about, rows = machine(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            for bits in arguments.bits:
                rows.append(measure(arguments, model, bits, Path(arguments.outputs or scratch)))
                write_result(arguments.out, {"machine": about, "formats": arguments.formats, "rows": rows})
    print(markdown(rows))


def measure(arguments: argparse.Namespace, model: str, bits: float, outputs: Path) -> dict[str, Any]:
    """Return one fit in a fresh process; its mix beside the best uniform format and the rule by hand."""
    words = [*MODELS[model], f"bits={bits:g}", f"seeds={arguments.seeds}"]
    words += [f"task.num_images={arguments.images}"] if "model=digits" in words else []
    words += [f"formats={arguments.formats}"] if arguments.formats != "null" else []
    words += [f"paths.outputs={outputs}", "tracking=none"]
    subprocess.run([sys.executable, "-m", "qexp.fit", *words], check=True)
    (folder,) = (path.parent for path in outputs.glob("fit/*/fit.json") if is_of(path, words))
    with (folder / "proof.csv").open(newline="", encoding="utf-8") as stream:
        proof = list(csv.DictReader(stream))
    return {"model": model, "bits": bits, "words": words[:-2]} | summary(
        proof, METRICS[model], json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    )


def is_of(path: Path, words: Sequence[str]) -> bool:
    """Return whether a fit.json is of this question."""
    found = json.loads(path.read_text(encoding="utf-8"))
    own = [word for word in words if word.partition("=")[0] not in ("bits", "formats", "seeds")]
    return bool(found["overrides"] == own and found["bounds"] in words)


def summary(proof: Sequence[Mapping[str, str]], metric: str, fit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mix, the best uniform format and the rule by hand, each with its value; and the mix's gain."""
    is_higher_better = metric == "quality/psnr_db"
    rows = [row for row in proof if not row["out"] and math.isfinite(float(row[metric] or "nan"))]

    def best(kind: str) -> dict[str, Any] | None:
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            return None
        row = (max if is_higher_better else min)(own, key=lambda row: float(row[metric]))
        return {"name": row["name"], "bits": float(row["bits_per_weight"]), "value": float(row[metric])}

    mix, uniform = best("mix"), best("uniform")
    assert mix is not None and uniform is not None
    gain = mix["value"] - uniform["value"] if is_higher_better else 100 * (1 - mix["value"] / uniform["value"])
    return {
        "metric": metric,
        "mix": mix,
        "uniform": uniform,
        "rule": best("rule"),
        "gain": gain,
        "recommended": fit["recommended"],
        "additivity": fit["additivity"]["spearman"],
        "predicted_bytes": fit["predicted"]["weights_bytes"],
        "loaded_bytes": fit["measured"]["weights_bytes"],
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table."""
    head = "| model | bits | best uniform | its value | rule by hand | mix | gain | recommended | Spearman |"
    lines = [head, "|---|--:|---|--:|--:|--:|--:|---|--:|"]
    for row in rows:
        unit, digits = ("dB", ".1f") if row["metric"] == "quality/psnr_db" else ("nats", ".2e")
        gain = f"{row['gain']:+.1f} dB" if unit == "dB" else f"{-row['gain']:+.0f} % KL"
        rule = f"{row['rule']['value']:{digits}}" if row["rule"] else "–"
        uniform = f"{row['uniform']['value']:{digits}} {unit}"
        cells = [
            row["model"], f"{row['bits']:g}", row["uniform"]["name"], uniform, rule,
            f"{row['mix']['value']:{digits}}", gain, row["recommended"]["name"],
            f"{row['additivity']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
