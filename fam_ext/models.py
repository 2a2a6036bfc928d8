"""Finding a model's head by name."""

from __future__ import annotations

import difflib
import fnmatch

from torch import nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.heads import LAYERS

_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile and DistributedDataParallel


def _bare(name: str) -> str:
    for prefix in _WRAPPERS:
        while name.startswith(prefix):
            name = name.removeprefix(prefix)
    return name


def find_layer(caller: str, model: nn.Module, layer: str | nn.Module | None) -> nn.Module:
    """The module that `layer` names in `model` (exactly, or the only match of a glob), or the last Linear or Conv layer.

    Raises ValueError for a name that matches nothing, listing near names, and UnsupportedError for several matches.
    """
    if not isinstance(model, nn.Module):
        _checks.bad_type(caller, "model", "a module", model)
    if isinstance(layer, nn.Module):
        if all(m is not layer for m in model.modules()):
            _checks.bad_value(caller, "layer", "a module of the model", layer)
        return layer
    modules: dict[str, nn.Module] = dict(model.named_modules())
    heads = {name: m for name, m in modules.items() if isinstance(m, LAYERS)}
    if layer is None:
        if not heads:
            _checks.bad_value(caller, "model", "one with a Linear or Conv layer", type(model).__name__)
        return list(heads.values())[-1]
    if not isinstance(layer, str):
        _checks.bad_type(caller, "layer", "a name, a glob pattern, a module or None", layer)
    if layer in modules and layer:
        return modules[layer]
    exact = [m for name, m in modules.items() if _bare(name) == layer and layer]
    if exact:
        return exact[0]
    matches = {
        n: m
        for n, m in heads.items()
        if fnmatch.fnmatchcase(_bare(n), layer) or fnmatch.fnmatchcase(n, layer)
    }
    if len(matches) > 1:
        raise UnsupportedError(
            f"{caller}: layer {layer!r} matches {', '.join(matches)}; only one layer can be the head of a criterion, and layers "
            "that are not heads are not supported yet: name the last one"
        )
    if not matches:
        near = (
            difflib.get_close_matches(layer, [_bare(n) for n in modules if n], n=3, cutoff=0.4)
            or list(heads)[-3:]
        )
        _checks.bad_value(
            caller, "layer", f"the name of a module of the model (near: {', '.join(near) or 'none'})", layer
        )
    return next(iter(matches.values()))
