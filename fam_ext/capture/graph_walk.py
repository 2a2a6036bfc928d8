"""Walk the autograd graph of a loss: the captured calls that it depends on, the nodes between, and ways past the calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Call:
    """One call of the layer in the graph of a loss: the node that made its output, which of its outputs, what was captured."""

    node: Any
    number: int
    stored: Any


class Walk(NamedTuple):
    """What the graph of a loss says of one layer.

    between: the nodes on a path from the loss to a call, the calls' own nodes excluded unless they lead to another one.
    past_calls: whether the loss reaches one of the layer's parameters on a way that holds none of its calls, as a weight
        penalty does, or a derivative of the network: the backward pass of a call multiplies with the weight again. `between` then
        holds the nodes on all paths to the parameters.
    """

    calls: list[Call]
    between: list[Any]
    past_calls: bool


def find(loss: Any, keys: Sequence[object], parameters: Sequence[Sequence[Any]] = ()) -> list[Walk]:
    """For each key: the calls whose node holds (key, output number) in its metadata, and what lies between them and `loss`.

    `parameters` holds the parameters of each key's layer that are looked for past the calls. One walk answers for all keys and
    visits every node once.
    """
    count = len(keys)
    numbers = {id(key): k for k, key in enumerate(keys)}
    wanted = {id(p): 1 << k for k, of_key in enumerate(parameters) for p in of_key}
    calls: list[list[Call]] = [[] for _ in keys]
    here: dict[
        Any, int
    ] = {}  # bit k: this node is a call of key k; bit count + k: it is a parameter of its layer
    behind: dict[Any, int] = {}  # the same of the nodes behind this one
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [] if loss.grad_fn is None else [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        if done:
            bits = 0
            for n in following:
                bits |= behind[n] | here.get(n, 0)
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
        if not following and wanted:
            bit = wanted.get(id(getattr(node, "variable", None)))
            if bit is not None:
                here[node] = here.get(node, 0) | bit << count
        stack.append((node, True))
        stack.extend((n, False) for n in following if n not in behind)
    order.reverse()  # every node before those that follow it
    past = _reached_past_calls(order, here, count) if wanted else 0
    walks = []
    for k, of_key in enumerate(calls):
        bit = 1 << k if not past >> k & 1 else (1 << k) | (1 << count + k)
        walks.append(Walk(of_key, [n for n in order if behind[n] & bit], bool(past >> k & 1)))
    return walks


def _reached_past_calls(order: Sequence[Any], here: dict[Any, int], count: int) -> int:
    """Bit k: from the first node of `order` a parameter of key k can be reached without meeting one of its calls."""
    if not order:
        return 0
    free = {order[0]: (1 << count) - 1}  # bit k: reached without meeting a call of key k
    past = 0
    for node in order:
        own = here.get(node, 0)
        bits = free.get(node, 0)
        past |= bits & own >> count
        bits &= ~own
        if bits:
            for n, _ in node.next_functions:
                if n is not None:
                    free[n] = free.get(n, 0) | bits
    return past
