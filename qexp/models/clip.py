"""CLIP of transformers from a folder: features of images and of texts in one space (arXiv:2103.00020).

torchmetrics has a CLIP score of its own, which cannot use transformers 5: there the features come wrapped in an output
object. The folder is what `save_pretrained` of a model and its processor writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.errors import LoadError

BATCH = 16


class Clip:
    """A CLIP model in fp32 on the CPU. Raises: LoadError for a folder that transformers cannot open."""

    def __init__(self, folder: Path) -> None:
        import transformers

        # the one that needs no torchvision, where there are two
        name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
        processor: Any = getattr(transformers, name)
        transformers.utils.logging.disable_progress_bar()
        here: dict[str, Any] = {"local_files_only": True}
        try:
            self.model: Any = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32, **here).eval()
            self.processor = processor.from_pretrained(folder, **here)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **here)
        except (OSError, ValueError, KeyError) as error:
            raise LoadError(
                f"'{folder}' has no CLIP model that transformers can open: {str(error).splitlines()[0]}; download it "
                "again, or set metrics.clip_model to another"
            ) from error

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, height, width] -> [n, dims] of length 1."""
        with torch.no_grad():
            pixels = [self.processor(list(part), return_tensors="pt")["pixel_values"] for part in images.split(BATCH)]
            return torch.cat([_normalize_features(self.model.get_image_features(part)) for part in pixels])

    def text_features(self, texts: list[str]) -> Tensor:
        """Return the features of texts, [texts, dims] of length 1; of a text that is too long, its beginning counts."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            return _normalize_features(self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))


def _normalize_features(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features / features.norm(dim=-1, keepdim=True)
