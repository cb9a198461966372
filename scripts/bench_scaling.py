"""How loading grows with the model: time and peak memory of qexp from 0.25 to 4 B parameters, with 1 and 2 workers.

    python scripts/bench_scaling.py            # nf4, five sizes: about four minutes, 8 GiB of disk
    python scripts/bench_scaling.py --quick    # 0.25 and 0.5 B: a minute

FLUX transformers of more and more blocks, made weights, in the page cache; a fresh process for each measurement, the
median of `--repeats`. `per_billion` is seconds over billions of parameters: equal numbers mean that time is linear.
`over_bytes` is the peak beyond the quantized weights, which should not grow.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench_load import flux_config, load_command
from benching import MIB, bench_parser, machine, medians, read_seconds, run_watched, write_result
from make_checkpoint import write_checkpoint

LAYERS = {0.25: (0, 1), 0.5: (0, 3), 1.0: (1, 4), 2.0: (3, 7), 4.0: (6, 14)}  # billions, about -> FLUX blocks


def main() -> None:
    parser = bench_parser(__doc__, "scaling.json")
    parser.add_argument("--format", default="nf4", help="a format of bench_load.py, or an option of conf/backend")
    parser.add_argument("--billions", type=float, nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="0.25 and 0.5 B, one repeat")
    parser.add_argument("--folder", help="where to write the checkpoints; default: the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.billions, arguments.repeats = [0.25, 0.5], 1
    about, rows = machine(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        small, large = Path(root) / "small", Path(root) / "large"
        write_checkpoint(small, flux_config(2, (1, 1)), 1)
        for billions in arguments.billions:
            write_checkpoint(large, flux_config(24, LAYERS[billions]), 1)
            for workers in arguments.workers:
                rows.append(measure(arguments, small, large, workers))  # what is measured is kept, whatever comes next
                found = {"machine": about, "format": arguments.format, "rows": rows}
                write_result(arguments.out, {**found, "largest_over_smallest": growth(rows)})
            shutil.rmtree(large)
    for workers, times in growth(rows).items():
        print(f"{workers} workers: {times:.2f} times the seconds a billion, smallest to largest")


def measure(arguments: argparse.Namespace, small: Path, large: Path, workers: int) -> dict[str, Any]:
    command = load_command("qexp", arguments.format, large, small, warm=True, workers=workers)
    files, runs = sorted(large.glob("*.safetensors")), list[dict[str, Any]]()
    for _ in range(arguments.repeats):
        read_seconds(files)
        runs.append(run_watched(command))
    run = medians(runs)
    billions = run["dense_bytes"] / 2e9  # bf16
    row = {
        "workers": workers,
        "billions": billions,
        **run,
        "per_billion": run["wall_seconds"] / billions,
        "over_bytes": run["peak_total_bytes"] - run["quantized_bytes"],
    }
    print(
        f"{billions:.2f} B, {workers} workers: {row['wall_seconds']:.2f} s wall, {row['cpu_seconds']:.2f} s CPU, "
        f"{row['per_billion']:.2f} s a billion; peak {row['peak_total_bytes'] / MIB:.0f} MiB, "
        f"{row['over_bytes'] / MIB:.0f} over the quantized weights",
        flush=True,
    )
    return row


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each number of workers: seconds a billion of the largest model over those of the smallest."""
    found = {}
    for workers in sorted({row["workers"] for row in rows}):
        own = [row for row in rows if row["workers"] == workers]
        found[str(workers)] = own[-1]["per_billion"] / own[0]["per_billion"]
    return found


if __name__ == "__main__":
    main()
