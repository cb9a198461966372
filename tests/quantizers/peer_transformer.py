"""The network of the peers' suites, a class of diffusers. Import it inside functions: that takes seconds."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ff(x)


class Transformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.proj_out = nn.Linear(width, 64)
        self.register_buffer("position", torch.linspace(0, 1, width), persistent=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x.to(self.proj_out.bias.dtype))


class Fp32Transformer(Transformer):
    _keep_in_fp32_modules = ["proj_out"]  # noqa: RUF012  # as upstream declares it
