"""The walk of a loss's graph: which calls it depends on, what lies between, ways past the calls, inputs of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext.capture import graph_walk


class Layer(nn.Linear):
    """Marks its calls in the graph, as the capturing hook does."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        if z.grad_fn is not None:
            z.grad_fn.metadata[(self, z.output_nr)] = x
        return z


def names(nodes: Any) -> list[str]:
    return [node.name().rstrip("0") for node in nodes]


def walk(loss: Tensor, layer: Layer) -> graph_walk.Walk:
    return graph_walk.find(loss, [layer], [[layer.weight]])[0]


def test_one_call() -> None:
    layer, x = Layer(3, 2), torch.randn(4, 3)
    z = layer(x)
    found = walk(F.cross_entropy(z.tanh(), torch.zeros(4).long()), layer)
    (call,) = found.calls
    assert call.node is z.grad_fn and call.number == 0 and call.stored is x
    assert names(found.between) == ["NllLossBackward", "LogSoftmaxBackward", "TanhBackward"]
    assert not found.past_calls
    assert len(found.nodes) > len(found.between) and found.nodes[: len(found.between)] == found.between


def test_nodes_on_no_path_to_a_call_are_not_between() -> None:
    layer, x = Layer(3, 2), torch.randn(4, 3, requires_grad=True)
    found = walk(layer(x.sin()).exp().sum() + x.cos().sum(), layer)
    assert names(found.between) == ["AddBackward", "SumBackward", "ExpBackward"]
    assert {"CosBackward", "SinBackward"} < set(names(found.nodes))


def test_no_call() -> None:
    layer, x = Layer(3, 2), torch.randn(4, 3, requires_grad=True)
    assert walk(x.exp().sum(), layer)[:3] == ([], [], False)
    assert walk(torch.ones(()), layer) == ([], [], False, [])


def test_several_calls_in_a_row() -> None:
    """A call's node that leads to another call is between the loss and that one."""
    layer, x = Layer(3, 3), torch.randn(4, 3)
    first = layer(x)
    second = layer(first.tanh())
    found = walk(second.exp().sum(), layer)
    assert {c.node for c in found.calls} == {first.grad_fn, second.grad_fn}
    assert names(found.between) == ["SumBackward", "ExpBackward", "AddmmBackward", "TanhBackward"]
    assert second.grad_fn in found.between and first.grad_fn not in found.between
    assert not found.past_calls


def test_several_calls_beside_each_other() -> None:
    layer = Layer(3, 2)
    a, b = layer(torch.randn(4, 3)), layer(torch.randn(4, 3))
    found = walk((a.sin() * b.cos()).sum(), layer)
    assert {c.node for c in found.calls} == {a.grad_fn, b.grad_fn} and not found.past_calls
    assert sorted(names(found.between)) == ["CosBackward", "MulBackward", "SinBackward", "SumBackward"]


def test_a_weight_penalty_is_a_way_past_the_calls() -> None:
    layer, x = Layer(3, 2), torch.randn(4, 3)
    found = walk(layer(x).exp().sum() + layer.weight.square().sum(), layer)
    assert found.past_calls and len(found.calls) == 1
    assert "PowBackward" in names(found.between)  # on the way to the parameter
    only = walk(layer.weight.square().sum(), layer)
    assert only.past_calls and not only.calls and names(only.between) == ["SumBackward", "PowBackward"]
    detached = walk(layer(x).exp().sum() + layer.weight.detach().square().sum(), layer)
    assert not detached.past_calls


def test_a_penalty_on_the_gradient_is_a_way_past_the_calls() -> None:
    """The backward pass of a call multiplies with the weight again."""
    layer, x = Layer(3, 2), torch.randn(4, 3, requires_grad=True)
    loss = layer(x).tanh().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    found = walk(loss + gradient.square().sum(), layer)
    assert found.past_calls and len(found.calls) == 1
    assert not walk(loss, layer).past_calls


def test_a_penalty_on_the_output_is_none() -> None:
    layer, x = Layer(3, 2), torch.randn(4, 3)
    z = layer(x)
    assert not walk(z.exp().sum() + z.square().sum(), layer).past_calls


def test_several_layers_in_one_walk() -> None:
    """Each one's own: a way past one's calls may go through another's."""
    first, second = Layer(3, 4), Layer(4, 2)
    h = first(torch.randn(5, 3))
    z = second(h.tanh())
    loss = z.exp().sum() + second.weight.square().sum()
    keys, parameters = [first, second], [[first.weight], [second.weight]]
    of_first, of_second = graph_walk.find(loss, keys, parameters)
    assert [c.node for c in of_first.calls] == [h.grad_fn] and [c.node for c in of_second.calls] == [
        z.grad_fn
    ]
    assert (of_first.past_calls, of_second.past_calls) == (False, True)
    assert "TanhBackward" in names(of_first.between) and "TanhBackward" not in names(of_second.between)
    assert z.grad_fn in of_first.between
    assert "PowBackward" in names(of_second.between) and "PowBackward" not in names(of_first.between)
    assert of_first.nodes is of_second.nodes


def test_every_node_comes_before_those_that_follow_it() -> None:
    layer, x = Layer(3, 3), torch.randn(4, 3, requires_grad=True)
    z = x
    for _ in range(4):
        z = layer(z).tanh() + z
    found = walk(z.sum(), layer)
    place = {node: k for k, node in enumerate(found.nodes)}
    assert len(place) == len(found.nodes)
    for node in found.nodes:
        assert all(place[node] < place[n] for n, _ in node.next_functions if n is not None)
    assert len(found.calls) == 4


def test_metadata_of_others() -> None:
    """Other keys in a node's metadata are passed over, and a key of an equal tuple of another layer."""
    layer, other, x = Layer(3, 2), Layer(3, 2), torch.randn(4, 3)
    z = layer(x)
    z.grad_fn.metadata["traceback_"] = ["a line"]
    z.grad_fn.metadata[(other, 0, 1)] = "three"
    assert [c.stored for c in walk(z.sum(), layer).calls] == [x]
    assert not walk(z.sum(), other).calls


def own(loss: Tensor, *calls: tuple[Tensor, Tensor]) -> list[bool]:
    nodes = graph_walk.find(loss, [])
    assert nodes == []
    order = graph_walk.find(loss, [object()])[0].nodes
    return graph_walk.inputs_of_their_own(order, [(z.grad_fn, x) for z, x in calls])


def test_inputs_of_their_own() -> None:
    layer, x = Layer(3, 3), torch.randn(4, 3, requires_grad=True)
    h = x.tanh()
    z = layer(h)
    assert own(z.exp().sum(), (z, h)) == [True]
    residual = z.exp() + h
    assert own(residual.sum(), (z, h)) == [False]  # two take h
    assert own(layer(x).sum(), (z, x)) == [False]  # a leaf, which no node made
    second = layer(z.tanh())
    middle = z.tanh()
    third = layer(middle)
    assert own(second.sum() + third.sum(), (z, h), (third, middle)) == [True, True]
    assert own(z.sum(), (third, middle)) == [False]  # a call that this loss does not depend on


def test_an_input_that_one_call_takes_twice() -> None:
    a = torch.randn(3, 3, requires_grad=True).exp()
    z = a @ a
    assert own(z.sum(), (z, a)) == [False]


def test_which_output_of_a_node() -> None:
    layer, x = Layer(3, 3), torch.randn(4, 6, requires_grad=True)
    left, right = x.tanh().split(3, 1)
    z = layer(left)
    assert own((z + right).sum(), (z, left)) == [True]  # right is another output of the same node
    assert own((z + left).sum(), (z, left)) == [False]


def test_a_cast_of_autocast_is_part_of_the_call() -> None:
    layer, x = Layer(3, 3), torch.randn(4, 3, requires_grad=True)
    h = x.tanh()
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(h)
        assert h.dtype == torch.float32 and z.dtype == torch.bfloat16
        assert own(z.float().sum(), (z, h)) == [True]
        assert own(z.float().sum() + h.sum(), (z, h)) == [False]
        cast = h.to(torch.bfloat16)
        again = F.linear(cast, layer.weight)
        assert own(again.sum() + cast.sum(), (again, h)) == [False]  # the cast itself has two takers
