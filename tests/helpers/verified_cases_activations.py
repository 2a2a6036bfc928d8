"""Activations and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_cases_base import Case, Tail


def _relu_in_place(z: Tensor) -> Tensor:
    return torch.relu_(z)


CASES = [
    Case("ReLU", nn.ReLU),
    Case("ReLU", lambda: _relu_in_place, variant="in place"),
    Case("LeakyReLU", lambda: nn.LeakyReLU(0.2)),
    Case("LeakyReLU", lambda: nn.LeakyReLU(0.2, inplace=True), variant="in place"),
    Case("PReLU", nn.PReLU),
    Case("PReLU", lambda: nn.PReLU(3), (2, 3, 4), "by channel"),
    Case("RReLU", lambda: nn.RReLU().eval(), variant="evaluation"),
    Case("RReLU", nn.RReLU, variant="training, same slopes in every product"),
    Case("ELU", lambda: nn.ELU(0.7)),
    Case("ELU", lambda: nn.ELU(0.7, inplace=True), variant="in place"),
    Case("SELU", nn.SELU),
    Case("CELU", lambda: nn.CELU(0.7)),
    Case("GELU", nn.GELU),
    Case("GELU", lambda: nn.GELU("tanh"), variant="tanh"),
    Case("SiLU", nn.SiLU),
    Case("Mish", nn.Mish),
    Case("Hardswish", nn.Hardswish),
    Case("Hardswish", lambda: lambda z: F.hardswish(4 * z), variant="every piece"),
    Case("Hardsigmoid", nn.Hardsigmoid),
    Case("Hardsigmoid", lambda: lambda z: F.hardsigmoid(4 * z), variant="every piece"),
    Case("Hardtanh", nn.Hardtanh),
    Case("ReLU6", nn.ReLU6),
    Case("ReLU6", lambda: lambda z: F.relu6(4 * z), variant="every piece"),
    Case("Softplus", nn.Softplus),
    Case("Softplus", lambda: nn.Softplus(2.0, 1.0), variant="beta, threshold"),
    Case("Softsign", nn.Softsign),
    Case("Softshrink", nn.Softshrink),
    Case("Hardshrink", nn.Hardshrink),
    Case("Tanhshrink", nn.Tanhshrink),
    Case("Tanh", nn.Tanh),
    Case("Tanh", lambda: lambda z: torch.tanh_(z), variant="in place"),
    Case("Sigmoid", nn.Sigmoid),
    Case("LogSigmoid", nn.LogSigmoid),
    Case("Threshold", lambda: nn.Threshold(0.1, 0.7)),
    Case("GLU", nn.GLU),
    Case("GLU", lambda: lambda z: F.glu(z, 0), variant="other dimension"),
    Case("Softmax", lambda: nn.Softmax(-1)),
    Case("Softmax2d", nn.Softmax2d, (2, 3, 2, 4)),
    Case("LogSoftmax", lambda: nn.LogSoftmax(-1)),
    Case("Softmin", lambda: nn.Softmin(-1)),
    Case("F.gumbel_softmax", lambda: lambda z: F.gumbel_softmax(z), variant="same noise in every product"),
    Case("SwiGLU", lambda: Tail(lambda m, z: F.silu(m.a(z)) * m.b(z), a=nn.Linear(4, 3), b=nn.Linear(4, 3))),
    Case("Dropout", lambda: nn.Dropout(0.4), variant="same mask in every product"),
    Case("Dropout", lambda: nn.Dropout(0.4).eval(), variant="evaluation"),
    Case("Dropout1d", lambda: nn.Dropout1d(0.4), (3, 3, 4), "same mask in every product"),
    Case("Dropout2d", lambda: nn.Dropout2d(0.4), (3, 3, 2, 4), "same mask in every product"),
    Case("Dropout3d", lambda: nn.Dropout3d(0.4), (3, 3, 2, 1, 4), "same mask in every product"),
    Case("AlphaDropout", lambda: nn.AlphaDropout(0.4), variant="same mask in every product"),
    Case("FeatureAlphaDropout", lambda: nn.FeatureAlphaDropout(0.4), (3, 3, 4), "same mask in every product"),
    Case(
        "torch.native_dropout",
        lambda: lambda z: torch.native_dropout(z, 0.4, True)[0],
        variant="same mask in every product",
    ),
]
