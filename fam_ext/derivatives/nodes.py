"""Reading autograd nodes: their names and the integers they saved."""

from __future__ import annotations


def bare(name: str) -> str:
    """An autograd node's name without the number torch appends."""
    return name.rstrip("0123456789")


def signed(value: int) -> int:
    """Autograd shows negative integers as unsigned 64-bit ones."""
    return value - (1 << 64) if value >= 1 << 63 else value
