"""What the two processes of tests/integrations/test_huggingface_noise_distributed.py do (spawned processes import it by name)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fam_ext.integrations.huggingface import patch_causal_lm


def model() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def tokens(rank: int) -> Tensor:
    torch.manual_seed(10 + rank)
    return torch.randint(0, 31, (2, 7))


def one_process(rank: int, strength: float = 0.02) -> list[Tensor]:
    """Gradients of two steps with the draws of this rank, added up, of an unwrapped model."""
    lm = model()
    patch_causal_lm(lm, strength, method="noise")
    return _gradients(lm, lm, rank)


def data_parallel(rank: int) -> list[Tensor]:
    lm = model()
    patch_causal_lm(lm, 0.02, method="noise")
    return _gradients(DistributedDataParallel(lm), lm, rank)


def fully_sharded(rank: int) -> list[Tensor]:
    """FSDP2, a unit for each block, patched after sharding."""
    from torch.distributed.fsdp import fully_shard

    lm = model()
    for layer in lm.model.layers:
        fully_shard(layer)
    fully_shard(lm)
    patch_causal_lm(lm, 0.02, method="noise")
    return [gradient.full_tensor() for gradient in _gradients(lm, lm, rank)]  # type: ignore[attr-defined]


def _gradients(called: Any, lm: Any, rank: int) -> list[Tensor]:
    torch.manual_seed(rank)  # of the draws
    for _ in range(2):
        called(input_ids=tokens(rank), labels=tokens(rank)).loss.backward()
    return [p.grad for p in lm.parameters()]
