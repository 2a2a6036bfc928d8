"""Finding a model's layers by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from fam_ext import _checks
from fam_ext.layers import adapters
from fam_ext.layers.linear_map import LAYERS

_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile and DistributedDataParallel


def _bare(name: str) -> str:
    for prefix in _WRAPPERS:
        while name.startswith(prefix):
            name = name.removeprefix(prefix)
    return name


def find_layers(
    caller: str, model: nn.Module, layer: str | nn.Module | Sequence[str | nn.Module] | None
) -> list[nn.Module]:
    """The modules that `layer` names in `model`: a name, a glob pattern, a module, several of these, or None for the last one.

    Patterns match Linear, Conv and ConvTranspose layers. Raises ValueError for a name that matches nothing, listing near names.
    """
    if not isinstance(model, nn.Module):
        _checks.bad_type(caller, "model", "a module", model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    wrapped = {id(part) for m in modules.values() if adapters.is_adapter(m) for part in list(m.modules())[1:]}
    candidates: dict[str, nn.Module] = {
        name: m
        for name, m in modules.items()
        if (isinstance(m, LAYERS) or adapters.is_adapter(m)) and id(m) not in wrapped
    }
    if layer is None:
        if not candidates:
            _checks.bad_value(caller, "model", "one with a Linear or Conv layer", type(model).__name__)
        return [list(candidates.values())[-1]]
    several = layer if isinstance(layer, (list, tuple)) else [layer]
    found: dict[int, nn.Module] = {}
    for one in several:
        found.update((id(m), m) for m in _matches(caller, modules, candidates, one))
    return list(found.values())


def _matches(
    caller: str, modules: dict[str, nn.Module], candidates: dict[str, nn.Module], layer: object
) -> list[nn.Module]:
    if isinstance(layer, nn.Module):
        if all(m is not layer for m in modules.values()):
            _checks.bad_value(caller, "layer", "a module of the model", layer)
        return [layer]
    if not isinstance(layer, str):
        _checks.bad_type(
            caller, "layer", "a name, a glob pattern, a module, several of these, or None", layer
        )
    exact = [m for name, m in modules.items() if layer and layer in (name, _bare(name))]
    if exact:
        return exact[:1]
    matches = [
        m
        for n, m in candidates.items()
        if fnmatch.fnmatchcase(_bare(n), layer) or fnmatch.fnmatchcase(n, layer)
    ]
    if not matches:
        near = difflib.get_close_matches(layer, [_bare(n) for n in modules if n], n=3, cutoff=0.4)
        known = ", ".join(near or list(candidates)[-3:]) or "none"
        _checks.bad_value(caller, "layer", f"the name of a module of the model (near: {known})", layer)
    return matches
