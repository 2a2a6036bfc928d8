"""What registrations share: gradients made in the forward pass are rounded once, and never differentiated silently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fam_ext.ops import _registration as registration
from fam_ext.ops._registration import gradient_dtype, hand_out, made_gradient


@pytest.mark.parametrize(
    ("dtype", "made"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ],
)
def test_the_dtype_of_a_gradient_that_waits_for_the_loss_scale(dtype: torch.dtype, made: torch.dtype) -> None:
    tensor = torch.ones(2, 3, dtype=dtype).t()
    assert gradient_dtype(tensor) == made
    gradient = made_gradient(tensor, True)
    assert gradient.shape == (3, 2) and gradient.is_contiguous() and gradient.dtype == made
    assert made_gradient(tensor, False).shape == (0,)


def test_gradients_are_handed_out_as_they_are_for_an_upstream_of_one() -> None:
    made = [torch.randn(3), None, torch.randn(2)]
    with torch.no_grad():
        for upstream in (torch.tensor(1.0), None):
            first, second, third = hand_out("op", made, [torch.float32, torch.float32, None], upstream)
            assert first is made[0] and second is None and third is None


def test_gradients_times_the_upstream_are_rounded_once() -> None:
    """Half of float16's smallest number survives until the loss scale has multiplied it."""
    made, scale = torch.tensor([2.0**-26, 1.0009765]), torch.tensor(2.0**10)
    with torch.no_grad():
        (handed,) = hand_out("op", [made], [torch.float16], scale)
    assert handed.dtype == torch.float16
    assert torch.equal(handed, (made.double() * 2.0**10).half()) and (handed > 0).all()
    with torch.no_grad():
        (small,) = hand_out("op", [made], [torch.float32], torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(small, 3 * made)


def test_differentiating_what_was_made_is_an_error() -> None:
    (handed,) = hand_out("the operation", [torch.ones(2)], [torch.float32], torch.tensor(2.0))
    assert handed.requires_grad and torch.equal(handed.detach(), torch.full((2,), 2.0))
    with pytest.raises(
        RuntimeError, match="the operation can be differentiated once only: its gradients were made"
    ):
        handed.sum().backward()


def test_a_backward_operation_without_a_derivative() -> None:
    library = torch.library.Library("fam_ext", "FRAGMENT")
    try:
        library.define("of_a_test_only_once(Tensor x) -> Tensor")
        library.impl("of_a_test_only_once", lambda x: 2 * x, "CPU")

        @registration.register_fake("of_a_test_only_once")
        def _(x: Tensor) -> Tensor:
            return torch.empty_like(x)

        registration.refuse_double_backward("of_a_test_only_once")
        x = torch.ones(2, requires_grad=True)
        z = torch.ops.fam_ext.of_a_test_only_once(x)
        assert torch.equal(z.detach(), torch.full((2,), 2.0))
        with pytest.raises(
            RuntimeError,
            match=r"fam_ext::of_a_test_only_once can be differentiated once only.*backend=.reference",
        ):
            z.sum().backward()
        assert torch.ops.fam_ext.of_a_test_only_once(torch.empty(3, device="meta")).shape == (3,)
    finally:
        library._destroy()


def test_products_between_launches_keep_their_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16), registration.triton_launches(torch.ones(1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
