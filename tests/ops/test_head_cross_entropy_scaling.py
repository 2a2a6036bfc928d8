"""head_cross_entropy in float16 and bfloat16 under a loss scale, which its forward pass does not know yet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import needs_native
from loss_scaling import GAPS, assert_scales_like_torch, confident_head, scaled_gradients
from torch import Tensor

import fam_ext
from fam_ext.ops import head_cross_entropy as module
from fam_ext.ops.head_cross_entropy import head_cross_entropy

pytestmark = [pytest.mark.on_devices, needs_native]
SIZES = [(64, 10, 16), (4096, 40, 8), (65536, 20, 4)]
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_at_every_scale(
    size: tuple[int, int, int], gap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, target = confident_head(*size, gap, dtype)
    run = lambda backend: lambda *t: head_cross_entropy(*t, target, strength=0.1, backend=backend)[0]  # noqa: E731
    for form in ("shifted", "pairwise"):
        monkeypatch.setattr(module, "choose_form", lambda *sizes: form)  # noqa: B023
        assert_scales_like_torch(run("native"), run("reference"), inputs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("gap", GAPS)
def test_gradient_of_the_loss_alone_is_as_good_as_torchs(gap: float, dtype: torch.dtype) -> None:
    inputs, target = confident_head(4096, 1000, 4, gap, dtype)

    def plain(logits: Tensor, features: Tensor, weight: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, target)

    ours = lambda *t: head_cross_entropy(*t, target, strength=0.0)[0]  # noqa: E731
    assert_scales_like_torch(ours, plain, inputs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_upstream_gradients_that_are_no_power_of_two(dtype: torch.dtype) -> None:
    """Rounded once, with the factor in float32: dividing a loss by three accumulation steps costs no digits."""
    inputs, target = confident_head(64, 10, 16, 2.0, dtype)
    run = lambda backend: lambda *t: head_cross_entropy(*t, target, strength=0.1, backend=backend)[0]  # noqa: E731
    assert_scales_like_torch(run("native"), run("reference"), inputs, (1 / 3, -1.0, 65535.0, 1e-3))


@pytest.mark.parametrize("scale", [2.0**-16, 1e-4])
def test_what_is_too_large_before_the_factor_is_known(scale: float) -> None:
    """A strength of 1e6 makes gradients beyond 65504 that a factor below 1 brings back."""
    inputs, target = confident_head(64, 10, 16, 1.0, torch.float16)
    run = lambda backend: lambda *t: head_cross_entropy(*t, target, strength=1e6, backend=backend)[0]  # noqa: E731
    made = scaled_gradients(run("native"), inputs, 1.0)
    assert not all(t.isfinite().all() for t in made)
    assert all(t.isfinite().all() for t in scaled_gradients(run("native"), inputs, scale))
    assert_scales_like_torch(run("native"), run("reference"), inputs, (scale,))


def test_gradients_wait_in_float32() -> None:
    """Also strided ones, and rows of features that begin anywhere."""
    for shape in ((7, 4), (2, 4, 3), (3, 36, 5)):
        logits, features, weight = (
            torch.randn(s, dtype=torch.float64).half()
            for s in (shape, (shape[0], *shape[2:], 9), (shape[1], 9))
        )
        target = torch.zeros(features.shape[:-1], dtype=torch.int64)
        options = None, -100, 0.0, True, 1.0, True, True, True, True, True
        made = torch.ops.fam_ext.head_cross_entropy_forward(
            logits, features[..., 1:], weight[:, 1:], target, *options
        )
        wide = (t.float() for t in (logits, features[..., 1:], weight[:, 1:]))
        expected = torch.ops.fam_ext.head_cross_entropy_forward(*wide, target, *options)
        assert all(
            a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(made, expected, strict=True)
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_mixed_precision_step(dtype: torch.dtype) -> None:
    """FAMLoss under autocast with a loss scale, confident and right: gradients of the layers before the head."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("autocast of the CPU")
    net = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 20))
    torch.nn.init.normal_(net[2].weight, std=2.0)
    x, scale = torch.randn(65536, 12), 2.0**14
    target, parameters = net(x).argmax(1), list(net.parameters())

    def gradients(backend: str, enabled: bool = True) -> list[Tensor]:
        criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), net[2], 0.1, backend=backend)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = criterion(net(x), target)
        criterion.detach()
        return [g.double() / scale for g in torch.autograd.grad(loss * scale, parameters)]

    exact = gradients("reference", enabled=False)
    for a, b, value in zip(gradients("auto"), gradients("reference"), exact, strict=True):
        assert (a - value).norm() <= 1.5 * (b - value).norm() + 1e-6 * value.norm()
