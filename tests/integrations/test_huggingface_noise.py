"""patch_causal_lm(method="noise") on tiny GPT-2 and Llama models: the mean over draws, and all that they are trained with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from tiny_language_models import MODELS, both, gpt2, ids, llama, transformers
from torch import Tensor, nn

from fam_ext import FAMLoss, schedules
from fam_ext.hessian import noise
from fam_ext.integrations.huggingface import patch_causal_lm


def weights(model: Any) -> None:
    """Larger than a new model's, so that kappa is not tiny."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "wte" not in name and "embed" not in name:
                p.mul_(12)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
        ("llama", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    ],
)
def test_the_mean_holds_strength_times_kappa(name: str, layers: list[str]) -> None:
    """Against the full Hessian in float64. The loss is that of the model's own predictions, so that it has no first order."""
    model, tokens, strength, count = MODELS[name]().double(), ids(2, 5), 1e-4, 1200
    weights(model)
    target = model(tokens).logits.detach().softmax(-1).flatten(0, 1)

    def loss(**given: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, given, (tokens,)).logits
        return F.cross_entropy(logits.flatten(0, 1), target)

    clean = loss().detach()
    kappa = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        weight = model.get_submodule(layer).weight
        of = lambda w, key=f"{layer}.weight", turn=name == "gpt2": loss(**{key: w.t() if turn else w})  # noqa: E731
        rows = (weight.t() if name == "gpt2" else weight).detach().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            kappa = kappa + oracle.kappa(of, rows).detach()
    patch = patch_causal_lm(model, strength, layers, method="noise")
    values = []
    for _ in range(count):
        logits = model(tokens).logits
        values.append((F.cross_entropy(logits.flatten(0, 1), target).detach() - clean) / strength)
    mean, error = torch.stack(values).mean(), torch.stack(values).std() / count**0.5
    assert abs(mean - kappa) < 4 * error and error < 0.1 * kappa
    patch.restore()
    assert torch.equal(loss().detach(), clean)


@both
def test_every_layer_of_the_body_and_restored_without_a_trace(name: str) -> None:
    model, tokens = MODELS[name](), ids()
    clean = model(tokens).logits
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    patch = patch_causal_lm(model, 0.01, method="noise")
    linear = [m for m in model.base_model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert {id(t.module) for t in patch.criterion.terms} == {id(m) for m in linear}
    assert (
        list(patch.left_out) == ["lm_head"]
        and ("tied" if name == "gpt2" else "output embedding") in patch.left_out["lm_head"]
    )
    first, second = model(tokens).logits, model(tokens).logits
    assert not torch.equal(first, clean) and not torch.equal(first, second)
    patch.restore()
    patch.restore()
    assert torch.equal(model(tokens).logits, clean)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before


@both
def test_evaluation_generation_and_passes_without_grad_are_untouched(name: str) -> None:
    model, tokens = MODELS[name](), ids()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    clean, longer = model(tokens).logits, model.eval().generate(tokens, **options)
    with patch_causal_lm(model, 0.1, method="noise") as patch:
        assert torch.equal(model(tokens).logits, clean) and torch.equal(
            model.generate(tokens, **options), longer
        )
        model.train()
        with torch.no_grad():
            cached = model(tokens[:, :4], use_cache=True)
            rest = model(tokens[:, 4:], past_key_values=cached.past_key_values).logits
        torch.testing.assert_close(rest, clean[:, 4:])
        assert torch.equal(model.generate(tokens, **options), longer) and patch.criterion.step == 0
        assert not torch.equal(model(tokens).logits, clean)


def test_hooks_that_are_made_anew_obey_the_patch() -> None:
    """After detach() and attach() passes without grad are still left alone, and steps have draws of their own."""
    model, tokens = gpt2(), ids()
    clean = model(tokens).logits
    with patch_causal_lm(model.train(), 0.1, method="noise") as patch:
        patch.criterion.detach()
        patch.criterion.attach()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, clean)
        first, second = model(tokens).logits, model(tokens).logits
        assert not torch.equal(first, second) and not torch.equal(first, clean)


def test_every_is_set_later() -> None:
    model, tokens = gpt2(), ids()
    clean = model(tokens).logits
    with patch_causal_lm(model.train(), 0.1, method="noise") as patch:
        patch.criterion.every = 2
        perturbed = [not torch.equal(model(tokens).logits, clean) for _ in range(4)]
    assert perturbed == [True, False, True, False]


class FusedLoss(nn.Module):
    """A stand-in for fused losses: the model's forward is replaced by one that forms the loss from the head's weight alone."""

    @staticmethod
    def put_on(model: Any) -> None:
        def forward(input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            hidden = model.base_model(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1]
            loss = hidden.new_zeros(())
            for rows, wanted in zip(
                hidden.flatten(0, 1).split(4), labels[:, 1:].flatten().split(4), strict=True
            ):
                loss = loss + F.cross_entropy(
                    rows @ model.get_output_embeddings().weight.T, wanted, reduction="sum"
                )
            return transformers.modeling_outputs.CausalLMOutput(loss=loss / labels[:, 1:].numel())

        model.forward = forward


@both
def test_whoever_forms_the_loss(name: str) -> None:
    """The same draws, the same loss and gradients: the model's own, FAMLoss of its logits, a fused one."""
    tokens, results = ids(), []
    for kind in ("own", "logits", "fused"):
        model = MODELS[name]()
        if kind == "fused":
            FusedLoss.put_on(model)
        patch = patch_causal_lm(model, 0.01, method="noise")
        torch.manual_seed(5)
        if kind == "logits":
            patch.restore()
            body = [f"{model.base_model_prefix}.*"]
            criterion = FAMLoss.for_model(nn.CrossEntropyLoss(), model, body, strength=0.01, method="noise")
            loss = criterion(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        else:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Two passes before their backward passes, one with padding, and a pass without grad between: the gradients are the same."""
    gradients = []
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    for checkpointed in (False, True):
        model = MODELS[name]()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        patch_causal_lm(model, 0.02, method="noise")
        torch.manual_seed(5)
        losses = [
            model(ids(), labels=ids(), attention_mask=mask, use_cache=False).loss,
            model(ids(2), labels=ids(2), use_cache=False).loss,
        ]
        with torch.no_grad():
            model(ids(1))
        (losses[0] + 2 * losses[1]).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@both
def test_padding_gets_no_noise(name: str, monkeypatch: Any) -> None:
    model, tokens = MODELS[name](), ids()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = mask[2, :1] = 0
    seen: list[tuple[Tensor, Tensor]] = []
    perturb = noise.perturb_input

    def watched(layer: Any, drawn: Any, features: Tensor, strength: Any) -> Tensor:
        perturbed = perturb(layer, drawn, features, strength)
        seen.append((features.detach(), perturbed.detach()))
        return perturbed

    monkeypatch.setattr(noise, "perturb_input", watched)
    patch = patch_causal_lm(model, 0.1, method="noise")
    model(tokens, attention_mask=mask)
    assert len(seen) == len(patch.criterion.terms)
    for features, perturbed in seen:
        assert torch.equal(features[mask == 0], perturbed[mask == 0])
        assert (features != perturbed).any(-1)[mask == 1].all()
    del seen[:]
    model(tokens)  # the mask was that of the pass before
    assert all((a != b).any(-1).all() for a, b in seen)


def test_packed_sequences_and_the_flash_kernel() -> None:
    model = llama(attn_implementation="sdpa")
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    tokens = ids(1)
    patch_causal_lm(model, 0.01, method="noise")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        model(tokens, labels=tokens, position_ids=places, use_cache=False).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@both
def test_bfloat16(name: str) -> None:
    model, tokens = MODELS[name](), ids()
    patch_causal_lm(model, 1e-4, method="noise")
    torch.manual_seed(5)
    full = model(tokens, labels=tokens).loss
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, full, rtol=0.02, atol=0)
    loss.backward()
    half = MODELS[name]().bfloat16()
    patch_causal_lm(half, 1e-4, method="noise")
    half(tokens, labels=tokens).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.slow
@both
def test_compiled_whole(name: str) -> None:
    """In one graph, which a second step and another strength do not compile again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, tokens = MODELS[name](use_cache=False), ids()
    model.loss_type = "ForCausalLM"  # else GPT-2 logs that it takes this one, which dynamo does not trace
    clean = model(tokens, labels=tokens).loss.detach()
    patch = patch_causal_lm(model, 0.01, method="noise")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = []
    for strength in (0.01, 0.01, 0.02, 0.03):
        patch.criterion.strength = strength
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.detach())
    assert counter.frame_count == 1 and len({float(x) for x in (clean, *losses)}) == 5
    model.eval()
    torch.testing.assert_close(compiled(input_ids=tokens, labels=tokens).loss.detach(), clean)


@pytest.mark.slow
def test_compiled_with_a_schedule() -> None:
    torch._dynamo.reset()
    model, tokens = llama(use_cache=False), ids()
    patch = patch_causal_lm(model, schedules.Warmup(0.1, 10), method="noise")
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cannot count its passes: call criterion\.follow"):
        compiled(tokens)
    patch.criterion.follow(torch.optim.SGD(model.parameters(), 0.1))
    compiled(tokens)


def test_schedules_count_passes_or_updates() -> None:
    model, tokens = gpt2(), ids()
    clean = model(tokens).logits
    patch = patch_causal_lm(model, schedules.Warmup(0.1, 2), method="noise", every=2)
    perturbed = [not torch.equal(model(tokens).logits, clean) for _ in range(5)]
    assert perturbed == [False, False, True, False, True] and patch.criterion.step == 4
    assert patch.last.strength == 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patch.criterion.follow(optimizer)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert patch.criterion.step == 5


class Adapter(nn.Module):
    """What PEFT wraps a layer with, by its attribute names."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"own": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"own": nn.Linear(2, layer.out_features, bias=False)})
        self.scaling, self.active_adapters = {"own": 2.0}, ["own"]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + 2.0 * self.lora_B["own"](self.lora_A["own"](x))
        return out


def test_low_rank_adapters_have_the_noise_of_the_effective_weight() -> None:
    tokens, losses = ids(), []
    for merged in (False, True):
        model = llama()
        layer = model.model.layers[0].mlp.down_proj
        adapter = Adapter(layer)
        if merged:
            with torch.no_grad():
                layer.weight += 2.0 * adapter.lora_B["own"].weight @ adapter.lora_A["own"].weight
        else:
            model.model.layers[0].mlp.down_proj = adapter
        patch_causal_lm(model, 0.05, "model.layers.0.mlp.down_proj", method="noise")
        torch.manual_seed(5)
        losses.append(model(tokens, labels=tokens).loss)
    torch.testing.assert_close(*losses)


def test_copies_are_inert() -> None:
    model, tokens = gpt2(), ids()
    clean = model(tokens).logits
    patch_causal_lm(model, 0.1, method="noise")
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens).logits, clean) and not torch.equal(model(tokens).logits, clean)


@pytest.mark.parametrize(
    ("strength", "layers", "options", "error", "message"),
    [
        (0.1, None, {"method": "exact"}, ValueError, "method must be 'auto'"),
        (0.1, "*", {}, ValueError, "layers must be None"),
        (0.1, None, {"method": "noise", "probes": 2}, ValueError, "none named probes"),
        (0.1, None, {"method": "noise", "max_bytes": 2**20}, ValueError, "none named max_bytes"),
        (0.1, None, {"probes": 2}, ValueError, "none named probes with method='auto'.*exact"),
        (0.1, "*.nothing", {"method": "noise"}, ValueError, "near: "),
        (0.1, "lm_h*", {"method": "noise"}, ValueError, "a pattern of layers inside"),
        (-0.1, None, {"method": "noise"}, ValueError, "at least 0"),
        (schedules.TargetRatio(0.1), None, {"method": "noise"}, TypeError, "no value of kappa"),
    ],
)
def test_refusals(strength: Any, layers: Any, options: Any, error: Any, message: str) -> None:
    model = llama()
    with pytest.raises(error, match=message):
        patch_causal_lm(model, strength, layers, **options)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_head_by_its_name() -> None:
    model = llama()
    named = patch_causal_lm(model, 0.1, "lm_head", method="noise")
    assert [t.module for t in named.criterion.terms] == [model.lm_head]


@both
def test_trainer(name: str, tmp_path: Path) -> None:
    """Without further code: steps are perturbed, evaluation is not, and the schedule counts updates where it follows them."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    data = [{"input_ids": row, "labels": row} for row in ids(8)]

    def train(strength: float) -> tuple[Any, float]:
        model = MODELS[name]()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, seed=3,
            learning_rate=0.1, optim="sgd", report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        patch = patch_causal_lm(model, strength, method="noise")
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        assert evaluated == trainer.evaluate()["eval_loss"] and patch.criterion.step == 3
        return model, evaluated

    (plain, _), (perturbed, _) = train(0.0), train(0.05)
    differences = [
        float((p - q).abs().max()) for p, q in zip(plain.parameters(), perturbed.parameters(), strict=True)
    ]
    assert max(differences) > 1e-4
