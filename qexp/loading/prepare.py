"""Stages 2 to 6 of a load, a function for each: quantizer, machine, dtypes, skeleton, and the plan."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.config.module_patterns import covering, patterns_lost, unmatched_patterns
from qexp.errors import ConfigError, LoadError
from qexp.interop.interfaces import kept_by_class
from qexp.loading.component import Prepared
from qexp.loading.model_names import under_model_names
from qexp.loading.notices import nothing_message, notices
from qexp.loading.plan import choose_modules, find_quantized, make_plan, stored_part_names
from qexp.loading.sharing import check_one_format, with_tied_entries
from qexp.loading.unread import check_meaning
from qexp.loading.weight_reads import keep_to_layers
from qexp.models.skeletons import on_meta, without_initialization
from qexp.quantizers.base import Quantizer, load_quantizer
from qexp.quantizers.embedded import merge, stored_config
from qexp.quantizers.layers import MARK, replace_module, to_linear
from qexp.quantizers.rows import WeightSpec
from qexp.system.screen import say

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig
    from qexp.models.base import ModelSource


def prepare(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    *,
    device: torch.device,
) -> Prepared:
    """Stages 3 to 6, for a component that is not loaded, or planned again with other settings."""
    check_environment(quantizer, checkpoint, device)
    dtypes = choose_dtypes(settings, checkpoint, quantizer)
    model, named = skeleton_and_names(source, component, checkpoint, dtypes[0])
    return plan_modules(source, component, settings, named, quantizer, model, *dtypes)


def check_environment(quantizer: Quantizer, checkpoint: Checkpoint, device: torch.device) -> None:
    """Stage 3. Raises what `validate_environment` raises; a wrong setting is the checkpoint's where it embeds them."""
    try:
        quantizer.validate_environment(device)
    except ConfigError as error:
        if not quantizer.stored:
            raise
        place = f"the quantization_config of '{checkpoint.path}'"
        raise LoadError(f"{place} cannot be used: {error}; check its config.json") from error


def choose_dtypes(
    settings: ComponentConfig, checkpoint: Checkpoint, quantizer: Quantizer
) -> tuple[torch.dtype, torch.dtype | None]:
    """Stage 4: (the compute dtype, the checkpoint's own). Raises: ConfigError if neither is known."""
    own_dtype = _own_dtype(checkpoint, quantizer)
    dtype = own_dtype if settings.compute_dtype is None else getattr(torch, settings.compute_dtype)
    if dtype is None:
        raise ConfigError(f"'{checkpoint.path}' has no unquantized floating-point tensors; set compute_dtype")
    return quantizer.update_torch_dtype(dtype), own_dtype


def plan_modules(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    model: nn.Module,
    compute_dtype: torch.dtype,
    own_dtype: torch.dtype | None,
) -> Prepared:
    """Stage 6: choose the modules to quantize, swap them, write down the plan.

    checkpoint: with tensors named as the model's.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    skip = (*settings.skip_modules, *quantizer.skip_modules)
    asked = {"skip_modules": skip, "keep_in_fp32_modules": settings.keep_in_fp32_modules}
    unmatched = {name: unmatched_patterns(found, names, f"{name} of '{component}'") for name, found in asked.items()}
    in_fp32, unquantized = kept_by_class(model, compute_dtype)
    fp32 = (*settings.keep_in_fp32_modules, *in_fp32)
    if quantizer.stored:
        quantizer.metadata = checkpoint.metadata  # under all names of what is shared
        chosen, skipped = find_quantized(model, quantizer, checkpoint.entries, skip, fp32, compute_dtype)
        if lost := patterns_lost((*settings.skip_modules, *settings.keep_in_fp32_modules), chosen):
            print(f"warning: {component}: {lost}", file=sys.stderr)
    else:
        own = source.skip_modules(component, model)
        unmatched["backend"] = quantizer.check_patterns(model, (*skip, *own, *fp32), component)
        check_one_format(model, quantizer)
        chosen, skipped = choose_modules(model, quantizer, (*skip, *own), fp32, compute_dtype, unquantized)
    if not chosen and quantizer.quantization_method != "none":
        raise LoadError(nothing_message(component, quantizer, skipped))
    _swap_layers(model, quantizer, chosen, compute_dtype)
    plan = make_plan(model, checkpoint, quantizer, chosen, skipped, fp32, compute_dtype)
    check_meaning(plan, checkpoint, plain_fp8=settings.plain_fp8)
    meant = (*skip, *settings.keep_in_fp32_modules)
    if chosen:
        unasked = (name for name in skipped if covering(meant, name) is None and not quantizer.keeps_dense(name))
        plan = replace(plan, left_dense=tuple(unasked))
    for notice in notices(component, plan):
        say(notice)
    config, path = dict(checkpoint.config), checkpoint.path
    return Prepared(
        model, quantizer, chosen, plan, compute_dtype, own_dtype, config, path, source.carried_files(), unmatched
    )


def _swap_layers(
    model: nn.Module, quantizer: Quantizer, chosen: Mapping[str, WeightSpec], compute_dtype: torch.dtype
) -> None:
    """Put layers that hold quantized weights in the place of the chosen ones, linear by class or by what they do.

    A layer under several names is swapped once, and stays one.
    """
    first_name: dict[nn.Module, str] = {}
    for name in chosen:
        first_name.setdefault(model.get_submodule(name), name)
    names = list(first_name.values())
    transposed = {name: type(model.get_submodule(name)) for name in names if chosen[name].transposed}
    for name in names:
        if name in transposed or type(model.get_submodule(name)).forward is not nn.Linear.forward:
            replace_module(model, name, to_linear(model.get_submodule(name)))
    keep_to_layers(model, chosen.keys())
    with without_initialization():
        quantizer.preprocess_model(model, names, compute_dtype)
    for name, kind in transposed.items():
        setattr(model.get_submodule(name), MARK, kind)
    for name in chosen:
        first = first_name.get(model.get_submodule(name))  # None where it was swapped with the first one
        if first is not None:
            replace_module(model, name, model.get_submodule(first))


def skeleton_and_names(
    source: ModelSource, component: str, checkpoint: Checkpoint, compute_dtype: torch.dtype | None = None
) -> tuple[nn.Module, Checkpoint]:
    """Stage 5: the network on the meta device, and the checkpoint under the names of all its tensors."""
    with on_meta(compute_dtype):
        model = source.skeleton(component, dict(checkpoint.config)).eval().requires_grad_(False)
    return model, with_tied_entries(under_model_names(source, component, checkpoint, model), model)


def resolve_quantizer(backend: Any, checkpoint: Checkpoint, component: str) -> Quantizer:
    """Stage 2: the quantizer of `backend`, or of the config in the checkpoint, which wins, with a warning."""
    embedded = stored_config(checkpoint, backend)
    if embedded is None:
        return load_quantizer(backend)
    if lost := merge(backend, embedded):
        print(f"warning: {component}: the checkpoint is quantized already; unused: {', '.join(lost)}", file=sys.stderr)
    quantizer = load_quantizer(embedded)
    quantizer.stored, quantizer.metadata = True, checkpoint.metadata
    return quantizer


def _own_dtype(checkpoint: Checkpoint, quantizer: Quantizer) -> torch.dtype | None:
    """The dtype that a stored format comes with, or the one of most floating-point bytes in the checkpoint that are no
    quantized weight's; None if there are none.

    In a quantized checkpoint fp32 counts only where it is alone. Beside 16 bits it belongs to modules that a class, or
    a user, keeps in fp32; they may well outweigh the norms and biases that are left of the rest.
    """
    if quantizer.stored and (own := quantizer.stored_dtype()) is not None:
        return own
    sizes: dict[torch.dtype, int] = {}
    parts = stored_part_names(quantizer, checkpoint)
    for entry in (entry for name, entry in checkpoint.entries.items() if name not in parts):
        stored = TORCH_DTYPES.get(entry.dtype)
        if stored in (torch.float64, torch.float32, torch.float16, torch.bfloat16) and not entry.is_scaled:
            sizes[stored] = sizes.get(stored, 0) + entry.nbytes
    if not sizes:
        return None
    if quantizer.stored:
        sizes = {stored: nbytes for stored, nbytes in sizes.items() if stored.itemsize == 2} or sizes
    most = max(sizes, key=lambda stored: sizes[stored])
    return torch.float32 if most == torch.float64 else most  # no format is quantized from, or computes in, float64
