"""Small definitions of well-known networks, for whole training steps. Plain torch, random weights, no pretraining.

Each has `middle` and `head`, the layers that FAM is measured on. Sources: a perceptron; ResNet-18 (He et al. 2016) with the 3x3
stem for 32x32 images; WideResNet-28 (Zagoruyko & Komodakis 2016); ViT-tiny (Touvron et al. 2021, DeiT-Ti: 12 blocks, width 192,
3 heads) with patches of 4 for 32x32 images; BERT-base's classification head (Devlin et al. 2019: pooler 768 -> 768, tanh,
768 -> classes) on two of its twelve blocks; a decoder with GPT-2's vocabulary (Radford et al. 2019), narrowed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Rows of 784 numbers, two hidden layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    @property
    def middle(self) -> nn.Module:
        return self[2]

    @property
    def head(self) -> nn.Module:
        return self[4]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """3x32x32 images; 11.2 million parameters at width 64."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for stage in range(4):
            for k in range(2):
                blocks.append(BasicBlock(inputs, width << stage, 2 if stage and not k else 1))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    @property
    def middle(self) -> nn.Module:
        return self.blocks[5].conv2  # the last convolution of the third stage

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + kept


class WideResNet(nn.Module):
    """WideResNet-28-2 by default: 3x32x32 images, 1.5 million parameters."""

    def __init__(self, classes: int = 10, depth: int = 28, widen: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks, inputs = [], 16
        for stage in range(3):
            for k in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, 16 * widen << stage, 2 if stage and not k else 1))
                inputs = 16 * widen << stage
        self.blocks, self.norm = nn.Sequential(*blocks), nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, classes)

    @property
    def middle(self) -> nn.Module:
        return self.blocks[len(self.blocks) // 3 * 2].conv2  # in the third stage

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Transformer block with the norms first."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """ViT-tiny by default: 3x32x32 images in patches of 4, 65 tokens."""

    def __init__(
        self, classes: int = 10, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    @property
    def middle(self) -> nn.Module:
        return self.blocks[len(self.blocks) * 3 // 4].fc1

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.fc(self.norm(self.blocks(x))[:, 0])


class BertClassifier(nn.Module):
    """BERT-base's width, vocabulary, pooler and classifier on fewer blocks (norms first, no dropout)."""

    def __init__(self, classes: int = 2, width: int = 768, depth: int = 2, vocabulary: int = 28996) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        self.norm, self.pooler, self.classifier = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, classes),
        )

    @property
    def middle(self) -> nn.Module:
        return self.blocks[-1].fc1

    @property
    def head(self) -> nn.Linear:
        return self.classifier

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.classifier(torch.tanh(self.pooler(self.norm(self.blocks(x))[:, 0])))


class LanguageModel(nn.Module):
    """A decoder with GPT-2's vocabulary; (batch, length) token numbers -> (batch * length, V) logits."""

    def __init__(self, width: int = 256, depth: int = 4, vocabulary: int = 50257, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64, causal=True) for _ in range(depth)))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    @property
    def middle(self) -> nn.Module:
        return self.blocks[-1].fc1

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def features(self, ids: Tensor) -> Tensor:
        """The head's input, (batch * length, width)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.norm(self.blocks(x)).flatten(0, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.features(ids))
