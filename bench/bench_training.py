"""Whole training steps, optimizer included: plain, FAM on the head and inside the network, SAM and its cheaper kin, the paper's.

Every way trains a copy of the same network with SGD on one fixed batch of random data. The learning rate is so small that the
loss stays where it is: before any time is taken it is compared with float64, cross-entropy, and for FAM on the head and the
paper's procedure the closed form of kappa; estimates inside the network are drawn at random and must be finite. A way that this
version of the package cannot take is named below the table, with the reason.

Forms of curvature inside the network check now and then whether samples interact: often in the first 32 steps, then in one of 32.
Steps without that check are timed.

Plain steps and those of about their cost run in every round. "by parts" is the plain step plus what FAM adds to the head and the
criterion alone, without the body: a difference of two long times cannot show so little. "% of ceiling" counts the plain step's
FLOPs, whatever the way.

The paper's procedure: the full Hessian of the head (where it fits in 2 GB) on features of a second forward pass, held constant
to the gradient; computed by torch.func, with the index right. SAM, LookSAM: pytorch_optimizer's; LookSAM perturbs in every fifth
step, and its time is a fifth of five steps'. Momentum SAM: bench/baselines.py.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from baselines import MomentumSAM, hessian_traces
from case import Build, Case, Settings, Variant, results, settle
from machine import making_tensors, thread_count
from models import MLP, BertClassifier, LanguageModel, ResNet18, ViT, WideResNet
from pytorch_optimizer import SAM, LookSAM
from report import Result, replace_cases, show, write_results
from rich.console import Console
from timing import interleaved, quantiles, ratios, seconds_per_call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fam_ext

OP = "training"
SHARE = 4.0
STRENGTH = 1e-3
HESSIAN_FLOATS = 5e8  # of the head's Hessian, 2 GB
PLAIN, HEAD, PAPER = "plain", "FAM (head)", "paper's procedure (head)"
FEATURES = "FAM (head, from features)"
MIDDLE, SAM_STEP = "FAM (middle layer, 1 probe)", "SAM"
LOOKSAM, MOMENTUM_SAM = "LookSAM, every 5th step", "momentum SAM"
INSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "FAM noise (middle layer)": ("middle", {"method": "noise"}),
    "FAM noise (all layers)": ("*", {"method": "noise"}),
    "FAM Fisher (middle layer)": ("middle", {"curvature": "fisher"}),
    "FAM Fisher (all layers)": ("*", {"curvature": "fisher"}),
    "FAM empirical Fisher (middle layer)": ("middle", {"curvature": "empirical_fisher"}),
    "FAM empirical Fisher (all layers)": ("*", {"curvature": "empirical_fisher"}),
}
ALWAYS = (PLAIN, HEAD, MOMENTUM_SAM, *(name for name in INSIDE if "noise" in name))  # run in every round


@dataclass(frozen=True)
class Problem:
    """A network and the shape of its batch: rows of numbers, images, or token numbers below `vocabulary`.

    `inside`: with the ways to regularize inside the network, and what competes with them.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: tuple[int, ...]
    classes: int
    vocabulary: int = 0
    inside: bool = True

    def data(self) -> tuple[Tensor, Tensor]:
        if not self.vocabulary:
            return torch.randn(self.batch), torch.randint(self.classes, self.batch[:1])
        rows = self.batch[:1] if self.classes != self.vocabulary else (math.prod(self.batch),)
        return torch.randint(self.vocabulary, self.batch), torch.randint(self.classes, rows)


PROBLEMS = (
    Problem("MLP 784-256-128-10, B=64", MLP, (64, 784), 10),
    Problem("ResNet-18, 32x32, B=64", ResNet18, (64, 3, 32, 32), 10),
    Problem("WideResNet-28-2, 32x32, B=32", WideResNet, (32, 3, 32, 32), 10),
    Problem("ViT-tiny, 32x32, B=16", ViT, (16, 3, 32, 32), 10),
    Problem("BERT-base head on 2 blocks, 4x128 tokens", BertClassifier, (4, 128), 2, 28996, inside=False),
    Problem("language model, V=50257, 2x128 tokens", LanguageModel, (2, 128), 50257, 50257, inside=False),
)
QUICK = (
    PROBLEMS[0],
    Problem("ResNet-18 of width 8, 32x32, B=16", partial(ResNet18, width=8), (16, 3, 32, 32), 10),
    Problem(
        "language model, V=4096, 2x32 tokens",
        partial(LanguageModel, 64, 2, 4096),
        (2, 32),
        4096,
        4096,
        inside=False,
    ),
)


class Way:
    """One way to train: a copy of the network with an optimizer of its own."""

    scale = 1.0  # of the time of `step`

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(model), x, y
        self.optimizer = self.make_optimizer(lr=1e-8, momentum=0.9)

    def make_optimizer(self, **options: float) -> Any:
        return torch.optim.SGD(self.model.parameters(), **options)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)

    def settle(self) -> None:
        """Leave the first steps of a training run behind, after one step."""


class Fam(Way):
    """FAM on `layer`: "head", "middle", or a glob of names."""

    def __init__(self, layer: str, options: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        chosen = getattr(self.model, layer, layer)
        self.criterion = fam_ext.FAMLoss.for_model(
            nn.CrossEntropyLoss(), self.model, chosen, strength=STRENGTH, **options
        )

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.x), self.y)

    def settle(self) -> None:
        settle(self.criterion)


class FamFromFeatures(Fam):
    """The logits are never held: for a vocabulary."""

    def loss(self) -> Tensor:
        head = self.model.head
        return self.criterion.linear_cross_entropy(
            self.model.features(self.x), head.weight, self.y, head.bias
        )


class Sam(Way):
    """Two forward and backward passes."""

    def make_optimizer(self, **options: float) -> Any:
        return SAM(self.model.parameters(), torch.optim.SGD, rho=0.05, **options)

    def step(self) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.first_step(zero_grad=True)
        self.loss().backward()
        self.optimizer.second_step(zero_grad=True)
        return (loss.detach(),)


class LookSam(Way):
    """Two passes in one of PERIOD steps; its `step` is a whole period."""

    PERIOD = 5
    scale = 1 / PERIOD

    def make_optimizer(self, **options: float) -> Any:
        return LookSAM(self.model.parameters(), torch.optim.SGD, rho=0.1, k=self.PERIOD, **options)

    def step(self) -> tuple[Tensor, ...]:
        for k in range(self.PERIOD):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            if not k:
                self.optimizer.first_step(zero_grad=True)
                self.loss().backward()
            self.optimizer.second_step(zero_grad=True)
        return (loss.detach(),)


class MomentumSam(Way):
    """One pass, at weights moved along the momentum."""

    def make_optimizer(self, **options: float) -> Any:
        return MomentumSAM(self.model.parameters(), rho=1e-6, **options)


class Paper(Way):
    """As published: the head's input comes from a second forward pass, and the Hessian is a constant to the gradient."""

    def loss(self) -> Tensor:
        plain, head = super().loss(), self.model.head
        features = head_input(self.model, self.x)

        def of_weight(weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(features, weight, head.bias), self.y)

        traces = hessian_traces(of_weight, head.weight.detach())
        return plain + STRENGTH * (traces * (head.weight @ head.weight.T)).sum()


@torch.no_grad()
def head_input(model: nn.Module, x: Tensor) -> Tensor:
    """What the head receives in a forward pass."""
    kept: list[Tensor] = []
    with model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0])):
        model(x)
    return kept[0]


def ways(problem: Problem, model: nn.Module) -> dict[str, Callable[..., Way]]:
    """What makes each way from (model, x, y)."""
    made: dict[str, Callable[..., Way]] = {
        PLAIN: Way,
        HEAD: partial(Fam, "head", {}),
        MIDDLE: partial(Fam, "middle", {"method": "hutchinson", "probes": 1}),
    }
    if problem.inside:
        made |= {name: partial(Fam, layer, options) for name, (layer, options) in INSIDE.items()}
    made[SAM_STEP] = Sam
    if problem.inside:
        made |= {LOOKSAM: LookSam, MOMENTUM_SAM: MomentumSam}
    if hasattr(model, "features"):
        made[FEATURES] = partial(FamFromFeatures, "head", {})
    if model.head.weight.numel() ** 2 <= HESSIAN_FLOATS:
        made[PAPER] = Paper
    return made


@torch.no_grad()
def exact_totals(way: Way) -> tuple[Tensor, Tensor, int]:
    """(CE, CE + STRENGTH * kappa of the head), in float64 from the float32 network's features; FLOPs of a plain step.

    The batch statistics are restored. A step counts as three times the products of its forward pass.
    """
    state = copy.deepcopy(way.model.state_dict())
    with FlopCounterMode(display=False) as counter:
        phi = head_input(way.model, way.x).double()
    way.model.load_state_dict(state)
    w, bias = way.model.head.weight.double(), way.model.head.bias
    z = F.linear(phi, w, None if bias is None else bias.double())
    p, centred = z.softmax(1), w - w.mean(0)
    # float64 has the digits where nothing is confident
    trace = p @ centred.square().sum(1) - (p @ centred).square().sum(1)
    plain = F.cross_entropy(z, way.y)
    return plain, plain + STRENGTH * (phi.square().sum(1) * trace).mean(), 3 * counter.get_total_flops()


@dataclass(frozen=True)
class Prepared:
    """Variants to time, the error of a step of each, and why others are not available."""

    case: Case
    errors: dict[str, float]
    missing: dict[str, str]
    plain: Way


def prepare(problem: Problem) -> Prepared:
    """A step of every way, checked."""
    torch.manual_seed(0)
    with making_tensors():
        model = problem.model()
        x, y = problem.data()
    variants, errors, missing = [], {}, {}
    plain = Way(model, x, y)
    without, total, flops = exact_totals(plain)
    for name, make in ways(problem, model).items():
        drawn = name == MIDDLE or name in INSIDE  # one probe is anything
        exact = total if name in (HEAD, FEATURES, PAPER) else without
        try:
            way = make(model, x, y)
            variant = Variant(
                name,
                way.step,
                PLAIN,
                math.inf if drawn else 1e-4,
                (exact,),
                scale=way.scale,
                thin=name not in ALWAYS,
            )
            errors[name] = variant.check()
            way.settle()
        except (ValueError, fam_ext.UnsupportedError) as error:
            missing[name] = str(error)
            continue
        variants.append(variant)
        if drawn:
            errors[name] = math.nan
    return Prepared(Case(problem.name, variants, flops=flops), errors, missing, plain)


def cases(quick: bool = False) -> list[Build]:
    return [lambda compiled, p=p: prepare(p).case for p in (QUICK if quick else PROBLEMS)]


def run(console: Console, settings: Settings) -> list[Result]:
    rows: list[Result] = []
    missing = []
    every = QUICK if settings.quick else PROBLEMS
    problems = [p for p in every if settings.only in p.name]
    for problem in problems:
        with thread_count(settings.threads[-1]):
            end = time.perf_counter() + 0.8 * settings.seconds / len(problems)
            prepared = prepare(problem)
            rows += measure(console, prepared, end)
        missing += [f"{problem.name}: {name}: not available: {why}" for name, why in prepared.missing.items()]
    show(console, rows)
    for line in missing:
        console.print(line, soft_wrap=True)
    if settings.only:
        replace_cases(settings.out / f"{OP}.csv", rows, [p.name for p in every])
    else:
        write_results(settings.out / f"{OP}.csv", rows)
    return rows


def head_alone(way: Way) -> tuple[Callable[[], object], Callable[[], object]]:
    """(plain, FAM) steps of head and criterion on fixed features: what FAM on the head adds is their difference."""
    features = head_input(way.model, way.x).requires_grad_()
    head, hooked = copy.deepcopy(way.model.head), copy.deepcopy(way.model.head)
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), hooked, STRENGTH)

    def step(layer: nn.Module, loss: nn.Module) -> None:
        torch.autograd.grad(loss(layer(features), way.y), [features, *layer.parameters()])

    return partial(step, head, nn.CrossEntropyLoss()), partial(step, hooked, criterion)


def measure(console: Console, prepared: Prepared, end: float) -> list[Result]:
    """Results of every way, and what FAM on the head adds by parts."""
    one = prepared.case
    times = interleaved(one.variants, rounds=101, least=3, seconds=max(1.0, end - time.perf_counter()))
    rows = results(OP, one, times, prepared.errors)
    without, added = head_alone(prepared.plain)
    plain = quantiles(times[PLAIN])[1]
    calls = 1 if plain > 1 else 5
    parts = [
        1 + (seconds_per_call(added, calls) - seconds_per_call(without, calls)) / plain for _ in range(9)
    ]
    low, middle, high = quantiles(parts)
    console.print(
        f"{one.label}: FAM adds {1e3 * (middle - 1) * plain:.3g} ms to head and criterion, {middle:.4f} x the plain step "
        f"by parts; of whole steps {quantiles(ratios(times[HEAD], times[PLAIN]))[1]:.3f} x",
        soft_wrap=True,
    )
    head = next(r for r in rows if r.variant == HEAD)
    by_parts = replace(
        head, variant=f"{HEAD}, by parts", ratio=middle, ratio_p20=low, ratio_p80=high,
        median_us=1e6 * plain * middle, p20_us=1e6 * plain * low, p80_us=1e6 * plain * high,
    )  # fmt: skip
    place = rows.index(head) + 1
    return [*rows[:place], by_parts, *rows[place:]]
