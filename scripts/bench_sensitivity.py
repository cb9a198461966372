"""Gradient scores of a Llama of half a billion made weights, whose blocks rest on disk: time and peak memory.

    python scripts/bench_sensitivity.py                      # ten minutes, 5 GB of disk for a while
    python scripts/bench_sensitivity.py --layers 4           # a seventh of the blocks
    python scripts/bench_sensitivity.py --formats '[gguf*]'

The run is the command line's own, in its own process; what it measured is in its result.json. The peak is over the
process before it loads. Beside it: the fp32 weights of one block, and what is kept of activations for one batch: the
inputs of all blocks, the logits, and their projection.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benching import MIB, bench_parser, machine, write_result
from make_checkpoint import Layout

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = bench_parser(__doc__, "sensitivity.json")
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--formats", default="null", help="task.formats (default: all that are tried by default)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=64)
    arguments = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as scratch:
        model, outputs = Path(scratch, "model"), Path(scratch, "outputs")
        layout = Layout({**CONFIG, "num_hidden_layers": arguments.layers}, "bfloat16", 5.0)
        layout.write(model, "Llama")
        text = add_tokenizer(model)
        measured = run(model, text, outputs, arguments)
    numel = {name: tensor.numel() for name, tensor in layout.tensors.items()}
    block = 4 * sum(count for name, count in numel.items() if name.startswith("model.layers.0."))
    rows = arguments.samples * arguments.window
    activations = 4 * rows * (CONFIG["hidden_size"] * arguments.layers + 2 * CONFIG["vocab_size"])  # type: ignore[operator]
    result = {
        "machine": about, "weights": sum(numel.values()), "layers": arguments.layers, "block_mib": block / MIB,
        "activations_mib": activations / MIB, "embedding_mib": 4 * numel["model.embed_tokens.weight"] / MIB, **measured,
    }  # fmt: skip
    write_result(arguments.out, result)
    print(json.dumps(result, indent=1))


def add_tokenizer(folder: Path) -> Path:
    """Put the embedded model's tokenizer beside the weights, and return its text: characters are tokens 0 to 31."""
    import qexp

    assets = Path(qexp.__file__).parent / "assets" / "arithmetic"
    for name in TOKENIZER:
        shutil.copy(assets / name, folder / name)
    return assets / "held_out.txt"


def run(model: Path, text: Path, outputs: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    words = [
        "model=causal_lm", f"model.path={model}", "task=sensitivity", "task.score=gradient", f"task.text={text}",
        f"task.formats={arguments.formats}", f"task.samples={arguments.samples}", f"task.window={arguments.window}",
        "offload=block", "offload.to=disk", f"paths.outputs={outputs}", "tracking=none",
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qexp", *words], check=True)
    seconds = time.perf_counter() - started
    (path,) = outputs.glob("runs/*/result.json")
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    peaks = [metrics["load/peak_host_gib"], metrics["memory/run_peak_host_gib"]]
    lines = (path.parent / "sensitivity.csv").read_text(encoding="utf-8").count("\n") - 1
    return {
        "wall_seconds": seconds, "load_seconds": metrics["load/seconds"], "scores": lines,
        "load_peak_mib": peaks[0] * 1024, "run_peak_mib": peaks[1] * 1024,
        "words": [word for word in words[2:-2] if not word.startswith("task.text=")],
    }  # fmt: skip


if __name__ == "__main__":
    main()
