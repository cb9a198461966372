"""Images that a pipeline replaced: those that its safety checker found something in are black, whatever was generated.

Pipelines say so beside their images, in a list of booleans (`nsfw_content_detected`, `watermark_detected`). Two black
images are no match: comparisons are over the images that neither side replaced, and `exact` is 0 if there are others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qexp.system.screen import say


def shown_images(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None
) -> tuple[Tensor, dict[str, float | None]]:
    """(which images neither side replaced, bool [n]; how many samples of `outputs` were, by the pipeline's name)."""
    own = {name: value for name, value in outputs.items() if value.dtype == torch.bool}
    theirs = {name: value for name, value in (expected or {}).items() if value.dtype == torch.bool}
    count, shown = len(outputs["images"]), torch.ones(len(outputs["images"]), dtype=torch.bool)
    for side, flags in (("this run", own), ("the reference", theirs)):
        for name, value in flags.items():
            shown &= ~value.repeat_interleave(count // len(value))  # of a video, all frames
            if value.any():
                say(
                    f"warning: {int(value.sum())} of {len(value)} images of {side} are black in place of what was "
                    f"generated ({name}); they match nothing. Open the pipeline without its safety checker to compare "
                    'them: "safety_checker": [null, null] in model_index.json',
                )
    return shown, {name: float(value.sum()) for name, value in own.items()}
