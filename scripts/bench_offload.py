"""Steps of a FLUX-shaped transformer whose weights rest on disk: qexp, diffusers, accelerate, and the disk itself.

    python scripts/bench_offload.py                          # 0.6 B parameters, bf16, nf4 and int8: under ten minutes
    python scripts/bench_offload.py --formats dense --repeats 5
    python scripts/bench_offload.py --quick                    # a small model: does everything work

Writes a checkpoint with made weights, then loads, offloads and runs it in a fresh process for each measurement, in
alternating order, `--repeats` times; medians. Steps with few tokens are bound by reading, those with many by computing.
Each is timed with the files' pages dropped before the step (cold: as if the model were larger than the memory) and
after a step before it (warm: what a program leaves in the page cache, it reads from there; qexp leaves nothing).

The processes are watched from outside: peaks are of the steps, over the process before it loaded the model. Limit of a
step, for comparison, with the bandwidth of the disk (past the page cache) or of the page cache, measured by turns:

    max(seconds of the resident step, bytes at rest / bandwidth)

Ends with exit code 1 if an output of qexp is not that of the resident model, or its peak memory above what stays
resident + the ring + the activations of the resident step + 128 MiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benching
from bench_load import flux_config
from bench_offload_programs import CACHES, PROGRAMS
from benching import MIB
from make_checkpoint import write_checkpoint

GIB = 1 << 30
ALLOWANCE_BYTES = 128 * MIB
FORMATS = ("dense", "nf4", "int8")


def measure(arguments: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for every format, with the medians of every program and of the disk."""
    print(f"writing {root} …", file=sys.stderr)
    write_checkpoint(root / "large", flux_config(arguments.heads, tuple(arguments.layers)), 1)
    write_checkpoint(root / "small", flux_config(2, (1, 1)), 1)
    for name in arguments.formats:
        runs: dict[str, list[dict[str, Any]]] = {program: [] for program in arguments.programs}
        disk: list[dict[str, Any]] = []
        for program in benching.alternating(arguments.programs, arguments.repeats):
            if not any("refused" in run for run in runs[program]):
                disk.append(bandwidths(root / "large"))
                runs[program].append(_run(program, name, root, arguments))
        row = {
            "format": name,
            "disk": benching.medians(disk),
            **{program: benching.medians(found) for program, found in runs.items()},
        }
        row["limits"] = limits(row, arguments.tokens)
        print(describe(row, arguments.tokens), flush=True)
        yield row


def bandwidths(checkpoint: Path) -> dict[str, float]:
    """Bytes a second of reading the checkpoint: from the disk, by the better of two ways, and from the page cache."""
    files = sorted(checkpoint.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    benching.drop_from_cache(files)
    direct = benching.direct_read_seconds(files)
    buffered = benching.read_seconds(files)
    warm = benching.read_seconds(files)
    benching.drop_from_cache(files)  # the programs need the memory
    return {
        "direct_bytes_per_second": nbytes / direct,
        "buffered_bytes_per_second": nbytes / buffered,
        "cached_bytes_per_second": nbytes / warm,
    }


def _run(program: str, name: str, root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=root) as store:
        script = str(Path(__file__).with_name("bench_offload_programs.py"))
        command = [sys.executable, script, program, name, str(root / "large"), str(root / "small"), store]
        command += ["--steps", str(arguments.steps), "--tokens", *map(str, arguments.tokens)]
        run = benching.run_watched(command)
    for kind in ("anon", "file", "total"):
        run[f"peak_{kind}_bytes"] += run[f"rest_{kind}_bytes"]
    shown = run.get("refused") or f"{run[f'cold_{arguments.tokens[0]}_seconds']:.2f} s"
    print(f"  {program}: {name}: {shown}", file=sys.stderr, flush=True)
    return run


def limits(row: dict[str, Any], tokens: list[int]) -> dict[str, float]:
    """Return seconds that no offloaded step can undercut, by cache and tokens."""
    if any("refused" in row.get(program, {"refused": ""}) for program in ("resident", "qexp leaf")):
        return {}
    disk, nbytes = row["disk"], row["qexp leaf"]["offload/payload_gib"] * GIB
    bandwidth = {
        "cold": max(disk["direct_bytes_per_second"], disk["buffered_bytes_per_second"]),
        "warm": disk["cached_bytes_per_second"],
    }
    return {
        f"{cache}_{count}_seconds": max(row["resident"][f"warm_{count}_seconds"], nbytes / bandwidth[cache])
        for cache in CACHES
        for count in tokens
    }


def describe(row: dict[str, Any], tokens: list[int]) -> str:
    """Return one format's lines: each program's steps, and how they compare with qexp leaf and the limit."""
    rates = " ".join(f"{name.partition('_')[0]} {value / GIB:.2f}" for name, value in row["disk"].items())
    lines = [f"{row['format']}   (GiB/s: {rates})"]
    for program in (program for program in PROGRAMS if program in row):
        run = row[program]
        if "refused" in run:
            lines.append(f"  {program:16} refused: {run['refused'][:90]}")
            continue
        memory = "/".join(f"{run[f'peak_{kind}_bytes'] / MIB:.0f}" for kind in ("anon", "file", "total"))
        lines.append(f"  {program:16} peak anon/file/total {memory} MiB")
        for name in (f"{cache}_{count}_seconds" for count in tokens for cache in CACHES):
            mine, limit = row.get("qexp leaf", {}).get(name), row["limits"].get(name)
            ratios = f"  {run[name] / mine:5.2f}x qexp leaf" if mine else ""
            ratios += f"  {run[name] / limit:5.2f}x limit ({limit:.2f} s)" if limit else ""
            lines.append(f"    {name.removesuffix('_seconds'):12} {run[name]:7.2f} s{ratios}")
    return "\n".join(lines)


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What must hold of qexp and does not."""
    found = []
    for row in rows:
        resident = row.get("resident")
        for program in (name for name in row if name.startswith("qexp")):
            run = row[program]
            if "refused" in run:
                found.append(f"{program}: {row['format']}: {run['refused']}")
                continue
            if resident and run["outputs"] != resident["outputs"]:
                found.append(f"{program}: {row['format']}: the output is not that of the resident model")
            if resident and run["peak_total_bytes"] > _bound(run, resident):
                found.append(f"{program}: {row['format']}: {run['peak_total_bytes'] / MIB:.0f} MiB are above the bound")
    return found


def _bound(run: dict[str, Any], resident: dict[str, Any]) -> float:
    activations = resident["peak_total_bytes"] - resident["rest_total_bytes"]
    return float((run["offload/ring_gib"] + run["offload/resident_gib"]) * GIB + activations + ALLOWANCE_BYTES)


def main() -> None:
    parser = benching.bench_parser(__doc__, "offload.json")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="also options of conf/backend (qexp)")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--heads", type=int, default=16, help="attention heads of 128 channels")
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 4), help="double and single blocks")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="of image, and as many of text")
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a process")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small model, one step of each kind, one repeat")
    parser.add_argument("--folder", help="where to write checkpoint and stores; default: the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.heads, arguments.layers, arguments.steps, arguments.repeats = 2, (1, 1), 1, 1
    about, rows = benching.machine(), list[dict[str, Any]]()
    options = {name: value for name, value in vars(arguments).items() if name not in ("folder", "out")}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for row in measure(arguments, Path(root)):
            rows.append(row)  # what is measured is kept, whatever comes next
            benching.write_result(arguments.out, {"machine": about, "options": options, "rows": rows})
    if found := failures(rows):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
