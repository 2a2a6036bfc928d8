"""One run of the language study: the methods, the steps of each, and the losses on the way."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fam_ext
from studies.language_data import CONTEXT, Windows
from studies.language_networks import Transformer, mean_loss
from studies.methods import Range

CHECKPOINTS = 8
WARMUP = 20  # steps
_LOSSES = [f"{part}_{k + 1}" for part in ("train", "validation", "test") for k in range(CHECKPOINTS)]
NUMBERS = (
    "best_checkpoint",
    "validation",
    "test",
    "train",
    "accuracy",
    "final_test",
    "final_train",
    *_LOSSES,
    "step_ms",
)
CRITERION = nn.CrossEntropyLoss()


class Method(NamedTuple):
    """What is added to AdamW with a tuned learning rate and weight decay: a value to tune for each."""

    dropout: bool = False
    sam: bool = False
    noise: bool = False  # FAM by noise on all linear layers of the blocks
    head: bool = False  # FAM of the head, exact
    share: float = 1.0  # of the steps


METHODS = {
    "adamw": Method(),
    "dropout": Method(dropout=True),
    "sam": Method(sam=True),
    "sam_half_the_steps": Method(sam=True, share=0.5),
    "fam_noise": Method(noise=True),
    "dropout_fam_noise": Method(dropout=True, noise=True),
    "fam_head": Method(head=True),
}


class Part(NamedTuple):
    """What is trained: steps and batch of all methods, and where learning rates are tried."""

    steps: int
    batch: int
    rates: Range


def configuration(method: Method, part: Part, number: int, count: int) -> dict[str, float]:
    """The number-th of `count`: each hyper-parameter takes every of `count` places of its range once (Latin hypercube).

    Learning rate and weight decay are the same for every method.
    """
    ranges = {"lr": part.rates, "weight_decay": Range(0.01, 1.0)}
    if method.dropout:
        ranges["dropout"] = Range(0.05, 0.4, log=False)
    if method.sam:
        ranges["rho"] = Range(0.02, 0.5)
    if method.noise:
        ranges["strength"] = Range(3e-5, 2e-3)
    if method.head:
        ranges["head_strength"] = Range(1e-5, 1e-2)
    hyper = {}
    for k, (name, values) in enumerate(ranges.items()):
        places = torch.randperm(count, generator=torch.Generator().manual_seed(100 + k + 10 * len(name)))
        hyper[name] = values.at((int(places[number]) + 0.5) / count)
    return hyper


def _learning_rate(base: float, step: int, steps: int) -> float:
    """Linear from zero, then cosine to zero."""
    if step < WARMUP:
        return base * (step + 1) / WARMUP
    return 0.5 * base * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def _criterion(model: nn.Module, hyper: Mapping[str, float]) -> Any:
    if "strength" in hyper:
        return fam_ext.FAMLoss.for_model(
            CRITERION, model, "blocks.*", strength=hyper["strength"], method="noise"
        )
    if "head_strength" in hyper:
        return fam_ext.FAMLoss.for_model(CRITERION, model, "head", strength=hyper["head_strength"])
    return CRITERION


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, hyper: Mapping[str, float]
) -> Callable[[Any], None]:
    criterion = _criterion(model, hyper)
    parameters = list(model.parameters())

    def descend(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        criterion(model(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
        optimizer.step()

    def sam(batch: tuple[Tensor, Tensor]) -> None:  # Foret et al. 2021
        optimizer.zero_grad()
        criterion(model(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        up = torch._foreach_mul(gradients, hyper["rho"] / (float(length) + 1e-12))
        moved = [p for p in parameters if p.grad is not None]
        with torch.no_grad():
            torch._foreach_add_(moved, up)
        optimizer.zero_grad()
        criterion(model(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
        with torch.no_grad():
            torch._foreach_sub_(moved, up)
        optimizer.step()

    return sam if "rho" in hyper else descend


def _batches(data: Windows, size: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Windows at random places of a text, or of labelled windows in epochs; the same for every method."""
    order = torch.Generator().manual_seed(seed)
    if data.labels is None:
        offsets = torch.arange(CONTEXT + 1)

        def draw() -> tuple[Tensor, Tensor]:
            starts = torch.randint(0, len(data.train) - CONTEXT, (size, 1), generator=order)
            rows = data.train[starts + offsets]
            return rows[:, :-1], rows[:, 1:]

        return draw
    labels, waiting = data.labels[0], torch.empty(0, dtype=torch.int64)

    def draw_labelled() -> tuple[Tensor, Tensor]:
        nonlocal waiting
        if len(waiting) < size:
            waiting = torch.randperm(len(labels), generator=order)
        chosen, waiting = waiting[:size], waiting[size:]
        return data.train[chosen], labels[chosen]

    return draw_labelled


def _parts(data: Windows, testing: bool) -> dict[str, tuple[Tensor, Tensor | None]]:
    labels: tuple[Tensor | None, ...] = data.labels or (None, None, None)
    parts = {"validation": (data.validation, labels[1])}
    if testing:
        train = data.train if data.labels else data.train.unfold(0, CONTEXT + 1, CONTEXT)
        step = max(1, len(train) // 128)
        parts["train"] = (train[::step], None if labels[0] is None else labels[0][::step])
        parts["test"] = (data.test, labels[2])
    return parts


def run(
    method: Method,
    part: Part,
    hyper: Mapping[str, float],
    data: Windows,
    vocabulary: int,
    seed: int,
    testing: bool,
    start: Mapping[str, Tensor] | None = None,
    keep: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Numbers of one run; the test part is looked at only where `testing` is set.

    The seed decides the initial weights (`start` where given) and the batches, the same for every method. Losses are taken
    at CHECKPOINTS steps; "validation", "test", "train" and "accuracy" are those of the checkpoint with the lowest validation
    loss. step_ms is processor time. `keep` takes the weights of that checkpoint.
    """
    torch.manual_seed(seed)
    classes = 0 if data.labels is None else int(data.labels[0].max()) + 1
    model = Transformer(vocabulary, CONTEXT, classes, hyper.get("dropout", 0.0))
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.AdamW(
        model.parameters(), hyper["lr"], weight_decay=hyper["weight_decay"], betas=(0.9, 0.95), fused=True
    )
    step, draw = _step(model, optimizer, hyper), _batches(data, part.batch, seed)
    steps = max(CHECKPOINTS, round(part.steps * method.share))
    times: list[float] = []
    numbers: dict[str, float] = {"validation": math.inf}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(hyper["lr"], number, steps)
            batch = draw()
            began = time.process_time()
            step(batch)
            times.append(time.process_time() - began)
            if (number + 1) * CHECKPOINTS // steps > number * CHECKPOINTS // steps:
                _look(model, _parts(data, testing), (number + 1) * CHECKPOINTS // steps, numbers, keep)
    numbers["step_ms"] = 1e3 * sorted(times)[len(times) // 2]
    return numbers


def _look(
    model: nn.Module,
    parts: Mapping[str, Any],
    checkpoint: int,
    numbers: dict[str, float],
    keep: dict[str, Tensor] | None,
) -> None:
    """Take the losses of a checkpoint into `numbers`."""
    seen = {name: mean_loss(model, *part) for name, part in parts.items()}
    numbers |= {f"{name}_{checkpoint}": loss for name, (loss, _) in seen.items()}
    if seen["validation"][0] < numbers["validation"]:
        numbers |= {name: loss for name, (loss, _) in seen.items()}
        numbers |= {"best_checkpoint": checkpoint, "accuracy": seen.get("test", seen["validation"])[1]}
        if keep is not None:
            keep.update({name: value.clone() for name, value in model.state_dict().items()})
    if "test" in seen:
        numbers |= {"final_test": seen["test"][0], "final_train": seen["train"][0]}
