"""What each of the processes of tests/integrations/test_huggingface_trainer_distributed.py does, started by torchrun.

Usage: trainer_runs.py FOLDER; the results of the runs go to FOLDER/<rank>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_language_models import WIDER, llama
from torch import Tensor, nn

from fam_ext import FAMLoss
from fam_ext.integrations.huggingface import FAMTrainerMixin, patch_causal_lm
from fam_ext.schedules import Warmup

VOCABULARY, STRENGTH, RATE, UPDATES = 29, 0.05, 0.1, 3
PER_UPDATE = 4  # sequences: two micro-batches of one on each of two ranks


class FAMTrainer(FAMTrainerMixin, transformers.Trainer):
    pass


def language_model() -> Any:
    return llama(vocab_size=VOCABULARY, num_hidden_layers=1, **WIDER).double()


def texts() -> list[dict[str, Tensor]]:
    """Sequences of which very different numbers of tokens count."""
    torch.manual_seed(2)
    rows = []
    for number in range(PER_UPDATE * UPDATES):
        ids = torch.randint(1, VOCABULARY, (9,))
        rows.append({"input_ids": ids, "labels": ids.where(torch.arange(9) < 2 + 3 * (number % 3), -100)})
    return rows


def criterion_of(kind: str, model: Any) -> Any:
    """FAMLoss of the logits, the patch, or an estimate with draws inside the network."""
    if kind == "patch":
        return patch_causal_lm(model, STRENGTH)
    if kind == "noise":
        layer = model.model.layers[0].mlp.down_proj
        return FAMLoss(nn.CrossEntropyLoss(), layer, Warmup(STRENGTH, steps=2), method="noise")
    return FAMLoss(nn.CrossEntropyLoss(), model.lm_head, STRENGTH)


def train(kind: str, folder: Path, updates: int = UPDATES, resume: bool = False) -> dict[str, Any]:
    model = language_model()
    criterion = criterion_of(kind, model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=updates,
        learning_rate=RATE, optim="sgd", max_grad_norm=0.0, report_to="none", use_cpu=True, save_strategy="steps", save_steps=2,
        disable_tqdm=True, lr_scheduler_type="constant", logging_strategy="steps", logging_steps=1, ddp_backend="gloo",
        train_sampling_strategy="sequential", average_tokens_across_devices=True,
    )  # fmt: skip
    gradients: list[Tensor] = []

    class First(transformers.TrainerCallback):
        """The gradient of the first update."""

        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            if not gradients:
                gradients.extend(p.grad.clone() for p in model.parameters())

    trainer = FAMTrainer(model, arguments, train_dataset=texts(), criterion=criterion, callbacks=[First()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "gradients": gradients,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "step": trainer.fam_criterion.step,
        "ranks": trainer.accelerator.num_processes,
    }


def main(folder: Path) -> None:
    results = {kind: train(kind, folder / kind) for kind in ("logits", "patch", "noise")}
    train("noise", folder / "parts", updates=2)
    results["resumed"] = train("noise", folder / "parts", resume=True)
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
