"""Quantized activations of quanto layers: 8-bit inputs, by scales that are found from samples.

Each layer divides its input by one number, `input_scale`, and rounds it to int8 or float8; with int8 weights, int8
inputs are multiplied as integers. The scale is the largest absolute input over the largest value of the format, found
by running samples through the model in the library's `Calibration`: the first batch's, then a running mean (0.9 old,
0.1 new). Larger inputs are clipped from then on.

The library can quantize what layers answer, too. While it calibrates it turns that off for layers that stand directly
in a module that is called (0.2.7), and a model that it loads again has it on everywhere. Here it is off from the
start, for every layer, so that a model computes the same before and after it is saved. `output_scale` is found and
stored as by the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qexp.errors import ConfigError, choices
from qexp.quantizers.quanto_support.library import library

SHOWN = 5  # layers in a message
UNKNOWN = (
    "the scales of activations are not known yet; run samples through the model first: "
    "model.hf_quantizer.calibrate(model, lambda: model(...))"
)


def refuse_to_run(layer: Any) -> None:
    """Let a layer raise ConfigError instead of computing with scales that nobody has found."""
    layer.register_forward_pre_hook(_refuse, prepend=True)


def calibrate(layers: Mapping[str, Any], run: Callable[[], object]) -> None:
    """Find the scales of layers, by their names in the model: `run` puts samples through it.

    Raises: ConfigError for a layer that no sample reaches, or whose inputs are not finite.
    """
    import torch

    if len(devices := {layer.weight.device for layer in layers.values()}) > 1:
        raise ConfigError(
            f"backend.activations_dtype: a model on {choices(devices)} cannot be calibrated; load it with "
            "device_map=null, calibrate and save it, and load what was saved as you like"
        )
    reached: set[str] = set()
    for layer in layers.values():
        _clear_refusal(layer)
        layer.input_scale, layer.output_scale = torch.ones_like(layer.input_scale), torch.ones_like(layer.output_scale)
    # Before the layer's own hook, which divides by the scale. The library's hooks, which find it, are global: earlier.
    notes = [
        layer.register_forward_pre_hook(partial(_note, reached, name), prepend=True) for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), library().Calibration(streamline=False):
            run()
    finally:
        for note in notes:
            note.remove()
    _refuse_if(layers, [name for name in layers if name not in reached], "were reached by no sample of the calibration")
    infinite = [name for name, layer in layers.items() if not layer.input_scale.isfinite()]
    _refuse_if(layers, infinite, "have inputs that are not finite")


def _refuse_if(layers: Mapping[str, Any], wrong: list[str], why: str) -> None:
    """Raise ConfigError if there are wrong ones, and lets all layers refuse to run again."""
    if not wrong:
        return
    for layer in layers.values():
        refuse_to_run(layer)
    names = ", ".join(f"'{name}'" for name in wrong[:SHOWN]) + (" …" if len(wrong) > SHOWN else "")
    raise ConfigError(
        f"backend.activations_dtype: {len(wrong)} layers {why}: {names}; "
        "use other samples, add them to skip_modules, or set activations_dtype to null"
    )


def _clear_refusal(layer: Any) -> None:
    for number in [number for number, hook in layer._forward_pre_hooks.items() if hook is _refuse]:
        del layer._forward_pre_hooks[number]


def _refuse(layer: Any, inputs: Any) -> None:
    raise ConfigError(f"backend.activations_dtype={layer.activation_qtype.name.removeprefix('q')}: {UNKNOWN}")


def _note(reached: set[str], name: str, layer: Any, inputs: Any) -> None:
    """Note that a sample reached a layer. Inputs of zeros give the scale 1, which the library replaces by the next."""
    reached.add(name)
    if layer.input_scale == 0:
        layer.input_scale = layer.input_scale + 1
