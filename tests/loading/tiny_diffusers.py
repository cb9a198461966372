"""A small network as a class of diffusers. Import it inside functions: diffusers takes seconds to import."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Tiny(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.second = nn.Linear(2 * width, 64)
        self.plain = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.second(self.norm(self.first(x))))
