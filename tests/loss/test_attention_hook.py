"""Noise in nn.MultiheadAttention's projections: its mean against kappa of the full Hessian, and all that must not change."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from attention_noise_cases import CALLS, STRENGTH, Call, mean_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fam_ext import FAMLoss, UnsupportedError
from fam_ext.layers.attention import Projection
from fam_ext.loss.attention_hook import AttentionForward
from fam_ext.loss.noise_hook import Gate

PARTS = pytest.mark.parametrize("part", ["in_proj", "out_proj"])
NAMES = pytest.mark.parametrize("name", CALLS)


def noisy(call: Call, strength: Any = 0.1, layer: Any = "*", **options: Any) -> FAMLoss:
    return FAMLoss.for_model(
        lambda loss: loss, call.attention, layer, strength=strength, method="noise", **options
    )


@PARTS
@NAMES
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_the_mean_is_loss_plus_strength_times_kappa(
    name: str, part: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, and the gradient by the inputs and all weights. A shared draw has all of kappa where samples are coupled."""
    call = CALLS[name]()
    call.coupled = shared
    clean, kappa = call(), call.kappa(part)
    mean = mean_loss(call, part, shared, monkeypatch)
    torch.testing.assert_close((mean - clean) / STRENGTH, kappa, rtol=1e-4, atol=0)
    leaves = [*call.leaves, *call.attention.parameters()]
    wanted = torch.autograd.grad(kappa, leaves, materialize_grads=True)
    given = torch.autograd.grad((mean - clean) / STRENGTH, leaves, materialize_grads=True)
    for g, w in zip(given, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * float(w.norm()) + 1e-8)


def test_samples_may_share_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own a are what keeps their draws apart."""
    monkeypatch.setattr("fam_ext.hessian.attention_noise.DIFFERENT", 1)
    call = CALLS["self"]()
    call.coupled = True  # with one draw for both, terms between the samples would come in
    clean, together = call(), call.kappa("out_proj")
    apart = between_samples_left_out(call)
    mean = mean_loss(call, "out_proj", False, monkeypatch)
    torch.testing.assert_close((mean - clean) / STRENGTH, apart, rtol=1e-4, atol=0)
    assert abs(apart - together) > 0.02 * abs(together)


def between_samples_left_out(call: Call) -> Tensor:
    """kappa of out_proj where only one sample's output moves at a time."""
    attention, loss = call.attention, call.loss
    output = attention(*call.three())[0].detach()
    total = torch.zeros((), dtype=torch.float64)
    for own in range(call.samples()):
        moves = (torch.arange(call.samples()) == own).reshape(-1, 1, 1)
        call.loss = lambda moved, moves=moves: loss(torch.where(moves, moved, output))  # type: ignore[method-assign]
        total = total + call.kappa("out_proj").detach()
    call.loss = loss  # type: ignore[method-assign]
    return total


@NAMES
def test_without_noise_worth_the_name_it_is_torch_s_attention(name: str) -> None:
    """Output, attention weights and dropout; the draws come from a generator of their own."""
    call = CALLS[name]()
    call.attention.dropout = 0.4
    torch.manual_seed(5)
    wanted = call.attention(*call.three(), **call.options)
    noisy(call, 1e-30, generator=torch.Generator())
    torch.manual_seed(5)
    given = call.attention(*call.three(), **call.options)
    for g, w in zip(given, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
            assert g.stride() == w.stride()


@NAMES
def test_both_projections_are_perturbed(name: str) -> None:
    call = CALLS[name]()
    clean = call().detach()
    for layer in ("in_proj", "out_proj", "*", call.attention):
        criterion = noisy(call, 0.1, layer)
        assert not torch.allclose(call().detach(), clean)
        assert [term.name for term in criterion.terms] == (
            [layer] if isinstance(layer, str) and layer != "*" else ["in_proj", "out_proj"]
        )
        criterion.detach()
        assert "forward" not in vars(call.attention) and torch.equal(call().detach(), clean)


def test_where_nothing_is_perturbed() -> None:
    call = CALLS["self"]()
    names, state = list(call.attention.state_dict()), copy.deepcopy(call.attention.state_dict())
    clean = call().detach()
    criterion = noisy(call)
    assert list(call.attention.state_dict()) == names
    call.attention.load_state_dict(state)
    before = torch.get_rng_state()
    for strength, training, mode in ((0.0, True, True), (0.1, False, True), (0.1, True, False)):
        criterion.strength = strength
        criterion.train(training)
        call.attention.train(mode)
        assert torch.equal(call().detach(), clean)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        call.attention.eval()
        torch.testing.assert_close(call(), clean)  # torch's fast path


def test_a_transformer_s_layers_by_name() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    criterion = FAMLoss.for_model(nn.MSELoss(), model, "*", strength=0.1, method="noise")
    names = [
        f"layers.{k}.{own}"
        for k in range(2)
        for own in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    ]
    assert [term.name for term in criterion.terms] == names and not criterion.left_out
    lines = str(criterion.plan).splitlines()
    assert [line.split(": ")[0] for line in lines] == names and all(
        ": noise (samples" in line for line in lines
    )
    x = torch.randn(3, 5, 4)
    criterion(model(x), x).backward()
    assert all(term.hook.called is False and term.hook.seen for term in criterion.terms)
    shares = {"*.in_proj": 0.0, "*": 0.5}
    other = FAMLoss.for_model(nn.MSELoss(), model, strength=shares, method="noise")
    assert [(t.name, t.share) for t in other.terms] == [
        (n, 0.0 if n.endswith("in_proj") else 0.5) for n in names
    ]


def test_one_draw_for_all_calls_of_a_step() -> None:
    call = CALLS["self"]()
    criterion = noisy(call)
    first, second = call(), call()
    assert torch.equal(first, second)
    criterion(first + second)
    assert not torch.equal(call(), first)


def test_strength_over_the_fan_in() -> None:
    """Each of query, key and value has a fan-in of its own."""
    call = CALLS["other sizes"]()
    (term,) = noisy(call, 0.6, "in_proj", normalize="fan_in").terms
    hook: Any = term.hook
    assert [hook.value * share for share in hook._shares] == pytest.approx([0.6 / 2, 0.6 / 3, 0.6 / 1])
    (term,) = noisy(call, 0.6, "in_proj").terms
    assert term.hook._shares == [1.0, 1.0, 1.0]  # type: ignore[union-attr]
    (term,) = noisy(call, 0.6, "out_proj", normalize="fan_in").terms
    assert term.hook.value == pytest.approx(0.3)


def test_positions_without_noise() -> None:
    call = CALLS["self"]()
    criterion = noisy(call, 0.5)
    gate = Gate()
    for term in criterion.terms:
        term.hook.gate = gate  # type: ignore[union-attr]
    clean = nn.MultiheadAttention.forward(call.attention, *call.three())[0]
    gate.positions = torch.zeros(2, 3)
    torch.testing.assert_close(call.attention(*call.three())[0], clean)
    gate.positions = torch.tensor([[1, 1, 0], [0, 0, 0]])
    (out_proj,) = criterion.terms[1:]
    criterion.terms[0].hook.active = False
    given = call.attention(*call.three())[0]
    moved = (given - clean).abs().amax(2) > 1e-9
    assert torch.equal(moved, gate.positions.bool()) and out_proj.name == "out_proj"
    gate.positions = torch.ones(2, 7)  # another sequence's
    assert ((call.attention(*call.three())[0] - clean).abs().amax(2) > 1e-9).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_draws(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        call = CALLS["self"]()
        criterion = noisy(call)
        x = call.leaves[0]
        torch.manual_seed(9)
        output = (
            checkpoint(call.attention, x, x, x, use_reentrant=reentrant)
            if checkpointed
            else call.attention(x, x, x)
        )[0]
        criterion(call.loss(output)).backward()
        gradients.append([t.grad for t in [x, *call.attention.parameters()]])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)


@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    call = CALLS["padding"]()
    criterion = noisy(call, 1e-30)
    clean = nn.MultiheadAttention.forward(call.attention, *call.three(), **call.options)[0]
    compiled = torch.compile(call.attention, backend="aot_eager", fullgraph=True)
    given = compiled(*call.three(), **call.options)[0]
    torch.testing.assert_close(given, clean)
    criterion(call.loss(given)).backward()
    criterion.strength = 0.1
    torch._dynamo.reset()
    compiled = torch.compile(call.attention, backend="aot_eager", fullgraph=True)
    first, same = (compiled(*call.three(), **call.options)[0] for _ in range(2))
    assert not torch.allclose(first, clean) and torch.equal(first, same)  # one step
    criterion(call.loss(first) + call.loss(same)).backward()
    assert not torch.allclose(first, compiled(*call.three(), **call.options)[0])


def test_autocast() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    criterion = FAMLoss.for_model(nn.MSELoss(), attention, "*", strength=0.01, method="noise")
    x = torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(x, x, x, need_weights=False)[0]
        assert output.dtype == torch.bfloat16
        criterion(output.float(), x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_an_empty_batch() -> None:
    call = Call(nn.MultiheadAttention(4, 2, batch_first=True), (torch.randn(0, 3, 4),))
    noisy(call)
    assert call.attention(*call.three())[0].shape == (0, 3, 4)


def test_copies_are_inert() -> None:
    call = CALLS["self"]()
    clean = call.attention(*call.three())[0]
    criterion = noisy(call)
    saved = io.BytesIO()
    torch.save(call.attention, saved)
    saved.seek(0)
    others = (
        copy.deepcopy(call.attention),
        pickle.loads(pickle.dumps(call.attention)),
        torch.load(saved, weights_only=False),
    )
    for other in others:
        forward = vars(other)["forward"]
        assert forward.attention is other and forward.hooks == []
        assert torch.equal(other(*call.three())[0], clean)
        own = FAMLoss(nn.MSELoss(), other, strength=0.1, method="noise")
        assert not torch.allclose(other(*call.three())[0], clean)
        own.detach()
        assert "forward" not in vars(other)
    copied = copy.deepcopy(criterion)
    assert [term.module.key for term in copied.terms] != [term.module.key for term in criterion.terms]
    assert [len(vars(t.module.attention)["forward"].hooks) for t in copied.terms] == [2, 2]


def test_two_criteria_on_one_attention() -> None:
    call = CALLS["self"]()
    clean = call().detach()
    first, second = noisy(call), noisy(call)
    both = call().detach()
    first.detach()
    assert not torch.allclose(call().detach(), clean) and not torch.allclose(call().detach(), both)
    second.detach()
    assert torch.equal(call().detach(), clean)


def test_a_criterion_that_is_gone_leaves_the_attention_as_it_was() -> None:
    call = CALLS["self"]()
    criterion = noisy(call)
    del criterion
    assert "forward" not in vars(call.attention)


def test_what_torch_refuses_it_still_refuses() -> None:
    call = CALLS["self"]()
    noisy(call)
    for wrong in (torch.randn(2, 3, 5).double(), torch.randn(1, 2, 3, 4).double(), torch.randn(4).double()):
        with pytest.raises(AssertionError):
            call.attention(wrong, wrong, wrong)


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_refusals() -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(
        UnsupportedError, match=r"out_proj of nn.MultiheadAttention.*pass the nn.MultiheadAttention"
    ):
        FAMLoss(nn.MSELoss(), attention.out_proj, strength=0.1, method="noise")
    for method in ("auto", "exact", "hutchinson"):
        with pytest.raises(UnsupportedError, match=r"nn.MultiheadAttention.*method='noise' has it"):
            FAMLoss(nn.MSELoss(), attention, strength=0.1, method=method)
    with pytest.raises(UnsupportedError, match=r"Own is an nn\.MultiheadAttention with a forward of its own"):
        FAMLoss(nn.MSELoss(), Own(4, 2), strength=0.1, method="noise")
    attention.forward = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="the forward of MultiheadAttention has been replaced by"):
        FAMLoss(nn.MSELoss(), attention, strength=0.1, method="noise")
    with pytest.raises(ValueError, match="different modules"):
        one = nn.MultiheadAttention(4, 2)
        FAMLoss(nn.MSELoss(), [one, one], strength=0.1, method="noise")
    assert isinstance(Projection("test", one, "in_proj"), Projection) and AttentionForward(one).hooks == []
