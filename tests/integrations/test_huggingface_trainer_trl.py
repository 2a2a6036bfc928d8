"""TRL's SFTTrainer through FAMTrainerMixin, on texts of different lengths: the update of a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from tiny_language_models import WIDER, llama
from torch import Tensor, nn
from trl_runs import RATE, WORDS, configured, data, texts, tokenizer

from fam_ext import FAMLoss
from fam_ext.integrations.huggingface import FAMTrainerMixin, patch_causal_lm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STRENGTH = 0.05


class FAMSFTTrainer(FAMTrainerMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
    pass


def language_model() -> Any:
    return llama(vocab_size=WORDS, num_hidden_layers=1, **WIDER, bos_token_id=1, eos_token_id=1).double()


def by_hand() -> dict[str, Tensor]:
    """Two updates of four texts each; kappa from the definition."""
    model, rows = language_model(), tokenizer()(texts())["input_ids"]
    for start in (0, 4):
        features, target = [], []
        for ids in rows[start : start + 4]:
            whole = torch.tensor([*ids, 1])  # TRL adds the token that ends a text
            features.append(model.model(whole[None]).last_hidden_state[0, :-1])
            target.append(whole[1:])
        phi, weight = torch.cat(features), model.lm_head.weight
        kappa = (phi.square().sum(1) * oracle.softmax_trace(phi @ weight.T, weight)).mean()
        total = F.cross_entropy(phi @ weight.T, torch.cat(target)) + STRENGTH * kappa
        with torch.no_grad():
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
                p -= RATE * g
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("patched", [False, True])
def test_updates_are_those_of_a_loop_by_hand(patched: bool, tmp_path: Path) -> None:
    model = language_model()
    criterion: Any = FAMLoss(nn.CrossEntropyLoss(), model.lm_head, STRENGTH)
    if patched:
        criterion.detach()
        criterion = patch_causal_lm(model, STRENGTH)
    trainer = FAMSFTTrainer(
        model, configured(tmp_path), train_dataset=data(),
        processing_class=tokenizer(), criterion=criterion,
    )  # fmt: skip
    trainer.train()
    got = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(got, by_hand(), rtol=1e-9, atol=1e-12)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2 and all(row["fam_flatness"] > 0 for row in logged)
    assert trainer.fam_criterion.step == 2


def test_another_loss_of_trl_is_refused(tmp_path: Path) -> None:
    model = language_model()
    criterion = FAMLoss(nn.CrossEntropyLoss(), model.lm_head, STRENGTH)
    for options in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        arguments = configured(tmp_path, **options)
        expect(
            "would form another loss|is another loss than the criterion's",
            lambda arguments=arguments: FAMSFTTrainer(  # type: ignore[misc]
                model, arguments, train_dataset=data(), processing_class=tokenizer(), criterion=criterion
            ),
        )
