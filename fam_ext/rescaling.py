"""The reparametrization of a ReLU network that changes sharpness but not the function."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fam_ext import _checks
from fam_ext.layers.linear_map import LAYERS

_NAME = "rescale"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)

Model = TypeVar("Model", bound=nn.Module)


def rescale(
    model: Model, layer_pairs: Sequence[tuple[str, str]], factor: float, *, inputs: Any = None
) -> Model:
    """A copy of the model whose layers are rescaled in pairs: the first one's weight and bias times `factor`, the second's weight
    divided by it.

    With only positively homogeneous operations between them (ReLU, leaky ReLU, pooling, dropout) the network's function is
    unchanged for a positive factor, while the trace of the Hessian, its largest eigenvalue and SAM's sharpness become as large
    or small as one likes (Dinh et al. 2017). Relative flatness does not change (Petzka et al. 2021).

    Args:
        model: it is left as it is.
        layer_pairs: names of layers, (first, second), `second` fed by `first`. `first` may be a normalization layer, whose scale
            and shift are multiplied: one between the two layers would undo the factor.
        factor: positive.
        inputs: arguments of the model (a tensor or a tuple); the outputs of both models, in evaluation mode, are compared then.

    Raises:
        TypeError, ValueError: an argument does not fit, or the two models' outputs differ.

    >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> other = rescale(model, [("0", "2")], 10.0, inputs=torch.randn(4, 3))
    >>> bool(torch.allclose(other[0].weight, 10 * model[0].weight))
    True
    """
    if not isinstance(model, nn.Module):
        _checks.bad_type(_NAME, "model", "a module", model)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        _checks.bad_value(_NAME, "factor", "a positive number", factor)
    result = copy.deepcopy(model)
    modules: dict[str, Any] = dict(result.named_modules())
    if (
        isinstance(layer_pairs, str)
        or not isinstance(layer_pairs, Iterable)
        or not all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            for pair in layer_pairs
        )
    ):
        _checks.bad_type(_NAME, "layer_pairs", "a sequence of pairs of layer names", layer_pairs)
    with torch.no_grad():
        for first, second in layer_pairs:
            for name, kinds in ((first, LAYERS + _NORMS), (second, LAYERS)):
                if not isinstance(modules.get(name), kinds) or modules[name].weight is None:
                    known = "a Linear or Conv layer with a weight" + " (or a normalization layer)" * (
                        name == first
                    )
                    _checks.bad_value(_NAME, "layer_pairs", f"names of layers of the model, {known}", name)
            modules[first].weight *= factor
            if modules[first].bias is not None:
                modules[first].bias *= factor
            modules[second].weight /= factor
        if inputs is not None:
            _check_function(model, result, inputs if isinstance(inputs, tuple) else (inputs,))
    return result


def _check_function(model: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> None:
    outputs = []
    for one in (copy.deepcopy(model).eval(), copy.deepcopy(other).eval()):
        outputs.append(one(*inputs))
    error = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp(min=1e-30))
    allowed = 1e4 * torch.finfo(outputs[0].dtype).eps
    if not error <= allowed:
        what = "pairs with only positively homogeneous operations between them: the outputs may not change"
        _checks.bad_value(_NAME, "layer_pairs", what, f"a relative change of {error:.2g}")
