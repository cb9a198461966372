"""The programs that `bench_offload.py` compares, each run in a process of its own:

    python scripts/bench_offload_programs.py PROGRAM FORMAT CHECKPOINT SMALL_CHECKPOINT STORE

resident         all weights in memory: what a step costs without offloading
qexp leaf        offload=leaf offload.to=disk; `qexp block`: offload=block
diffusers leaf   `apply_group_offloading(offload_type="leaf_level", offload_to_disk_path=…)`; block: block_level
accelerate       `accelerate.disk_offload`

Each loads and runs the small checkpoint first, so that libraries are imported and threads are running, then the large
one, offloads it, and runs one step, in which orders are traced. Then steps are timed, with the files' pages dropped
from the page cache before each one (cold), and left as they are (warm).
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_load_programs import load_with_diffusers, load_with_qexp
from benching import drop_from_cache, resident_bytes, serve, wait_for_start
from torch import Tensor, nn

BF16, CPU = torch.bfloat16, torch.device("cpu")
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
PROGRAMS = ("resident", "qexp leaf", "qexp block", "diffusers leaf", "diffusers block", "accelerate")
CACHES = ("cold", "warm")


def load(program: str, checkpoint: Path, name: str) -> nn.Module:
    """Return a FLUX-shaped model; by diffusers itself for the other programs, whose hooks expect its models."""
    if program.startswith(("diffusers", "accelerate")):
        model = load_with_diffusers(checkpoint, name)
    else:
        model = load_with_qexp(checkpoint, name).model
    return model.eval().requires_grad_(False)


def offload(program: str, model: nn.Module, store: Path) -> dict[str, float]:
    """Offload a model to a folder; returns what the program knows about it."""
    program, _, level = program.partition(" ")
    if program == "qexp":
        from qexp.config.offload import OffloadConfig
        from qexp.offloading.strategies import apply_offload

        config = OffloadConfig(level, "disk").resolved("cpu")
        return apply_offload(model, config, device=CPU, block_lists=BLOCK_LISTS, store=store).statistics()
    if program == "diffusers":
        from diffusers.hooks import apply_group_offloading

        blocks = 1 if level == "block" else None
        apply_group_offloading(
            model, CPU, CPU, offload_type=f"{level}_level", num_blocks_per_group=blocks, offload_to_disk_path=str(store)
        )
    elif program == "accelerate":
        from accelerate import disk_offload

        disk_offload(model, str(store), execution_device=CPU)
    return {}


def inputs(tokens: int) -> dict[str, Tensor]:
    """Return one image of so many latent tokens, and as many of text."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return {
        "hidden_states": random(1, tokens, 64).to(BF16),
        "encoder_hidden_states": random(1, tokens, 4096).to(BF16),
        "pooled_projections": random(1, 768).to(BF16),
        "timestep": torch.tensor([0.5], dtype=BF16),
        "guidance": torch.tensor([3.5], dtype=BF16),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(tokens, 3),
    }


def step(model: nn.Module, tokens: int) -> str:
    """Return one forward; the SHA-256 of its output."""
    with torch.no_grad():
        output = model(**inputs(tokens), return_dict=False)[0]
    return hashlib.sha256(output.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def measure(model: nn.Module, store: Path, tokens: list[int], steps: int) -> dict[str, Any]:
    """Median step seconds by tokens and cache, and the outputs."""
    result: dict[str, Any] = {"outputs": [step(model, count) for count in tokens]}
    for count in tokens:
        for cache in CACHES:
            wall, cpu = [], []
            if cache == "warm":
                step(model, count)
            for _ in range(steps):
                if cache == "cold":
                    drop_from_cache(file for file in store.rglob("*") if file.is_file())
                started, started_cpu = time.perf_counter(), time.process_time()
                step(model, count)
                wall.append(time.perf_counter() - started)
                cpu.append(time.process_time() - started_cpu)
            result[f"{cache}_{count}_seconds"] = statistics.median(wall)
            result[f"{cache}_{count}_cpu_seconds"] = statistics.median(cpu)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("format")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    work: Callable[[], dict[str, Any]]
    step(load(arguments.program, arguments.small, arguments.format), arguments.tokens[0])
    before = resident_bytes()
    try:
        model = load(arguments.program, arguments.checkpoint, arguments.format)
        known = offload(arguments.program, model, arguments.store)
        step(model, arguments.tokens[0])
    except Exception as error:  # a combination that the program refuses, or fails on
        refusal = f"{type(error).__name__}: {error}".partition("\n")[0]

        def work() -> dict[str, Any]:
            return {"refused": refusal}
    else:

        def work() -> dict[str, Any]:
            return measure(model, arguments.store, arguments.tokens, arguments.steps) | known

    rest = {f"rest_{kind}_bytes": now - before[kind] for kind, now in resident_bytes().items()}
    wait_for_start()
    serve(work() | rest)


if __name__ == "__main__":
    main()
