"""What a checkpoint holds that is not read: harmless, or a sign that what is read means something else.

A tensor that stands beside a layer's weight (`X.some_scale` beside `X.weight`) says something of it: a scale, a mask,
a low-rank correction. Read without it, the weight is wrong by any factor. The same goes for a weight in 8 bits for
which no scale is known.
"""

from __future__ import annotations

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.scaled_weights import FLOAT8
from qexp.errors import LoadError, first_names
from qexp.loading.plan import LoadPlan
from qexp.quantizers.layers import paths_above

HARMLESS = ("num_batches_tracked",)  # of batch norms that are frozen in the model


def check_meaning(plan: LoadPlan, checkpoint: Checkpoint, *, plain_fp8: bool) -> None:
    """Raise LoadError for weights that mean nothing without what is not read.

    plain_fp8: whether weights in float8 without scales are what they seem.
    """
    for item in plan.items:
        if item.source.dtype in FLOAT8 and not item.stored and not plain_fp8:
            raise LoadError(
                f"'{item.source.name}' is {item.source.dtype} in '{item.source.file}' without a scale that is known "
                "(X.weight_scale, X.scale_weight), so that its numbers may be wrong by any factor; if the file is a "
                "plain cast to float8, say so with plain_fp8=true"
            )
    read = {entry.name for item in plan.items for entry in item.entries} | {item.target for item in plan.items}
    read |= checkpoint.converted_names
    layers = {name.removesuffix(".weight") for name in read if name.endswith(".weight")}
    found = [name for name in plan.unused if not name.endswith(HARMLESS) and layers & {*paths_above(name)}]
    if found:
        layer = next(path for path in paths_above(found[0]) if path in layers)
        file = checkpoint.entries[found[0]].file
        raise LoadError(
            f"'{file}' has {first_names(found)} beside '{layer}.weight', which nothing here reads: the weight means "
            "something else without it, or the model's config is of another version; use the checkpoint that the "
            "model's own library opens, or an unquantized one"
        )
