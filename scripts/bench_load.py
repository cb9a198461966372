"""Loading and quantizing a FLUX-shaped transformer: qexp beside diffusers, and beside what the machine allows.

    python scripts/bench_load.py                                  # 1.9 B parameters, every format: half an hour
    python scripts/bench_load.py --formats nf4 --programs qexp    # one of them
    python scripts/bench_load.py --shards 8 --cold                # eight files, read from the disk

Writes a checkpoint with made weights (3.7 GiB), then loads it in a fresh process for each measurement, in alternating
order, `--repeats` times; medians. The processes are watched from outside: peaks are what loading adds to a process that
has imported its libraries and loaded a small checkpoint before. Limits, for comparison:

    pipeline   max(time to read the files, CPU time of the quantizing alone / cores)
    machine    bytes read and written / the measured bandwidth of copying memory
    memory     quantized bytes + the largest dense tensor

Ends with exit code 1 if qexp's peak memory is above the last one + 128 MiB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_load_programs import FORMATS
from benching import (
    MIB,
    copy_bytes_per_second,
    drop_from_cache,
    machine,
    medians,
    read_seconds,
    run_watched,
    write_result,
)
from make_checkpoint import write_checkpoint

ALLOWANCE_BYTES = 128 * MIB
PROGRAMS = ("qexp", "diffusers", "convert")
CONVERTIBLE = ("torchao int8wo", "quanto int8")
RESULT = Path(__file__).parents[1] / "docs" / "bench" / "load.json"


def flux_config(heads: int, layers: tuple[int, int]) -> dict[str, Any]:
    """The config.json of a FLUX transformer of `heads` × 128 channels and (double, single) blocks."""
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": layers[0],
        "num_single_layers": layers[1], "attention_head_dim": 128, "num_attention_heads": heads,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


def write_stored(source: Path, target: Path) -> None:
    """The nf4 checkpoint that reloads are measured with, made by qexp."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from bench_load_programs import *;"
        "from qexp.loading.saving import save_model;"
        "save_model(load_with_qexp(Path(sys.argv[2]), 'nf4').model, Path(sys.argv[3]))"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(source), str(target)], check=True)


def measure(arguments: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """A row for every (format, program), and for every format one of the quantizing alone."""
    folders = {"dense": (root / "large", root / "small")}
    print(f"writing {root} …", file=sys.stderr)
    write_checkpoint(root / "large", flux_config(arguments.heads, tuple(arguments.layers)), arguments.shards)
    write_checkpoint(root / "small", flux_config(2, (1, 1)), 1)
    if any("stored" in name for name in arguments.formats):
        for kind in ("large", "small"):
            write_stored(root / kind, root / f"{kind}-stored")
        folders["stored"] = (root / "large-stored", root / "small-stored")
    rows = []
    for name in arguments.formats:
        large, small = folders["stored" if "stored" in name else "dense"]
        programs = [p for p in arguments.programs if p != "convert" or name in CONVERTIBLE]
        runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
        for repeat in range(arguments.repeats):
            for program in programs if repeat % 2 == 0 else reversed(programs):
                runs[program].append(_run(program, name, large, small, arguments))
        files = sorted(large.glob("*.safetensors"))
        limits = {"read_seconds": _reading(files, arguments.cold), "read_bytes": sum(f.stat().st_size for f in files)}
        if name not in ("dense", "nf4, stored"):
            kernels = run_watched(_command("kernels", name, large, small, arguments))
            limits["kernel_cpu_seconds"] = kernels["cpu_seconds"]
        cores = len(os.sched_getaffinity(0))
        limits["pipeline_seconds"] = max(limits["read_seconds"], limits.get("kernel_cpu_seconds", 0) / cores)
        rows.append({"format": name, "limits": limits, **{program: medians(runs[program]) for program in programs}})
        print(describe(rows[-1]), flush=True)
    return rows


def _run(program: str, name: str, large: Path, small: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    files = sorted(large.glob("*.safetensors"))
    if arguments.cold:
        drop_from_cache(files)
    else:
        read_seconds(files)
    result = run_watched(_command(program, name, large, small, arguments))
    print(f"  {program}: {name}: {result['wall_seconds']:.1f} s", file=sys.stderr, flush=True)
    return result


def _reading(files: list[Path], cold: bool) -> float:
    if cold:
        drop_from_cache(files)
    return read_seconds(files)


def _command(program: str, name: str, large: Path, small: Path, arguments: argparse.Namespace) -> list[str]:
    script = str(Path(__file__).with_name("bench_load_programs.py"))
    command = [sys.executable, script, program, name, str(large), str(small)]
    for option in ("workers", "slice_weights"):
        if getattr(arguments, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    return command


def describe(row: dict[str, Any]) -> str:
    """One format's lines: each program's numbers, and qexp's ratios."""
    lines, mine = [f"{row['format']}"], row.get("qexp")
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
    lines.append(f"  reading alone {limits['read_seconds']:.2f} s, pipeline's limit {limits['pipeline_seconds']:.2f} s")
    return "\n".join(lines)


def _bound(run: dict[str, Any]) -> float:
    return float(run["quantized_bytes"] + run["largest_dense_bytes"] + ALLOWANCE_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="also options of conf/backend (qexp)")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 channels")
    parser.add_argument("--layers", type=int, nargs=2, default=(3, 6), help="double and single blocks")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of qexp's loader; default: one a core")
    parser.add_argument("--slice-weights", type=int, help="weights that qexp gives a kernel at a time")
    parser.add_argument("--folder", help="where to write the checkpoint; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        rows = measure(arguments, Path(root))
    options = {name: value for name, value in vars(arguments).items() if name not in ("folder", "out")}
    bandwidth = copy_bytes_per_second()
    write_result(
        arguments.out, {"machine": about, "options": options, "copy_bytes_per_second": bandwidth, "rows": rows}
    )
    if any(row["qexp"]["peak_total_bytes"] > _bound(row["qexp"]) for row in rows if "qexp" in row):
        raise SystemExit("qexp's peak memory is above its bound")


if __name__ == "__main__":
    main()
