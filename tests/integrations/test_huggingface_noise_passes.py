"""Which passes of a patched model are steps, which are perturbed and where, and layers that no pass calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_language_models import MODELS, both, ids, llama
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fam_ext import UnsupportedError
from fam_ext.integrations.huggingface import patch_causal_lm


def mask() -> Tensor:
    given = torch.ones(3, 7, dtype=torch.long)
    given[0, :3] = 0
    return given


def test_passes_in_the_criterion_s_evaluation_mode_are_no_steps() -> None:
    model = llama()
    clean = model(ids()).logits
    patch = patch_causal_lm(model, 0.1, method="noise")
    model(ids())
    patch.criterion.eval()
    for _ in range(3):
        assert torch.equal(model(ids()).logits, clean)
    assert patch.criterion.step == 0 and patch._passes == 1
    patch.criterion.train()
    assert not torch.equal(model(ids()).logits, clean)
    assert patch.criterion.step == 1 and patch._passes == 2


def test_a_mask_by_position() -> None:
    model = llama()
    patch = patch_causal_lm(model, 0.1, method="noise")
    body = model.model
    for call in (lambda: body(ids(), mask()), lambda: body(ids(), attention_mask=mask())):
        call()
        assert torch.equal(patch._gate.positions, mask())  # type: ignore[arg-type]
    body(ids())
    assert patch._gate.positions is None
    body(ids(), mask()[:, None, None] == 1)  # of another kind: the attention's own
    assert patch._gate.positions is None


def repeated(body: Any, vectors: Tensor, **options: Any) -> Tensor:
    """The body's states, under a checkpoint where there are options."""

    def hidden(vectors: Tensor) -> Tensor:
        states: Tensor = body(inputs_embeds=vectors, use_cache=False).last_hidden_state
        return states

    states: Tensor = checkpoint(hidden, vectors, **options) if options else hidden(vectors)
    return states


@both
def test_a_checkpoint_around_the_whole_body(name: str) -> None:
    """The backward pass repeats the body, and is no step of its own; also with a pass without grad in between."""
    gradients = []
    for checkpointed in (False, True):
        model = MODELS[name]()
        patch = patch_causal_lm(model, 0.02, method="noise")
        vectors = model.get_input_embeddings()(ids()).detach().requires_grad_()
        torch.manual_seed(5)
        states = repeated(model.base_model, vectors, **({"use_reentrant": False} if checkpointed else {}))
        with torch.no_grad():
            model(ids(1))
        states.square().sum().backward()
        assert patch._passes == 1 and patch.criterion.step == 0
        gradients.append([vectors.grad, *(p.grad for p in model.base_model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_reentrant_checkpoint_around_the_whole_body_is_refused() -> None:
    """Its first pass has no gradients, and so no noise."""
    model = llama()
    patch_causal_lm(model, 0.02, method="noise")
    model(ids(), labels=ids()).loss.backward()
    vectors = model.get_input_embeddings()(ids()).detach().requires_grad_()
    torch.manual_seed(5)  # not the pass before once more
    states = repeated(model.base_model, vectors, use_reentrant=True)
    with pytest.raises(UnsupportedError, match=r"around the whole model.*use_reentrant=False"):
        states.sum().backward()
    model(ids(), labels=ids()).loss.backward()  # and nothing is left of it


def test_settings_between_passes_leave_the_noise_on() -> None:
    """Also after a pass without noise: a new strength, the optimizer's step that the criterion follows, train()."""
    model = llama()
    clean = model(ids()).logits.detach()
    patch = patch_causal_lm(model, 0.1, method="noise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    patch.criterion.follow(optimizer)

    def new_strength() -> None:
        patch.criterion.strength = 0.2

    for change in (optimizer.step, new_strength, patch.criterion.train):
        model(ids(), labels=ids()).loss.backward()
        with torch.no_grad():
            assert torch.equal(model(ids()).logits, clean)
        change()
        assert not torch.allclose(model(ids()).logits, clean)


def test_layers_that_no_pass_calls_are_refused_at_the_second(monkeypatch: Any) -> None:
    model = llama()
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", lambda x: x)
    patch = patch_causal_lm(model, 0.1, "model.layers.0.mlp.*", method="noise")
    model(ids())
    with pytest.raises(UnsupportedError, match=r"3 of 3 layers have not been called \(model\.layers\.0\.mlp"):
        model(ids())
    patch.restore()
    model(ids())
    patch = patch_causal_lm(model, 0.1, ["model.layers.0.mlp.up_proj", "model.layers.1.*"], method="noise")
    model(ids())
    with pytest.warns(UserWarning, match=r"1 of 8 layers have not been called"):
        model(ids())
    model(ids())  # said once
    assert patch._passes == 3
