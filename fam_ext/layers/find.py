"""Finding a model's layers: by name, by glob pattern, or the head."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.layers import adapters, attention
from fam_ext.layers.attention import Projection, identity
from fam_ext.layers.linear_map import is_layer
from fam_ext.schedules import check_strength

_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")  # torch.compile, DistributedDataParallel, PEFT
_COPY = ".modules_to_save."  # PEFT's copy of a module that it trains in full; its adapter's name follows
# attributes that models of many libraries keep their last layer under
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "fc", "head", "heads", "output_layer", "out_proj")


@dataclass(frozen=True)
class Selection:
    """Layers of a model, modules or projections of an attention, by name in the order they were asked for.

    left_out: layers that a pattern matched and that cannot be regularized, with the reason.
    guess: how the default layer was chosen; None where layers were named. The criterion need not receive the output of a
        guessed layer.
    """

    layers: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    guess: str | None = None


def select_layers(
    caller: str,
    model: nn.Module,
    layer: str | nn.Module | Sequence[str | nn.Module] | None,
    noise: bool = False,
) -> Selection:
    """The modules that `layer` names in `model`: a name, a glob pattern, a module, several of these, or None for the head.

    Patterns match Linear, Conv and ConvTranspose layers, transformers' Conv1D and LoRA wrappers, and leave out what cannot be
    regularized: layers that are never called (the convolution of Mamba-like mixers), weights that are tied to an embedding,
    experts whose matrices lie in one parameter, and modules that PEFT has put copies in place of. An nn.MultiheadAttention has an
    in_proj and an out_proj, which are never called either: for `noise` they are offered all the same. None asks the
    model for its head (get_output_embeddings of transformers, get_classifier of timm), else takes the last layer outside of a
    transformers model's base model, or under a usual name for heads, else the last one registered.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a name matches nothing (near names are listed), or there is no layer.
        UnsupportedError: a layer asked for by name is never called.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> selection = select_layers("example", model, None)
    >>> list(selection.layers), selection.guess
    (['2'], 'the last layer registered')
    >>> list(select_layers("example", model, "*").layers)
    ['0', '2']
    """
    if not isinstance(model, nn.Module):
        _checks.bad_type(caller, "model", "a module", model)
    modules: dict[str, Any] = dict(model.named_modules())
    wrapped = {id(part) for m in modules.values() if adapters.is_adapter(m) for part in list(m.modules())[1:]}
    candidates: dict[str, Any] = {}
    unused: dict[str, str] = {}
    for name, m in modules.items():
        if id(m) in wrapped:
            continue
        if isinstance(m, nn.MultiheadAttention):
            for own, projection, reason in _projections(caller, name, m, noise):
                candidates[own] = projection
                unused |= {} if reason is None else {own: reason}
        elif is_layer(m) or adapters.is_adapter(m):
            candidates.setdefault(name, m)
    unused |= dict(_unused(modules, candidates))
    if layer is None:
        usable = {
            name: m for name, m in candidates.items() if name not in unused and isinstance(m, nn.Module)
        }
        if not usable:
            _checks.bad_value(caller, "model", "one with a Linear or Conv layer", type(model).__name__)
        name, guess = _head(model, modules, usable)
        return Selection({name: usable[name]}, guess=guess)
    tied = dict(_tied(modules, candidates))
    named = modules | {name: m for name, m in candidates.items() if isinstance(m, Projection)}
    chosen: dict[Any, tuple[str, Any]] = {}
    left_out: dict[str, str] = {}
    for one in layer if isinstance(layer, (list, tuple)) else [layer]:
        exact = _by_name(caller, modules if isinstance(one, nn.Module) else named, one)
        if exact is not None:
            whole = isinstance(named[exact], nn.MultiheadAttention)
            for name in [_inside(exact, part) for part in attention.PARTS] if whole else [exact]:
                if name in unused:
                    raise UnsupportedError(f"{caller}: layer {name!r} cannot be regularized: {unused[name]}")
                chosen[identity(named[name])] = name, named[name]
            continue
        for name in _by_pattern(caller, named, candidates, str(one)):
            reason = unused.get(name) or tied.get(name)
            if reason is None:
                chosen[identity(named[name])] = name, named[name]
            else:
                left_out[name] = reason
        left_out |= {name: why for name, why in _grouped(modules, candidates) if _matches(name, str(one))}
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        _checks.bad_value(caller, "layer", f"a pattern of layers that can be regularized ({reasons})", layer)
    return Selection(dict(chosen.values()), left_out)


def select_with_strengths(
    caller: str,
    model: nn.Module,
    layer: str | nn.Module | Sequence[str | nn.Module] | None,
    strengths: dict[str, float],
    noise: bool = False,
) -> tuple[Selection, list[float]]:
    """The layers that the patterns of `strengths` match, within those that `layer` names if it does, and a number for each.

    The first pattern that matches counts. Raises ValueError where a pattern matches nothing or a layer has no number.
    """
    if not strengths:
        _checks.bad_value(caller, "strength", "a dict that is not empty", strengths)
    of_layer: dict[Any, float] = {}
    selections = [select_layers(caller, model, pattern, noise) for pattern in strengths]
    for one, value in zip(selections, strengths.values(), strict=True):
        number = check_strength(caller, "strength", value)
        if callable(number):
            _checks.bad_type(caller, "strength", "a dict from patterns to numbers", value)
        if noise and number < 0:
            _checks.bad_value(caller, "strength", "at least 0 with method='noise', a variance", number)
        for module in one.layers.values():
            of_layer.setdefault(identity(module), number)
    if layer is None:
        among = {name: m for one in selections for name, m in one.layers.items()}
        order = {name: k for k, (name, _) in enumerate(model.named_modules())}

        def place(name: str) -> int:
            """That of in_proj, which is no module, is its attention's."""
            return order[name] if name in order else order[name.rpartition(".")[0]]

        named = {name: among[name] for name in sorted(among, key=place)}
        left_out = {
            name: why for one in selections for name, why in one.left_out.items() if name not in named
        }
        selection = Selection(named, left_out)
    else:
        selection = select_layers(caller, model, layer, noise)
        missing = [name for name, m in selection.layers.items() if identity(m) not in of_layer]
        if missing:
            _checks.bad_value(
                caller,
                "strength",
                f"a dict with a pattern for every layer (none for {missing[0]})",
                strengths,
            )
    return selection, [of_layer[identity(m)] for m in selection.layers.values()]


def find_layers(
    caller: str, model: nn.Module, layer: str | nn.Module | Sequence[str | nn.Module] | None
) -> list[nn.Module]:
    """The modules of `select_layers`."""
    return list(select_layers(caller, model, layer).layers.values())


def _bare(name: str) -> str:
    """The name that the layer has in the model inside of wrappers, PEFT's copies included."""
    shorter = True
    while shorter:
        prefix = next((p for p in _WRAPPERS if name.startswith(p)), "")
        name, shorter = name.removeprefix(prefix), prefix != ""
    before, copied, after = name.partition(_COPY)
    return ".".join([before, *after.split(".")[1:]]) if copied else name


def _by_name(caller: str, modules: dict[str, Any], layer: object) -> str | None:
    """The name of a module that `layer` names exactly or is; None for a pattern."""
    if isinstance(layer, nn.Module):
        wanted = adapters.active_copy(layer)
        for name, module in modules.items():
            if module is wanted:
                return name
        _checks.bad_value(caller, "layer", "a module of the model", layer)
    if not isinstance(layer, str):
        _checks.bad_type(
            caller, "layer", "a name, a glob pattern, a module, several of these, or None", layer
        )
    if layer == "":
        return None
    own = layer if layer in modules else next((name for name in modules if layer == _bare(name)), None)
    if own is None or (copy := adapters.active_copy(modules[own])) is modules[own]:
        return own
    return next(name for name, module in modules.items() if module is copy)


def _by_pattern(
    caller: str, modules: dict[str, nn.Module], candidates: dict[str, nn.Module], pattern: str
) -> list[str]:
    matches = [n for n in candidates if _matches(n, pattern)]
    if not matches:
        near = difflib.get_close_matches(pattern, [_bare(n) for n in modules if n], n=3, cutoff=0.4)
        known = ", ".join(near or list(candidates)[-3:]) or "none"
        _checks.bad_value(caller, "layer", f"the name of a module of the model (near: {known})", pattern)
    return matches


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(_bare(name), pattern) or fnmatch.fnmatchcase(name, pattern)


def _grouped(modules: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Modules with several matrices in one parameter (E, I, O), as transformers' experts have, with the reason."""
    for name, module in modules.items():
        stacks = [
            own
            for own, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3 and parameter.shape[0] > 1
        ]
        if stacks and name not in candidates:
            yield (
                name,
                f"it holds several matrices in one parameter ({', '.join(stacks)}), which is no layer of its own for each expert",
            )


def _inside(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _projections(
    caller: str, name: str, module: nn.MultiheadAttention, noise: bool
) -> Iterator[tuple[str, Projection | None, str | None]]:
    """Name of each projection, the projection, and why it cannot be regularized."""
    for part in attention.PARTS:
        own = _inside(name, part)
        try:
            yield own, Projection(caller, module, part), None if noise else attention.NEVER_CALLED
        except UnsupportedError as error:
            yield own, None, str(error).removeprefix(f"{caller}: ") if noise else attention.NEVER_CALLED


def _unused(modules: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Candidates whose forward pass never runs, with the reason."""
    for name in candidates:
        parent_name, _, own = name.rpartition(".")
        parent: Any = modules[parent_name] if name else None
        if isinstance(adapters.base_layer(modules.get(name)), nn.MultiheadAttention):
            yield (
                name,
                "PEFT's adapter around nn.MultiheadAttention merges its weights for each call; merge it first",
            )
        elif own.startswith("conv1d") and "A_log" in getattr(parent, "_parameters", ()):
            yield name, "a Mamba-like mixer convolves with its weight without calling it"
        else:
            reason = _replaced(modules, name)
            if reason is not None:
                yield name, reason


def _replaced(modules: dict[str, nn.Module], name: str) -> str | None:
    """Whether PEFT's modules_to_save holds another module in this one's place."""
    parts = name.split(".")
    for k in range(len(parts)):
        wrapper: Any = modules.get(".".join(parts[:k]))
        copies = getattr(wrapper, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict) or getattr(wrapper, "disable_adapters", False):
            continue
        active = adapters.active_names(wrapper)
        if parts[k] == "original_module" and any(a in copies for a in active):
            return "PEFT uses a copy in its place (modules_to_save)"
        if parts[k] == "modules_to_save" and k + 1 < len(parts) and parts[k + 1] not in active:
            return "it belongs to an adapter of PEFT that is not active"
    return None


def _tied(modules: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Candidates whose weight is an embedding's, too."""
    embeddings = {id(m.weight): name for name, m in modules.items() if isinstance(m, nn.Embedding)}
    for name, module in candidates.items():
        if not isinstance(module, nn.Module):
            continue
        embedding = embeddings.get(id(adapters.base_layer(module)._parameters.get("weight")))
        if embedding is not None:
            yield name, f"its weight is tied to the embedding {embedding}; name it exactly to have it"


def _head(model: nn.Module, modules: dict[str, nn.Module], usable: dict[str, nn.Module]) -> tuple[str, str]:
    """The name of the layer whose output the criterion receives, as far as the model tells, and how it was chosen."""
    names = {id(m): name for name, m in usable.items()}
    inner = _unwrapped(model)
    for accessor in ("get_output_embeddings", "get_classifier"):
        name = _last_within(_called(inner, accessor), names)
        if name is not None:
            return name, f"the model's {accessor}()"
    last = list(usable)[-1]
    base = getattr(inner, str(getattr(inner, "base_model_prefix", "")) or " ", None)  # of transformers
    if isinstance(base, nn.Module) and base is not inner:
        inside = {id(m) for m in base.modules()}
        outside = [name for name, m in usable.items() if id(m) not in inside]
        if outside:
            return outside[-1], f"the last layer outside of the base model {inner.base_model_prefix!r}"
    prefix = next((n for n, m in modules.items() if m is inner), "")
    path = last.removeprefix(prefix + "." if prefix else "").split(".")
    if len(path) > 1 and path[0] not in _HEADS:  # the last one lies deep inside of something else
        for own in _HEADS:
            name = _last_within(inner._modules.get(own), names)
            if name is not None:
                return name, f"the last layer of the model's {own!r}"
    return last, "the last layer registered"


def _last_within(module: object, names: dict[int, str]) -> str | None:
    """The name of the last layer inside of `module`, itself included; `names` has those of the layers by id."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    return next((names[id(part)] for part in reversed(parts) if id(part) in names), None)


def _unwrapped(model: nn.Module) -> Any:
    """The model inside torch.compile, data parallelism and PEFT."""
    inner: Any = model
    while True:
        wrapped = inner._modules.get("_orig_mod")
        if wrapped is None and isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped = inner.module
        if wrapped is None and hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            wrapped = inner.get_base_model()
        if not isinstance(wrapped, nn.Module) or wrapped is inner:
            return inner
        inner = wrapped


def _called(model: Any, accessor: str) -> object:
    """What the model's accessor returns; None where it has none or cannot tell."""
    method = getattr(model, accessor, None)
    if not callable(method):
        return None
    try:
        return method()
    except Exception:
        return None
