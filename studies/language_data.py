"""Text that every machine has: Python's standard library and PyTorch's own sources, split by package.

Nothing is downloaded. The text is a little different from one version of Python or PyTorch to the next, so results name both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONTEXT = 64
# (training, validation, test) packages, and how many tokens of each: no package lies in two of them
PRE_TRAINING = (
    ("email", "http", "multiprocessing", "importlib", "xmlrpc", "concurrent"),
    ("asyncio",),
    ("unittest", "urllib", "logging"),
)
FINE_TUNING = (("torch.optim",), ("torch.distributions",), ("torch.nn.modules", "torch.sparse"))
TOPICS = ("asyncio", "email", "xml", "idlelib", "tkinter", "multiprocessing", "torch.optim", "torch.distributions",
          "torch.nn.modules", "torch.utils.data")  # fmt: skip


class Windows(NamedTuple):
    """Texts as rows of tokens, with labels where they are classified. A language model's training tokens are one row."""

    train: Tensor
    validation: Tensor
    test: Tensor
    labels: tuple[Tensor, Tensor, Tensor] | None = None


class Size(NamedTuple):
    """Tokens of the parts, and words of the vocabulary."""

    training: int = 12_000
    fine_tuning: int = 6_000
    validation: int = 8_000
    test: int = 12_000
    vocabulary: int = 768
    windows: int = 120  # of each topic: two thirds to train on, a sixth each to validate and test
    characters: int = 1_000_000  # of a text with a topic, at most


def sources(package: str) -> list[str]:
    """The sources of a package, a text each, by path. Its tests are left out."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the study reads the sources of {package}, which is not installed here")
    folder = Path(next(iter(spec.submodule_search_locations)))
    paths = sorted(
        p for p in folder.rglob("*.py") if not any("test" in part for part in p.relative_to(folder).parts)
    )
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def _mixed(packages: Sequence[str]) -> Iterator[str]:
    """Texts of several packages in turn, so that a part of given size has something of each."""
    waiting = [sources(package) for package in packages]
    while any(waiting):
        for texts in waiting:
            if texts:
                yield texts.pop(0)


@cache
def tokenizer(size: Size) -> Any:
    """Byte-pair encoding of the training packages' text alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "\n".join(_mixed(PRE_TRAINING[0]))[: 10 * size.training]
    made.train_from_iterator([text], trainer)
    return made


def _tokens(packages: Sequence[str], size: Size, count: int) -> Tensor:
    """The first `count` tokens of the packages' files in turn, at most 5,000 characters of each."""
    known: list[int] = []
    for text in _mixed(packages):
        known += tokenizer(size).encode(text[:5_000]).ids
        if len(known) >= count:
            break
    return torch.tensor(known[:count])


def _rows(tokens: Tensor) -> Tensor:
    """Windows that do not overlap, with the token behind each: (N, CONTEXT + 1)."""
    return tokens.unfold(0, CONTEXT + 1, CONTEXT)


@cache
def language(part: str, size: Size) -> Windows:
    """The data of "pretrain" or "finetune"."""
    training, validation, test = PRE_TRAINING if part == "pretrain" else FINE_TUNING
    count = size.training if part == "pretrain" else size.fine_tuning
    return Windows(
        _tokens(training, size, count),
        _rows(_tokens(validation, size, size.validation)),
        _rows(_tokens(test, size, size.test)),
    )


@cache
def topics(size: Size) -> Windows:
    """Windows of text and the package that each is of; the parts are different files of the same packages."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    labels: tuple[list[int], ...] = ([], [], [])
    counts = (4 * size.windows // 6, size.windows // 6, size.windows // 6)
    for label, package in enumerate(TOPICS):
        texts = sources(package)
        for k, share in enumerate((slice(0, None, 3), slice(1, None, 3), slice(2, None, 3))):
            known = [tokenizer(size).encode(text[: size.characters]).ids for text in texts[share]]
            ids = torch.tensor([i for text in known for i in text])
            rows = ids.unfold(0, CONTEXT, CONTEXT)
            evenly = torch.linspace(0, len(rows) - 1, min(counts[k], len(rows))).long()
            parts[k].append(rows[evenly])
            labels[k].extend([label] * len(evenly))
    train, validation, test = (torch.cat(part) for part in parts)
    one, two, three = (torch.tensor(part) for part in labels)
    return Windows(train, validation, test, (one, two, three))


def fingerprint(size: Size) -> str:
    """Of all text that the study is made of."""
    known = hashlib.sha256()
    for part in ("pretrain", "finetune"):
        for tensor in language(part, size)[:3]:
            known.update(tensor.contiguous().numpy().tobytes())
    return known.hexdigest()[:12]
