"""Docstrings as the terminal shows them, made fit for the site: loaded by mkdocs.yml.

Formulas, `.. math::` blocks of LaTeX, become MathML, which browsers show by themselves. Examples, which begin with >>>, become
blocks of code; Markdown would take them for quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(r"^\.\. math::(?P<first>.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^(?P<indent>[ \t]*)>>> .*(?:\n(?P=indent).*\S.*)*", re.MULTILINE)


def readable(text: str) -> str:
    """A docstring with MathML for formulas and fences around examples."""
    text = _FORMULA.sub(lambda m: convert(" ".join(m["first"].split()), display="block"), text)
    text = _EXAMPLE.sub(lambda m: f"{m['indent']}```pycon\n{m[0]}\n{m['indent']}```", text)
    return re.sub(r"^Examples:$", "Example:", text, flags=re.MULTILINE)  # Examples: would look for >>> itself


class Readable(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
