"""Training loops that stacks make of a loss: accumulation, SAM, LBFGS, GradScaler, each for a loss of (network, x, y, step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext.schedules import Warmup

Loss = Callable[[nn.Sequential, Tensor, Tensor, int], Tensor]
WARMUP = Warmup(0.6, steps=3)
UPDATES = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,))) for _ in range(count)]


def by_definition(layer: int) -> Loss:
    """CE + strength * kappa of the layer, from the full Hessian."""

    def loss(net: nn.Sequential, x: Tensor, y: Tensor, step: int) -> Tensor:
        def of_weight(weight: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, {f"{layer}.weight": weight}, (x,)), y)

        weight: Any = net[layer].weight
        return F.cross_entropy(net(x), y) + WARMUP(step) * oracle.kappa(of_weight, weight)

    return loss


class SAM:
    """Foret et al. 2021: the gradient at the top of a ball, around a torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.optimizer, self.rho = optimizer, rho

    def step(self, closure: Callable[[], Tensor]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        gradients = torch.autograd.grad(closure(), parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p += self.rho * g / norm
        at_the_top = torch.autograd.grad(closure(), parameters)
        with torch.no_grad():
            for p, b, g in zip(parameters, before, at_the_top, strict=True):
                p.copy_(b)
                p.grad = g
        self.optimizer.step()


def accumulated(net: nn.Sequential, loss: Loss, follow: Callable[[Any], object]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
    follow(optimizer)
    for number, (x, y) in enumerate(batches(2 * UPDATES)):
        (loss(net, x, y, number // 2) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def sam(net: nn.Sequential, loss: Loss, follow: Callable[[Any], object]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    follow(optimizer)
    for step, (x, y) in enumerate(batches(UPDATES)):
        SAM(optimizer, 0.1).step(lambda x=x, y=y, step=step: loss(net, x, y, step))  # type: ignore[misc]


def lbfgs(net: nn.Sequential, loss: Loss, follow: Callable[[Any], object]) -> None:
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.2, max_iter=3, line_search_fn="strong_wolfe")
    follow(optimizer)
    x, y = batches(1)[0]
    for step in range(UPDATES):

        def closure(step: int = step) -> Any:
            optimizer.zero_grad()
            total = loss(net, x, y, step)
            total.backward()
            return total

        optimizer.step(closure)


def scaled(net: nn.Sequential, loss: Loss, follow: Callable[[Any], object]) -> None:
    """Under a GradScaler; the second update is skipped, since a gradient is infinite."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    done = 0
    for number, (x, y) in enumerate(batches(UPDATES + 1)):
        optimizer.zero_grad()
        scaler.scale(loss(net, x, y, done)).backward()
        if number == 1:
            net[0].bias.grad[0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        done += number != 1


LOOPS = {"accumulated": accumulated, "sam": sam, "lbfgs": lbfgs, "scaled": scaled}
