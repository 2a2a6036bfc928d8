"""The rows of linear_cross_entropy that are not ignored, and what their targets say: shares of the loss, and coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

NONE, MEAN, SUM = range(3)  # reductions, in the order of the public function's names


class Targets:
    """Rows that are not ignored, `kept`, with targets q_s = hard [s = t] + soft omega_s and coefficients c = sum_s q_s.

    The reduction's factor and `scale`, one number a row, are multiplied in. Where class weights sum to 0 over the rows, the mean
    divides by 0, as torch's does: the loss and gradients are not finite.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: int,
        omega: Tensor | None,
        scale: Tensor | None,
        acc: torch.dtype,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
    ) -> None:
        valid = labels != ignore_index
        self._check(labels, valid, classes, ignore_index)
        self.index = labels.contiguous() if self.kept is None else labels[self.kept]
        self.omega = None if omega is None else omega.to(acc).contiguous()
        self.may_be_zero = omega is not None or scale is not None
        self.smooth = label_smoothing != 0
        target_weight = torch.ones(self.count, dtype=torch.float64, device=labels.device)
        self._wide = target_weight.new_ones(classes) if self.omega is None else self.omega.double()
        self._sum = self._wide.sum()
        if self.omega is not None:
            target_weight = self._wide[self.index]
        factor = torch.ones_like(target_weight)
        self.mean_of_nothing = reduction == MEAN and self.count == 0  # nan, as torch's
        if reduction == MEAN:
            factor = factor / target_weight.sum()
        if scale is not None:
            each = scale.reshape(-1).double()
            factor = factor * (each if self.kept is None else each[self.kept])
        hard, soft = 1 - label_smoothing, label_smoothing / classes
        self.hard = (hard * target_weight * factor).to(acc)
        self.coefficient = ((hard * target_weight + soft * self._sum) * factor).to(acc)
        self.soft = torch.where(self.coefficient == 0, 0.0, soft * factor).to(acc)

    def _check(self, labels: Tensor, valid: Tensor, classes: int, ignore_index: int) -> None:
        """Finds `kept` and `count`, and raises IndexError for a class that there is not.

        The only wait for a GPU: how many rows there are decides what is launched. No CUDA graph can capture it.
        """
        wrong = valid & ((labels < 0) | (labels >= classes))
        bad = torch.where(wrong, labels, 0)
        extreme = torch.where(bad.amin() < 0, bad.amin(), bad.amax()) if bad.numel() else labels.sum()
        count, any_wrong, example = torch.stack([valid.sum(), wrong.sum(), extreme]).tolist()
        if any_wrong:
            raise IndexError(
                f"linear_cross_entropy: target must be a class index from 0 to {classes - 1} or ignore_index "
                f"({ignore_index}), got {example}"
            )
        self.total, self.count = labels.numel(), int(count)
        every = self.count == self.total
        self.kept = None if every else torch.argsort((~valid).byte(), stable=True)[: self.count]

    def others(self, part: slice, best: Tensor) -> Tensor:
        """Sum of the targets of all classes but the most likely one, `best`, of the rows in `part`."""
        hard = torch.where(self.index[part] == best, 0.0, self.hard[part])
        if not self.smooth:
            return hard
        return hard + self.soft[part] * (self._sum - self._wide[best]).to(hard.dtype)

    def scatter(self, values: Tensor) -> Tensor:
        """Numbers of the kept rows among zeros for all others."""
        if self.kept is None:
            return values
        return values.new_zeros(self.total).index_copy_(0, self.kept, values)

    def gather(self, source: Tensor, part: slice) -> Tensor:
        """The kept rows in `part` of a tensor of all rows."""
        return source[part] if self.kept is None else source[self.kept[part]]
