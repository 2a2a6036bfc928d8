"""Late generalization: a network learns a + b mod p by heart long before it generalizes; sharpness delays it on purpose.

    python examples/paper/grokking.py                  # strengths 0 and -0.01, 0.01; the term is switched off half-way
    python examples/paper/grokking.py --strengths 0 -0.1 --switch-off 2000
    python examples/paper/grokking.py --smoke          # a few steps with a small p

Features are divided by their norm and multiplied by 1 / temperature, so that kappa of the head cannot be changed by their length.
A negative strength rewards sharpness while training runs; a schedule ends it. The idea is that of arXiv 2509.17738; network and
numbers here are our own. The validation part is the pairs that are not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

import fam_ext
from fam_ext.schedules import SwitchOff


class ModularSum(nn.Module):
    """(B, 2) residues -> (B, p) logits of the sum's residue."""

    def __init__(self, p: int, width: int, temperature: float) -> None:
        super().__init__()
        self.tokens, self.temperature = nn.Embedding(p, width), temperature
        self.body = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        features = nn.functional.normalize(self.body(self.tokens(pairs).flatten(1)), dim=1)
        return self.head(features / self.temperature)


def split(p: int, share: float, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training, validation): all pairs of residues in random order, cut once."""
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    pairs = torch.stack([a.flatten(), b.flatten()], 1)
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    cut = round(share * p * p)
    sums = pairs.sum(1) % p
    return (pairs[order[:cut]], sums[order[:cut]]), (pairs[order[cut:]], sums[order[cut:]])


def run(strength: float, options: argparse.Namespace) -> list[dict[str, float]]:
    """One training; a line of the log every options.log steps."""
    tqdm = common.need("tqdm", "tqdm", "The progress bar").tqdm
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    parts = split(options.p, options.share, options.seed)
    (x, y), (new_x, new_y) = ((pairs.to(device), sums.to(device)) for pairs, sums in parts)
    model = ModularSum(options.p, options.width, options.temperature).to(device)
    schedule = SwitchOff(strength, options.switch_off)
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), model.head, schedule)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=options.weight_decay)
    flatness = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), model.head)
    log: list[dict[str, float]] = []
    for step in tqdm(range(options.steps), desc=f"strength {strength:g}", mininterval=1.0):
        chosen = torch.randint(len(x), (options.batch,), device=device)
        optimizer.zero_grad()
        criterion(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if (step + 1) % options.log == 0:
            with torch.no_grad():
                logits, new_logits = model(x), model(new_x)
                kappa = flatness(model(x), y)
            log.append(
                {
                    "strength": strength,
                    "step": step + 1,
                    "loss": float(nn.functional.cross_entropy(logits, y)),
                    "kappa": float(kappa),
                    "train": float((logits.argmax(1) == y).float().mean()),
                    "validation": float((new_logits.argmax(1) == new_y).float().mean()),
                }
            )
    flatness.detach()
    criterion.detach()
    return log


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    common.add_places(parser)
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[0.0, -0.01, 0.01], help="one training each"
    )
    parser.add_argument("--steps", type=int, default=20000, help="updates")
    parser.add_argument("--switch-off", type=int, default=10000, help="the step that ends the term")
    parser.add_argument("--p", type=int, default=97, help="modulus")
    parser.add_argument("--share", type=float, default=0.4, help="of all pairs that is trained on")
    parser.add_argument("--width", type=int, default=128, help="of features")
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="features have the length 1 / temperature"
    )
    parser.add_argument("--batch", type=int, default=512, help="pairs in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--weight-decay", type=float, default=1.0, help="of AdamW")
    parser.add_argument("--log", type=int, default=200, help="steps between lines of the log")
    smoke = {"p": 11, "steps": 60, "switch_off": 30, "width": 32, "batch": 32, "log": 20}
    options = common.settled(parser, arguments, **smoke)
    rows = [row for strength in options.strengths for row in run(strength, options)]
    common.write(options.out / "grokking.csv", rows)
    for strength in options.strengths:
        own = [row for row in rows if row["strength"] == strength]
        learned = next((row["step"] for row in own if row["train"] > 0.99), None)
        known = next((row["step"] for row in own if row["validation"] > 0.99), None)
        print(
            f"strength {strength:g}: training pairs right at step {learned}, new pairs right at step {known}"
        )
    return rows


if __name__ == "__main__":
    main()
