"""Walk the autograd graph of a loss: the captured calls that it depends on, the nodes between, and ways past the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Call(NamedTuple):
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
    nodes: the whole graph of the loss, every node before those that follow it.
    """

    calls: list[Call]
    between: list[Any]
    past_calls: bool
    nodes: list[Any]


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
            for key, stored in metadata.items():
                number = numbers.get(id(key[0])) if isinstance(key, tuple) and len(key) == 2 else None
                if number is not None:
                    calls[number].append(Call(node, key[1], stored))
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
        walks.append(Walk(of_key, [n for n in order if behind[n] & bit], bool(past >> k & 1), order))
    return walks


def inputs_of_their_own(nodes: Sequence[Any], of_calls: Sequence[tuple[Any, Any]]) -> list[bool]:
    """For each (the node of a call, its input): whether the call alone takes that input in the graph made of `nodes`.

    The gradient by the input is the call's own then. A cast between the two, as autocast makes, is part of the call.
    """
    inputs = [(x.grad_fn, x.output_nr) for _, x in of_calls]
    takers = _takers(nodes, inputs)
    sole = [takers[edge][0] if edge[0] is not None and len(takers[edge]) == 1 else None for edge in inputs]
    casts = [(node, 0) for node in sole if node is not None and node.name() == "ToCopyBackward0"]
    of_casts = _takers(nodes, casts)
    return [
        node is call or (node is not None and of_casts.get((node, 0)) == [call])
        for node, (call, _) in zip(sole, of_calls, strict=True)
    ]


def _takers(nodes: Sequence[Any], edges: Sequence[Any]) -> dict[Any, list[Any]]:
    """The nodes that hand their gradient on to each edge."""
    takers: dict[Any, list[Any]] = {edge: [] for edge in edges}
    if takers:
        for node in nodes:
            for edge in node.next_functions:
                if edge in takers:
                    takers[edge].append(node)
    return takers


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
