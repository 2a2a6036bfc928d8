"""Training steps of small language models: noise in all layers of the blocks, Fisher on one block, FAM of the head, SAM.

The models are transformers' own, GPT-2 and Llama in little; a step is forward and backward pass, without an optimizer, which
costs every variant the same. Noise and Fisher have no exact value to compare with: what is checked is the loss itself, against
float64 (noise: at a strength of 1e-12), or kappa of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Build, Case, Variant, settle
from torch import Tensor, nn

import fam_ext
from fam_ext.integrations.huggingface import patch_causal_lm

OP = "language_model"
SHARE = 0
BATCH, LENGTH = 4, 128
BLOCKS, WIDTH = 4, 256
PLAIN = "plain"
TINY = 1e-12  # too small for the noise to show in float32, and not 0, which would skip it
CASES = (("GPT-2", 8192), ("GPT-2", 50257), ("Llama", 8192))
QUICK_CASES = (("GPT-2", 512),)


def model(kind: str, vocabulary: int, blocks: int, width: int) -> Any:
    import transformers

    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=LENGTH, n_embd=width, n_layer=blocks, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        made = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH, use_cache=False, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(config)
    made.loss_type = "ForCausalLM"
    return made.train()


def of_logits(lm: Any, criterion: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """A criterion of the logits, shifted as transformers shifts them."""
    return criterion(lm(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def sam(lm: Any, tokens: Tensor, rho: float = 0.05) -> tuple[Tensor]:
    """Two gradients, the second at the weights moved along the first (Foret et al. 2021). The weights are put back."""
    lm.zero_grad()
    loss = lm(tokens, labels=tokens).loss
    loss.backward()
    parameters = [p for p in lm.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    up = torch._foreach_mul(gradients, float(rho / (norm + 1e-12)))
    with torch.no_grad():
        torch._foreach_add_(parameters, up)
        lm.zero_grad()
    with torch.enable_grad():
        lm(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        torch._foreach_sub_(parameters, up)
    return (loss.detach(),)


def case(
    kind: str, vocabulary: int, compiled: bool = False, blocks: int = BLOCKS, width: int = WIDTH
) -> Case:
    torch.manual_seed(0)
    plain = model(kind, vocabulary, blocks, width)
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH))
    block = "transformer.h.1.*" if kind == "GPT-2" else "model.layers.1.*"
    copies = {name: copy.deepcopy(plain) for name in ("noise", "fisher", "head", "narrow", "sam")}
    patch_causal_lm(copies["noise"], TINY, method="noise")
    patches = {name: patch_causal_lm(copies[name], 1e-3, parts=n) for name, n in (("head", 2), ("narrow", 1))}
    fisher = fam_ext.FAMLoss.for_model(
        nn.CrossEntropyLoss(), copies["fisher"], block, strength=TINY, curvature="fisher",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    def own(lm: Any) -> tuple[Tensor]:
        lm.zero_grad()
        loss = lm(tokens, labels=tokens).loss
        loss.backward()
        return (loss.detach(),)

    def with_fisher() -> tuple[Tensor]:
        copies["fisher"].zero_grad()
        loss = of_logits(copies["fisher"], fisher, tokens)
        loss.backward()
        return (fisher.last.loss.detach(),)

    def with_head(name: str) -> tuple[Tensor, Tensor]:
        own(copies[name])
        return patches[name].last.loss, patches[name].last.flatness

    loss, kappa = _exact(plain, tokens)
    with_fisher()
    settle(fisher)
    return Case(
        f"{kind}, {blocks} blocks of {width}, V={vocabulary}, {BATCH}x{LENGTH} tokens",
        [
            Variant(PLAIN, partial(own, plain), PLAIN, 1e-5, (loss,)),
            Variant(
                "FAM noise (all layers of the blocks)", partial(own, copies["noise"]), PLAIN, 1e-4, (loss,)
            ),
            Variant("FAM Fisher (one block)", with_fisher, PLAIN, 1e-5, (loss,)),
            Variant("FAM head, exact, no logits", partial(with_head, "head"), PLAIN, 1e-4, (loss, kappa)),
            Variant("FAM head, parts=1", partial(with_head, "narrow"), PLAIN, 1e-4, (loss, kappa)),
            Variant("SAM", partial(sam, copies["sam"], tokens), PLAIN, 1e-5, (loss,)),
        ],
    )


@torch.no_grad()
def _exact(plain: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, kappa of the head) in float64, a few rows of logits at a time."""
    double = copy.deepcopy(plain).double()
    phi = double.base_model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    weight, wanted = double.lm_head.weight, tokens[:, 1:].flatten()
    square, loss, kappa = weight.square().sum(1), phi.new_zeros(()), phi.new_zeros(())
    for rows, own in zip(phi.split(64), wanted.split(64), strict=True):
        z = rows @ weight.T
        p = z.softmax(1)
        loss = loss + F.cross_entropy(z, own, reduction="sum")
        trace = (p @ square) - (p @ weight).square().sum(1)
        kappa = kappa + (rows.square().sum(1) * trace).sum()
    return loss / len(phi), kappa / len(phi)


def cases(quick: bool = False) -> list[Build]:
    if quick:
        return [partial(case, *chosen, blocks=2, width=64) for chosen in QUICK_CASES]
    return [partial(case, *chosen) for chosen in CASES]
