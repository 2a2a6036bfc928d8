"""patch_causal_lm(method="noise") on mixtures of experts and on packed weights."""

from __future__ import annotations

import pytest
import torch
from tiny_language_models import VOCABULARY, ids, llama, transformers
from torch import Tensor, nn

from fam_ext import FAMLoss, UnsupportedError
from fam_ext.integrations.huggingface import patch_causal_lm


class Experts(nn.Module):
    """A mixture of plain linear layers; each token goes to one of them."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                out[chosen == k] = expert(x[chosen == k]) * weight[chosen == k].unsqueeze(-1)
        return out


def test_experts_of_plain_layers_have_noise_and_a_fisher_term() -> None:
    model, tokens = llama(), ids()
    model.model.layers[0].mlp = Experts(8, 40)  # more than tokens: some are not called
    patch = patch_causal_lm(model, 0.01, method="noise")
    with pytest.warns(UserWarning, match=r"have not been called \(model\.layers\.0\.mlp\.experts"):
        for _ in range(3):
            model(tokens, labels=tokens).loss.backward()
    called = [k for k, e in enumerate(model.model.layers[0].mlp.experts) if e.weight.grad is not None]
    hooks = {id(t.module): t.hook for t in patch.criterion.terms}
    seen = [k for k, e in enumerate(model.model.layers[0].mlp.experts) if hooks[id(e)].seen]  # type: ignore[union-attr]
    assert 0 < len(called) < 40 and set(called) == set(seen)
    patch.restore()
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    expert = next(e for e in model.model.layers[0].mlp.experts if e.weight.grad is not None)
    fisher = FAMLoss(nn.CrossEntropyLoss(), expert, 0.1, curvature="fisher")
    fisher(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert float(fisher.last.flatness) > 0


def test_experts_in_one_parameter_are_left_out_and_refused_by_name() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()
    name = next(n for n, m in model.named_modules() if n.endswith("experts"))
    if isinstance(model.get_submodule(name), nn.ModuleList):
        pytest.skip("this version of transformers has a module for each expert")
    with patch_causal_lm(model, 0.01, method="noise") as patch:
        assert "several matrices in one parameter (gate_up_proj, down_proj)" in patch.left_out[name]
        model(ids(), labels=ids()).loss.backward()
    with pytest.raises(UnsupportedError, match=r"got transformers.*MixtralExperts"):
        patch_causal_lm(model, 0.01, name, method="noise")


class Linear4bit(nn.Linear):
    """Two weights in a byte, as bitsandbytes packs them."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        self.weight = nn.Parameter(torch.zeros(width * width // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_packed_weights_are_refused_by_name() -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj = Linear4bit(8)
    with pytest.raises(
        UnsupportedError, match=r"Linear4bit whose weight is packed or quantized \(torch\.uint8\)"
    ):
        patch_causal_lm(model, 0.01, "*.q_proj", method="noise")
