"""A class-conditional diffusion transformer (DiT) for 8x8 digits, and the classifier that scores its images.

The transformer predicts the flow-matching velocity v(x_t, t, label), where x_t = (1 - t) * image + t * noise
and v = noise - image; integrating from t = 1 to t = 0 turns noise into an image. Blocks are adaLN-Zero blocks.
Every linear layer but `x_embed` and `proj_out` has dimensions divisible by 256, so that every quantization
format's block size fits. Label 10 is the null label of classifier-free guidance.

Sources: arXiv:2212.09748 (DiT), arXiv:2210.02747 (flow matching).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 10
NULL_LABEL = NUM_CLASSES


@dataclass(frozen=True)
class DigitsConfig:
    """Architecture of `DigitsTransformer`, as stored in the checkpoint's config.json."""

    image_size: int = 8
    patch_size: int = 2
    width: int = 256
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features of times in [0, 1]: t [batch] -> [batch, width], in fp32."""
    frequencies = torch.exp(-math.log(10_000.0) / (width // 2) * torch.arange(width // 2, device=t.device))
    angles = 1000.0 * t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]  # x [batch, tokens, width], shift and scale [batch, width]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            project(x).view(batch, tokens, self.heads, -1).transpose(1, 2)  # [batch, heads, tokens, width / heads]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = FeedForward(width, mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DigitsTransformer(nn.Module):
    """Velocity field of the digits.

    Shapes: images [batch, 1, 8, 8] in [-1, 1]; t [batch] in [0, 1]; labels [batch] in 0..10 -> [batch, 1, 8, 8].
    """

    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        width, side = config.width, config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.x_embed = nn.Linear(config.patch_size**2, width)
        self.pos_embed = nn.Parameter(torch.empty(side * side, width).normal_(std=0.02))
        self.t_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embed = nn.Embedding(NUM_CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, config.patch_size**2)

    def forward(self, images: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        dtype = self.pos_embed.dtype
        tokens = F.pixel_unshuffle(images, self.patch_size).flatten(2).transpose(1, 2)  # [batch, 16, 4]
        x = self.x_embed(tokens.to(dtype)) + self.pos_embed
        condition = self.t_embed(timestep_features(t, x.shape[-1]).to(dtype)) + self.y_embed(labels)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation_out(F.silu(condition)).chunk(2, dim=-1)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale)).transpose(1, 2)  # [batch, 4, 16]
        side = images.shape[-1] // self.patch_size
        return F.pixel_shuffle(x.unflatten(2, (side, side)), self.patch_size)


class DigitsClassifier(nn.Module):
    """A small convolutional classifier; its penultimate activations are the features of the Fréchet distance.

    Shapes: images [batch, 1, 8, 8] in [-1, 1] -> logits [batch, 10]; `features` -> [batch, 32].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4, 32)
        self.head = nn.Linear(32, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # [batch, 64, 2, 2]
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
