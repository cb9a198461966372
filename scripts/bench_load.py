"""Peak memory and time of loading a synthetic checkpoint, watched from outside the loading process.

    python scripts/bench_load.py                                 # 2 GiB of bf16 linear layers to nf4
    python scripts/bench_load.py --backend torchao --gib 1

Writes a checkpoint of linear layers of 32, 64 and 128 MiB, loads it in a fresh process, and samples that process's
resident memory (anonymous and file pages) every millisecond. The baseline is taken after imports and the load of a
small checkpoint, as a warm-up. Bound: quantized bytes + largest dense tensor + 128 MiB. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

MIB = 1 << 20
SHAPES = {32: (4096, 4096), 64: (4096, 8192), 128: (8192, 8192)}  # MiB in bf16 -> [out, in]
ALLOWANCE_BYTES = 128 * MIB


class Stack(nn.Module):
    """Linear layers that are loaded, never run."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)


class StackSource:
    """The model source of a `Stack` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self) -> dict[str, Path]:
        return {"stack": self.folder}

    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        return Stack([tuple(shape) for shape in config["shapes"]])


def write_checkpoint(folder: Path, shapes: list[tuple[int, int]]) -> None:
    """One shard a layer, so that writing needs one layer's memory."""
    folder.mkdir(parents=True)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, shape in enumerate(shapes):
        name, shard = f"layers.{number}.weight", f"model-{number + 1:05}-of-{len(shapes):05}.safetensors"
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        save_file({name: weight}, folder / shard, {"format": "pt"})
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"shapes": shapes}))


def shapes_of(total_mib: int) -> list[tuple[int, int]]:
    """Layers of 32, 64 and 128 MiB in turn, `total_mib` in all."""
    sizes: list[int] = []
    left = total_mib
    while left >= 32:
        size = next(s for s in (128, 64, 32) if s <= left and (s <= 32 or sizes[-1:] != [s]))
        sizes.append(size)
        left -= size
    return [SHAPES[size] for size in sizes]


def compose_backend(name: str, overrides: list[str]) -> Any:
    """The backend config that `python -m qexp backend=<name> backend.<override> …` would use."""
    from hydra import compose, initialize_config_dir

    from qexp.config import to_run_config
    from qexp.options import conf_folder
    from qexp.schema import register_schemas

    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", ["device=cpu", f"backend={name}", *(f"backend.{field}" for field in overrides)])
    return to_run_config(config).components["transformer"].backend


def load(folder: Path, backend: str, overrides: list[str], slice_weights: int | None) -> Any:
    from qexp.loading.lifecycle import load_component
    from qexp.quantizers import base
    from qexp.settings import ComponentConfig, LoaderConfig

    if slice_weights is not None:
        base.SLICE_WEIGHTS["cpu"] = slice_weights
    settings = ComponentConfig(compose_backend(backend, overrides))
    source: Any = StackSource(folder)
    return load_component(source, "stack", settings, device=torch.device("cpu"), loader=LoaderConfig())


def child(arguments: argparse.Namespace) -> None:
    """The process that is watched: warm up, wait for the start, load, report."""
    options = (arguments.backend, arguments.overrides, arguments.slice_weights)
    load(Path(arguments.child) / "small", *options)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    loaded = load(Path(arguments.child) / "large", *options)
    seconds = time.perf_counter() - started
    plan = loaded.plan.to_container()
    print(
        json.dumps({"seconds": seconds, "quantized_bytes": plan["result_bytes"], "dense_bytes": plan["dense_bytes"]}),
        flush=True,
    )
    sys.stdin.readline()


class Sampler(threading.Thread):
    """Peak anonymous, file and total resident bytes of another process."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.statm, self.page = Path(f"/proc/{pid}/statm"), os.sysconf("SC_PAGE_SIZE")
        self.peak = {"anon": 0, "file": 0, "total": 0}
        self.done = threading.Event()

    def sample(self) -> dict[str, int]:
        _, resident, shared, *_ = (int(field) * self.page for field in self.statm.read_text().split())
        return {"anon": resident - shared, "file": shared, "total": resident}

    def run(self) -> None:
        while not self.done.is_set():
            now = self.sample()
            self.peak = {kind: max(self.peak[kind], now[kind]) for kind in now}
            time.sleep(0.001)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    shapes = shapes_of(int(arguments.gib * 1024))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(f"writing {arguments.gib} GiB below {folder} …", file=sys.stderr)
        write_checkpoint(Path(folder, "large"), shapes)
        write_checkpoint(Path(folder, "small"), [(256, 256), (256, 256)])
        command = [sys.executable, __file__, "--child", folder, "--backend", arguments.backend, *arguments.overrides]
        if arguments.slice_weights is not None:
            command += ["--slice-weights", str(arguments.slice_weights)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit("the loading process failed before it was ready")
        sampler = Sampler(process.pid)
        baseline = sampler.sample()
        sampler.start()
        print(file=process.stdin, flush=True)
        line = process.stdout.readline()
        sampler.done.set()
        sampler.join()
        process.communicate("\n")
        if not line:
            raise SystemExit("the loading process failed")
    result = json.loads(line)
    largest = max(rows * columns * 2 for rows, columns in shapes)
    return {
        "backend": arguments.backend,
        **result,
        "largest_dense_bytes": largest,
        "baseline_bytes": baseline["total"],
        **{f"peak_{kind}_bytes": sampler.peak[kind] - baseline[kind] for kind in baseline},
        "bound_bytes": result["quantized_bytes"] + largest + ALLOWANCE_BYTES,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "bitsandbytes", "torchao", "optimum-quanto")},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="backend fields, e.g. quant_type=float8wo")
    parser.add_argument("--backend", default="bitsandbytes", help="a file of conf/backend")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--folder", help="where to write it; default: the system's temporary folder")
    parser.add_argument("--slice-weights", type=int, help="weights a library kernel is given at a time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    result = measure(arguments)
    for name in ("quantized", "largest_dense", "peak_anon", "peak_file", "peak_total", "bound"):
        print(f"{name:>14} {result[name + '_bytes'] / MIB:9.1f} MiB")
    print(f"{'seconds':>14} {result['seconds']:9.1f}")
    print(json.dumps(result))
    if result["peak_total_bytes"] > result["bound_bytes"]:
        raise SystemExit("peak memory is above the bound")


if __name__ == "__main__":
    main()
