"""The process that tries backends: it loads one small quantized layer per option and reports the result.

Reads {"device", "trials": [{"option", "config"}, ...]} from standard input. For each trial it writes a line of JSON
when it begins, {"begin": option}, so that a crash has a name, and one with the result. What libraries print goes to
standard error. This module imports no torch at its top level.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.config.plugins import plugin_config
from qexp.errors import MissingLibraryError
from qexp.models.base import ModelSource
from qexp.results.outcome import outcome_of

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("bfloat16", "float32")
ROWS, COLUMNS, TOKENS = 64, 256, 8  # of the layer and of its input; every format's groups divide 256
AGREEMENT = 0.05  # relative L2 between the outputs of the quantized layer and of its dequantized weight


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # standard output is for answers only
    request = json.load(sys.stdin)
    for trial in request["trials"]:
        _say(answers, {"begin": trial["option"]})
        _say(answers, {"end": trial["option"], **attempt(trial["config"], request["device"], measure)})


def attempt(config: dict[str, Any], device: str, measure: Callable[[Any, str, str], dict[str, Any]]) -> dict[str, Any]:
    """Measure one option in every dtype; an error becomes its status, reason and message."""
    started, measured = time.monotonic(), {}
    status, reason, message = "runs", None, ""
    for dtype in DTYPES:
        try:
            backend = plugin_config("backend", config, "backend").resolved(device.partition(":")[0])
            measured[dtype] = measure(backend, dtype, device)
        except Exception as error:
            status, reason, message = verdict_of(error)
            if measured:  # the other dtype ran
                message = f"{dtype}: {message}"
            break
    return {
        "status": status,
        "reason": reason,
        "message": message,
        "measured": measured,
        "seconds": round(time.monotonic() - started, 2),
    }


def verdict_of(error: Exception) -> tuple[str, str, str]:
    """Return (status, reason, one line) of an error: needs something, or fails."""
    if isinstance(error, MissingLibraryError):
        return "needs", "library", " ".join(str(error).split())
    if isinstance(error, ImportError):
        missing = (error.name or "").partition(".")[0]
        remedy = f"; install the package that has {missing} again, as constraints.txt pins it" if missing else ""
        return "needs", "library", " ".join(f"{type(error).__name__}: {error}{remedy}".split())
    outcome = outcome_of(error)
    return ("needs" if outcome.status == "unsupported" else "fails"), str(outcome.reason), outcome.message


def measure(config: Any, dtype: str, device: str) -> dict[str, Any]:
    """Load a linear layer through the loader, run it, dequantize it. Raises ArithmeticError for a wrong output."""
    import torch

    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.loading.lifecycle import load_component
    from qexp.metrics.tensors import compare

    with tempfile.TemporaryDirectory(prefix="qexp-doctor-") as folder:
        weight = _save_layer(Path(folder), getattr(torch, dtype))
        settings = ComponentConfig(backend=config, compute_dtype=dtype)
        loader = LoaderConfig(workers=1)
        source: Any = _Layer(Path(folder))
        loaded = load_component(source, "layer", settings, device=torch.device(device), loader=loader)
    item = next(item for item in loaded.plan.items if item.target == "0.weight")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(TOKENS, COLUMNS, generator=generator).to(device=device, dtype=getattr(torch, dtype))
    with torch.no_grad():
        quantizer: Any = getattr(loaded.model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.calibrate(loaded.model, lambda: loaded.model(tokens))
        answer = loaded.model(tokens)
        dense = loaded.model if quantizer is None else quantizer.dequantize(loaded.model)
        agreement = compare(dense(tokens), answer).relative_l2
    if agreement is None or agreement > AGREEMENT:
        raise ArithmeticError(f"its output differs from that of its dequantized weight (relative L2 {agreement})")
    compared = compare(weight, dense.get_parameter("0.weight").cpu())
    if not compared.finite:
        raise ArithmeticError("its dequantized weight is not finite")
    return {
        "sqnr_db": None if compared.sqnr_db is None else round(compared.sqnr_db, 3),
        "exact": compared.exact,
        "bits_per_weight": 8 * item.result_nbytes / weight.numel(),
    }


class _Layer(ModelSource):
    """The model source of the saved layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def checkpoints(self) -> dict[str, Path]:
        return {"layer": self.folder}

    @override
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(COLUMNS, ROWS))


def _save_layer(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Write a layer with N(0, 1) weights as a checkpoint; returns its weight [ROWS, COLUMNS]."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    bias = torch.randn(ROWS, generator=generator).to(dtype)
    save_file({"0.weight": weight, "0.bias": bias}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return weight


def _say(answers: Any, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main()
