"""Steps too long for a captured graph, on a GPU: a language model's head, gram_trace, whole training steps; with peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_baselines
import models
import torch
import torch.nn.functional as F
from gpu_timing import Step
from torch import Tensor, nn

import fam_ext
from fam_ext import functional

STRENGTH = 0.01


def vocabulary(rows: int, fan_in: int, classes: int) -> dict[str, Step]:
    """CE + FAM from features to gradients in bfloat16, beside cross-entropy alone."""
    x = torch.randn(rows, fan_in, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(classes, fan_in) / fan_in**0.5).bfloat16().requires_grad_()
    target = torch.randint(classes, (rows,))
    with torch.no_grad():  # a part of the rows against float64
        some = slice(0, 64)
        ours = functional.linear_cross_entropy(x[some], weight, target[some], strength=STRENGTH)[0]
        exact = functional.linear_cross_entropy(
            x[some].double(), weight.double(), target[some], strength=STRENGTH, backend="reference"
        )[0]
    if not abs(float(ours) / float(exact) - 1) <= 1e-3:
        raise RuntimeError(f"linear_cross_entropy: {float(ours)} instead of {float(exact)}")

    def gradients(loss: Tensor) -> Any:
        return torch.autograd.grad(loss, (x, weight))

    steps: dict[str, Step] = {
        "linear_cross_entropy": lambda: gradients(
            functional.linear_cross_entropy(x, weight, target, strength=STRENGTH)[0]
        ),
        "linear_cross_entropy, parts=1": lambda: gradients(
            functional.linear_cross_entropy(x, weight, target, strength=STRENGTH, parts=1)[0]
        ),
        "linear + CE, eager": lambda: gradients(F.cross_entropy(F.linear(x, weight).float(), target)),
    }
    for name, loss in gpu_baselines.linear_cross_entropy().items():
        steps[name] = lambda loss=loss: gradients(loss(x, weight, target))
    return steps


def gram(samples: int, positions: int, width: int) -> dict[str, Step]:
    """gram_trace of a token layer in bfloat16, forward and backward, in both forms and by the reference."""
    x, s = (torch.randn(samples, positions, width, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight = (torch.randn(width, width) / width**0.5).bfloat16().requires_grad_()

    def step(**options: Any) -> Any:
        return torch.autograd.grad(functional.gram_trace(x, s, weight, **options).sum(), (x, s, weight))

    return {
        "gram_trace": step,
        "gram_trace, gram": lambda: step(form="gram"),
        "gram_trace, direct": lambda: step(form="direct"),
        "plain PyTorch": lambda: step(backend="reference"),
    }


def training(rows: int) -> dict[str, Step]:
    """ResNet-18 on CIFAR shapes, bfloat16 autocast, SGD: plain and with FAM on the head."""
    x = torch.randn(rows, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(10, (rows,))

    def network(fam: bool) -> Step:
        torch.manual_seed(0)
        kind = x.device.type
        model: Any = models.ResNet18().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
        criterion: nn.Module = nn.CrossEntropyLoss()
        if fam:
            criterion = fam_ext.FAMLoss(criterion, layer=model.head, strength=STRENGTH)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(kind, torch.bfloat16):
                loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

        return step

    return {"plain": network(False), "FAM on the head": network(True)}


def cases(small: bool) -> dict[str, Callable[[], dict[str, Step]]]:
    """Name -> what makes the steps; `small` is for a rehearsal on the CPU."""
    rows, fan_in, classes = (64, 8, 50) if small else (8192, 4096, 128256)
    samples, positions, width = (2, 5, 6) if small else (16, 1024, 768)
    images = 4 if small else 128
    return {
        f"vocabulary {rows}x{fan_in}x{classes} bf16": lambda: vocabulary(rows, fan_in, classes),
        f"gram_trace {samples}x{positions}x{width} bf16": lambda: gram(samples, positions, width),
        f"ResNet-18 step, B={images} bf16": lambda: training(images),
    }
