"""The projections of nn.MultiheadAttention, which multiplies with their weights without calling a layer.

Its forward pass hands all weights to torch.nn.functional.multi_head_attention_forward. in_proj is one linear layer, the packed
one of query, key and value, where all three are the same tensor; projections of different tensors are layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fam_ext.errors import UnsupportedError
from fam_ext.layers.linear_map import LinearMap

PARTS = ("in_proj", "out_proj")
NEVER_CALLED = "nn.MultiheadAttention multiplies with its weight without calling it; method='noise' has it"


class Projection:
    """in_proj or out_proj of an attention, in the place of a layer.

    Raises UnsupportedError for a subclass of nn.MultiheadAttention with a forward of its own.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> [(str(p), tuple(p.weight.shape)) for p in parts("example", attention)]
    [('in_proj of MultiheadAttention', (12, 4)), ('out_proj of MultiheadAttention', (4, 4))]
    """

    def __init__(self, caller: str, attention: nn.Module, part: str) -> None:
        if type(attention).forward is not nn.MultiheadAttention.forward:
            raise UnsupportedError(
                f"{caller}: {type(attention).__name__} is an nn.MultiheadAttention with a forward of its own, in which the "
                f"products with {part} are not known; use nn.MultiheadAttention itself"
            )
        self.attention: Any = attention
        self.part = part

    @property
    def key(self) -> tuple[int, str]:
        """The same for all objects that stand for this projection."""
        return id(self.attention), self.part

    @property
    def training(self) -> bool:
        """Whether the attention is in training mode."""
        training: bool = self.attention.training
        return training

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, and the bias."""
        if self.part == "out_proj":
            yield from self.attention.out_proj.parameters()
            return
        for name, parameter in self.attention._parameters.items():
            if parameter is not None and (name.startswith("in_proj") or name.endswith("proj_weight")):
                yield parameter

    @property
    def weight(self) -> Tensor:
        """(3E, E) or (E, E); of several weights for query, key and value the first."""
        return next(self.parameters())

    @property
    def inputs(self) -> tuple[int, int, int]:
        """Fan-in of the projections of query, key and value."""
        return self.attention.embed_dim, self.attention.kdim, self.attention.vdim

    def linear_map(self, caller: str) -> LinearMap:
        """The projection as a linear layer of E features, by its sizes alone."""
        size: int = self.attention.embed_dim
        return LinearMap(caller, sizes(size, 3 * size if self.part == "in_proj" else size))

    def __repr__(self) -> str:
        return f"{self.part} of {type(self.attention).__name__}"


def sizes(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without memory."""
    return nn.Linear(inputs, outputs, device="meta")


def parts(caller: str, layer: Any) -> list[Any]:
    """The projections of an nn.MultiheadAttention; any other layer itself."""
    if not isinstance(layer, nn.MultiheadAttention):
        return [layer]
    return [Projection(caller, layer, part) for part in PARTS]


def identity(layer: Any) -> Any:
    """A key of a module or a projection."""
    return layer.key if isinstance(layer, Projection) else id(layer)
