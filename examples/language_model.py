"""A small GPT-2 on Python's own sources, with and without FAM's noise in its blocks: python examples/language_model.py

It needs transformers. The text is read byte by byte: trained on `json`, `asyncio` is predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fam_ext.integrations.huggingface import patch_causal_lm

LENGTH, BATCH = 64, 16


def text(module: object) -> torch.Tensor:
    folder = Path(str(getattr(module, "__file__", ""))).parent
    return torch.tensor(list(b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))))


def train(strength: float, steps: int) -> tuple[float, float]:
    """(training loss, loss on another package) in nats of a byte, after `steps` steps."""
    torch.manual_seed(0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, **options)
    )
    if strength > 0:
        patch_causal_lm(model, strength, method="noise")  # all that FAM asks for
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    training, other = text(json), text(asyncio).unfold(0, LENGTH, LENGTH)[:200]
    for _ in range(steps):
        starts = torch.randint(0, len(training) - LENGTH, (BATCH, 1))
        batch = training[starts + torch.arange(LENGTH)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        seen = training.unfold(0, LENGTH, LENGTH)[:200]
        return float(model(seen, labels=seen).loss), float(model(other, labels=other).loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    for strength in (0.0, 1e-4, 1e-3):
        seen, other = train(strength, steps)
        print(f"strength {strength:g}: training loss {seen:.3f}, on another package {other:.3f}")
