"""A tokenizer, texts of different lengths and settings for TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="TRL needs datasets")
tokenizers = pytest.importorskip("tokenizers")
WORDS, RATE = 30, 0.1


def tokenizer() -> Any:
    words = {"[PAD]": 0, "[EOS]": 1, **{f"w{n}": n for n in range(2, WORDS)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]")


def texts() -> list[str]:
    torch.manual_seed(1)
    return [" ".join(f"w{k}" for k in torch.randint(2, WORDS, (3 + n,)).tolist()) for n in range(8)]


def data() -> Any:
    """With a fingerprint of its own: datasets would pickle the table for one."""
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict({"text": texts()}), fingerprint="texts")


def configured(folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2,
        "learning_rate": RATE, "optim": "sgd", "max_grad_norm": 0.0, "report_to": "none", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant", "logging_steps": 1,
        "gradient_checkpointing": False, "train_sampling_strategy": "sequential", "dataset_num_proc": None,
    }  # fmt: skip
    return trl.SFTConfig(**{**given, **options})
