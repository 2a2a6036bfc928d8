"""patch_causal_lm on tiny GPT-2 and Llama models: the same training step as FAMLoss of the logits, undone without a trace."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_language_models
import torch
import torch.nn.functional as F
from inputs import expect
from tiny_language_models import WIDER, transformers
from torch import Tensor, nn

from fam_ext import FAMLoss
from fam_ext.integrations.huggingface import patch_causal_lm

VOCABULARY, STRENGTH = 61, 0.05


gpt2 = partial(tiny_language_models.gpt2, vocab_size=VOCABULARY, n_embd=16)


def llama(kind: str = "Llama", **options: Any) -> Any:
    return tiny_language_models.llama(kind, vocab_size=VOCABULARY, **{**WIDER, **options})


def granite() -> Any:
    return llama("Granite", logits_scaling=4.0)


MODELS = {"gpt2": gpt2, "llama": llama, "granite": granite}


@pytest.fixture(params=MODELS)
def model(request: Any) -> Any:
    return MODELS[request.param]()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 11))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name, of every parameter; a tied weight appears once."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_logits(model: Any, batch: dict[str, Tensor], items: int | None = None) -> tuple[Tensor, Tensor]:
    """(loss + strength * kappa, kappa) by FAMLoss's closed form of logits: the scale of Granite's belongs to the features."""
    scale = getattr(model.config, "logits_scaling", 1.0)
    phi = model.base_model(batch["input_ids"]).last_hidden_state[:, :-1] / scale
    head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    criterion = FAMLoss(nn.CrossEntropyLoss(reduction="mean" if items is None else "sum"), head, STRENGTH)
    loss = criterion(head(phi).flatten(0, 1), batch["labels"][:, 1:].flatten())
    return loss / (items or 1), criterion.last.flatness / (items or 1)


@pytest.mark.parametrize("items", [None, 50, torch.tensor(50)])
def test_training_step(model: Any, items: Any) -> None:
    data = batch()
    expected, kappa = of_logits(model, data, None if items is None else int(items))
    grads = gradients(model, expected)
    patch = patch_causal_lm(model, STRENGTH)
    output = model(**data, **({} if items is None else {"num_items_in_batch": items}))
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(patch.last.flatness, kappa)
    assert kappa > 0
    torch.testing.assert_close(gradients(model, output.loss), grads, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**data, return_dict=False)[0], of_logits(model, data)[0])


def test_strength_0_is_the_models_own_loss(model: Any) -> None:
    data = batch()
    expected = model(**data).loss
    grads = gradients(model, expected)
    with patch_causal_lm(model, 0.0):
        loss = model(data["input_ids"], labels=data["labels"]).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), grads, rtol=1e-5, atol=1e-6)


def test_evaluation_and_calls_without_labels_are_untouched(model: Any) -> None:
    data = batch()
    logits = model(data["input_ids"]).logits
    expected = model.eval()(**data)
    patch = patch_causal_lm(model, STRENGTH)
    output = model(**data)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert torch.equal(model.train()(data["input_ids"]).logits, logits)
    assert patch.last.loss is None and patch.criterion.step == 0


def test_restored_without_a_trace(model: Any) -> None:
    data = batch()
    before = [dict(vars(m)) for m in model.modules()]
    expected = model(**data)
    patch = patch_causal_lm(model, STRENGTH)
    expect("has been replaced, by an earlier patch", lambda: patch_causal_lm(model, STRENGTH))
    model(**data)
    patch.restore()
    patch.restore()
    output = model(**data)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert [set(vars(m)) for m in model.modules()] == [set(v) for v in before]
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.lm_head._forward_hooks


def test_copies_are_patched_for_themselves(model: Any) -> None:
    data = batch()
    patch_causal_lm(model, STRENGTH)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**data).loss, model(**data).loss)
    assert copied.lm_head.forward.__self__ is not model.lm_head.forward.__self__


def test_failed_forward_leaves_the_model_usable() -> None:
    model, data = gpt2(), batch()
    patch_causal_lm(model, STRENGTH)
    with pytest.raises(IndexError):
        model(data["input_ids"] + VOCABULARY, labels=data["labels"])
    assert model(data["input_ids"]).logits.shape == (3, 11, VOCABULARY)


def test_changed_logits_are_refused() -> None:
    model = llama("Gemma2", final_logit_softcapping=30.0, query_pre_attn_scalar=8, sliding_window=8)
    patch_causal_lm(model, STRENGTH)
    expect("applies tanh to its logits", lambda: model(**batch()))


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"model must be a transformers\.PreTrainedModel"):
        patch_causal_lm(nn.Linear(3, 4), STRENGTH)
    other = llama()
    other.lm_head = nn.Sequential(other.lm_head)
    expect("must be an nn.Linear", lambda: patch_causal_lm(other, STRENGTH))
    custom = llama()
    custom.loss_function = lambda logits, labels, **k: F.mse_loss(logits, logits)
    expect("must be transformers' ForCausalLMLoss", lambda: patch_causal_lm(custom, STRENGTH))


def test_compiled_body() -> None:
    torch._dynamo.reset()
    model, data = llama(), batch()
    expected = of_logits(model, data)[0]
    patch_causal_lm(model, STRENGTH)
    with pytest.raises(Exception, match=r"compile the model's body, model\.base_model\.compile\(\)"):
        torch.compile(model, backend="aot_eager")(**data)
    torch._dynamo.reset()
    model.base_model.compile(backend="aot_eager")
    torch.testing.assert_close(model(**data).loss, expected)


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma", "Cohere", "Olmo2"])
def test_other_models(kind: str) -> None:
    model, data = llama(kind), batch()
    expected = model(**data).loss
    with patch_causal_lm(model, 0.0):
        torch.testing.assert_close(model(**data).loss, expected)
    with patch_causal_lm(model, STRENGTH) as patch:
        loss = model(**data).loss
    torch.testing.assert_close(loss, expected + STRENGTH * patch.last.flatness)
    assert patch.last.flatness > 0


def test_autocast() -> None:
    model, data = llama(), batch()
    patch_causal_lm(model, STRENGTH)
    expected = model(**data).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**data).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)  # the body runs in bfloat16
    loss.backward()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trainer(name: str, tmp_path: Path) -> None:
    """Two micro-batches of different lengths give the update of the batch of both; evaluation reports the plain loss."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    torch.manual_seed(2)
    data = []
    for length in (5, 11, 7, 3):
        ids = torch.randint(1, VOCABULARY, (11,))
        data.append({"input_ids": ids, "labels": ids.where(torch.arange(11) < length, -100)})

    def train(micro: int) -> tuple[dict[str, Tensor], Any]:
        model = MODELS[name]()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro,
            max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", logging_strategy="no",
        )  # fmt: skip
        with patch_causal_lm(model, STRENGTH) as patch:
            trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"]
        assert evaluated == trainer.evaluate()["eval_loss"]
        return {k: p.detach() for k, p in model.named_parameters()}, patch

    whole, _ = train(4)
    accumulated, patch = train(1)
    torch.testing.assert_close(whole, accumulated, rtol=1e-4, atol=1e-6)
    assert patch.criterion.step == 4
    assert any((whole[k] - p).abs().max() > 1e-4 for k, p in MODELS[name]().named_parameters())


class OwnHead(nn.Module):
    """As TRL's fused head: another forward on the model, which forms the log-probabilities from the head's weight."""

    @staticmethod
    def put_on(model: Any) -> None:
        original = model.forward

        def forward(*args: Any, labels: Any = None, own: bool = False, **kwargs: Any) -> Any:
            if not own:
                return original(*args, labels=labels, **kwargs)
            hidden = model.base_model(*args, **kwargs).last_hidden_state
            logits = hidden[:, :-1] @ model.get_output_embeddings().weight.T
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            return transformers.modeling_outputs.CausalLMOutput(loss=loss)

        model.forward = forward


@pytest.mark.parametrize("labels", [True, False])
def test_training_without_the_term_is_refused(model: Any, labels: bool) -> None:
    patch = patch_causal_lm(model, STRENGTH)
    data = batch()
    if labels:
        OwnHead.put_on(model)

    def without() -> Tensor:
        if labels:
            return model(**data, own=True).loss
        return F.cross_entropy(
            model(data["input_ids"]).logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten()
        )

    text = "its loss_function was not asked" if labels else "called without labels"
    expect(text, without().backward)
    with torch.no_grad():
        without()
    model.eval()
    without().backward()
    model.train()
    if not labels:  # beside the model's own loss, of the same weights, another use of the logits is welcome
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            model(**data).loss.backward()
            without().backward()
            optimizer.step()
        expect(text, without().backward)
    pending = without()
    patch.restore()
    pending.backward()
    without().backward()
