"""Every option of conf/backend loaded straight onto the device: memory, bytes, dequantizing, saving and loading again.

The memory bound of a load is the quantized model, and in each lane the largest dense weight and what the workers'
kernels use: a slice of at most 2^22 weights at a time, 48 bytes for each. Bytes are compared with those that the CPU
makes of the same weights; they have to be equal where the kernel is the same formula in PyTorch (`EXACT`), elsewhere
the error may differ by a twentieth of a decibel, since a library's kernels for CPU and GPU round ties and sum in
orders of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_checks.accelerator import MIB, Accelerator
from gpu_checks.checks import Checks, Outcome
from gpu_checks.subjects import batches, load_net
from qexp.loading.streaming.lanes import LANES
from qexp.metrics.tensors import compare
from qexp.offloading.payload import leaves, module_nbytes, sites

GROUP = "loading"
EXACT = ("none", "gguf")  # quant_method
MOST_DB = 0.05
BYTES_A_WEIGHT = 48
SLICE_WEIGHTS = 1 << 22
AGREEMENT = 0.08  # relative L2 between the quantized model's answer and the dequantized one's; some round activations


def plain(model: nn.Module) -> list[Tensor]:
    """Copies in host memory of the plain tensors of all weights."""
    values = [store[name] for module in model.modules() for store, name in sites(module)]
    return [leaf.cpu() for value in values for leaf in leaves(value)]


def same_bytes(some: list[Tensor], others: list[Tensor]) -> bool:
    def is_same(a: Tensor, b: Tensor) -> bool:
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))

    return len(some) == len(others) and all(map(is_same, some, others))


def dense_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights that the quantized model stands for, in fp32 on the host.

    The model is dequantized in place.
    """
    dense = model.hf_quantizer.dequantize(model) if hasattr(model, "hf_quantizer") else model
    return {name: tensor.float().cpu() for name, tensor in dense.state_dict().items() if tensor.dim() == 2}


def memory(option: str, folder: Path, accelerator: Accelerator, dtype: torch.dtype, *, workers: int = 1) -> Outcome:
    accelerator.settle()
    before = accelerator.allocated_bytes()
    with accelerator.peak() as watched:  # which the load starts anew when it has warmed up
        loaded = load_net(option, folder, accelerator.device, dtype, workers=workers)
        peak = max(watched() - before, 0)
    accelerator.settle()
    result_bytes, largest = module_nbytes(loaded.model), loaded.plan.items
    weights = max(item.numel for item in largest)
    lanes, slices = min(workers, LANES), min(weights, SLICE_WEIGHTS) * BYTES_A_WEIGHT
    bound = result_bytes + lanes * (weights * dtype.itemsize + slices) + 8 * MIB
    held = accelerator.allocated_bytes() - before
    numbers = {
        "result_bytes": result_bytes,
        "peak_device_bytes": peak,
        "peak_by_its_own_account_bytes": loaded.memory.peak_device_bytes - before,
        "bound_bytes": bound,
        "held_device_bytes": held,
        "load_seconds": round(loaded.times.total, 3),
    }
    broken = [f"the peak of {peak} bytes is above {bound}"] if peak > bound else []
    if accelerator.module is not None and not result_bytes <= held <= result_bytes + 8 * MIB:
        broken.append(f"{held} bytes are on the device for a model of {result_bytes}")
    return numbers, broken


def against_cpu(option: str, folder: Path, accelerator: Accelerator, dtype: torch.dtype) -> Outcome:
    """Weights made on the device and on the CPU: their bytes, and their errors against the checkpoint."""
    from safetensors.torch import load_file

    original = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    here, there = (load_net(option, folder, place, dtype).model for place in (accelerator.device, "cpu"))
    equal = same_bytes(plain(here), plain(there))
    method = getattr(getattr(here, "hf_quantizer", None), "quantization_method", "none")
    errors = []
    for model in (here, there):
        dense = dense_weights(model)
        names = [name for name in dense if name.startswith("blocks.")]
        found = [compare(original[name], dense[name]).sqnr_db for name in names]
        errors.append(min((error for error in found if error is not None), default=None))
    numbers = {"bytes_equal": equal, "lowest_sqnr_db": errors[0], "lowest_sqnr_cpu_db": errors[1]}
    broken = [f"the bytes of {method} differ from the CPU's"] if method in EXACT and not equal else []
    if (errors[0] is None) != (errors[1] is None):
        broken.append(f"the error is {errors[0]} dB on the device and {errors[1]} dB on the CPU")
    elif errors[0] is not None and errors[1] is not None and abs(errors[0] - errors[1]) > MOST_DB:
        broken.append(f"the error is {errors[0]:.2f} dB on the device and {errors[1]:.2f} dB on the CPU")
    return numbers, broken


def dequantized(option: str, folder: Path, accelerator: Accelerator, dtype: torch.dtype) -> Outcome:
    model: Any = load_net(option, folder, accelerator.device, dtype).model
    batch = batches(model.embed.in_features, 1, dtype)[0].to(accelerator.device)
    with torch.no_grad():
        answer = model(batch)
        dense = model.hf_quantizer.dequantize(model) if hasattr(model, "hf_quantizer") else model
        relative = compare(dense(batch).cpu(), answer.cpu()).relative_l2
    kinds = {type(module) for module in dense.modules() if isinstance(module, nn.Linear)}
    broken = [] if relative is not None and relative <= AGREEMENT else [f"the answers differ by {relative}"]
    if kinds != {nn.Linear}:
        broken.append(f"dequantized layers are {sorted(kind.__name__ for kind in kinds)}")
    return {"relative_l2": relative}, broken


def saved(option: str, folder: Path, accelerator: Accelerator, dtype: torch.dtype) -> Outcome:
    """Save from the device, load onto it again: the same bytes and answers."""
    from qexp.loading.saving import save_model

    model: Any = load_net(option, folder, accelerator.device, dtype).model
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable:
        return {"serializable": False}, []
    batch = batches(model.embed.in_features, 1, dtype)[0].to(accelerator.device)
    place = folder.parent / "saved"
    try:
        save_model(model, place)
        again = load_net(option, place, accelerator.device, dtype).model
    finally:
        shutil.rmtree(place, ignore_errors=True)
    equal_bytes = same_bytes(plain(model), plain(again))
    with torch.no_grad():
        relative = compare(model(batch).cpu(), again(batch).cpu()).relative_l2
    numbers = {"serializable": True, "bytes_equal": equal_bytes, "relative_l2": relative}
    if relative is None or relative > (0 if equal_bytes else 0.01):
        return numbers, [f"the model that was saved and loaded answers differently: relative L2 {relative}"]
    return numbers, []


CHECKS: dict[str, tuple[str, Callable[[str, Path, Accelerator, torch.dtype], Outcome]]] = {
    "memory": ("large", memory),
    "memory, 8 workers": ("large", partial(memory, workers=8)),
    "against the CPU": ("net", against_cpu),
    "dequantize": ("net", dequantized),
    "save and load": ("net", saved),
}


def check_all(
    checks: Checks, accelerator: Accelerator, folder: Path, options: list[str], *, dtype: torch.dtype
) -> None:
    for option in options:
        for what, (checkpoint, check) in CHECKS.items():
            bound = partial(check, option, folder / checkpoint, accelerator, dtype)
            checks.run(GROUP, f"{option} · {what}", bound)
        accelerator.settle()
