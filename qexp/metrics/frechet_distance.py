"""Fréchet distance of generated images to real ones, in the features of the embedded classifier (`frechet.py`).

It decreases with the number of images: compare only values with the same n.
"""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import Metric

METRICS = (
    Metric(
        "quality/frechet_distance", "Fréchet distance to real images, in the embedded classifier's features",
        header="Fréchet distance", better="lower", range=(0, inf), tasks=("generate",), set_of="images", order=40,
        needs=("images",), compute=lambda samples: samples.own_scores().get("frechet_distance"), is_minor=True,
    ),
)  # fmt: skip
