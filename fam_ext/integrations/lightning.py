"""Lightning with FAM: steps of the optimizer, logs, and checkpoints. For `lightning` and for `pytorch_lightning`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.loss.fam_loss import FAMLoss

NAME = "FAMCallback"
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _base() -> Any:
    """Callback of the package that is in use; a trainer of the other one takes it in its list of callbacks as well."""
    for package in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise ImportError(f"{NAME} needs Lightning; pip install lightning")


_Base: Any = _base()


class FAMCallback(_Base):  # type: ignore[misc]
    """Put beside a LightningModule whose training_step calls a FAMLoss: `Trainer(callbacks=[FAMCallback()])`.

    - A step of schedules and `every` is an update of the optimizer that trains the layer (FAMLoss.follow), so accumulated batches
      and LBFGS's closures share one.
    - "fam_loss", "fam_flatness" (kappa) and "fam_strength" of the latest call are logged by `log_dict`, those of them that the
      step has; reading them waits for the device only when Lightning writes its logs.
    - A checkpoint holds the criterion's state (step, schedule, generators), whether the criterion is a submodule or not, and a
      run that is resumed goes on from it.
    - A first training step without the term raises an error.

    In validation the criterion gives its plain loss, since its layer is in evaluation mode then.

    Args:
        criterion: a FAMLoss, or what patch_causal_lm returned; None: the one FAMLoss among the module's submodules.
        prefix: of the logged names.
        log_options: of Lightning's `log_dict`: on_epoch, prog_bar, sync_dist, ... A step's kappa is that of one rank's batch.

    Raises:
        TypeError: `criterion` is neither a FAMLoss nor a patch.
        ValueError: it is None, and the module has no FAMLoss or several.
        UnsupportedError: the term was not taken in the first training step, or a checkpoint lacks the criterion's state.

    Example:
        >>> import lightning, torch, fam_ext
        >>> from fam_ext.integrations.lightning import FAMCallback
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        ...         warmup = fam_ext.schedules.Warmup(0.01, steps=100)
        ...         self.criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), self.net[2], warmup)
        ...     def training_step(self, batch):
        ...         return self.criterion(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> module = Classifier()
        >>> data = [(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))] * 6
        >>> trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[FAMCallback()], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        >>> trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        >>> module.criterion.step
        3
    """

    def __init__(self, criterion: Any = None, *, prefix: str = "fam_", **log_options: Any) -> None:
        super().__init__()
        self._given: FAMLoss | None = None if criterion is None else FAMLoss._within(NAME, criterion)
        self.criterion: FAMLoss | None = self._given
        self.prefix = prefix
        self.log_options = log_options
        self._before: Any = None
        self._taken = False

    @property
    def state_key(self) -> str:
        return f"{NAME}({self.prefix})"

    def _of(self, module: Any) -> FAMLoss:
        if self._given is None:
            among = [m for m in module.modules() if isinstance(m, FAMLoss)]
            if len(among) != 1:
                expected = f"given where the module does not hold exactly one FAMLoss ({type(module).__name__} has {len(among)})"
                _checks.bad_value(NAME, "criterion", expected, None)
            self.criterion = among[0]
        assert self.criterion is not None
        return self.criterion

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        criterion = self._of(pl_module)
        trained = {id(p) for term in criterion.terms for p in term.module.parameters()}
        for optimizer in trainer.optimizers:
            if trained & {id(p) for group in optimizer.param_groups for p in group["params"]}:
                break
        else:  # a layer that is not trained: the first one's steps
            optimizer = trainer.optimizers[0] if trainer.optimizers else None
        criterion.follow(optimizer)
        self._taken = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._before = self._of(pl_module).last

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = self._of(pl_module).last
        if last is self._before:
            skipped = not outputs and pl_module.automatic_optimization  # training_step returned None
            if not self._taken and not skipped:
                raise UnsupportedError(
                    f"{NAME}: the first training step took no term: training_step did not call the criterion, or it or its layer "
                    "is in evaluation mode; call it in training_step, after module.train()"
                )
            return
        self._taken = True
        numbers = {
            self.prefix + name: value.float().mean() if isinstance(value, Tensor) else float(value)
            for name, value in last.values().items()
        }
        pl_module.log_dict(numbers, **self.log_options)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.criterion is None else {"criterion": self.criterion.get_extra_state()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        criterion = self._of(pl_module)
        among = {name for name, m in pl_module.named_modules() if m is criterion}
        saved = any(f"{name}._extra_state" in checkpoint["state_dict"] for name in among)
        if not saved and self.state_key not in checkpoint.get("callbacks", {}):
            raise UnsupportedError(
                f"{NAME}: the checkpoint was saved without the criterion, whose schedule would start anew; to start one from its "
                "weights, load its state_dict into the module in place of resuming from it"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.criterion is not None and "criterion" in state_dict:
            self.criterion.set_extra_state(state_dict["criterion"])
