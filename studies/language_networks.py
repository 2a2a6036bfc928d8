"""Small transformers of the language study: causal with a language model's head, or bidirectional with a classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and MLP, residual dropout behind each, as GPT-2's."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        y: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))
        return y


class Transformer(nn.Module):
    """(B, T) tokens to (B, T, vocabulary) logits by an embedding that head shares, or to (B, classes) from the tokens' mean."""

    def __init__(
        self, vocabulary: int, context: int, classes: int = 0, dropout: float = 0.0, width: int = 64, blocks: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, 4, not classes, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes or vocabulary, bias=bool(classes))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.05)
        if not classes:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.embedding(tokens) + self.position.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(1) if self.classes else x)
        return logits


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy) of windows in evaluation mode: of the next tokens, or of the labels."""
    training = model.training
    model.eval()
    loss = right = count = 0.0
    for number, rows in enumerate(tokens.split(64)):
        if labels is None:
            logits, wanted = model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        else:
            logits, wanted = model(rows), labels.split(64)[number]
        loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        right += float((logits.argmax(1) == wanted).sum())
        count += len(wanted)
    model.train(training)
    return loss / count, right / count
