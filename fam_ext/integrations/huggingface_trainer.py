"""transformers.Trainer and its descendants with FAM: the loss, the logs and the checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.loss.fam_loss import FAMLoss

NAME = "FAMTrainerMixin"
_IGNORED = -100  # what Trainer does not count

_Base: Any = object
if TYPE_CHECKING:

    class _Trainer:  # what the mixin asks of transformers.Trainer
        def __getattr__(self, name: str) -> Any: ...

    _Base = _Trainer


class FAMTrainerMixin(_Base):  # type: ignore[misc]
    """Trains with FAM in `transformers.Trainer`, and in trainers derived from it, TRL's SFTTrainer among them.

    Derive from this class and the trainer, in this order, and pass `criterion=`: a FAMLoss of the logits, or what patch_causal_lm
    returned, for which the model forms the loss. Then

    - the loss is the sum over the items of an update, of all micro-batches and ranks, divided by their number, and kappa is of
      that loss (Trainer's `num_items_in_batch`). Where the number is not known, or the criterion has none (class weights, a loss
      of your own), it is the mean of the micro-batches' losses, as in Trainer. The load-balancing loss of a mixture of experts is
      added as a mean over micro-batches;
    - a step of schedules and `every` is an update (FAMLoss.follow);
    - "fam_loss", "fam_flatness" (kappa) and "fam_strength" of the latest micro-batch are logged with Trainer's own numbers, which
      all of its loggers get;
    - a checkpoint holds the criterion's state, for each rank, and a run that is resumed goes on from it;
    - a training step without the term raises an error.

    The logits and labels that the criterion gets are those of `loss_arguments`, which may be overridden.

    Raises:
        TypeError: `criterion` is neither a FAMLoss nor a patch.
        UnsupportedError: the trainer smooths labels as well, or its loss is another one; in training: a step took no term.

    Example:
        >>> import tempfile, torch, transformers, fam_ext
        >>> from fam_ext.integrations.huggingface import FAMTrainerMixin
        >>> class FAMTrainer(FAMTrainerMixin, transformers.Trainer):
        ...     pass
        >>> config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.BertForSequenceClassification(config)
        >>> criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), model.classifier, strength=0.1)
        >>> data = [{"input_ids": [i, 3], "labels": i % 2} for i in range(8)]
        >>> arguments = transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=1, report_to="none", use_cpu=True,
        ...     save_strategy="no", disable_tqdm=True)
        >>> trainer = FAMTrainer(model, arguments, train_dataset=data, criterion=criterion)
        >>> trainer.remove_callback(transformers.PrinterCallback)
        >>> _ = trainer.train()
        >>> criterion.step
        1
    """

    def __init__(self, *args: Any, criterion: Any, **kwargs: Any) -> None:
        own = criterion if isinstance(criterion, FAMLoss) else getattr(criterion, "criterion", None)
        if not isinstance(own, FAMLoss):
            _checks.bad_type(NAME, "criterion", "a FAMLoss, or what patch_causal_lm returned", criterion)
        self.fam_criterion: FAMLoss = own
        self._patched = own is not criterion
        self._fam_followed: Any = None
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise UnsupportedError(
                f"{NAME}: label_smoothing_factor and compute_loss_func would form another loss than the criterion's; use "
                "CrossEntropyLoss(label_smoothing=), or patch_causal_lm(..., label_smoothing=)"
            )
        loss_type = getattr(self.args, "loss_type", "nll")  # of TRL's SFTConfig
        if loss_type != "nll":
            raise UnsupportedError(
                f"{NAME}: loss_type={loss_type!r} is another loss than the criterion's; leave it at 'nll'"
            )
        shifts = getattr(self, "_loss_shifts_labels", None)  # Trainer's own judgement, where it has one
        self._fam_shifts = _is_causal_lm(self) if shifts is None else bool(shifts)
        if not self._patched:
            self.model_accepts_loss_kwargs = _can_sum(own)  # Trainer counts the items then

    def loss_arguments(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, labels) of the criterion: of a causal language model position t against label t + 1, both with rows in one
        dimension; of tokens likewise, unshifted; else as they are.
        """
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self._fam_shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.dim() == 3 and labels.dim() == 2:
            return logits.flatten(0, 1), labels.flatten()
        return logits, labels.view_as(logits) if labels.numel() == logits.numel() else labels

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The criterion's loss, in training with strength * kappa; arguments and result as Trainer's."""
        inputs = dict(inputs)
        if self._patched:
            if num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            outputs = model(**inputs)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        else:
            labels = inputs.pop("labels", None)
            if labels is None:
                _checks.bad_value(NAME, "inputs", "a batch with labels", sorted(inputs))
            outputs = model(**inputs)
            logits, target = self.loss_arguments(outputs, labels)
            loss = self.fam_criterion(logits, target, num_items=num_items_in_batch)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the ranks' gradients are averaged, their losses are to be summed; tensor-parallel ranks share one loss
            sharing = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            loss = loss * (self.accelerator.num_processes // sharing)
        balance = None if self._patched or not isinstance(outputs, dict) else outputs.get("aux_loss")
        if (
            balance is not None
        ):  # of mixtures of experts, a mean over the micro-batch: the model adds it to a loss of its own only
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.model.config.router_aux_loss_coef * balance.to(loss.device) / steps
        if not return_outputs:
            return loss
        if not isinstance(outputs, dict):
            return loss, outputs if self._patched else (loss.detach(), *outputs)  # Trainer drops the first
        return loss, outputs

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        criterion = self.fam_criterion
        if self.optimizer is not None and self._fam_followed is not self.optimizer:
            criterion.follow(self.optimizer)
            self._fam_followed = self.optimizer
        before = criterion.last
        loss = super().training_step(*args, **kwargs)
        if criterion.last is before:
            raise UnsupportedError(
                f"{NAME}: this training step took no term: the criterion or its layer is in evaluation mode, or the trainer "
                "overrides compute_loss; call criterion.train() and model.train(), and derive from FAMTrainerMixin first"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.fam_criterion.last.total is not None:
            logs = {**logs, **self.fam_criterion.last.as_dict("fam_")}
        super().log(logs, *args, **kwargs)

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"fam_criterion_{self.args.process_index}.pt")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        torch.save(self.fam_criterion.get_extra_state(), self._state_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._state_file(checkpoint)
        if not os.path.isfile(path):
            raise UnsupportedError(
                f"{NAME}: {path} is missing: the checkpoint was saved without the criterion, or by fewer processes; its schedule "
                "would start anew"
            )
        self.fam_criterion.set_extra_state(torch.load(path, weights_only=True))


def _is_causal_lm(trainer: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(model).__name__ in NAMES.values()


def _can_sum(criterion: FAMLoss) -> bool:
    """Whether a sum over the items that Trainer counts, divided by their number, is what the criterion means."""
    from fam_ext.loss.num_items import summed

    inner = criterion.criterion
    if getattr(inner, "ignore_index", _IGNORED) != _IGNORED:
        return False
    try:
        with summed(criterion.options, criterion.criterion, criterion._bind, (None,), {}):
            return True
    except (TypeError, UnsupportedError, ValueError):  # TypeError: it takes more than labels
        return False
