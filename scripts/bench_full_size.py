"""FLUX.1-dev's transformer and its T5-XXL encoder at full size, quantized by qexp on a machine where they do not fit.

    python scripts/bench_full_size.py                                  # 24 GB of disk, about 20 minutes on two cores
    python scripts/bench_full_size.py --formats nf4 --fraction 0.1     # one format, a tenth of the blocks
    python scripts/bench_full_size.py --formats nf4 --keep /path/to/folder     # piece by piece: files and rows are kept

Writes checkpoints with made weights in the published layout (scripts/make_checkpoint.py), one model at a time, and for
each format loads it in a fresh process (`qexp.load`) and runs one forward: of 256 image tokens (256 × 256 pixels) and
--text-tokens for the transformer, of --text-tokens for the encoder. The processes are watched from outside: peaks are
what they added, file pages included, to a process that has loaded and run a small checkpoint before.

Ends with exit code 1 if an answer is not finite, or if nf4 of the whole transformer took more than 7.5 GiB.
The files are removed, unless --keep names a folder for them; one that is there is used again, and rows that --out has
of other formats with the same options stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench_full_size_program import BACKENDS
from benching import bench_parser, drop_from_cache, machine, run_watched, write_result
from make_checkpoint import write_architecture, write_checkpoint

from qexp.models.architectures import component_of

GIB = 1 << 30
TARGET_GIB = 7.5  # of nf4, load and forward, over the process's baseline
FORMATS = {"transformer": ("nf4", "gguf Q4_0", "torchao int4wo"), "text_encoder_2": ("nf4", "int8")}
SMALL = {"transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
         "text_encoder_2": {"num_layers": 1, "num_heads": 4, "d_ff": 256, "vocab_size": 1024}}  # fmt: skip


def measure(component: str, root: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each format of one component."""
    formats = [name for name in FORMATS[component] if name in arguments.formats]
    if not formats:
        return
    large, small = root / f"{component}-{arguments.fraction:g}", root / f"small-{component}"
    published = component_of("flux_dev", component)
    if not large.exists():
        write_architecture(large, f"flux_dev/{component}", fraction=arguments.fraction)
    if not small.exists():
        write_checkpoint(small, {**published.config, **SMALL[component]}, 1)
    files = sorted(large.glob("*.safetensors"))
    for name in formats:
        drop_from_cache(files)  # every load reads from the disk
        load = os.getloadavg()[0]
        run = run_watched(_command(name, large, small, arguments))
        size = sum(file.stat().st_size for file in files)
        when = {"date": time.strftime("%Y-%m-%d %H:%M"), "load_average_before": load}
        yield {"component": component, "format": name, "file_bytes": size, **run, **when}
    if arguments.keep is None:
        shutil.rmtree(large)


def merged(rows: list[dict[str, Any]], path: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return these rows, and those of a result with the same options that they do not replace."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = before["rows"] if before.get("options") == options else []
    new = {(row["component"], row["format"]): row for row in rows}
    return [*(row for row in kept if (row["component"], row["format"]) not in new), *rows]


def _command(name: str, large: Path, small: Path, arguments: argparse.Namespace) -> list[str]:
    script = str(Path(__file__).with_name("bench_full_size_program.py"))
    options = {"compute-dtype": arguments.compute_dtype, "text-tokens": str(arguments.text_tokens)}
    flags = [part for option, value in options.items() for part in (f"--{option}", value)]
    return [sys.executable, script, name, str(large), str(small), *flags]


def describe(row: dict[str, Any]) -> str:
    gib = {name: row[f"{name}_bytes"] / GIB for name in ("file", "weights", "loaded_peak_total", "peak_total")}
    return (
        f"{row['component']} {row['format']}: {gib['file']:.2f} GiB on disk, {gib['weights']:.2f} in memory, peak "
        f"{gib['loaded_peak_total']:.2f} loading and {gib['peak_total']:.2f} with the forward; "
        f"load {row['load_seconds']:.0f} s, forward {row['forward_seconds']:.0f} s, "
        f"{'finite' if row['finite'] else 'NOT FINITE'}"
    )


def failures(rows: list[dict[str, Any]], fraction: float) -> list[str]:
    found = [f"{row['component']} {row['format']}: the answer is not finite" for row in rows if not row["finite"]]
    for row in rows:
        is_judged = (row["component"], row["format"], fraction) == ("transformer", "nf4", 1)
        if is_judged and row["peak_total_bytes"] > TARGET_GIB * GIB:
            found.append(f"nf4 took {row['peak_total_bytes'] / GIB:.2f} GiB, above {TARGET_GIB}")
    return found


def main() -> None:
    parser = bench_parser(__doc__, "full_size.json")
    parser.add_argument("--components", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--formats", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the blocks")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--compute-dtype", default="float32", choices=("float32", "bfloat16"),
                        help="float32: a CPU without AVX-512 multiplies bfloat16 several times slower")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="where checkpoints are written and stay")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("fraction", "text_tokens", "compute_dtype")}
    rows = list[dict[str, Any]]()
    with nullcontext(arguments.keep) if arguments.keep else tempfile.TemporaryDirectory() as root:
        for component in arguments.components:
            for row in measure(component, Path(root), arguments):
                print(describe(row), flush=True)
                rows = merged([row], arguments.out, options)  # what is measured is kept, whatever comes next
                write_result(arguments.out, {"machine": machine(), "options": options, "rows": rows})
    if found := failures(rows, arguments.fraction):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
