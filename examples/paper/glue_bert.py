"""A GLUE task with BERT in transformers' Trainer: 20 epochs at 2e-5, the relative flatness of the classifier.

    python examples/paper/glue_bert.py                      # RTE
    python examples/paper/glue_bert.py --task mrpc --strength 0
    python examples/paper/glue_bert.py --smoke              # a small BERT with random weights on generated sentences

A tenth of the training data is held out as the validation part. GLUE hides its test labels: --test takes its validation set.
The published strength, 3e6, belongs to another number than kappa; docs/paper.md says why 1 is the default here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import common
import torch
from torch import nn

SENTENCES = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
}
LENGTH = 128  # tokens


def load(options: argparse.Namespace, transformers: Any) -> tuple[Any, Any, common.Parts]:
    """(model, collator, parts) of the real task."""
    datasets = common.need("datasets", "datasets", f"GLUE's {options.task}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    glue = datasets.load_dataset("nyu-mll/glue", options.task)
    columns = [c for c in glue["train"].column_names if c != "label"]
    glue = glue.map(
        lambda rows: tokenizer(*(rows[c] for c in SENTENCES[options.task]), truncation=True, max_length=LENGTH),
        batched=True, remove_columns=columns,
    )  # fmt: skip
    held = glue["train"].train_test_split(test_size=0.1, seed=options.seed)
    test = glue["validation_matched" if options.task == "mnli" else "validation"]
    labels = glue["train"].features["label"].num_classes
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=labels)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    return model, collator, common.Parts(held["train"], held["test"], test)


def generate(transformers: Any) -> tuple[Any, Any, common.Parts]:
    """The same of random sentences, whose first word tells the label."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
    )
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in common.Parts._fields:
        words = torch.randint(10, 50, (8, 12), generator=generator)
        words[:, 0] = torch.arange(8) % 2
        parts.append([{"input_ids": row, "labels": int(row[0])} for row in words])
    model = transformers.BertForSequenceClassification(config)
    return model, transformers.default_data_collator, common.Parts(*parts)


def share_right(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments: Sequence[str] | None = None) -> common.Log:
    parser = common.parser(
        __doc__, epochs=20, batch=32, lr=2e-5, weight_decay=0.0, strength=1.0, layer="classifier"
    )
    parser.add_argument("--task", choices=SENTENCES, default="rte", help="of GLUE")
    parser.add_argument("--model", default="bert-base-cased", help="name on the hub, or a folder")
    options = common.settled(parser, arguments)
    transformers = common.need("transformers", "transformers accelerate", "The Trainer")
    from fam_ext.integrations.huggingface import FAMTrainerMixin

    class FAMTrainer(FAMTrainerMixin, transformers.Trainer):
        pass

    model, collator, parts = generate(transformers) if options.smoke else load(options, transformers)
    criterion = common.fam_loss(nn.CrossEntropyLoss(), model, options)
    settings = transformers.TrainingArguments(
        str(options.out / f"glue_{options.task}"), num_train_epochs=options.epochs, learning_rate=options.lr,
        per_device_train_batch_size=options.batch, per_device_eval_batch_size=options.batch,
        weight_decay=options.weight_decay, eval_strategy="epoch", save_strategy="no", logging_strategy="epoch",
        report_to="none", seed=options.seed, use_cpu=options.smoke, dataloader_num_workers=options.workers,
    )  # fmt: skip
    trainer = FAMTrainer(
        model, settings, train_dataset=parts.train, eval_dataset=parts.validation, data_collator=collator,
        compute_metrics=share_right, criterion=criterion,
    )  # fmt: skip
    trainer.train()
    rows: dict[float, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        rows.setdefault(entry["epoch"], {}).update(entry)
    log = [
        {
            "epoch": epoch,
            **{k: row[f"fam_{k}"] for k in ("loss", "flatness", "strength") if f"fam_{k}" in row},
            "validation": row["eval_accuracy"],
        }
        for epoch, row in rows.items()
        if "eval_accuracy" in row
    ]
    if options.test:
        log[-1]["test"] = trainer.evaluate(parts.test, metric_key_prefix="test")["test_accuracy"]
    common.write(options.out / f"glue_{options.task}.csv", log)
    print(f"glue {options.task}: {', '.join(f'{key} {value:.4g}' for key, value in log[-1].items())}")
    return log


if __name__ == "__main__":
    main()
