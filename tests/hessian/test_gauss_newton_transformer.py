"""Positive forms before layer_norm, attention, GELU and SiLU: kappa and its gradient against the dense Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import fam_ext
from fam_ext.derivatives import taken_twice


class Block(nn.Module):
    """One pre-norm block on (B, T, 6), its mean over positions classified."""

    def __init__(self, activation: Any, causal: bool) -> None:
        super().__init__()
        self.first, self.qkv, self.last = nn.Linear(5, 6), nn.Linear(6, 18), nn.Linear(8, 3)
        self.norm, self.again, self.up = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 8)
        self.activation, self.causal = activation, causal

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        return self.last(self.activation(self.up(self.again(x))).mean(1))


def oracle(net: Block, name: str, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """kappa of the mean cross-entropy's Gauss-Newton matrix by the layer's weight, and its gradients by all parameters."""
    parameters = dict(net.named_parameters())
    weight = parameters[f"{name}.weight"]

    def of_weight(w: Tensor) -> Tensor:
        result: Tensor = functional_call(net, {**parameters, f"{name}.weight": w}, (x,))
        return result

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(of_weight)(weight)  # (B, classes, O, I)
        p = of_weight(weight).softmax(1)
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    blocks = torch.einsum("bkoi,bkl,blpi->op", jacobian, curvature, jacobian) / len(x)  # Tr over the inputs
    kappa = (blocks * (weight @ weight.T)).sum()
    return kappa, list(torch.autograd.grad(kappa, list(parameters.values()), allow_unused=True))


@pytest.mark.parametrize("least", [0, 10**9], ids=["ours", "torch's where there are both"])
@pytest.mark.parametrize("name", ["first", "qkv", "up"])
@pytest.mark.parametrize("kind", ["gelu", "gelu, tanh, causal", "silu"])
def test_the_dense_matrix(kind: str, name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken_twice, "_PAYS", least)
    activations = {"gelu": nn.GELU(), "gelu, tanh, causal": nn.GELU("tanh"), "silu": nn.SiLU()}
    net = Block(activations[kind], "causal" in kind).double()
    x, y = torch.randn(4, 5, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    criterion = fam_ext.FAMLoss.for_model(nn.CrossEntropyLoss(), net, name, strength=1.0, curvature="ggn")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        total = criterion(net(x), y)
    kappa, gradients = oracle(net, name, x)
    torch.testing.assert_close(criterion.last.flatness, kappa.detach(), rtol=1e-10, atol=0)
    plain = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    got = torch.autograd.grad(total, list(net.parameters()))
    for one, loss, term in zip(got, plain, gradients, strict=True):
        torch.testing.assert_close(
            one - loss, torch.zeros_like(one) if term is None else term, rtol=1e-8, atol=1e-11
        )
