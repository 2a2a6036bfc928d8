"""What one would do without this package, written as its users write it, for a head z = x W^T + b under cross-entropy.

- full Hessian: torch.func.hessian of the layer, then the neuronwise formula (Petzka et al. 2021, Definition 3); what the paper's
  published code does with the head;
- Hutchinson: double backward over the layer's weight with Rademacher probes in the coordinates of R, R R^T = W W^T, the paper's
  other estimator;
- PyHessian's procedure (Z. Yao et al., "PyHessian: Neural Networks Through the Lens of the Hessian", 2020): the gradient with its
  graph once, then one product for each Rademacher vector; written anew, as the package needs torchvision;
- curvlinops (F. Dangel et al.): its Hessian operator with its Hutch++ (Meyer et al. 2021), where it is installed;
- SAM along the momentum (M. Becker, F. Altrock, B. Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational
  Overhead", arXiv 2401.12033), which pytorch_optimizer does not have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def textbook_trace(z: Tensor, w: Tensor) -> Tensor:
    """sum_s p_s |w_s|^2 - |sum_s p_s w_s|^2 of every row: what one would write, without digits on confident predictions."""
    p = z.softmax(1)
    return p @ w.square().sum(1) - (p @ w).square().sum(1)


def by_trace(
    trace: Callable[[Tensor, Tensor], Tensor],
    strength: float,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    t: Tensor,
) -> Tensor:
    """CE + strength * kappa of a head from `trace`(logits, weight) of every row."""
    z = F.linear(x, w, b)
    return F.cross_entropy(z, t) + strength * (x.square().sum(1) * trace(z, w)).mean()


def hessian_kappa(loss: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'}) from the full Hessian of `loss`; differentiable."""
    return (hessian_traces(loss, weight) * (weight @ weight.T)).sum()


def hessian_traces(loss: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Tr(H_{s,s'}), (O, O); (O I)^2 numbers are held."""
    return torch.einsum("aibi->ab", torch.func.hessian(loss)(weight))


def full_hessian(x: Tensor, w: Tensor, b: Tensor, t: Tensor, strength: float) -> Tensor:
    """CE + strength * kappa. The Hessian takes another forward pass, of this layer only."""
    loss = F.cross_entropy(F.linear(x, w, b), t)
    return loss + strength * hessian_kappa(lambda weight: F.cross_entropy(F.linear(x, weight, b), t), w)


def rademacher(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randint(0, 2, shape, device=like.device).mul_(2).sub_(1).to(like)


def hutchinson_values(
    x: Tensor, w: Tensor, b: Tensor, t: Tensor, probes: int, graph: bool
) -> tuple[Tensor, Tensor]:
    """(CE, kappa's estimates (probes,)) by double backward over the weight."""
    loss = F.cross_entropy(F.linear(x, w, b), t)
    (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    root = torch.linalg.cholesky(w @ w.T)
    estimates = []
    for _ in range(probes):
        direction = root @ rademacher(w.shape, w)
        (product,) = torch.autograd.grad(gradient, w, direction, create_graph=graph, retain_graph=True)
        estimates.append((direction * product).sum())
    return loss, torch.stack(estimates)


def hutchinson(x: Tensor, w: Tensor, b: Tensor, t: Tensor, strength: float, probes: int) -> Tensor:
    """CE + strength * kappa, estimated."""
    loss, values = hutchinson_values(x, w, b, t, probes, graph=True)
    return loss + strength * values.mean()


def pyhessian_trace(model: nn.Module, x: Tensor, t: Tensor, probes: int, parameters: list[Tensor]) -> Tensor:
    """Estimates of Tr(H) over `parameters`, one for each probe. The number alone: nothing can be differentiated."""
    loss = F.cross_entropy(model(x), t)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    estimates = []
    for _ in range(probes):
        vectors = [rademacher(p.shape, p) for p in parameters]
        products = torch.autograd.grad(gradients, parameters, vectors, retain_graph=True)
        estimates.append(sum((p * v).sum() for p, v in zip(products, vectors, strict=True)))
    return torch.stack([torch.as_tensor(e) for e in estimates]).detach()


def curvlinops() -> Any:
    """The package, or None."""
    try:
        import curvlinops as package
    except ImportError:
        return None
    return package


def curvlinops_trace(layer: nn.Module, x: Tensor, t: Tensor, products: int) -> Tensor:
    """Hutch++ on curvlinops' Hessian operator of the layer's weight."""
    package = curvlinops()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = package.HessianLinearOperator(
            layer, nn.CrossEntropyLoss(), [layer.weight], [(x, t)], check_deterministic=False
        )
        return package.hutchpp_trace(operator, num_matvecs=products)


def probes_for(estimates: Tensor, mean: float, wanted: float = 0.01) -> tuple[int, float]:
    """(probes for the relative standard error `wanted`, relative standard deviation of one), from independent estimates."""
    deviation = float(estimates.detach().double().std()) / abs(mean)
    return max(1, math.ceil((deviation / wanted) ** 2)), deviation


class MomentumSAM(torch.optim.SGD):
    """SGD with momentum m whose gradients are taken at w + rho m / |m|: a sharpness-aware step at the price of a plain one.

    The parameters stay at the perturbed point between steps, where the next gradient is taken.
    """

    def __init__(self, parameters: Any, rho: float, **options: float) -> None:
        super().__init__(parameters, **options)
        self.rho = rho
        self.moved: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.moved:
            torch._foreach_sub_(parameters, self.moved)
        super().step()
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        length = torch.stack(torch._foreach_norm(momenta)).norm()
        self.moved = list(torch._foreach_mul(momenta, self.rho / length))
        torch._foreach_add_(parameters, self.moved)
