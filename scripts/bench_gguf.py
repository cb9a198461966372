"""A forward pass of one FLUX-sized linear layer in GGUF blocks: qexp beside diffusers.

    python scripts/bench_gguf.py            # Q4_0, Q8_0, Q4_K, Q6_K; 1, 64 and 1024 tokens: about four minutes
    python scripts/bench_gguf.py --quick    # one token, one repeat: a minute

3072 inputs, 12288 outputs, bf16, every core. A fresh process for each measurement, in alternating order; a process
takes the median of its passes, the table the median of the processes. Blocks are random bytes with scales of a sane
size. What decoding and multiplying take apart is reported as well: `decode_seconds` is the whole weight, to bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benching import alternating, bench_parser, machine, medians, run_watched, serve, wait_for_start, write_result
from torch import Tensor, nn

SHAPE = (12288, 3072)
PROGRAMS = ("qexp", "diffusers")
TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
HALVES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # where a block has numbers in fp16


def blocks(name: str) -> Tensor:
    """uint8 [12288, bytes of a row]."""
    from qexp.checkpoints.gguf_types import TYPES as SIZES

    kind, generator = SIZES[name], torch.Generator().manual_seed(0)
    count = SHAPE[0] * SHAPE[1] // kind.block
    raw = torch.randint(0, 256, (count, kind.block_bytes), dtype=torch.uint8, generator=generator)
    for place in HALVES.get(name, ()):
        raw[:, place : place + 2] = torch.full((count, 1), 1e-3, dtype=torch.float16).view(torch.uint8)
    return raw.view(SHAPE[0], -1)


def qexp_layer(name: str, raw: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False, device="meta")
    weight = GGUFTensor(raw, name, torch.bfloat16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer, lambda: weight.dequantize(torch.bfloat16)


def diffusers_layer(name: str, raw: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    layer = GGUFLinear(SHAPE[1], SHAPE[0], compute_dtype=torch.bfloat16, device="meta")
    weight = GGUFParameter(raw, quant_type=getattr(gguf.GGMLQuantizationType, name))
    layer.weight = weight
    return layer, lambda: dequantize_gguf_tensor(weight).to(torch.bfloat16)


def seconds(work: Callable[[], Any], least: int = 5, budget: float = 3.0) -> float:
    """Return the median of as many runs as fit into `budget` seconds, of `least` at the least."""
    taken, end = list[float](), time.perf_counter() + budget
    while len(taken) < least or (time.perf_counter() < end and len(taken) < 50):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measured(program: str, name: str, tokens: int) -> None:
    """One process of the benchmark."""
    make = qexp_layer if program == "qexp" else diffusers_layer
    with torch.no_grad():
        layer, decode = make(name, blocks(name))
        inputs = torch.randn(tokens, SHAPE[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        dense = decode()
        layer(inputs)
        wait_for_start()
        result = {"forward_seconds": seconds(lambda: layer(inputs)), "decode_seconds": seconds(decode)}
        result["multiply_seconds"] = seconds(lambda: nn.functional.linear(inputs, dense))
    serve(result)


def main() -> None:
    parser = bench_parser(__doc__, "gguf.json")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one token, one repeat")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        measured(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    if arguments.quick:
        arguments.tokens, arguments.repeats = [1], 1
    about, rows = machine(), list[dict[str, Any]]()
    for name in arguments.types:
        for tokens in arguments.tokens:
            runs: dict[str, list[dict[str, Any]]] = {program: [] for program in PROGRAMS}
            for program in alternating(PROGRAMS, arguments.repeats):
                command = [sys.executable, __file__, "--child", program, name, str(tokens)]
                runs[program].append(run_watched(command))
            rows.append({"type": name, "tokens": tokens} | {program: medians(runs[program]) for program in PROGRAMS})
            print(describe(rows[-1]), flush=True)
    write_result(arguments.out, {"machine": about, "shape": SHAPE, "repeats": arguments.repeats, "rows": rows})


def describe(row: dict[str, Any]) -> str:
    mine, theirs = row["qexp"], row["diffusers"]
    parts = (f"{part} {1e3 * mine[f'{part}_seconds']:.1f} / {1e3 * theirs[f'{part}_seconds']:.1f} ms" for part in PARTS)
    ratio = theirs["forward_seconds"] / mine["forward_seconds"]
    return f"{row['type']} {row['tokens']:5} tokens, qexp / diffusers: {', '.join(parts)}; {ratio:.2f}x"


PARTS = ("forward", "decode", "multiply")


if __name__ == "__main__":
    main()
