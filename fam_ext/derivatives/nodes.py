"""Reading autograd nodes: their names and the integers they saved."""

from __future__ import annotations

import re


def bare(name: str) -> str:
    """An autograd node's name without the number torch appends."""
    return name.rstrip("0123456789")


def readable(name: str) -> str:
    """What an operation is called in messages: the class of one written in C++, any other node's bare name.

    >>> readable("torch::autograd::CppNode<pkg::(anonymous namespace)::Distance>")
    'pkg::Distance'
    """
    inner = re.fullmatch(r"torch::autograd::CppNode<(.*)>", bare(name))
    return bare(name) if inner is None else inner[1].replace("(anonymous namespace)::", "")


def signed(value: int) -> int:
    """Autograd shows negative integers as unsigned 64-bit ones."""
    return value - (1 << 64) if value >= 1 << 63 else value
