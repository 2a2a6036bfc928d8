"""A criterion's state as bytes: it comes back as it was, on any device, and executes nothing."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from fam_ext.loss.state import from_bytes, to_bytes

STATE = {
    "step": 7,
    "schedule": {"averages": torch.tensor([1.5, torch.nan]), "first": None},
    "generators": [{"cpu": torch.Generator().manual_seed(3).get_state()}, {}],
}


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(9), b.nan_to_num(9)) and a.dtype == b.dtype
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_there_and_back() -> None:
    encoded = to_bytes(STATE)
    assert encoded.dtype == torch.uint8 and encoded.dim() == 1
    assert same(from_bytes(encoded), STATE)
    assert same(
        from_bytes(encoded.to(torch.float64)), STATE
    )  # a saver may have cast it: bytes are exact there
    assert same(from_bytes(encoded.clone().requires_grad_(False)), STATE)


def test_a_dict_of_an_earlier_version() -> None:
    assert from_bytes(STATE) is STATE


def test_nothing_is_executed() -> None:
    class Harmful:
        def __reduce__(self) -> object:
            return print, ("executed",)

    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        from_bytes(to_bytes({"step": Harmful()}))


def test_saved_on_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        encoded = to_bytes(STATE)
    assert b"cuda:7" in bytes(encoded.tolist())
    assert same(from_bytes(encoded), STATE)
