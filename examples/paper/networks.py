"""The networks of the recipes, in plain torch: ResNet-18, WideResNet, a small MBConv network, a 3-d autoencoder, LeNet-5.

Each has a `head`, the last linear layer, behind the bottleneck that the published code inserts before it (two linear layers with
nothing in between). Sources: He et al. 2016; Zagoruyko & Komodakis 2016; Tan & Le 2019; LeCun et al. 1998.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOTTLENECK = 64


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (at stride 1), and batch_norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """For 32x32 images: a 3x3 stem without pooling; 512 -> 64 -> classes behind it."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(3, width, 3), nn.ReLU()]
        inputs = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                layers.append(Residual(inputs, width << stage, stride))
                inputs = width << stage
        self.body = nn.Sequential(*layers)
        self.bottleneck, self.head = nn.Linear(inputs, BOTTLENECK), nn.Linear(BOTTLENECK, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bottleneck(self.body(x).mean((2, 3))))


class Wide(nn.Module):
    """WideResNet's block: norm, ReLU, convolution, twice, with dropout in between."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.Dropout(dropout),
            ),
            *(nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, stride, 1)),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class WideResNet(nn.Module):
    """WRN-28-10 with dropout 0.3 by default; 640 -> 64 -> classes behind it."""

    def __init__(self, classes: int = 10, depth: int = 28, widen: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
        inputs = 16
        for stage in range(3):
            for k in range((depth - 4) // 6):
                outputs = 16 * widen << stage
                layers.append(Wide(inputs, outputs, 2 if stage and not k else 1, dropout))
                inputs = outputs
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU())
        self.bottleneck, self.head = nn.Linear(inputs, BOTTLENECK), nn.Linear(BOTTLENECK, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bottleneck(self.body(x).mean((2, 3))))


class MBConv(nn.Module):
    """EfficientNet's block: expansion, convolution by channel, squeeze-and-excitation, projection."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.expand = nn.Sequential(conv_norm(inputs, inner, 1), nn.SiLU())
        self.by_channel = nn.Sequential(conv_norm(inner, inner, 3, stride, groups=inner), nn.SiLU())
        squeezed = max(1, inputs // 4)
        self.gate = nn.Sequential(
            nn.Linear(inner, squeezed), nn.SiLU(), nn.Linear(squeezed, inner), nn.Sigmoid()
        )
        self.project = conv_norm(inner, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.by_channel(self.expand(x))
        y = self.project(y * self.gate(y.mean((2, 3)))[:, :, None, None])
        return y + x if self.residual else y


def small_efficientnet() -> nn.Sequential:
    """Three of EfficientNet's blocks with its 1000 outputs, for a smoke test."""
    blocks = MBConv(8, 8, 1, 1), MBConv(8, 16, 6, 2), MBConv(16, 16, 6, 1)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(conv_norm(3, 8, 3, 2), nn.SiLU(), *blocks, *pool, nn.Linear(16, 1000))


class LinearLatentAutoencoder(nn.Module):
    """Convolutions of stride 2 down to a vector, `decode` from it, and transposed convolutions up again: (B, 1, *size) volumes to
    (B, outputs, *size) logits. `size` must be divisible by 2 ** len(channels).
    """

    def __init__(
        self, size: Sequence[int], channels: Sequence[int], latent: int = 32, outputs: int = 2
    ) -> None:
        super().__init__()
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for inputs, width in zip((1, *channels), channels, strict=False):
            down += [nn.Conv3d(inputs, width, 3, 2, 1), nn.InstanceNorm3d(width), nn.PReLU()]
        # one value for each channel has no deviation to be divided by
        self.shape = (channels[-1], *(s >> len(channels) for s in size))
        if math.prod(self.shape[1:]) == 1:
            raise ValueError(f"size {tuple(size)} leaves one voxel after {len(channels)} halvings")
        decoded = (*channels[::-1], outputs)
        for k, (inputs, width) in enumerate(itertools.pairwise(decoded)):
            up.append(nn.ConvTranspose3d(inputs, width, 3, 2, 1, output_padding=1))
            up += [nn.InstanceNorm3d(width), nn.PReLU()] if k < len(channels) - 1 else []
        flat = math.prod(self.shape)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, latent))
        self.decode = nn.Linear(latent, flat)
        self.decoder = nn.Sequential(*up)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.encoder(x)
        return self.decoder(F.relu(self.decode(latent)).view(len(x), *self.shape))


class LeNet5(nn.Module):
    """3x32x32 images; two convolutions, 120 and 84 units with ReLU, and the head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        convolutions = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.body = nn.Sequential(
            *(convolutions[0], nn.ReLU(), nn.MaxPool2d(2), convolutions[1], nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU()),
        )
        self.hidden, self.head = nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.body(x))))
