"""Stages 2 to 6 of a load, a function for each: quantizer, machine, dtypes, skeleton, and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.config.module_patterns import covering, patterns_lost, unmatched_patterns
from qexp.errors import ConfigError, LoadError
from qexp.interop.interfaces import kept_by_class
from qexp.loading.component import LoadRequest, Prepared
from qexp.loading.model_names import under_model_names
from qexp.loading.notices import nothing_message, notices
from qexp.loading.plan import choose_modules, find_quantized, make_plan, stored_part_names
from qexp.loading.sharing import check_one_format, with_tied_entries
from qexp.loading.unread import check_meaning
from qexp.loading.weight_reads import keep_to_layers
from qexp.models.base import ModelSource
from qexp.models.computed_tables import deferred_tables, settle_tables
from qexp.models.skeletons import on_meta, without_initialization
from qexp.quantizers.base import Quantizer, load_quantizer
from qexp.quantizers.embedded import is_quantized
from qexp.quantizers.layers import MARK, replace_module, to_linear
from qexp.quantizers.rows import WeightSpec
from qexp.system.screen import say


def prepare(request: LoadRequest, quantizer: Quantizer) -> Prepared:
    """Run stages 3 to 6 for a component that is not loaded, or planned again with other settings."""
    check_environment(request, quantizer)
    compute_dtype, own_dtype = choose_dtypes(request, quantizer)
    model, named = skeleton_and_names(request.source, request.component, request.checkpoint, compute_dtype)
    return plan_modules(request, quantizer, model, named, compute_dtype, own_dtype)


def load_quantizer_of(request: LoadRequest) -> Quantizer:
    """Stage 2: the quantizer of the settings' backend, which is the checkpoint's own where that is quantized."""
    quantizer = load_quantizer(request.settings.backend)
    if is_quantized(request.checkpoint):
        quantizer.mark_stored(request.checkpoint.metadata)
    return quantizer


def check_environment(request: LoadRequest, quantizer: Quantizer) -> None:
    """Stage 3. Raises what `validate_environment` raises; a wrong setting is the checkpoint's where it embeds them."""
    try:
        quantizer.validate_environment(request.device)
    except ConfigError as error:
        if not quantizer.stored:
            raise
        place = f"the quantization_config of '{request.checkpoint.path}'"
        raise LoadError(f"{place} cannot be used: {error}; check its config.json") from error


def choose_dtypes(request: LoadRequest, quantizer: Quantizer) -> tuple[torch.dtype, torch.dtype | None]:
    """Stage 4: (the compute dtype, the checkpoint's own). Raises: ConfigError if neither is known."""
    asked, own_dtype = request.settings.compute_dtype, _own_dtype(request.checkpoint, quantizer)
    dtype = own_dtype if asked is None else getattr(torch, asked)
    if dtype is None:
        raise ConfigError(f"'{request.checkpoint.path}' has no unquantized floating-point tensors; set compute_dtype")
    return quantizer.update_torch_dtype(dtype), own_dtype


def plan_modules(
    request: LoadRequest,
    quantizer: Quantizer,
    model: nn.Module,
    named: Checkpoint,
    compute_dtype: torch.dtype,
    own_dtype: torch.dtype | None,
) -> Prepared:
    """Stage 6: choose the modules to quantize, swap them, write down the plan.

    named: the checkpoint with tensors named as the model's.
    """
    component, settings = request.component, request.settings
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    skip = (*settings.skip_modules, *quantizer.skip_modules)
    asked = {"skip_modules": skip, "keep_in_fp32_modules": settings.keep_in_fp32_modules}
    unmatched = {name: unmatched_patterns(found, names, f"{name} of '{component}'") for name, found in asked.items()}
    in_fp32, unquantized = kept_by_class(model, compute_dtype)
    fp32 = (*settings.keep_in_fp32_modules, *in_fp32)
    if quantizer.stored:
        quantizer.mark_stored(named.metadata)  # under all names of what is shared
        chosen, skipped = find_quantized(model, quantizer, named.entries, skip, fp32, compute_dtype)
        if lost := patterns_lost((*settings.skip_modules, *settings.keep_in_fp32_modules), chosen):
            say(f"warning: {component}: {lost}")
    else:
        own = request.source.skip_modules(component, model)
        unmatched["backend"] = quantizer.check_patterns(model, (*skip, *own, *fp32), component)
        check_one_format(model, quantizer)
        chosen, skipped = choose_modules(model, quantizer, (*skip, *own), fp32, compute_dtype, unquantized)
    if not chosen and quantizer.quantization_method != "none":
        raise LoadError(nothing_message(component, quantizer, skipped))
    _swap_layers(model, quantizer, chosen, compute_dtype)
    plan = make_plan(model, named, quantizer, chosen, skipped, fp32, compute_dtype)
    check_meaning(plan, named, plain_fp8=settings.plain_fp8)
    meant = (*skip, *settings.keep_in_fp32_modules)
    if chosen:
        unasked = (name for name in skipped if covering(meant, name) is None and not quantizer.keeps_dense(name))
        plan = replace(plan, left_dense=tuple(unasked))
    for notice in notices(component, plan):
        say(notice)
    return Prepared(request, model, named, quantizer, chosen, plan, compute_dtype, own_dtype, unmatched)


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
    with on_meta(compute_dtype), deferred_tables():
        model = source.skeleton(component, dict(checkpoint.config)).eval().requires_grad_(False)
    named = under_model_names(source, component, checkpoint, model)
    settle_tables(model, named.entries)
    return model, with_tied_entries(named, model)


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
