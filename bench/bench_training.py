"""Whole training steps, optimizer included: plain, FAM, SAM, and the paper's procedure.

Every way trains a copy of the same network with SGD on one fixed batch of random data. Before any time is taken the losses of
the first step are compared with float64: cross-entropy, and for FAM on the head and the paper's procedure the closed form of
kappa. The plain step and FAM on the head run in every round; "by parts" is the plain step plus what FAM adds to the head and the
criterion alone, without the body: a difference of two long times cannot show so little.

The paper's procedure: the full Hessian of the head (where it fits in 2 GB) on features of a second forward pass, held constant
to the gradient; computed by torch.func, with the index right. SAM: pytorch_optimizer's, two forward and backward passes.
"% of ceiling" counts the plain step's FLOPs, whatever the way.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from baselines import hessian_traces
from common import Case, Settings, Variant, in_pytest, interleaved
from common import results as results_of
from machine import making_tensors, thread_count
from memory import peak_megabytes
from models import BertClassifier, LanguageModel, ResNet18, ViT, WideResNet
from report import Result, show, write_csv
from rich.console import Console
from timing import quantiles, ratios, seconds_per_call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fam_ext

OP = "training"
SHARE = 4.0
STRENGTH = 1e-3
HESSIAN_FLOATS = 5e8  # of the head's Hessian, 2 GB
PLAIN, HEAD, PAPER = "plain", "FAM (head)", "paper's procedure (head)"
FEATURES = "FAM (head, from features)"
MIDDLE, SAM = "FAM (middle layer, 1 probe)", "SAM"


@dataclass(frozen=True)
class Problem:
    """A network and the shape of its batch: images, or token numbers below `vocabulary`."""

    name: str
    model: Callable[[], nn.Module]
    batch: tuple[int, ...]
    classes: int
    vocabulary: int = 0

    def data(self) -> tuple[Tensor, Tensor]:
        if not self.vocabulary:
            return torch.randn(self.batch), torch.randint(self.classes, self.batch[:1])
        rows = self.batch[:1] if self.classes != self.vocabulary else (math.prod(self.batch),)
        return torch.randint(self.vocabulary, self.batch), torch.randint(self.classes, rows)


PROBLEMS = (
    Problem("ResNet-18, 32x32, B=64", ResNet18, (64, 3, 32, 32), 10),
    Problem("WideResNet-28-2, 32x32, B=32", WideResNet, (32, 3, 32, 32), 10),
    Problem("ViT-tiny, 32x32, B=16", ViT, (16, 3, 32, 32), 10),
    Problem("BERT-base head on 2 blocks, 4x128 tokens", BertClassifier, (4, 128), 2, 28996),
    Problem("language model, V=50257, 2x128 tokens", LanguageModel, (2, 128), 50257, 50257),
)
QUICK = (
    Problem("ResNet-18 of width 8, 32x32, B=16", partial(ResNet18, width=8), (16, 3, 32, 32), 10),
    Problem("language model, V=4096, 2x32 tokens", partial(LanguageModel, 64, 2, 4096), (2, 32), 4096, 4096),
)


class Way:
    """One way to train: a copy of the network with an optimizer of its own."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(model), x, y
        self.optimizer: torch.optim.Optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)


class Fam(Way):
    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, layer: str) -> None:
        super().__init__(model, x, y)
        options = {} if layer == "head" else {"method": "hutchinson", "probes": 1}
        self.criterion = fam_ext.FAMLoss(
            nn.CrossEntropyLoss(), getattr(self.model, layer), STRENGTH, **options
        )

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.x), self.y)


class FamFromFeatures(Fam):
    """The logits are never held: for a vocabulary."""

    def loss(self) -> Tensor:
        head = self.model.head
        return self.criterion.linear_cross_entropy(
            self.model.features(self.x), head.weight, self.y, head.bias
        )


class Sam(Way):
    def make_optimizer(self) -> torch.optim.Optimizer:
        from pytorch_optimizer import SAM

        return SAM(self.model.parameters(), torch.optim.SGD, rho=0.05, lr=1e-4, momentum=0.9)

    def step(self) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        first = self.loss()
        first.backward()
        self.optimizer.first_step(zero_grad=True)
        self.loss().backward()
        self.optimizer.second_step(zero_grad=True)
        return (first.detach(),)


class Paper(Way):
    """As published: the head's input comes from a second forward pass, and the Hessian is a constant to the gradient."""

    def loss(self) -> Tensor:
        plain, head = super().loss(), self.model.head
        found: list[Tensor] = []
        with torch.no_grad(), head.register_forward_pre_hook(lambda _, args: found.append(args[0])):
            self.model(self.x)

        def of_weight(weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(found[0], weight, head.bias), self.y)

        traces = hessian_traces(of_weight, head.weight.detach())
        return plain + STRENGTH * (traces * (head.weight @ head.weight.T)).sum()


def ways(problem: Problem) -> dict[str, Way]:
    torch.manual_seed(0)
    model = problem.model()
    x, y = problem.data()
    found: dict[str, Way] = {
        PLAIN: Way(model, x, y),
        HEAD: Fam(model, x, y, "head"),
        MIDDLE: Fam(model, x, y, "middle"),
        SAM: Sam(model, x, y),
    }
    if hasattr(model, "features") and hasattr(fam_ext.FAMLoss, "linear_cross_entropy"):
        found[FEATURES] = FamFromFeatures(model, x, y, "head")
    if model.head.weight.numel() ** 2 <= HESSIAN_FLOATS:
        found[PAPER] = Paper(model, x, y)
    return found


@torch.no_grad()
def head_alone(way: Way) -> tuple[Callable[[], object], Callable[[], object]]:
    """(plain, FAM) steps of head and criterion on fixed features: what FAM on the head adds is their difference."""
    found: list[Tensor] = []
    head = copy.deepcopy(way.model.head)
    with way.model.head.register_forward_pre_hook(lambda _, args: found.append(args[0])):
        way.model(way.x)
    features = found[0].detach().requires_grad_()
    head._forward_hooks.clear()
    hooked = copy.deepcopy(head)
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), hooked, STRENGTH)

    def step(layer: nn.Module, loss: nn.Module) -> None:
        inputs = [features, *layer.parameters()]
        with torch.enable_grad():
            torch.autograd.grad(loss(layer(features), way.y), inputs)

    return partial(step, head, nn.CrossEntropyLoss()), partial(step, hooked, criterion)


@torch.no_grad()
def exact_totals(way: Way) -> tuple[Tensor, Tensor, int]:
    """(CE, CE + STRENGTH * kappa of the head), in float64 from the float32 network's features; FLOPs of a plain step.

    The batch statistics are restored. A step counts as three times the products of its forward pass.
    """
    state = copy.deepcopy(way.model.state_dict())
    found: list[Tensor] = []
    with (
        FlopCounterMode(display=False) as counter,
        way.model.head.register_forward_pre_hook(lambda _, args: found.append(args[0])),
    ):
        way.model(way.x)
    way.model.load_state_dict(state)
    w, phi = way.model.head.weight.double(), found[0].double()
    z = F.linear(phi, w, None if way.model.head.bias is None else way.model.head.bias.double())
    p, centred = z.softmax(1), w - w.mean(0)
    trace = p @ centred.square().sum(1) - (p @ centred).square().sum(
        1
    )  # float64 has the digits where nothing is confident
    plain = F.cross_entropy(z, way.y)
    return plain, plain + STRENGTH * (phi.square().sum(1) * trace).mean(), 3 * counter.get_total_flops()


def case(problem: Problem) -> tuple[Case, dict[str, Way]]:
    """The first steps, checked; then variants to time."""
    found = ways(problem)
    plain, total, flops = exact_totals(found[PLAIN])
    expected = {PLAIN: plain, SAM: plain, HEAD: total, FEATURES: total, PAPER: total}
    variants = []
    for name, way in found.items():
        values = (expected.get(name, plain),)
        tolerance = 1e-4 if name in expected else math.inf  # one probe is anything
        variants.append(Variant(name, way.step, PLAIN, tolerance, values, thin=name not in (PLAIN, HEAD)))
    return Case(problem.name, variants, flops=flops), found


def run(console: Console, settings: Settings) -> list[Result]:
    rows: list[Result] = []
    problems = QUICK if settings.quick else PROBLEMS
    for problem in problems:
        with thread_count(settings.threads[-1]), making_tensors():
            one, found = case(problem)
        with thread_count(settings.threads[-1]):
            rows += _measure(console, one, found, settings.seconds / len(problems))
    show(console, rows)
    write_csv(settings.out / f"{OP}.csv", rows)
    return rows


def _measure(console: Console, one: Case, found: dict[str, Way], seconds: float) -> list[Result]:
    start, errors, known = time.perf_counter(), {}, {}
    for v in one.variants:
        before = time.perf_counter()
        errors[v.name] = v.check()
        if time.perf_counter() - before > 0.2:  # warm enough
            known[v.name] = time.perf_counter() - before
    errors[MIDDLE] = math.nan  # an estimate
    left = max(1.0, 0.8 * seconds - (time.perf_counter() - start))
    times = interleaved(one.variants, rounds=101, least=3, seconds=left, known=known)
    peaks = {v.name: peak_megabytes(v.step, warm=True) for v in one.variants}
    rows = results_of(OP, one, times, errors, peaks)
    without, added = head_alone(found[PLAIN])
    plain = quantiles(times[PLAIN])[1]
    calls = 1 if plain > 1 else 5
    differences = []
    for _ in range(9):
        a, b = seconds_per_call(without, calls), seconds_per_call(added, calls)
        differences.append(b - a)
    middle = quantiles(differences)[1]
    whole = quantiles(ratios(times[HEAD], times[PLAIN]))[1]
    console.print(
        f"{one.label}: FAM adds {1e3 * middle:.3g} ms to head and criterion, {1 + middle / plain:.4f} x the plain step by parts; "
        f"of whole steps {whole:.3f} x",
        soft_wrap=True,
    )
    by_parts = 1 + middle / plain
    template = next(r for r in rows if r.variant == HEAD)
    spread = [1 + d / plain for d in quantiles(differences)]
    fields = {**vars(template), "variant": f"{HEAD}, by parts", "ratio": by_parts}
    fields.update(ratio_p20=spread[0], ratio_p80=spread[2], median_us=1e6 * plain * by_parts)
    fields.update(p20_us=1e6 * plain * spread[0], p80_us=1e6 * plain * spread[2])
    place = rows.index(template) + 1
    return [*rows[:place], Result(**fields), *rows[place:]]


@pytest.mark.parametrize("name", [PLAIN, HEAD, MIDDLE, SAM, PAPER])
@pytest.mark.parametrize("problem", QUICK[:1], ids=lambda p: p.name)
def test_training(benchmark, problem, name):
    in_pytest(benchmark, OP, case(problem)[0], name)
