"""Autograd nodes of a tensor, and float64 leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def nodes_of(t: Tensor) -> Iterator[Any]:
    stack, seen = [t.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
            yield node
