"""Loading and quantizing transformers: qexp beside diffusers and transformers, and beside what the machine allows.

    python scripts/bench_load.py                                  # three shapes, every format: an hour
    python scripts/bench_load.py --quick                          # fewer blocks, once each: five minutes
    python scripts/bench_load.py --shapes sd3 --formats nf4 --programs qexp
    python scripts/bench_load.py --cases cold shards shards-cold  # read from the disk, from eight files, and both

Writes checkpoints with made weights (FLUX-shaped 3.7 GiB, SD3-shaped 3.0, T5-shaped 2.6), then loads them in a fresh
process for each measurement, in alternating order, `--repeats` times; medians. A process has imported torch, the
model's class, the format's library and what it calls of qexp when the clock starts (import_seconds). Reported
for each format:

    wall_seconds     from the call to the returned model
    touched_seconds  until a byte of every page of its weights has been read
    first_ever       wall_seconds of qexp on a machine that has not loaded before: no loop is compiled, and no mapped
                     file is known to hold finite values
    memory           peaks seen from outside, of what a load adds to a process that has loaded a small checkpoint before

`command` is `python -m qexp` on the embedded digits, from Enter to the result, with its reference known. Limits:

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import benching
from bench_load_programs import FORMATS, STORED
from benching import MIB
from make_checkpoint import write_checkpoint

ALLOWANCE_BYTES = 128 * MIB
PROGRAMS = ("qexp", "diffusers", "convert")
CASES = ("warm", "cold", "shards", "shards-cold")
READ = ("dense", "nf4", *STORED)  # what is measured in every case
LAYERS = {"flux": (3, 6), "sd3": (18,), "t5": (6,)}  # blocks, of each kind
QUICK_LAYERS = {"flux": (0, 2), "sd3": (4,), "t5": (2,)}
COMMAND_BACKENDS = ("bitsandbytes", "quanto")
CONVERTIBLE = ("torchao int8wo", "quanto int8")


def flux_config(heads: int, layers: tuple[int, int]) -> dict[str, Any]:
    """Return the config.json of a FLUX transformer of `heads` × 128 channels and (double, single) blocks."""
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": layers[0],
        "num_single_layers": layers[1], "attention_head_dim": 128, "num_attention_heads": heads,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


def sd3_config(heads: int, layers: tuple[int]) -> dict[str, Any]:
    """Return the config.json of a Stable Diffusion 3 transformer of `heads` × 64 channels."""
    return {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "num_layers": layers[0], "attention_head_dim": 64, "num_attention_heads": heads,
        "joint_attention_dim": 4096, "caption_projection_dim": 64 * heads, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }  # fmt: skip


def t5_config(heads: int, layers: tuple[int]) -> dict[str, Any]:
    """Return the config.json of a T5 encoder as FLUX and SD3 have it, of `heads` × 64 channels."""
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 64 * heads, "d_ff": 160 * heads, "d_kv": 64,
        "num_heads": heads, "num_layers": layers[0], "feed_forward_proj": "gated-gelu", "vocab_size": 32128,
        "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
    }  # fmt: skip


SHAPES: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {  # config.json, and its heads
    "flux": (flux_config, 24),
    "sd3": (sd3_config, 24),
    "t5": (t5_config, 64),
}


def small_config(shape: str) -> dict[str, Any]:
    config, _ = SHAPES[shape]
    return config(2, (1, 1))


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
    """Yield a row for every (shape, case, format), of all programs."""
    for shape in arguments.shapes:
        # how files are read does not depend on the shape
        cases = arguments.cases if shape == arguments.shapes[0] else arguments.cases[:1]
        formats = [name for name in arguments.formats if shape == "flux" or not name.startswith("gguf")]
        small = root / "small"
        write_checkpoint(small, small_config(shape), 1)
        stored = {name: option for name, option in STORED.items() if name in formats}
        for option in stored.values():
            write_stored(small, root / f"small-{option}", option)
        for shards in (1, arguments.shards):
            if own := [case for case in cases if ("shards" in case) == (shards > 1)]:
                yield from measure_cases(arguments, root, shape, own, shards, formats)
        for folder in root.glob("small*"):
            shutil.rmtree(folder)


def measure_cases(
    arguments: argparse.Namespace, root: Path, shape: str, cases: Sequence[str], shards: int, formats: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one checkpoint in so many files."""
    large, (config, heads) = root / f"large-{shards}", SHAPES[shape]
    print(f"writing {shape} in {shards} files …", file=sys.stderr)
    layers = arguments.layers if shape == "flux" and arguments.layers else arguments.layers_of[shape]
    write_checkpoint(large, config(arguments.heads or heads, tuple(layers)), shards)
    for name in (name for name in formats if name in STORED):
        write_stored(large, root / f"large-{shards}-{STORED[name]}", STORED[name])
    for case in cases:
        # everything in the first case; of the others, what reading matters to
        for name in formats if case == arguments.cases[0] else [name for name in formats if name in READ]:
            yield {"shape": shape, **measure_format(arguments, root, case, shards, name)}
    for folder in root.glob("large*"):
        shutil.rmtree(folder)


def measure_format(arguments: argparse.Namespace, root: Path, case: str, shards: int, name: str) -> dict[str, Any]:
    kind, cold = f"-{STORED[name]}" if name in STORED else "", case.endswith("cold")
    large, small = root / f"large-{shards}{kind}", root / f"small{kind}"
    files = sorted(large.glob("*.safetensors")) or sorted(large.glob("*.gguf"))
    options = {"workers": arguments.workers, "slice_weights": arguments.slice_weights}
    programs = [p for p in arguments.programs if p != "convert" or name in CONVERTIBLE]
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    memory = dict[str, dict[str, Any]]()
    for program in programs:  # before the times: compiled loops are in their cache afterwards
        memory[program] = benching.run_watched(load_command(program, name, large, small, warm=True, **options))
    for program in benching.alternating(programs, arguments.repeats):
        _reading(files, cold, read=not cold)
        load = os.getloadavg()[0]
        run = benching.run_watched(load_command(program, name, large, small, **options))
        runs[program].append({**run, "load_average_before": load})
        print(f"  {case}: {name}: {program}: {run['wall_seconds']:.2f} s", file=sys.stderr, flush=True)
    limits = {"read_seconds": _reading(files, cold), "read_bytes": sum(f.stat().st_size for f in files)}
    if name != "dense" and name not in STORED:
        kernels = benching.run_watched(load_command("kernels", name, large, small, **options))
        limits["kernel_cpu_seconds"] = kernels["cpu_seconds"]
    cores = len(os.sched_getaffinity(0))
    kernel_seconds = limits.get("kernel_cpu_seconds", 0) / cores
    limits["pipeline_seconds"] = max(limits["read_seconds"], kernel_seconds)
    row: dict[str, Any] = {"case": case, "format": name, "files": len(files), "limits": limits}
    row |= {program: {**benching.medians(runs[program]), "memory": memory[program]} for program in programs}
    if "qexp" in row:
        if not cold:
            with tempfile.TemporaryDirectory() as empty:
                command = load_command("qexp", name, large, small, **options)
                row["qexp"]["first_ever"] = benching.run_watched(command, QEXP_LOOPS=empty, XDG_CACHE_HOME=empty)
        quantized_bytes = memory["qexp"]["quantized_bytes"]
        written = quantized_bytes / benching.fresh_bytes_per_second()
        copied = benching.read_seconds(files) / cores  # they are in the page cache now
        limits["cores_seconds"] = copied + kernel_seconds + written
        limits["machine_seconds"] = (limits["read_bytes"] + quantized_bytes) / benching.copy_bytes_per_second()
    print(describe(row), flush=True)
    return row


def _reading(files: list[Path], cold: bool, read: bool = True) -> float:
    """Time to read the files, from the disk if `cold`; they are in the page cache then, or with read=False are not."""
    if cold:
        benching.drop_from_cache(files)
    elif read:
        benching.read_seconds(files)
    return benching.read_seconds(files) if read else 0.0


def load_command(
    program: str, name: str, large: Path, small: Path, *, warm: bool = False, **options: int | None
) -> list[str]:
    """Return a program of `bench_load_programs.py`. options: by their names there; None is left out."""
    script = str(Path(__file__).with_name("bench_load_programs.py"))
    command = [sys.executable, script, program, name, str(large), str(small)]
    command += ["--warm"] if warm else []
    for option, value in options.items():
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    return command


def describe(row: dict[str, Any]) -> str:
    """Return one format's lines: each program's numbers, and qexp's ratios."""
    lines, mine = [f"{row['format']} ({row['case']}, {row['files']} files)"], row.get("qexp")
    if mine and "first_ever" in mine:
        lines[0] += f"; first ever {mine['first_ever']['wall_seconds']:.2f} s"
    for program in (program for program in PROGRAMS if program in row):
        run = row[program]
        ratio = f"  {run['wall_seconds'] / mine['wall_seconds']:5.1f}x" if mine and program != "qexp" else ""
        memory = "/".join(f"{run['memory'][f'peak_{kind}_bytes'] / MIB:.0f}" for kind in ("anon", "file", "total"))
        lines.append(
            f"  {program:10} {run['wall_seconds']:7.2f} s wall {run['touched_seconds']:7.2f} s touched "
            f"{run['cpu_seconds']:7.2f} s CPU  imports {run['import_seconds']:.1f} s  peak "
            f"anon/file/total {memory} MiB  {run['minor_faults']:.0f} faults{ratio}"
        )
    if mine:
        held = mine["memory"]
        lines.append(f"  quantized {held['quantized_bytes'] / MIB:.0f} MiB, bound {_bound(held) / MIB:.0f} MiB")
        parts = ", ".join(f"{part} {held[f'{part}_seconds']:.2f} s" for part in ("plan", "warm_up", "read"))
        lines.append(f"  of a load in a process that has loaded before: {parts}")
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


def measure_command(root: Path) -> dict[str, Any]:
    """Return wall and CPU seconds of `python -m qexp`, from Enter to the result, by backend; the reference is there."""
    outputs, found = root / "outputs", dict[str, Any]()
    for backend in ("none", *COMMAND_BACKENDS):  # the first one computes the reference
        settings = [f"backend={backend}", "seed=1", f"paths.outputs={outputs}"]
        found[backend] = benching.timed([sys.executable, "-m", "qexp", *settings], root / f"{backend}.log")
    del found["none"]
    return found


def main() -> None:
    parser = benching.bench_parser(__doc__, "load.json")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="also options of conf/backend (qexp)")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="the first has every case")
    parser.add_argument("--heads", type=int, help="attention heads; default: those of the shape")
    parser.add_argument("--layers", type=int, nargs=2, help="of flux: double and single blocks")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="the first has every format")
    parser.add_argument("--shards", type=int, default=8, help="files of a case with shards")
    parser.add_argument("--quick", action="store_true", help="fewer blocks, one repeat, the first case")
    parser.add_argument("--no-command", action="store_true", help="without `python -m qexp`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of qexp's loader; default: one a core")
    parser.add_argument("--slice-weights", type=int, help="weights that qexp gives a kernel at a time")
    parser.add_argument("--folder", help="where to write the checkpoint; default: the system's temporary folder")
    arguments = parser.parse_args()
    arguments.layers_of = QUICK_LAYERS if arguments.quick else LAYERS
    if arguments.quick:
        arguments.repeats, arguments.cases = 1, arguments.cases[:1]
    about, rows = benching.machine(), list[dict[str, Any]]()
    options = {name: value for name, value in vars(arguments).items() if name not in ("folder", "out")}
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for row in measure(arguments, Path(root)):
            rows.append(row)  # what is measured is kept, whatever comes next
            benching.write_result(arguments.out, {"machine": about, "options": options, "rows": rows})
        if not arguments.no_command:
            command = measure_command(Path(root))
            benching.write_result(
                arguments.out, {"machine": about, "options": options, "rows": rows, "command": command}
            )
    held = [row["qexp"]["memory"] for row in rows if "qexp" in row]
    if any(run["peak_total_bytes"] > _bound(run) for run in held):
        raise SystemExit("qexp's peak memory is above its bound")


if __name__ == "__main__":
    main()
