"""Any network of transformers, by the class that config.json names: encoders (BERT, T5EncoderModel, CLIP), classifiers.

`model.auto_class` names another one: an Auto class (AutoModel, AutoModelForSequenceClassification, …), or a class of a
network (T5EncoderModel, of a whole T5's checkpoint). The output embedding, if there is one, is left unquantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from qexp.models import causal_lm

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TransformersConfig(causal_lm.CausalLMConfig):
    """As of causal_lm; a tokenizer is needed for inputs of text alone. auto_class: a class of transformers that builds
    the network; null is the first of config.json's architectures."""

    source: str = "transformers"
    auto_class: str | None = None


Config = TransformersConfig


class Source(causal_lm.Source):
    """A network with one component, "model"."""

    config: TransformersConfig
    tasks: tuple[str, ...] = ("forward", "roundtrip")
    modality = "tensors"
    padding_side = "right"

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__(config)
        self.network_class = config.auto_class

    @override
    def skip_modules(self, component: str, model: nn.Module) -> tuple[str, ...]:
        """Return the output embedding: what the last layer gets wrong goes straight into the output."""
        from qexp.models.transformers_networks import output_embedding

        return output_embedding(model)
