"""Loading and quantizing a FLUX-shaped transformer: qexp beside diffusers, and beside what the machine allows.

    python scripts/bench_load.py                                  # 1.9 B parameters, every format: a quarter of an hour
    python scripts/bench_load.py --quick                          # 0.5 B, once each: three minutes
    python scripts/bench_load.py --formats nf4 --programs qexp    # one of them
    python scripts/bench_load.py --cases cold shards shards-cold  # read from the disk, from eight files, and both

Writes a checkpoint with made weights (3.7 GiB), then loads it in a fresh process for each measurement, in alternating
order, `--repeats` times; medians. The processes are watched from outside: peaks are what loading adds to a process that
has imported its libraries and loaded a small checkpoint before. Limits, for comparison:

    pipeline   max(time to read the files, CPU time of the quantizing alone / cores)
    cores      what the cores must do however it is arranged: (copying the files from the page cache + quantizing) /
               cores + writing the quantized bytes into fresh memory
    machine    bytes read and written / the measured bandwidth of copying memory
    memory     quantized bytes + the largest dense tensor

Ends with exit code 1 if qexp's peak memory is above the last one + 128 MiB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_load_programs import FORMATS, STORED
from benching import (
    MIB,
    copy_bytes_per_second,
    drop_from_cache,
    fresh_bytes_per_second,
    machine,
    medians,
    read_seconds,
    run_watched,
    write_result,
)
from make_checkpoint import write_checkpoint

ALLOWANCE_BYTES = 128 * MIB
PROGRAMS = ("qexp", "diffusers", "convert")
CASES = ("warm", "cold", "shards", "shards-cold")
READ = ("dense", "nf4", *STORED)  # what is measured in every case
CONVERTIBLE = ("torchao int8wo", "quanto int8")
RESULT = Path(__file__).parents[1] / "docs" / "bench" / "load.json"


def flux_config(heads: int, layers: tuple[int, int]) -> dict[str, Any]:
    """Return the config.json of a FLUX transformer of `heads` × 128 channels and (double, single) blocks."""
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": layers[0],
        "num_single_layers": layers[1], "attention_head_dim": 128, "num_attention_heads": heads,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


def write_stored(source: Path, target: Path, option: str) -> None:
    """The quantized checkpoint that reloads are measured with, made by qexp."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from bench_load_programs import *;"
        "from qexp.loading.saving import save_model;"
        "save_model(load_with_qexp(Path(sys.argv[2]), sys.argv[4]).model, Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(source), str(target), option]
    subprocess.run(command, check=True)


def measure(arguments: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for every (case, format), of all programs."""
    small = root / "small"
    write_checkpoint(small, flux_config(2, (1, 1)), 1)
    stored = {name: option for name, option in STORED.items() if name in arguments.formats}
    for option in stored.values():
        write_stored(small, root / f"small-{option}", option)
    for shards in (1, arguments.shards):
        cases = [case for case in arguments.cases if ("shards" in case) == (shards > 1)]
        if not cases:
            continue
        large = root / f"large-{shards}"
        print(f"writing {large} …", file=sys.stderr)
        write_checkpoint(large, flux_config(arguments.heads, tuple(arguments.layers)), shards)
        for option in stored.values():
            write_stored(large, root / f"large-{shards}-{option}", option)
        for case in cases:
            # everything in the first case; of the others, what reading matters to
            formats = arguments.formats if case == arguments.cases[0] else [n for n in arguments.formats if n in READ]
            for name in formats:
                yield measure_format(arguments, root, case, shards, name)
        for folder in root.glob("large*"):
            shutil.rmtree(folder)


def measure_format(arguments: argparse.Namespace, root: Path, case: str, shards: int, name: str) -> dict[str, Any]:
    kind, cold = f"-{STORED[name]}" if name in STORED else "", case.endswith("cold")
    large, small = root / f"large-{shards}{kind}", root / f"small{kind}"
    files = sorted(large.glob("*.safetensors")) or sorted(large.glob("*.gguf"))
    options = {"workers": arguments.workers, "slice_weights": arguments.slice_weights}
    programs = [p for p in arguments.programs if p != "convert" or name in CONVERTIBLE]
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for repeat in range(arguments.repeats):
        for program in programs if repeat % 2 == 0 else reversed(programs):
            _reading(files, cold, read=not cold)
            runs[program].append(run_watched(load_command(program, name, large, small, **options)))
            seconds = runs[program][-1]["wall_seconds"]
            print(f"  {case}: {name}: {program}: {seconds:.2f} s", file=sys.stderr, flush=True)
    limits = {"read_seconds": _reading(files, cold), "read_bytes": sum(f.stat().st_size for f in files)}
    if name != "dense" and name not in STORED:
        kernels = run_watched(load_command("kernels", name, large, small, **options))
        limits["kernel_cpu_seconds"] = kernels["cpu_seconds"]
    cores = len(os.sched_getaffinity(0))
    kernel_seconds = limits.get("kernel_cpu_seconds", 0) / cores
    limits["pipeline_seconds"] = max(limits["read_seconds"], kernel_seconds)
    row: dict[str, Any] = {"case": case, "format": name, "files": len(files), "limits": limits}
    row |= {program: medians(runs[program]) for program in programs}
    if "qexp" in row:
        written = row["qexp"]["quantized_bytes"] / fresh_bytes_per_second()
        copied = read_seconds(files) / cores  # they are in the page cache now
        limits["cores_seconds"] = copied + kernel_seconds + written
        limits["machine_seconds"] = (limits["read_bytes"] + row["qexp"]["quantized_bytes"]) / copy_bytes_per_second()
    print(describe(row), flush=True)
    return row


def _reading(files: list[Path], cold: bool, read: bool = True) -> float:
    """Time to read the files, from the disk if `cold`; they are in the page cache then, or with read=False are not."""
    if cold:
        drop_from_cache(files)
    elif read:
        read_seconds(files)
    return read_seconds(files) if read else 0.0


def load_command(program: str, name: str, large: Path, small: Path, **options: int | None) -> list[str]:
    """Return a program of `bench_load_programs.py`. options: by their names there; None is left out."""
    script = str(Path(__file__).with_name("bench_load_programs.py"))
    command = [sys.executable, script, program, name, str(large), str(small)]
    for option, value in options.items():
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    return command


def describe(row: dict[str, Any]) -> str:
    """Return one format's lines: each program's numbers, and qexp's ratios."""
    lines, mine = [f"{row['format']} ({row['case']}, {row['files']} files)"], row.get("qexp")
    for program in (program for program in PROGRAMS if program in row):
        run = row[program]
        ratio = f"  {run['wall_seconds'] / mine['wall_seconds']:5.1f}x" if mine and program != "qexp" else ""
        memory = "/".join(f"{run[f'peak_{kind}_bytes'] / MIB:.0f}" for kind in ("anon", "file", "total"))
        lines.append(
            f"  {program:10} {run['wall_seconds']:7.2f} s wall {run['cpu_seconds']:7.2f} s CPU  peak "
            f"anon/file/total {memory} MiB  {run['minor_faults']:.0f} faults{ratio}"
        )
    if mine:
        lines.append(f"  quantized {mine['quantized_bytes'] / MIB:.0f} MiB, bound {_bound(mine) / MIB:.0f} MiB")
    limits = row["limits"]
    shown = [f"reading alone {limits['read_seconds']:.2f} s"]
    for limit in ("pipeline", "cores", "machine"):
        if mine is None:
            break
        seconds = limits[f"{limit}_seconds"]
        shown.append(f"limit of the {limit} {seconds:.2f} s, {mine['wall_seconds'] / seconds:.2f} times that")
    lines.append(f"  {'; '.join(shown)}")
    return "\n".join(lines)


def _bound(run: dict[str, Any]) -> float:
    return float(run["quantized_bytes"] + run["largest_dense_bytes"] + ALLOWANCE_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="also options of conf/backend (qexp)")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 channels")
    parser.add_argument("--layers", type=int, nargs=2, default=(3, 6), help="double and single blocks")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="the first has every format")
    parser.add_argument("--shards", type=int, default=8, help="files of a case with shards")
    parser.add_argument("--quick", action="store_true", help="0.5 B parameters, one repeat, the first case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of qexp's loader; default: one a core")
    parser.add_argument("--slice-weights", type=int, help="weights that qexp gives a kernel at a time")
    parser.add_argument("--folder", help="where to write the checkpoint; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.repeats, arguments.cases = [0, 2], 1, arguments.cases[:1]
    about, rows = machine(), list[dict[str, Any]]()
    options = {name: value for name, value in vars(arguments).items() if name not in ("folder", "out")}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for row in measure(arguments, Path(root)):
            rows.append(row)  # what is measured is kept, whatever comes next
            write_result(arguments.out, {"machine": about, "options": options, "rows": rows})
    if any(row["qexp"]["peak_total_bytes"] > _bound(row["qexp"]) for row in rows if "qexp" in row):
        raise SystemExit("qexp's peak memory is above its bound")


if __name__ == "__main__":
    main()
