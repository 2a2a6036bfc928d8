"""What gram_trace and its operator refuse, and with which words."""

import pytest
import torch

from fam_ext.ops.gram_trace import gram_trace

X, S, W = torch.zeros(2, 6, 5, 7), torch.zeros(2, 4, 3, 5), torch.zeros(4, 6, 3, 3)
ROWS, OUT, LINEAR = torch.zeros(2, 5, 6), torch.zeros(2, 5, 4), torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((X.long(), S, W), {}, TypeError, "input must be a float32"),
        ((X, [1.0], W), {}, TypeError, "factors must be a float32"),
        ((X, S, W.long()), {}, TypeError, "weight must be a float32"),
        ((X, S.to("meta"), W), {}, ValueError, "factors must be on the device of input"),
        ((ROWS, OUT[:, :4], LINEAR), {}, ValueError, r"factors must be \(2, 5, 4\), or K of them"),
        ((ROWS[..., :5], OUT, LINEAR), {}, ValueError, r"input must be \(B, \*positions, 6\)"),
        ((ROWS[0, 0], OUT[0, 0], LINEAR), {}, ValueError, "input must be .*sample unsqueezed"),
        ((ROWS, OUT, LINEAR), {"stride": 2}, ValueError, "stride, padding.*left at their defaults"),
        ((X, S, W[0, 0, 0]), {}, ValueError, r"weight must be \(O, I\), or"),
        ((X, S[..., :4], W), {}, ValueError, r"factors must be \(2, 4, 3, 5\), or K of them"),
        ((X[0], S[0], W), {}, ValueError, r"input must be \(B, 6, \*spatial\) with 2 spatial axes"),
        ((X, S, W[:, :3]), {}, ValueError, r"input must be \(B, 3"),
        ((X, S, W), {"groups": 3}, ValueError, "groups must be a positive divisor of the 4 neurons, got 3"),
        ((X, S, W), {"groups": 2.0}, TypeError, "groups must be an integer"),
        ((X, S, W), {"stride": 0}, ValueError, "stride must be at least 1"),
        ((X, S, W), {"dilation": 3}, ValueError, "weight's kernel must be small enough"),
        ((X, S, W), {"stride": 2**63 - 1}, ValueError, "stride must be at most 16777216"),
        ((X, S, W), {"padding": 2**63 - 1}, ValueError, "padding must be at most 16777216"),
        ((X, S, W), {"padding": 2**40, "padding_mode": "replicate"}, ValueError, "padding must be at most"),
        ((X, S, W), {"dilation": 2**40}, ValueError, "dilation must be at most 16777216"),
        ((X, S, W[:, :, :0]), {}, ValueError, "weight must be of a kernel with at least one position"),
        ((X, S, W[:0]), {}, ValueError, r"factors must be \(2, 0, 3, 5\)"),
        ((X, S, W), {"padding": "full"}, ValueError, "padding must be one of 'same', 'valid'"),
        ((X, S, W), {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        ((X, S, W), {"form": "pairs"}, ValueError, "form must be one of 'auto', 'direct', 'gram'"),
        ((X, S, W), {"weighted": "no"}, TypeError, "weighted must be True or False, got 'no'"),
        ((X, S, W), {"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
        ((X, S, W), {"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(args, kwargs, error, match):
    with pytest.raises(error, match="gram_trace: " + match):
        gram_trace(*args, **kwargs)


CHUNK, FACTORS = torch.zeros(2, 1, 3, 5), torch.zeros(1, 2, 1, 4, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"input": CHUNK[0]},
        {"input": CHUNK[:1]},
        {"factors": FACTORS[0]},
        {"gram": torch.zeros(1, 4, 3)},
        {"form": "pairs"},
        {"kernel_size": [0]},
        {"kernel_size": [1, 1]},
        {"stride": [0]},
        {"stride": [2**63 - 1]},
        {"padding": [-1]},
        {"padding": [2**63 - 1]},
        {"dilation": [2**24 + 1]},
    ],
    ids=str,
)
def test_operator_checks_its_own_arguments(change):
    arguments = {
        "input": CHUNK,
        "factors": FACTORS,
        "gram": None,
        "kernel_size": [1],
        "stride": [1],
        "padding": [0],
        "dilation": [1],
        "form": "direct",
        "max_bytes": 1,
    }
    wanted = dict.fromkeys(("grad_input", "grad_factors", "grad_gram"), True)
    arguments = {**arguments, **change}
    with pytest.raises(ValueError, match="gram_trace: "):
        torch.ops.fam_ext.gram_trace(**arguments, keep=False)
    with pytest.raises(ValueError, match="gram_trace_backward: "):
        saved = torch.zeros(2, 1, 1, 4, 3)
        torch.ops.fam_ext.gram_trace_backward(torch.zeros(1, 2), **arguments, saved=saved, **wanted)


@pytest.mark.parametrize(
    ("grad", "saved", "argument"),
    [
        (torch.zeros(1, 2), torch.zeros(0), "saved must have shape"),
        (torch.zeros(1, 2), torch.zeros(2, 1, 1, 4, 4), "saved must have shape"),
        (torch.zeros(1, 2), torch.zeros(2, 1, 1, 4, 3, dtype=torch.float64), "saved must have dtype"),
        (torch.zeros(2, 1), torch.zeros(2, 1, 1, 4, 3), "grad must have shape"),
    ],
)
def test_backward_operator_checks_its_own_arguments(grad, saved, argument):
    window = ([1], [1], [0], [1], "direct", 1)
    with pytest.raises(ValueError, match=f"gram_trace_backward: {argument}"):
        torch.ops.fam_ext.gram_trace_backward(grad, CHUNK, FACTORS, None, saved, *window, True, True, False)


def test_triton_kernels_do_not_sum_in_float64():
    with pytest.raises(ValueError, match="gram_trace: form must be another one for float64"):
        torch.ops.fam_ext.gram_trace(
            CHUNK.double(), FACTORS, None, [1], [1], [0], [1], "gram_tiles", 1, False
        )
