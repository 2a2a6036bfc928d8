"""FlatnessNoise: relative flatness by noise on a layer's input, as a module to put before the layer."""

from __future__ import annotations

import math
import numbers
import sys

import torch
from torch import Tensor, nn

from fam_ext import _checks

_NAME = "FlatnessNoise"


class FlatnessNoise(nn.Module):
    r"""The dropout of relative flatness: put it before a linear layer, where nn.Dropout would go.

    In training mode every row x of the input (its last dimension, I numbers) becomes

        x + sqrt(2 * strength) * ||x|| * r,      r ~ N(0, 1_I)

    With a linear layer behind it and one row per sample the expected loss is loss + strength * kappa + O(strength^2), and so is
    its gradient, where kappa = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'}) is the layer's relative flatness (Petzka et al. 2021,
    Definition 3): the layer's output moves by W ||x|| r, which has the covariance 2 * strength * ||x||^2 W W^T. No second
    derivative is taken, and the layer may be any module that is linear in its input. The loss of a step is the perturbed one. In
    evaluation mode, and with strength 0, the input is returned as it is.

    What else it may regularize:

    - Several rows per sample, (B, tokens, I): each row has its own draw. That is kappa without the terms between different rows
      of one sample; ``FAMLoss(..., method="noise")`` has them, and takes convolutions.
    - Samples that interact later, as by batch_norm in training mode: kappa without the terms between different samples.
    - Several layers behind one FlatnessNoise (the projections of an attention): the sum of their kappas, and terms between them.

    Args:
        strength: finite and at least 0. It may be set at any time, ``noise.strength = 0.01``, without torch.compile compiling
            again, except when it changes from or to 0. It has no place in the state_dict.

    Shapes: (*, I) to (*, I), of the same dtype.

    Raises:
        TypeError: a strength that is no number, an input that is not floating-point.
        ValueError: a strength that is negative or not finite.

    Sources: H. Petzka et al., "Relative Flatness and Generalization", NeurIPS 2021 (arXiv 2001.00939): relative flatness measures
    robustness to changes of the features in proportion to them (feature robustness). H. Zhang et al., "Noise stability
    optimization", 2024 (arXiv 2306.08553), regularizes the Hessian's trace by noise on the weights.

    >>> import torch
    >>> from torch import nn
    >>> from fam_ext.flatness_noise import FlatnessNoise
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), FlatnessNoise(0.01), nn.Linear(16, 3))
    >>> x = torch.randn(4, 8)
    >>> bool((model(x) == model(x)).all())
    False
    >>> model = model.eval()
    >>> bool((model(x) == model(x)).all())
    True
    """

    __jit_unused_properties__ = ("strength",)

    def __init__(self, strength: float) -> None:
        super().__init__()
        self._amplitude: Tensor
        self._active = False
        self._strength = 0.0
        self.strength = strength

    @property
    def strength(self) -> float:
        """The factor of kappa in the expected loss."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            _checks.bad_type(_NAME, "strength", "a number", value)
        if not 0 <= value <= sys.float_info.max:  # an integer may be too large for a float
            _checks.bad_value(_NAME, "strength", "finite and at least 0 (it is the noise's variance)", value)
        self._strength = number = float(value)
        self._active = number > 0
        # Acts as a number, on the CPU for modules on any device, but compiled code does not depend on its value. A new one: a
        # backward pass that is still to come keeps the old one.
        self._amplitude = torch.full((), math.sqrt(2 * number), dtype=torch.float64, device="cpu")

    def forward(self, input: Tensor) -> Tensor:
        """The input with noise, in training mode."""
        if not isinstance(input, Tensor):
            _checks.bad_type(_NAME, "input", "a floating-point tensor", input)
        if input.is_nested or input.layout != torch.strided:  # a DTensor will do
            _checks.check_dense(_NAME, "input", input)
        if input.dim() == 0:
            _checks.bad_value(_NAME, "input", "of shape (*, I)", input)
        if input.dtype not in _checks.FLOATING:
            raise TypeError(f"FlatnessNoise: input must be a floating-point tensor, got one of {input.dtype}")
        if not self.training or not self._active:
            return input
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(input, dim=-1, keepdim=True, dtype=dtype)
        return torch.addcmul(input, (length * self._amplitude).to(input.dtype), torch.randn_like(input))

    def extra_repr(self) -> str:
        return f"strength={self._strength}"
