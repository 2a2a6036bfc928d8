"""Small networks: an MLP, CNNs for images and series with batch_norm, and a transformer over rows or time steps.

Every layer is nn.Linear or nn.Conv, each called once, so that any of them can be regularized by name. `noise` is called on the
input of every layer but the first: dropout or feature noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Which = Literal["head", "hidden", "first", "all", "inner"]
Noise = Callable[[], nn.Module]


class GaussianNoise(nn.Module):
    """Adds deviation * N(0, 1) to features in training."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.deviation * torch.randn_like(x) if self.training else x


def mlp(shape: torch.Size, classes: int, noise: Noise = nn.Identity) -> nn.Sequential:
    """D - 256 - 128 - classes."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(shape.numel(), 256), nn.ReLU(), noise()),
        *(nn.Linear(256, 128), nn.ReLU(), noise()),
        nn.Linear(128, classes),
    )


def mlp_bottleneck(shape: torch.Size, classes: int, noise: Noise = nn.Identity) -> nn.Sequential:
    """The MLP with a linear layer of 64 units before its head, as the paper inserts it: no activation between the two."""
    *body, _ = mlp(shape, classes, noise)
    return nn.Sequential(*body, nn.Linear(128, 64), nn.Linear(64, classes))


def cnn(shape: torch.Size, classes: int, noise: Noise = nn.Identity) -> nn.Sequential:
    """Two convolutions with batch_norm, of images or of series, and two linear layers."""
    if len(shape) == 3:
        convolution, norm, pool, size = nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d(4), 16
    else:
        convolution, norm, pool, size = nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d(8), 8
    kernel, step = (3, 1) if len(shape) == 3 else (7, 2)
    return nn.Sequential(
        *(convolution(shape[0], 16, kernel, step, padding=kernel // 2), norm(16), nn.ReLU(), noise()),
        *(
            convolution(16, 32, kernel, 2, padding=kernel // 2),
            norm(32),
            nn.ReLU(),
            pool,
            nn.Flatten(),
            noise(),
        ),
        *(nn.Linear(32 * size, 64), nn.ReLU(), noise()),
        nn.Linear(64, classes),
    )


class Attention(nn.Module):
    """Self-attention from linear layers, written out: it can be differentiated twice."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(samples, tokens, width))
        return out


class Block(nn.Module):
    """Attention and an MLP, each behind layer_norm and on a residual branch."""

    def __init__(self, width: int, noise: Noise) -> None:
        super().__init__()
        self.norm1, self.attention, self.noise1 = nn.LayerNorm(width), Attention(width, 4), noise()
        self.norm2, self.fc1, self.noise2, self.fc2 = (
            nn.LayerNorm(width), nn.Linear(width, 2 * width), noise(), nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.noise1(self.attention(self.norm1(x)))
        out: Tensor = x + self.fc2(self.noise2(torch.nn.functional.gelu(self.fc1(self.norm2(x)))))
        return out


class Transformer(nn.Module):
    """Tokens are image rows, or stretches of a series (16 at most); two blocks; the mean token goes to the head."""

    def __init__(self, shape: torch.Size, classes: int, noise: Noise = nn.Identity, width: int = 32) -> None:
        super().__init__()
        length = shape[-2] if len(shape) == 3 else shape[-1]
        self.tokens = min(length, 16)
        self.stretch = -(-length // self.tokens)
        self.embed = nn.Linear(shape.numel() // length * self.stretch, width)
        self.position = nn.Parameter(torch.randn(self.tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, noise) for _ in range(2)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        by_step = x.flatten(1, 2) if x.dim() == 4 else x.transpose(1, 2)  # (B, length, numbers)
        missing = self.tokens * self.stretch - by_step.shape[1]
        by_step = torch.nn.functional.pad(by_step, (0, 0, 0, missing))
        tokens = self.embed(by_step.reshape(len(x), self.tokens, -1)) + self.position
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp, "mlp_bottleneck": mlp_bottleneck, "cnn": cnn, "transformer": Transformer,
}  # fmt: skip


def layer_names(model: nn.Module, which: Which) -> list[str]:
    """Names of the layers to regularize: "inner" leaves out the one that reads the input, where noise is augmentation."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    chosen = {
        "head": names[-1:], "hidden": [names[len(names) // 2]], "first": names[:1], "all": names, "inner": names[1:],
    }  # fmt: skip
    return chosen[which]
