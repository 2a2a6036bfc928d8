"""Autograd nodes whose third derivative has been compared with finite differences in float64 (tests/test_verified.py)."""

VERIFIED: frozenset[str] = frozenset()
