"""Names and integers of autograd nodes."""

from __future__ import annotations

import torch

from fam_ext.derivatives import nodes


def test_names() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    node = x.transpose(-1, -2).grad_fn
    assert nodes.bare(node.name()) == nodes.readable(node.name()) == "TransposeBackward"
    assert nodes.signed(node._saved_dim0) == -1 and nodes.signed(3) == 3
    assert nodes.readable("torch::autograd::CppNode<a::(anonymous namespace)::B>") == "a::B"
    assert nodes.readable("torch::autograd::CopySlices") == "torch::autograd::CopySlices"
