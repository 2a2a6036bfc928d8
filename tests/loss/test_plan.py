"""Plans: which method is chosen and why, what a coupling check may teach later, and how graphs are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden_problems import convolution, coupled_samples, mlp, tokens
from torch import nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError
from fam_ext.hessian import coupling
from fam_ext.loss import plan
from fam_ext.loss.plan import CouplingMemory, Plan, plan_products, signature
from fam_ext.options import Options


def planned(case: Any, per_sample: bool = False, layers: int = 1, **options: Any) -> list[Plan]:
    with case.products():
        each = [(CouplingMemory(), case.hessian, [])] * layers
        return plan_products(Options("test", **options), each, per_sample)


def test_readable() -> None:
    assert str(Plan("exact", "rows", 4, "asked for")) == "exact (rows independent), 4 products: asked for"
    assert str(Plan("closed_form", reason="a head")) == "closed_form, 0 products: a head"


def test_few_products_are_taken_exactly() -> None:
    assert planned(mlp()) == [Plan("exact", "rows", 2, "at most 32 products")]
    assert planned(tokens()) == [Plan("exact", "samples", 4, "at most 32 products")]
    assert planned(coupled_samples())[0].level == "batch"


def test_many_products_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "EXACT_PRODUCTS", 15)
    (estimate,) = planned(convolution(), probes=3)
    assert estimate == Plan("hutchinson", "samples", 3, "the exact value takes 16 products")
    several = planned(mlp(), layers=8)  # 2 products each, 16 of all
    assert {p.method for p in several} == {"hutchinson"} and "16 products for all layers" in several[0].reason
    assert planned(convolution(), method="exact")[0].products == 16


def test_memory_decides_too() -> None:
    (estimate,) = planned(mlp(), max_bytes=1)
    assert (
        estimate.method == "hutchinson"
        and estimate.reason == "the exact value's graph takes more than max_bytes=1"
    )
    with pytest.raises(
        UnsupportedError, match=r"test: method='exact' takes 2 Hessian products here.*max_bytes=1"
    ):
        planned(mlp(), method="exact", max_bytes=1)
    case = mlp()
    case.hessian.detached = True  # products leave nothing
    assert planned(case, method="exact", max_bytes=1)[0].method == "exact"


def test_what_is_asked_for() -> None:
    assert planned(mlp(), method="hutchinson", probes=2) == [Plan("hutchinson", "rows", 2, "asked for")]
    assert planned(mlp(), method="hutchinson", per_sample_probes=False)[0].level == "batch"
    for case, level in ((coupled_samples(), "rows"), (convolution(), "samples")):
        assert planned(case, method="hutchinson", per_sample_probes=True)[0].level == level
    assert planned(coupled_samples(), method="exact", per_sample_probes=True)[0].level == "batch"
    assert planned(mlp(), measure="layerwise_eigenvalue") == [Plan("lanczos", None, 0, "an eigenvalue")]


def test_shares_by_sample_need_samples_apart() -> None:
    assert planned(mlp(), per_sample=True)[0].level == "rows"
    with pytest.raises(
        UnsupportedError, match="samples interact after the layer, kappa has no shares by sample"
    ):
        planned(coupled_samples(), per_sample=True)


def test_ways_past_the_calls_are_told() -> None:
    case = mlp()
    case.hessian.past_calls = case.hessian.on_weight = True
    (estimate,) = planned(case, method="hutchinson")
    assert (
        estimate.level == "batch" and "the loss depends on it past the layer's own calls" in estimate.reason
    )


def test_results_are_checked_again_at_powers_of_two() -> None:
    memory = CouplingMemory()
    again = [use for use in range(1, 20) if memory.should_recheck("graph")]
    assert again == [1, 2, 4, 8, 16]
    assert memory.should_recheck("another graph")


def test_a_wider_coupling_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of zero tell nothing yet; a level only widens; "batch" is not checked again."""
    shown, checks = iter([None, "rows", "samples", "rows", "batch"]), []

    def level(hessian: Any, check: int) -> str | None:
        checks.append(check)
        return next(shown)

    monkeypatch.setattr(coupling, "coupling_level", level)
    memory, options, case = CouplingMemory(), Options("test"), tokens()
    got = [memory.level(options, case.hessian, [], False) for _ in range(12)]
    assert got == ["batch", "rows", "samples", "samples", "samples", *["batch"] * 7][: len(got)]
    assert len(checks) == 5 and checks == sorted(checks)
    fresh = CouplingMemory()
    monkeypatch.setattr(coupling, "coupling_level", lambda *args: None)
    assert fresh.level(options, case.hessian, [], True) == "samples"  # what shares by sample will be


def test_signatures() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    norm = nn.BatchNorm1d(3)
    training, evaluation = norm(x).grad_fn, norm.eval()(x).grad_fn
    assert signature(training) != signature(evaluation)
    assert signature(x.tanh().grad_fn) == signature(x.tanh().grad_fn) == "TanhBackward0"
    assert plan.graph_key(mlp().hessian, [training], "exact") != plan.graph_key(
        mlp().hessian, [evaluation], "exact"
    )


def test_plans_of_several_layers_are_a_tuple_that_prints_by_name() -> None:
    net = nn.ModuleDict({"first": nn.Linear(3, 4), "last": nn.Linear(4, 2), "norm": nn.LayerNorm(2)})
    net["attention"] = nn.MultiheadAttention(2, 1)
    criterion = FAMLoss.for_model(nn.CrossEntropyLoss(), net, "*", strength=0.1)
    assert str(criterion.plan).startswith("first: no step yet\nlast: no step yet\n")
    criterion(net["last"](net["first"](torch.randn(5, 3)).relu()), torch.tensor([0, 1, 1, 0, 1]))
    first, last = criterion.plan
    assert (first.method, last.method) == ("exact", "closed_form") and criterion.plan == (first, last)
    lines = str(criterion.plan).split("\n")
    assert lines[:2] == [f"first: {first}", f"last: {last}"]
    assert lines[2].startswith("attention.in_proj: left out, ")
    assert lines[3].startswith("attention.out_proj: left out, ") and len(lines) == 4
    unnamed = FAMLoss(nn.CrossEntropyLoss(), [net["first"], net["last"]], 0.1).plan
    assert str(unnamed).startswith("Linear(in_features=3, out_features=4, bias=True): no step yet")


def test_a_coupling_that_is_switched_on_later_is_seen_within_32_steps() -> None:
    """The graph is the same: an auxiliary loss of the batch had the coefficient 0."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y, coefficient = torch.randn(8, 5).double(), torch.randint(0, 3, (8,)), torch.zeros(()).double()

    def loss(z: Any, target: Any) -> Any:
        return nn.functional.cross_entropy(z, target) + coefficient * z.mean(0).square().sum()

    criterion = FAMLoss(loss, net[0], 0.1)
    for _ in range(200):
        criterion(net(x), y)
    assert criterion.plan.level == "rows"
    coefficient.fill_(3.0)
    for _ in range(plan.RECHECKED):
        criterion(net(x), y)
    assert criterion.plan.level == "batch"
    weight: Any = net[0].weight

    def of_weight(w: Any) -> Any:
        return loss(torch.func.functional_call(net, {"0.weight": w}, (x,)), y)

    second: Any = torch.func.hessian(of_weight)(weight.detach())
    expected = torch.einsum("stut,su->", second, (weight @ weight.t()).detach())
    torch.testing.assert_close(criterion.last.flatness, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("measure", ["layerwise_eigenvalue", "neuronwise_eigenvalue"])
def test_an_eigenvalue_has_no_shares_by_sample(measure: str) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    kappa = RelativeFlatness(nn.CrossEntropyLoss(), net[0], measure=measure)
    with pytest.raises(UnsupportedError, match="no shares by sample; use per_sample=False"):
        kappa(net(torch.randn(6, 5)), torch.randint(0, 3, (6,)), per_sample=True)
