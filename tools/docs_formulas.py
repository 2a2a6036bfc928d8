"""Docstrings hold formulas as `.. math::` blocks of LaTeX; for the site they become MathML, which browsers show by themselves."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_BLOCK = re.compile(r"^\.\. math::(?P<first>.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)


class Formulas(griffe.Extension):
    """Loaded by mkdocs.yml."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and ".. math::" in obj.docstring.value:
            obj.docstring.value = _BLOCK.sub(
                lambda block: convert(" ".join(block["first"].split()), display="block"), obj.docstring.value
            )
