"""Second derivatives of GELU, SiLU, layer_norm and attention: against torch's own in float64, attention's against the formula
written with matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_nodes import nodes_of, randn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fam_ext.derivatives import taken_twice, twice_smooth

pytestmark = pytest.mark.on_devices


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken_twice, "_PAYS", 0)


def both(make: Callable[[], Tensor], sources: list[Tensor], by: list[Tensor], name: str) -> None:
    """Derivatives of <v, sin y> by `by`, and those of their weighted sum of sines by all sources: ours and torch's own."""
    results = []
    for ours in (True, False):
        torch.manual_seed(3)
        y = make()
        loss = (torch.randn(y.shape, dtype=y.dtype) * y.sin()).sum()
        if ours:
            with taken_twice.replaced(list(nodes_of(loss)), False):
                first = torch.autograd.grad(loss, by, create_graph=True)
        else:
            first = torch.autograd.grad(loss, by, create_graph=True)
        total: Any = sum((torch.randn(t.shape, dtype=t.dtype) * t.sin()).sum() for t in first)
        assert (name in {n.name() for n in nodes_of(total)}) is ours
        results.append([*first, *torch.autograd.grad(total, sources)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["gelu", "gelu, tanh", "silu"])
def test_activations(name: str) -> None:
    x, w = randn(4, 5), randn(5, 30)
    f = {"gelu": F.gelu, "gelu, tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}[name]
    both(lambda: f(3 * x @ w), [x, w], [x], "_ActivationBackward")


@pytest.mark.parametrize("name", ["gelu", "gelu, tanh", "silu"])
def test_activations_far_out_and_at_zero(name: str) -> None:
    x = torch.tensor([-90.0, -12.0, -1.0, 0.0, 1e-8, 2.0, 15.0, 80.0], dtype=torch.float64).requires_grad_()
    f = {"gelu": F.gelu, "gelu, tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}[name]
    both(lambda: f(x), [x], [x], "_ActivationBackward")


@pytest.mark.skipif(twice_smooth._native is None, reason="needs the compiled library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_in_one_pass(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled pass against plain PyTorch in float64, over all of the line, in any layout that the three tensors share."""
    kind = twice_smooth._KINDS[name]
    line = torch.cat([torch.linspace(-40, 40, 20011), torch.tensor([-90.0, 90.0, 0.0, -0.0, 1e-8])]).to(dtype)
    for x in (
        line,
        line[:20012].view(4, 5003),
        torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
    ):
        upstream, grad = torch.randn_like(x), torch.randn_like(x)
        got = twice_smooth._of_activation(kind, upstream, grad, x, True, True)
        assert twice_smooth._native(name, upstream, grad, x, True, True) is not None
        with monkeypatch.context() as patch:
            patch.setattr(twice_smooth, "_native", None)
            given = [t.double() for t in (upstream, grad, x)]
            want = twice_smooth._of_activation(kind, *given, True, True)
        near = {"rtol": 1e-5, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
        for ours, exact in zip(got, want, strict=True):
            assert ours is not None and exact is not None and ours.stride() == x.stride()
            torch.testing.assert_close(ours, exact.to(dtype), **near)
        for wanted in ((True, False), (False, True)):
            alone = twice_smooth._of_activation(kind, upstream, grad, x, *wanted)
            torch.testing.assert_close(
                alone, tuple(t if w else None for t, w in zip(got, wanted, strict=True))
            )
    for other in (
        upstream.expand(2, *upstream.shape)[0].contiguous(),
        upstream.half(),
    ):  # of another layout or dtype
        assert twice_smooth._native(name, other, grad, x, True, True) is None


@pytest.mark.parametrize(
    "shape, normalized", [((6, 5), (5,)), ((2, 3, 4, 5), (4, 5)), ((1, 7), (7,))], ids=str
)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(shape: tuple[int, ...], normalized: tuple[int, ...], affine: bool) -> None:
    x = randn(*shape)
    weight, bias = (randn(*normalized), randn(*normalized)) if affine else (None, None)
    sources = [x, weight, bias] if weight is not None and bias is not None else [x]
    both(lambda: F.layer_norm(2 * x + 1, normalized, weight, bias), sources, [x], "_LayerNormBackward")


def test_layer_norm_of_no_rows() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    y = F.layer_norm(x, (3,))
    with taken_twice.replaced(list(nodes_of(y)), False):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert dx.shape == x.shape


ATTENTION: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "self": ((2, 3, 5, 4), (2, 3, 5, 4), {}),
    "causal": ((2, 3, 5, 4), (2, 3, 5, 4), {"is_causal": True}),
    "other lengths, a scale": ((2, 3, 4, 4), (2, 3, 6, 4), {"scale": 0.7}),
    "a mask": ((2, 3, 4, 4), (2, 3, 6, 4), {"attn_mask": "additive"}),
    "a row without keys": ((2, 3, 4, 4), (2, 3, 6, 4), {"attn_mask": "boolean"}),
    "grouped queries": ((2, 6, 5, 4), (2, 2, 5, 4), {"enable_gqa": True}),
}


def of_attention(name: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    of_q, of_kv, options = ATTENTION[name]
    options = dict(options)
    q, k, v = randn(*of_q), randn(*of_kv), randn(*of_kv)
    if options.get("attn_mask") == "additive":
        options["attn_mask"] = torch.randn(of_q[2], of_kv[2], dtype=torch.float64)
    elif "attn_mask" in options:
        mask = torch.rand(of_q[2], of_kv[2]) < 0.6
        mask[1] = False
        options["attn_mask"] = mask
    return lambda: F.scaled_dot_product_attention(q, k, v, **options), [q, k, v]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("by", [(0, 1, 2), (0,), (1, 2)], ids=str)
def test_attention(name: str, by: tuple[int, ...]) -> None:
    """torch has no second derivative of the flash kernel; that of the composed form is compared with."""
    make, sources = of_attention(name)
    results = []
    for ours in (True, False):
        torch.manual_seed(3)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if ours else SDPBackend.MATH):
            y = make()
        loss = (torch.randn(y.shape, dtype=y.dtype) * y.sin()).sum()
        wanted = [sources[i] for i in by]
        with taken_twice.replaced(list(nodes_of(loss)), False):
            first = torch.autograd.grad(loss, wanted, create_graph=True)
        total: Any = sum((torch.randn(t.shape, dtype=t.dtype) * t.sin()).sum() for t in first)
        assert ("_AttentionBackward" in {n.name() for n in nodes_of(total)}) is ours
        results.append([t.nan_to_num() for t in (*first, *torch.autograd.grad(total, sources))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_with_dropout_is_left_to_the_refusal(dropout: float) -> None:
    name = "ScaledDotProductFlashAttentionForCpuBackward0"
    node = SimpleNamespace(name=lambda: name, _saved_dropout_p=dropout)
    assert taken_twice.needs_no_correction(node, True) is (dropout == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Sums in float32; the results in the dtypes of their sources, as near to float64 as the dtype allows."""
    torch.manual_seed(0)
    sources = [randn(2, 3, 8), randn(8), randn(8), randn(2, 3, 8)]

    def third(of: torch.dtype) -> list[Tensor]:
        x, weight, bias, v = (t.detach().to(dtype).to(of).requires_grad_() for t in sources)
        y = F.gelu(F.layer_norm(x, (8,), weight, bias))
        y = F.scaled_dot_product_attention(*[F.silu(y).unsqueeze(1)] * 3).squeeze(1)
        with taken_twice.replaced(list(nodes_of(y)), False):
            (dx,) = torch.autograd.grad((y * v).sum(), x, create_graph=True)
        return [dx, *torch.autograd.grad(dx.square().sum(), [x, weight, bias, v])]

    for got, want in zip(third(dtype), third(torch.float64), strict=True):
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < 20 * torch.finfo(dtype).eps
