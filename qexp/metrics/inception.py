"""The Inception v3 network of FID, with parameter names as in the files of torch-fidelity and pytorch-fid.

It is TensorFlow's of 2015-12-05, which differs from torchvision's in four ways: images are resized as in TensorFlow 1,
to 299 pixels; values are (x - 128) / 128; average pooling ignores the padding; and the last block uses maximum pooling,
the one before it average pooling. Neither torch-fidelity nor torchvision is needed.

Sources: arXiv:1512.00567 (Inception v3), arXiv:1706.08500 (FID).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 299  # pixels a side, as the network was trained
Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution, normalization by the statistics of training, ReLU."""

    def __init__(self, channels: int, width: int, size: Size, *, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def flat(channels: int, width: int, length: int) -> Conv:
    """Return a convolution over one row of pixels."""
    return Conv(channels, width, (1, length), padding=(0, length // 2))


def tall(channels: int, width: int, length: int) -> Conv:
    """Return a convolution over one column of pixels."""
    return Conv(channels, width, (length, 1), padding=(length // 2, 0))


def average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


def halved(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    """35 x 35 pixels: 1x1, 5x5 and twice 3x3."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1
        )


class BlockB(nn.Module):
    """35 x 35 to 17 x 17 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halved(x)], 1)


class BlockC(nn.Module):
    """17 x 17 pixels: 7x7 as 1x7 and 7x1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, width, 1)
        self.branch7x7_2, self.branch7x7_3 = flat(width, width, 7), tall(width, 192, 7)
        self.branch7x7dbl_1 = Conv(channels, width, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = tall(width, width, 7), flat(width, width, 7)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = tall(width, width, 7), flat(width, 192, 7)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(channels, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = flat(192, 192, 7)
        self.branch7x7x3_3 = tall(192, 192, 7)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, halved(x)], 1)


class BlockE(nn.Module):
    """8 x 8 pixels: 1x3 and 3x1 side by side. is_last: with maximum pooling."""

    def __init__(self, channels: int, is_last: bool) -> None:
        super().__init__()
        self.branch1x1, self.branch3x3_1 = Conv(channels, 320, 1), Conv(channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = flat(384, 384, 3), tall(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = flat(384, 384, 3), tall(384, 384, 3)
        self.branch_pool = Conv(channels, 192, 1)
        self.pool = maximum if is_last else average

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        wide += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """uint8 [n, 3, height, width] -> features [n, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, is_last=False), BlockE(2048, is_last=True)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a file without its classifier (fc). Raises RuntimeError if one is missing."""
        self.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})

    def forward(self, images: Tensor) -> Tensor:
        x = (resized(images.float()) - 128) / 128  # [n, 3, 299, 299]
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # [n, 64, 73, 73]
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [n, 192, 35, 35]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [n, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [n, 2048, 8, 8]
        return x.mean((2, 3))


def resized(images: Tensor) -> Tensor:
    """Bilinear as in TensorFlow 1: pixel i of the result lies at i * height / 299, not at its centre's place."""
    for dimension in (2, 3):
        length = images.shape[dimension]
        place = torch.arange(SIDE) * (length / SIDE)
        low = place.floor().long()
        high = (low + 1).clamp(max=length - 1)
        part = (place - low).view(-1, 1) if dimension == 2 else place - low
        first, second = images.index_select(dimension, low), images.index_select(dimension, high)
        images = first + (second - first) * part
    return images
