"""FAMTrainerMixin in the real transformers.Trainer: the update, logs, checkpoints, and a loss that lacks the term."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from tiny_language_models import WIDER, llama
from torch import Tensor, nn

from fam_ext import FAMLoss
from fam_ext.integrations.huggingface import FAMTrainerMixin, patch_causal_lm
from fam_ext.schedules import TargetRatio, Warmup

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
VOCABULARY, STRENGTH = 37, 0.05


class FAMTrainer(FAMTrainerMixin, transformers.Trainer):
    pass


def language_model() -> Any:
    return llama(vocab_size=VOCABULARY, num_hidden_layers=1, **WIDER)


def classifier(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(count: int = 8) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    rows = []
    for number in range(count):
        ids = torch.randint(1, VOCABULARY, (9,))
        rows.append({"input_ids": ids, "labels": ids.where(torch.arange(9) < 3 + number % 5, -100)})
    return rows


def classified(count: int = 8) -> list[dict[str, Any]]:
    torch.manual_seed(2)
    return [{"input_ids": torch.randint(1, VOCABULARY, (6,)), "labels": n % 3} for n in range(count)]


def arguments(folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd",
        "max_grad_norm": 0.0, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "logging_strategy": "no", "average_tokens_across_devices": True,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**given, **options})


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def head_of_logits(model: Any) -> FAMLoss:
    return FAMLoss(nn.CrossEntropyLoss(), model.lm_head, STRENGTH)


@pytest.mark.parametrize("how", [head_of_logits, lambda model: patch_causal_lm(model, STRENGTH)])
def test_language_model_under_accumulation(how: Any, tmp_path: Path) -> None:
    """Four micro-batches with different numbers of tokens make the update of their one mean."""
    data = texts(4)
    by_hand = language_model()
    criterion = FAMLoss(nn.CrossEntropyLoss(), by_hand.lm_head, STRENGTH)
    ids, labels = (torch.stack([row[k] for row in data]) for k in ("input_ids", "labels"))
    loss = criterion(by_hand(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0.1 * p.grad

    model = language_model()
    trainer = FAMTrainer(
        model, arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4),
        train_dataset=data, eval_dataset=data, criterion=how(model),
    )  # fmt: skip
    result = trainer.train()
    torch.testing.assert_close(parameters(model), parameters(by_hand), rtol=1e-4, atol=1e-6)
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.fam_criterion.step == 1
    expected = F.cross_entropy(by_hand.eval()(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_classification(weighted: bool, tmp_path: Path) -> None:
    """Class weights have no number of items: the micro-batches' means are averaged then."""
    data = classified(8)
    by_hand = classifier()
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]) if weighted else None)
    criterion = FAMLoss(loss, by_hand.classifier, STRENGTH)
    ids = torch.stack([row["input_ids"] for row in data])
    labels = torch.tensor([row["labels"] for row in data])
    by_hand.eval()
    by_hand.classifier.train()
    micro = [slice(0, 4), slice(4, 8)] if weighted else [slice(0, 8)]
    for rows in micro:
        (criterion(by_hand(ids[rows]).logits, labels[rows]) / len(micro)).backward()
    model = classifier()
    trainer = FAMTrainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2, train_sampling_strategy="sequential"), train_dataset=data,
        criterion=FAMLoss(loss, model.classifier, STRENGTH),
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0.1 * p.grad
    torch.testing.assert_close(parameters(model), parameters(by_hand), rtol=1e-4, atol=1e-6)


def test_logs_hold_kappa_and_no_none(tmp_path: Path) -> None:
    model = classifier()
    criterion = FAMLoss(nn.CrossEntropyLoss(), model.classifier, Warmup(0.4, steps=4))
    options = {"max_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    trainer = FAMTrainer(
        model, arguments(tmp_path, **options), train_dataset=classified(), criterion=criterion
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["fam_strength"] for entry in logged] == pytest.approx([0.0, 0.1, 0.2])
    assert "fam_flatness" not in logged[0] and logged[1]["fam_flatness"] > 0
    for entry in logged[1:]:
        total = entry["fam_loss"] + entry["fam_strength"] * entry["fam_flatness"]
        assert entry["loss"] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("kind", ["hutchinson", "ratio", "noise"])
def test_a_resumed_run_is_the_run_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def train(folder: Path, steps: int, resume: bool = False) -> tuple[dict[str, Tensor], FAMLoss]:
        model = classifier(dropout=0.1)
        layer = model.bert.encoder.layer[0].output.dense
        criterion = {
            "hutchinson": lambda: FAMLoss(
                nn.CrossEntropyLoss(),
                layer,
                Warmup(0.2, steps=8),
                method="hutchinson",
                per_sample_probes=True,
            ),
            "ratio": lambda: FAMLoss(nn.CrossEntropyLoss(), model.classifier, TargetRatio(0.3, maximum=1.0)),
            "noise": lambda: FAMLoss(nn.CrossEntropyLoss(), layer, Warmup(0.2, steps=8), method="noise"),
        }[kind]()
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": steps, "gradient_accumulation_steps": 2,
                   "per_device_train_batch_size": 2}  # fmt: skip
        trainer = FAMTrainer(
            model, arguments(folder, **options), train_dataset=classified(12), criterion=criterion
        )
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            trainer.train(resume_from_checkpoint=resume or None)
        criterion.detach()
        return parameters(model), criterion

    whole, _ = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    resumed, criterion = train(tmp_path / "parts", 6, resume=True)
    assert criterion.step == 6
    for name, expected in whole.items():
        assert torch.equal(resumed[name], expected), name


def test_a_checkpoint_without_the_criterion_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    transformers.Trainer(classifier(), arguments(tmp_path, **options), train_dataset=classified()).train()
    model = classifier()
    criterion = FAMLoss(nn.CrossEntropyLoss(), model.classifier, STRENGTH)
    trainer = FAMTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=classified(), criterion=criterion
    )
    expect(
        "the checkpoint was saved without the criterion", lambda: trainer.train(resume_from_checkpoint=True)
    )


def test_refusals(tmp_path: Path) -> None:
    model = classifier()
    with pytest.raises(TypeError, match="criterion must be a FAMLoss, or what patch_causal_lm returned"):
        FAMTrainer(model, arguments(tmp_path), train_dataset=classified(), criterion=nn.CrossEntropyLoss())
    criterion = FAMLoss(nn.CrossEntropyLoss(), model.classifier, STRENGTH)
    smoothed = arguments(tmp_path, label_smoothing_factor=0.1)
    expect(
        "label_smoothing_factor",
        lambda: FAMTrainer(model, smoothed, train_dataset=classified(), criterion=criterion),
    )
    trainer = FAMTrainer(model, arguments(tmp_path), train_dataset=classified(), criterion=criterion.eval())
    expect("this training step took no term", trainer.train)
    criterion.train()

    class Plain(FAMTrainerMixin, transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss

    plain = Plain(model, arguments(tmp_path), train_dataset=classified(), criterion=criterion)
    expect("this training step took no term", plain.train)


def test_label_smoothing_of_the_plain_trainer_is_refused(tmp_path: Path) -> None:
    """It takes the labels away from the model, which would train without the term."""
    model = language_model()
    with patch_causal_lm(model, STRENGTH):
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.1),
            train_dataset=texts(),
            eval_dataset=texts(),
        )
        assert trainer.evaluate()["eval_loss"] > 0
        expect("called without labels.*label_smoothing=", trainer.train)
    trainer.train()  # restored: as the user wants it


def test_a_trainer_that_forms_the_loss_itself_is_refused(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    columns = {name: [row[name].tolist() for row in texts()] for name in ("input_ids", "labels")}
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="texts")
    config = {k: v for k, v in arguments(tmp_path).to_dict().items() if k in (
        "output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "optim", "max_grad_norm", "report_to",
        "use_cpu", "save_strategy", "disable_tqdm", "lr_scheduler_type", "logging_strategy",
    )}  # fmt: skip
    config |= {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": False,
        "bf16": False,
    }
    tokenizer = _tokenizer(tmp_path)

    def trainer(kind: Any, model: Any, **options: Any) -> Any:
        return kind(model, trl.SFTConfig(**config), train_dataset=data, processing_class=tokenizer, **options)

    model = language_model()
    patch = patch_causal_lm(model, STRENGTH)
    expect("its loss_function was not asked.*FAMTrainerMixin", trainer(trl.SFTTrainer, model).train)

    class FAMSFTTrainer(FAMTrainerMixin, trl.SFTTrainer):
        pass

    model = language_model()
    patch = patch_causal_lm(model, STRENGTH)
    trainer(FAMSFTTrainer, model, criterion=patch).train()
    expected = language_model()
    transformers_trainer = FAMTrainer(
        expected, arguments(tmp_path, remove_unused_columns=False), train_dataset=texts(),
        criterion=patch_causal_lm(expected, STRENGTH),
    )  # fmt: skip
    transformers_trainer.train()
    torch.testing.assert_close(parameters(model), parameters(expected))
    assert patch.last.flatness > 0


def _tokenizer(folder: Path) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{n}": n for n in range(1, VOCABULARY)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[UNK]", eos_token="[UNK]")


def test_a_mixture_of_experts_keeps_its_balancing_loss(tmp_path: Path) -> None:
    """The model adds it to a loss of its own, which FAMLoss of the logits takes the place of."""
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_local_experts=3, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    by_hand = copy.deepcopy(model)
    data = texts(4)
    ids, labels = (torch.stack([row[k] for row in data]) for k in ("input_ids", "labels"))
    criterion = FAMLoss(nn.CrossEntropyLoss(), by_hand.lm_head, STRENGTH)
    for rows in (slice(0, 2), slice(2, 4)):
        outputs = by_hand(ids[rows])
        count = (labels[:, 1:] != -100).sum()
        loss = criterion(outputs.logits[:, :-1].flatten(0, 1), labels[rows, 1:].flatten(), num_items=count)
        (loss + 0.5 * outputs.aux_loss / 2).backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0.1 * p.grad
    trainer = FAMTrainer(
        model, arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                         train_sampling_strategy="sequential"),
        train_dataset=data, criterion=head_of_logits(model),
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(parameters(model), parameters(by_hand), rtol=1e-4, atol=1e-6)
