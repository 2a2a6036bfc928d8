"""The methods that are compared: what each one tunes, and how it takes a training step."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fam_ext
from studies.networks import GaussianNoise, Noise, layer_names

Step = Callable[[Tensor, Tensor], None]
MOMENTUM = 0.9


class Range(NamedTuple):
    """Values of a hyper-parameter: evenly in the logarithm, or evenly."""

    low: float
    high: float
    log: bool = True

    def at(self, u: float) -> float:
        """The value at a share u of the range, to three digits."""
        value = self.low * (self.high / self.low) ** u if self.log else self.low + u * (self.high - self.low)
        return float(f"{value:.3g}")


class Training(NamedTuple):
    """What a method's step works on."""

    model: nn.Module
    hyper: Mapping[str, float]
    seed: int
    criterion: nn.CrossEntropyLoss | nn.MSELoss = nn.CrossEntropyLoss()


Builder = Callable[[Training], tuple[torch.optim.Optimizer, Step]]
COMMON = {"lr": Range(0.01, 0.3), "weight_decay": Range(1e-5, 1e-2)}


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    name: str
    build: Builder
    own: Mapping[str, Range] = field(default_factory=dict)
    common: Mapping[str, Range] = field(default_factory=lambda: COMMON)
    noise: Callable[[Mapping[str, float]], Noise] = lambda hyper: nn.Identity

    def configuration(self, number: int) -> dict[str, float]:
        """The number-th random configuration. lr and weight decay are drawn at the same place for every method."""
        hyper = {}
        for name, values in {**self.common, **self.own}.items():
            place = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
            hyper[name] = values.at(float(torch.rand((), generator=place)))
        return hyper


def _sgd(model: nn.Module, hyper: Mapping[str, float]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), hyper["lr"], MOMENTUM, weight_decay=hyper.get("weight_decay", 0.0), foreach=True
    )


def _plain(optimizer: torch.optim.Optimizer, model: nn.Module, criterion: Callable[..., Tensor]) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def sgd(training: Training) -> tuple[torch.optim.Optimizer, Step]:
    """SGD with momentum, also of the methods that change the network or the criterion only."""
    optimizer, criterion = _sgd(training.model, training.hyper), training.criterion
    if "label_smoothing" in training.hyper:
        criterion = nn.CrossEntropyLoss(label_smoothing=training.hyper["label_smoothing"])
    return optimizer, _plain(optimizer, training.model, criterion)


def adamw(training: Training) -> tuple[torch.optim.Optimizer, Step]:
    hyper = training.hyper
    optimizer = torch.optim.AdamW(
        training.model.parameters(), hyper["lr"], weight_decay=hyper["weight_decay"], foreach=True
    )
    return optimizer, _plain(optimizer, training.model, training.criterion)


def _sam(training: Training, criterion: Any, kind: str = "SAM", **options: Any) -> Any:
    import pytorch_optimizer

    hyper = training.hyper
    optimizer = getattr(pytorch_optimizer, kind)(
        training.model.parameters(), torch.optim.SGD, rho=hyper["rho"], foreach=True, lr=hyper["lr"], momentum=MOMENTUM,
        weight_decay=hyper["weight_decay"], **options,
    )  # fmt: skip

    def step(x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(training.model(x), y)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)

    return optimizer, step


def sam(training: Training) -> Any:
    return _sam(training, training.criterion)


def asam(training: Training) -> Any:
    return _sam(training, training.criterion, adaptive=True)


def looksam(training: Training) -> Any:
    return _sam(training, training.criterion, "LookSAM", k=5, alpha=training.hyper["alpha"])


class _Radius:
    """What GSAM asks for its radius; here a constant."""

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def step(self) -> float:
        return self.rho


def gsam(training: Training) -> tuple[torch.optim.Optimizer, Step]:
    from pytorch_optimizer import GSAM

    base = _sgd(training.model, training.hyper)
    optimizer: Any = GSAM(
        training.model.parameters(),
        base,
        training.model,
        _Radius(training.hyper["rho"]),
        alpha=training.hyper["alpha"],
    )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.set_closure(training.criterion, x, y)
        optimizer.step()

    return base, step


def nso(training: Training) -> tuple[torch.optim.Optimizer, Step]:
    """Noise stability optimization: the mean loss of weights moved to both sides by noise (Zhang et al. 2024)."""
    optimizer = _sgd(training.model, training.hyper)
    parameters = list(training.model.parameters())
    generator = torch.Generator().manual_seed(training.seed)

    def step(x: Tensor, y: Tensor) -> None:
        noise = [torch.randn(p.shape, generator=generator) * training.hyper["sigma"] for p in parameters]
        optimizer.zero_grad()
        for sign in (1, -2):  # forth, and back to the other side
            with torch.no_grad():
                torch._foreach_add_(parameters, noise, alpha=sign)
            (training.criterion(training.model(x), y) / 2).backward()
        with torch.no_grad():
            torch._foreach_add_(parameters, noise)
        optimizer.step()

    return optimizer, step


def _fam_criterion(training: Training, which: Any, **options: Any) -> fam_ext.FAMLoss:
    model = training.model
    norms = any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    if options.get("curvature") == "fisher" and isinstance(training.criterion, nn.MSELoss):
        options.update(curvature="ggn", method="hutchinson")  # of a Gaussian the same but for a factor
    if options.get("curvature", "hessian") != "hessian" and norms:
        options["hold_statistics"] = True
    generator = torch.Generator().manual_seed(training.seed)
    return fam_ext.FAMLoss.for_model(
        training.criterion,
        model,
        layer_names(model, which),
        strength=training.hyper["strength"],
        generator=generator,
        **options,
    )


def fam(training: Training, which: Any, **options: Any) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = _sgd(training.model, training.hyper)
    return optimizer, _plain(optimizer, training.model, _fam_criterion(training, which, **options))


def fam_sam(training: Training, which: Any, **options: Any) -> Any:
    return _sam(training, _fam_criterion(training, which, **options))


def _fam(name: str, which: str, strengths: Range = Range(1e-3, 1.0), **options: Any) -> Method:  # noqa: B008
    return Method(name, functools.partial(fam, which=which, **options), {"strength": strengths})


# for all layers together, whose kappas add up
MIDDLE, LOW = Range(1e-4, 0.1), Range(3e-5, 3e-2)
RHO, ALPHA = Range(0.01, 1.0), Range(0.1, 0.8, log=False)
_ALL = [
    Method("sgd", sgd, common={"lr": COMMON["lr"]}),
    Method("weight_decay", sgd),
    Method("adamw", adamw, common={"lr": Range(3e-4, 1e-2), "weight_decay": Range(1e-3, 1.0)}),
    Method(
        "dropout", sgd, {"rate": Range(0.1, 0.8, log=False)}, noise=lambda h: functools.partial(nn.Dropout, h["rate"])
    ),
    Method(
        "feature_noise", sgd, {"deviation": Range(0.05, 2.0)},
        noise=lambda h: functools.partial(GaussianNoise, h["deviation"]),
    ),
    Method("label_smoothing", sgd, {"label_smoothing": Range(0.02, 0.5)}),
    Method("sam", sam, {"rho": RHO}),
    Method("asam", asam, {"rho": Range(0.1, 10.0)}),
    Method("gsam", gsam, {"rho": RHO, "alpha": ALPHA}),
    Method("looksam", looksam, {"rho": RHO, "alpha": ALPHA}),
    Method("nso", nso, {"sigma": Range(0.003, 0.3)}),
    _fam("fam_head", "head"),
    _fam("fam_head_held", "head", curvature_grad=False),
    _fam("fam_hidden_hutchinson", "hidden", MIDDLE, method="hutchinson"),
    _fam("fam_hidden_fisher", "hidden", MIDDLE, curvature="fisher"),
    _fam("fam_hidden_noise", "hidden", MIDDLE, method="noise"),
    _fam("fam_all_fisher", "all", LOW, curvature="fisher"),
    _fam("fam_all_empirical_fisher", "all", LOW, curvature="empirical_fisher"),
    _fam("fam_all_noise", "all", LOW, method="noise"),
    _fam("fam_inner_fisher", "inner", LOW, curvature="fisher"),
    _fam("fam_inner_noise", "inner", LOW, method="noise"),
    Method(
        "fam_all_fisher_sam", functools.partial(fam_sam, which="all", curvature="fisher"),
        {"strength": LOW, "rho": RHO},
    ),
]  # fmt: skip
# what a choice in FAM changes, all else as in the methods above
_CHOICES = [
    _fam("fam_first_fisher", "first", MIDDLE, curvature="fisher"),
    _fam("fam_first_noise", "first", MIDDLE, method="noise"),
    _fam("fam_all_fisher_4_draws", "all", LOW, curvature="fisher", probes=4),
    _fam("fam_all_fisher_every_4", "all", LOW, curvature="fisher", every=4),
    _fam("fam_all_noise_shared", "all", LOW, method="noise", per_sample_probes=False),
]
CHOICES = tuple(method.name for method in _CHOICES)
METHODS: dict[str, Method] = {method.name: method for method in (*_ALL, *_CHOICES)}


def learning_rate(base: float, step: int, steps: int) -> float:
    """Cosine to zero."""
    return 0.5 * base * (1 + math.cos(math.pi * step / steps))
