"""What patch_sqnorm and its operator refuse, and with which words."""

import pytest
import torch
from inputs import needs_native

from fam_ext.ops.patch_sqnorm import patch_sqnorm

pytestmark = pytest.mark.on_devices

X = torch.zeros(2, 6, 5, 7)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((X.long(), 3), {}, TypeError, "input must be a float32"),
        (([1.0], 3), {}, TypeError, "input must be a float32"),
        ((X[0, 0, 0], 3), {}, ValueError, "input must be .*spatial.*shape \\(7,\\)"),
        ((X[None, None], 3), {}, ValueError, "input must be"),
        ((X[0, 0], 3), {}, ValueError, "kernel_size must be .*unsqueeze.*got 3"),
        ((X[0, 0], (3,)), {}, ValueError, "kernel_size must be .*got \\(3,\\)"),
        ((X, (3,)), {}, ValueError, "kernel_size must be an integer or 2 integers"),
        ((X, 0), {}, ValueError, "kernel_size must be at least 1, got 0"),
        ((X, 3.0), {}, TypeError, "kernel_size must be an integer"),
        ((X, (3, 1.5)), {}, TypeError, "kernel_size must be made of integers"),
        ((X, True), {}, TypeError, "kernel_size must be an integer"),
        ((X, (6, 3)), {}, ValueError, "kernel_size must be small enough .*axis 0: extent 6, size 5"),
        ((X, 3), {"dilation": 3}, ValueError, "kernel_size must be small enough .*extent 7, size 5"),
        ((X[:, :, :0], 1), {}, ValueError, "kernel_size must be small enough"),
        ((X, 3), {"stride": 0}, ValueError, "stride must be at least 1"),
        ((X, 3), {"stride": (1, 1, 1)}, ValueError, "stride must be an integer or 2"),
        ((X, 3), {"dilation": (1, -1)}, ValueError, "dilation must be at least 1"),
        ((X, 2**24 + 1), {}, ValueError, "kernel_size must be at most 16777216"),
        ((X, 2**40), {"padding": 2**40}, ValueError, "kernel_size must be at most 16777216"),
        ((X, 2), {"padding": 2**63 - 1, "dilation": 2}, ValueError, "padding must be at most 16777216"),
        ((X, 2), {"padding": (0, 2**80)}, ValueError, "padding must be at most 16777216"),
        ((X, 2), {"padding": 2**63 - 1, "padding_mode": "replicate"}, ValueError, "padding must be at most"),
        ((X, 2), {"stride": 2**63 - 1}, ValueError, "stride must be at most 16777216"),
        ((X, 1), {"dilation": 2**62}, ValueError, "dilation must be at most 16777216"),
        ((X, 3), {"groups": 2**70}, ValueError, "groups must be a positive divisor"),
        ((X, 3), {"padding": -1}, ValueError, "padding must be at least 0"),
        ((X, 3), {"padding": "full"}, ValueError, "padding must be one of 'same', 'valid'"),
        ((X, 3), {"padding": "same", "stride": 2}, ValueError, "stride must be 1 with padding='same'"),
        ((X, 3), {"groups": 4}, ValueError, "groups must be a positive divisor of the 6 channels.*got 4"),
        ((X, 3), {"groups": 0}, ValueError, "groups must be a positive divisor"),
        ((X, 3), {"groups": 2.0}, TypeError, "groups must be an integer"),
        ((X, 3), {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        (
            (X, 3),
            {"padding": 5, "padding_mode": "reflect"},
            ValueError,
            "padding must be at most 4 .*'reflect'",
        ),
        (
            (X, 3),
            {"padding": 6, "padding_mode": "circular"},
            ValueError,
            "padding must be at most 5 .*'circular'",
        ),
        ((X, 3), {"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(args, kwargs, error, match):
    with pytest.raises(error, match="patch_sqnorm: " + match):
        patch_sqnorm(*args, **kwargs)


@needs_native
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ([3], [1, 1], [0, 0], [1, 1], 1),
        ([0, 3], [1, 1], [0, 0], [1, 1], 1),
        ([6, 3], [1, 1], [0, 0], [1, 1], 1),
        ([3, 3], [1, 1], [0, 0], [1, 1], 4),
        ([3, 3], [1, 1], [0, 0], [1, 1], 0),
        ([2, 2], [1, 1], [2**63 - 1] * 2, [2, 2], 1),
        ([2, 2], [1, 1], [0, 2**24 + 1], [1, 1], 1),
        ([2, 2], [2**63 - 1] * 2, [0, 0], [1, 1], 1),
        ([2, 2], [1, 0], [0, 0], [1, 1], 1),
        ([2**62, 2**62], [1, 1], [0, 0], [4, 4], 1),
        ([2, 2], [1, 1], [0, -1], [1, 1], 1),
    ],
)
def test_operator_checks_its_own_arguments(kernel, stride, padding, dilation, groups):
    operation, backward = torch.ops.fam_ext.patch_sqnorm, torch.ops.fam_ext.patch_sqnorm_backward
    with pytest.raises(ValueError, match="patch_sqnorm: "):
        operation(X, kernel, stride, padding, dilation, groups)
    with pytest.raises(ValueError, match="patch_sqnorm: "):
        backward(torch.zeros(2, 1, 4, 6), X, kernel, stride, padding, dilation, groups)


@needs_native
def test_backward_checks_its_gradient():
    window = ([3, 3], [1, 1], [0, 0], [1, 1], 1)
    for grad in (torch.zeros(2, 1, 5, 7), torch.zeros(2, 1, 3, 5, dtype=torch.float64), torch.zeros(0)):
        with pytest.raises(ValueError, match="patch_sqnorm_backward: grad must have shape"):
            torch.ops.fam_ext.patch_sqnorm_backward(grad, X, *window)
    with pytest.raises(TypeError, match="patch_sqnorm: input must be a floating tensor"):
        torch.ops.fam_ext.patch_sqnorm(X.long(), *window)
