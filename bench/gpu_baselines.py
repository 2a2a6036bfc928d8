"""Cross-entropy over a vocabulary by the libraries that GPU users take, where they are installed: kernels of theirs need a GPU.

Liger-Kernel (P.-L. Hsu et al. 2024) and cut-cross-entropy (E. Wijmans et al. 2024). Both give cross-entropy alone.
"""

from __future__ import annotations

from collections.abc import Callable

from machine import on_gpu
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear_cross_entropy() -> dict[str, Loss]:
    """By name, loss(x (N, I), weight (V, I), target (N,)), the mean over rows; empty on a CPU."""
    found: dict[str, Loss] = {}
    if not on_gpu():
        return found
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger-Kernel, CE alone"] = lambda x, weight, target: liger(weight, x, target)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy, CE alone"] = cut
    except ImportError:
        pass
    return found
