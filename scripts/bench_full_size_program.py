"""What `bench_full_size.py` measures, in a process of its own:

    python scripts/bench_full_size_program.py FORMAT CHECKPOINT SMALL_CHECKPOINT

Loads with `qexp.load` and runs one forward, both first with the small checkpoint of the same class, so that libraries
are imported and threads are running when the clock starts. Says "loaded" between the two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benching import Stopwatch, phase, serve, wait_for_start
from torch import Tensor, nn

import qexp

BACKENDS: dict[str, Any] = {  # name in the table -> what qexp.load takes
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes_int8",
    "gguf Q4_0": "gguf_q4_0",
    "torchao int4wo": {"quant_method": "torchao", "quant_type": "int4wo", "group_size": 64},  # x_embedder has 64 inputs
}


def flux_forward(model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype, image: int, text: int) -> Tensor:
    """Return the velocity of one step: [1, image, in_channels]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    answer: Tensor = model(
        hidden_states=normal(1, image, config["in_channels"]),
        encoder_hidden_states=normal(1, text, config["joint_attention_dim"]),
        pooled_projections=normal(1, config["pooled_projection_dim"]),
        timestep=torch.tensor([0.5], dtype=dtype),
        img_ids=torch.stack([torch.zeros(image), torch.arange(image) // 16, torch.arange(image) % 16], dim=1),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.tensor([3.5], dtype=dtype),
        return_dict=False,
    )[0]
    return answer


def text_forward(model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype, image: int, text: int) -> Tensor:
    """Return the last hidden state of `text` tokens: [1, text, width]."""
    return model(torch.arange(2, text + 2)[None] % config["vocab_size"])[0]


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "FluxTransformer2DModel": flux_forward,
    "T5EncoderModel": text_forward,
    "UMT5EncoderModel": text_forward,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=BACKENDS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=64)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.compute_dtype)

    def load(folder: Path) -> nn.Module:
        return qexp.load(folder, BACKENDS[arguments.format], device="cpu", compute_dtype=arguments.compute_dtype)

    def forward(model: nn.Module, folder: Path) -> Tensor:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        run = FORWARDS[config.get("_class_name") or config["architectures"][0]]
        with torch.no_grad():
            return run(model, config, dtype, arguments.image_tokens, arguments.text_tokens)

    forward(load(arguments.small), arguments.small)
    wait_for_start()
    with Stopwatch() as loading:
        model = load(arguments.checkpoint)
    phase("loaded")
    with Stopwatch() as running:
        answer = forward(model, arguments.checkpoint)
    serve(
        {
            "load_seconds": loading.taken[0],
            "load_cpu_seconds": loading.taken[1],
            "forward_seconds": running.taken[0],
            "forward_cpu_seconds": running.taken[1],
            "weights_bytes": qexp.memory_footprint(model),
            "finite": bool(torch.isfinite(answer).all()),
            "answer_std": answer.float().std().item(),
        }
    )


if __name__ == "__main__":
    main()
