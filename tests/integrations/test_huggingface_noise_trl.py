"""TRL's SFTTrainer and PEFT's adapters on a model with noise: no further code, whoever wraps the model and forms the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import WIDER, gpt2, llama
from torch import Tensor
from trl_runs import WORDS, configured, data, tokenizer

from fam_ext.hessian import noise
from fam_ext.integrations.huggingface import patch_causal_lm

trl = pytest.importorskip("trl", reason="TRL is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SPECIAL = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 1}
MODELS: dict[str, tuple[Callable[[], Any], list[str], int]] = {
    "gpt2": (lambda: gpt2(**SPECIAL), ["c_attn", "c_proj", "c_fc"], 8),
    "llama": (lambda: llama(**SPECIAL, **WIDER), ["q_proj", "v_proj", "o_proj", "down_proj"], 14),
}
# options of SFTConfig
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"gradient_accumulation_steps": 1},
    "accumulated": {},
    "checkpointed": {"gradient_checkpointing": True},
    "loss in chunks": {"loss_type": "chunked_nll"},
    "packed": {"packing": True, "max_length": 16},
    "without padding": {"padding_free": True, "max_length": None},
    "bfloat16": {"bf16": True},
}


class Seen:
    """What the noise did in every call of a layer: where the mask had padding, and how far each row moved."""

    def __init__(self, patch: Any) -> None:
        self.gate = patch._gate
        self.calls: list[tuple[Tensor | None, Tensor]] = []

    def __call__(self, *arguments: Any) -> Tensor:
        perturbed = _PERTURB(*arguments)
        moved = (perturbed - arguments[2]).detach().abs().amax(-1)
        self.calls.append((self.gate.positions, moved))
        return perturbed

    def padded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(mask, how far rows moved) of calls with padding in the batch."""
        return ((mask == 1, moved) for mask, moved in self.calls if mask is not None and (mask == 0).any())


_PERTURB = noise.perturb_input


def trained(
    name: str, strength: float, first: str, folder: Path, monkeypatch: Any, **options: Any
) -> tuple[list[float], Seen, int]:
    """Losses of two updates with LoRA. `first`: whether the patch or the trainer, which adds the adapters, comes first."""
    make, targets, _ = MODELS[name]
    model: Any = make()
    torch.manual_seed(2)  # of the adapters
    adapters = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    given: dict[str, Any] = {"peft_config": adapters}
    if first == "patch":
        model, given = peft.get_peft_model(model, adapters), {}
        patch = patch_causal_lm(model, strength, method="noise")
    trainer = trl.SFTTrainer(
        model, configured(folder, **options), train_dataset=data(), processing_class=tokenizer(), **given
    )
    if first == "trainer":
        patch = patch_causal_lm(trainer.model, strength, method="noise")
    seen = Seen(patch)
    monkeypatch.setattr(noise, "perturb_input", seen)
    trainer.train()
    monkeypatch.setattr(noise, "perturb_input", _PERTURB)
    layers = len(patch.criterion.terms)
    patch.restore()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], seen, layers


@pytest.mark.parametrize("first", ["patch", "trainer"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_two_updates(name: str, way: str, first: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Noise in every layer of the body, none in padding, and no draws at strength 0."""
    options = WAYS[way]
    clean, silent, _ = trained(name, 0.0, first, tmp_path, monkeypatch, **options)
    losses, seen, layers = trained(name, 0.05, first, tmp_path, monkeypatch, **options)
    assert not silent.calls and layers == MODELS[name][2]
    assert len(losses) == len(clean) == 2 and all(loss == loss for loss in losses)
    assert all(abs(a - b) > 1e-5 for a, b in zip(losses, clean, strict=True))
    passes = 2 * options.get("gradient_accumulation_steps", 2) * (1 + ("gradient_checkpointing" in options))
    assert len(seen.calls) == passes * layers
    padded = list(seen.padded())
    assert bool(padded) == (way not in ("packed", "without padding"))
    for mask, moved in padded:
        assert (moved[mask] > 0).all() and (moved[~mask] == 0).all()
    if not padded:
        assert all((moved > 0).all() for _, moved in seen.calls)
