"""The image classifiers of LPIPS up to the layers that it compares, with parameter names as in torchvision's files.

torchvision itself, which is built for one version of torch, is not needed: its file of weights is enough. Taps are the
activations that LPIPS compares.

Sources: arXiv:1404.5997 (AlexNet, one column), arXiv:1409.1556 (VGG, configuration D), arXiv:1801.03924 (the taps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

VGG16_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: halve the image
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # numbers of ReLUs in `features`


def alexnet_features() -> nn.Sequential:
    """[n, 3, h, w] -> [n, 256, h / 16, w / 16]."""
    relu = nn.ReLU
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), relu(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), relu(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), relu(),
        nn.Conv2d(384, 256, 3, padding=1), relu(),
        nn.Conv2d(256, 256, 3, padding=1), relu(),
    )  # fmt: skip


def vgg16_features() -> nn.Sequential:
    """[n, 3, h, w] -> [n, 512, h / 16, w / 16]."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16_CHANNELS:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        channels = width or channels
    return nn.Sequential(*layers)


class Backbone(nn.Module):
    """net: alex or vgg. The activations at its taps, [n, channels, height, width] each."""

    def __init__(self, net: str) -> None:
        super().__init__()
        self.features = {"alex": alexnet_features, "vgg": vgg16_features}[net]()
        self.taps = TAPS[net]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a torchvision file without its classifier. Raises RuntimeError if one is missing."""
        self.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith("features.")})

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        found = []
        for number, layer in enumerate(self.features):
            images = layer(images)
            if number in self.taps:
                found.append(images)
        return found
