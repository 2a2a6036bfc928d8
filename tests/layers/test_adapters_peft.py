"""Layers of real PEFT models: LoRA and DoRA against the merged weight, names and patterns, heads trained in full."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness
from fam_ext.integrations.huggingface import patch_causal_lm

peft = pytest.importorskip("peft", reason="PEFT is not installed")
STRENGTH = 0.1
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def adapted(names: list[str], **options: Any) -> Any:
    """A PeftModel whose adapters are no longer those of the start."""
    config = peft.LoraConfig(target_modules=names, r=2, lora_alpha=3, **options)
    model = peft.get_peft_model(network(), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p += 0.3 * torch.randn_like(p)
    return model


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(7, *shape, 5, dtype=torch.float64), torch.randint(0, 3, (7, *shape))


def effective(layer: Any, kind: str) -> Tensor:
    """By hand; DoRA's norm is a constant of the gradient."""
    scaling = 3 / (2**0.5 if kind == "rslora" else 2)
    weight: Tensor = (
        layer.base_layer.weight + scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    if kind == "dora":
        scale = layer.lora_magnitude_vector["default"].weight / weight.square().sum(1).sqrt().detach()
        weight = scale[:, None] * weight
    return weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["2", "4"])
def test_loss_kappa_and_gradients(name: str, kind: str) -> None:
    model = adapted([name], **KINDS[kind])
    net = model.get_base_model()
    criterion = FAMLoss.for_model(nn.CrossEntropyLoss(), model, name, strength=STRENGTH)
    assert criterion.layer is net[int(name)]
    x, y = batch()
    total = criterion(model(x), y)
    weight = effective(criterion.layer, kind)
    index = int(name)

    def loss(w: Tensor) -> Tensor:
        z = F.linear(net[:index](x), w, net[index].base_layer.bias)
        return F.cross_entropy(net[index + 1 :](z), y)

    expected = loss(weight) + STRENGTH * oracle.kappa(loss, weight)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (3 if kind == "dora" else 2)
    for got, e in zip(*(torch.autograd.grad(v, trained) for v in (total, expected)), strict=True):
        torch.testing.assert_close(got, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "tokens"])
@pytest.mark.parametrize(
    "options", [{"curvature": "fisher"}, {"curvature": "ggn"}, {"method": "noise"}], ids=str
)
def test_fisher_and_noise_are_those_of_the_effective_weight(
    options: dict[str, Any], positions: tuple[int, ...], kind: str
) -> None:
    """The same draws on a plain layer of that weight give the same number, and the same gradient of it."""
    model = adapted(["2"], **KINDS[kind])
    net = model.get_base_model()
    plain = copy.deepcopy(net)
    plain[2] = nn.Linear(6, 4).double()
    plain[2].bias = net[2].base_layer.bias
    weight = effective(net[2], kind)
    with torch.no_grad():
        plain[2].weight.copy_(weight)
    x, y = batch(*positions)

    def ce(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, -2), y.flatten())

    inner: Any = nn.CrossEntropyLoss()
    totals = []
    for module in (net, plain):
        torch.manual_seed(3)
        criterion = FAMLoss(inner, module[2], STRENGTH, **options)
        totals.append(criterion(module(x).flatten(0, -2), y.flatten()))
    assert abs(totals[0] - ce(plain.eval()(x), y)) > 1e-6
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-10, atol=0)
    (by_weight,) = torch.autograd.grad(totals[1], plain[2].weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    for got, e in zip(
        torch.autograd.grad(totals[0], trained), torch.autograd.grad(weight, trained, by_weight), strict=True
    ):
        torch.testing.assert_close(got, e, rtol=1e-9, atol=1e-12)


def test_names_and_patterns_are_those_of_the_base_model() -> None:
    model = adapted(["2"], modules_to_save=["4"])
    head = model.get_base_model()[4]
    copied = head.modules_to_save["default"]
    for name in ("4", "base_model.model.4", "base_model.model.4.modules_to_save.default", head, None, "[4]"):
        criterion = FAMLoss.for_model(nn.CrossEntropyLoss(), model, name, strength=STRENGTH)
        assert [t.module for t in criterion.terms] == [copied]
        criterion.detach()
    every = FAMLoss.for_model(nn.CrossEntropyLoss(), model, "*4*", strength=STRENGTH)
    assert [t.module for t in every.terms] == [copied]
    assert every.left_out == {
        "base_model.model.4.original_module": "PEFT uses a copy in its place (modules_to_save)"
    }
    every.detach()
    by_wrapper = FAMLoss(nn.CrossEntropyLoss(), head, STRENGTH)
    assert by_wrapper.layer is copied
    x, y = batch()
    kappa = RelativeFlatness(nn.CrossEntropyLoss(), head)(model(x), y)
    hidden = model.get_base_model()[:4](x)
    expected = oracle.kappa(lambda w: F.cross_entropy(F.linear(hidden, w, copied.bias), y), copied.weight)
    torch.testing.assert_close(kappa, expected, rtol=1e-10, atol=0)
    by_wrapper(model(x), y)
    with model.disable_adapter():
        original = FAMLoss(nn.CrossEntropyLoss(), head, STRENGTH)
        assert original.layer is head.original_module
        total = original(model(x), y)
        torch.testing.assert_close(total, original.last.loss + STRENGTH * original.last.flatness)
    expect("for layers of a PeftModel use for_model", lambda: FAMLoss(nn.CrossEntropyLoss(), model, STRENGTH))


def language_model(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, **options))


def test_a_patched_causal_language_model() -> None:
    """With adapters in the body, and an lm_head that is trained in full."""
    model = language_model(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    ids = torch.randint(1, 37, (2, 9))
    with pytest.raises(TypeError, match=r"for a PeftModel pass its get_base_model\(\)"):
        patch_causal_lm(model, STRENGTH)
    criterion = FAMLoss.for_model(nn.CrossEntropyLoss(), model, "lm_head", strength=STRENGTH)
    expected = criterion(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    criterion.detach()
    gradients = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    with patch_causal_lm(model.get_base_model(), STRENGTH) as patch:
        loss = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        assert patch.last.flatness > 0
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    for got, e in zip(trained, gradients, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-6)


def test_an_lm_head_with_an_adapter_is_refused() -> None:
    model = language_model(target_modules=["lm_head"])
    expect(
        "must be an nn.Linear.*take FAMLoss of the logits instead",
        lambda: patch_causal_lm(model.get_base_model(), STRENGTH),
    )
