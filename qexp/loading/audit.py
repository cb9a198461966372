"""What must hold after a load. A load that fails this would answer wrongly, or not what was asked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qexp.errors import LoadError, first_names
from qexp.offloading.payload import leaves, nbytes_of
from qexp.quantizers.base import Quantizer
from qexp.quantizers.rows import is_finite


def audit(model: nn.Module, quantizer: Quantizer, planned: Mapping[str, int]) -> None:
    """Raise LoadError unless every tensor is real, and the layers planned to be quantized are exactly those that are.

    planned: layer -> bytes of its quantized weight. Also checked: a backend that quantized nothing, weights whose bytes
    are not those the plan predicted, and scales (of a stored weight, say) that are not finite.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    parts = {id(tensor): leaves(tensor) for _, tensor in tensors}  # to take a tensor apart is most of the work here
    on_meta = [name for name, tensor in tensors if any(leaf.is_meta for leaf in parts[id(tensor)])]
    if on_meta:
        raise LoadError(f"after loading, {len(on_meta)} tensors have no data: {first_names(on_meta)}")
    quantized = {name for name, module in model.named_modules(remove_duplicate=False) if quantizer.is_quantized(module)}
    forgotten, surplus = sorted(set(planned) - quantized), sorted(quantized - set(planned))
    if wrong := forgotten or surplus:
        what = "not quantized though planned" if forgotten else "quantized though not planned"
        raise LoadError(f"after loading, {len(wrong)} layers are {what}: {first_names(wrong)}")
    if not quantized and quantizer.quantization_method != "none":
        raise LoadError(
            f"backend {quantizer.quantization_method!r} quantized no layer: every linear layer is skipped; "
            "loosen skip_modules, or use backend=none"
        )
    for name, expected in planned.items():
        weight = model.get_submodule(name).weight
        found = parts.get(id(weight)) or leaves(weight)  # a backend's own layer may compute its weight
        if expected != (nbytes := nbytes_of(found)):
            raise LoadError(f"the quantized weight of '{name}' takes {nbytes} bytes, but {expected} were planned")
        opaque = 0 if is_traceable_wrapper_subclass(weight) else 1  # its own bytes, in whatever dtype they are kept
        if not all(map(is_finite, found[opaque:])):
            raise LoadError(
                f"the quantized weight of '{name}' has a scale or a value that is not finite: every answer would be "
                "wrong; repair the checkpoint, or quantize the original one again"
            )
