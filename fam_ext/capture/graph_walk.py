"""Walk the autograd graph of a loss: the captured calls that it depends on, and the nodes between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of the layer in the graph of a loss: the node that made its output, which of its outputs, what was captured."""

    node: Any
    number: int
    stored: Any


def find(loss: Any, keys: Sequence[object]) -> list[tuple[list[Call], list[Any]]]:
    """For each key: the calls whose node holds (key, output number) in its metadata, and the nodes between them and `loss`.

    Between means: on a path from the loss to a call, the calls' own nodes excluded unless they lead to another one. One walk
    serves all keys and visits every node once.
    """
    numbers = {id(key): k for k, key in enumerate(keys)}
    calls: list[list[Call]] = [[] for _ in keys]
    between: list[list[Any]] = [[] for _ in keys]
    here: dict[Any, int] = {}  # bit k: this node is a call of key k
    behind: dict[Any, int] = {}  # bit k: a call of key k is behind this node
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [] if loss.grad_fn is None else [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        if done:
            bits = 0
            for n in following:
                bits |= behind.get(n, 0) | here.get(n, 0)
            behind[node] = bits
            order.append(node)
            continue
        if node in behind:
            continue
        behind[node] = 0
        metadata = node.metadata
        if metadata:
            for found, stored in metadata.items():
                number = numbers.get(id(found[0])) if isinstance(found, tuple) and len(found) == 2 else None
                if number is not None:
                    calls[number].append(Call(node, found[1], stored))
                    here[node] = here.get(node, 0) | 1 << number
        stack.append((node, True))
        stack.extend((n, False) for n in following if n not in behind)
    for node in reversed(order):
        bits = behind[node]
        for k, nodes in enumerate(between):
            if bits >> k & 1:
                nodes.append(node)
    return list(zip(calls, between, strict=True))
