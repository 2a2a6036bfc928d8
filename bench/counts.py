"""FLOPs and bytes that a computation cannot do without, counted from its shapes: two FLOPs for a multiply-add.

They are lower bounds, whatever way is taken; a table's "% of ceiling" is the count over the measured time, divided by the rate of
a large matrix product or copy on the same machine (docs/performance.md).
"""

from __future__ import annotations


def linear_step(rows: int, fan_in: int, outputs: int) -> int:
    """FLOPs of a linear layer, forward and backward: the products z, dphi and dW."""
    return 6 * rows * fan_in * outputs


def trace_step(rows: int, fan_in: int, classes: int) -> int:
    """FLOPs of softmax_trace, forward and backward, in the cheaper form: three (N,O)x(O,I) products, or class distances."""
    shifted = 6 * rows * fan_in * classes
    pairwise = 4 * classes * classes * (fan_in + rows)
    return min(shifted, pairwise)


def head_step(rows: int, fan_in: int, classes: int) -> int:
    """FLOPs of linear + cross-entropy + kappa, forward and backward."""
    return linear_step(rows, fan_in, classes) + trace_step(rows, fan_in, classes)


def linear_cross_entropy_step(rows: int, fan_in: int, vocabulary: int) -> int:
    """FLOPs of cross-entropy + kappa over a vocabulary, logits included: six products (cross-entropy alone: three)."""
    return 12 * rows * fan_in * vocabulary


def patch_bytes(inputs: int, outputs: int, train: bool, item: int = 4) -> int:
    """Bytes of patch_sqnorm: input and output once; in training also the upstream gradient, the input again, its gradient."""
    return item * (inputs * (3 if train else 1) + outputs * (2 if train else 1))


def gram_direct(positions: int, fan_in: int, outputs: int) -> int:
    """FLOPs of one factor of one sample of gram_trace, direct: Gamma = s phi (Q I O), then its norm under W W^T (O^2 I)."""
    return 2 * positions * fan_in * outputs + 2 * outputs * outputs * fan_in


def gram_gram(positions: int, fan_in: int, outputs: int, factors: int = 1) -> int:
    """The same for `factors` factors through Gram matrices: phi phi^T once, then s G and (s G) s^T for each factor."""
    once = 2 * positions * positions * fan_in
    each = 2 * positions * outputs * outputs + 2 * positions * positions * outputs
    return once + factors * each
