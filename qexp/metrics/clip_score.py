"""CLIP score: 100 times the mean cosine of an image's and its prompt's features in CLIP, not below 0.

Source: arXiv:2104.08718 (weight 100 instead of 2.5).
"""

from __future__ import annotations

from qexp.metrics.registry import Metric, Result, Samples


def _compute(samples: Samples) -> Result:
    from qexp.metrics.tensors import is_finite

    images, prompts = samples.outputs["images"], samples.prompts
    if not prompts or len(images) % len(prompts) or not is_finite(images):  # images cannot be assigned to prompts
        return Result(None)
    clip = samples.tools["clip"]()
    texts = clip.text_features(list(prompts)).repeat_interleave(len(images) // len(prompts), 0)
    cosines = (clip.image_features(samples.tools["pixels"]()) * texts).sum(-1).double()
    return Result(max(100 * cosines.mean().item(), 0.0), (100 * cosines).tolist())


METRICS = (
    Metric(
        "quality/clip_score", "how well images fit their prompts: 100 times the mean cosine in CLIP",
        header="CLIP score", better="higher", range=(0, 100), tasks=("generate",), mean_over="images", order=61,
        needs=("images",), compute=_compute, setting="clip_model",
    ),
)  # fmt: skip
