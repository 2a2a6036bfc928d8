"""A tiny GPT-2 and a tiny Llama without dropout, and their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
VOCABULARY = 31


WIDER = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}  # of a Llama


def gpt2(**options: Any) -> Any:
    """Its lm_head is tied to the token embedding."""
    given = {
        "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**given)).train()


def llama(kind: str = "Llama", **options: Any) -> Any:
    """Or a model of another `kind` that is configured alike."""
    given = {
        "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**given)
    ).train()


MODELS = {"gpt2": gpt2, "llama": llama}
both = pytest.mark.parametrize("name", MODELS)


def ids(samples: int = 3, length: int = 7) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, VOCABULARY, (samples, length))
