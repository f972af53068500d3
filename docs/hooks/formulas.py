"""MkDocs hook: formulas become MathML when the site is built, so that pages need no script and no network.

A formula on lines of its own is written `$$…$$`, one in a sentence as a dollar sign, code and a dollar sign,
as GitHub reads them.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r"^\$\$(?P<block>.+?)\$\$$|\$`(?P<inline>[^`\n]+)`\$", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"(?:<p>)?FORMULA(?P<number>\d+)ALUMROF(?:</p>)?")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a placeholder for each formula, so that Markdown does not read its underscores and brackets."""
    page.formulas = []

    def place(found: re.Match[str]) -> str:
        page.formulas.append(to_mathml(found["block"] or found["inline"], block=bool(found["block"])))
        return f"FORMULA{len(page.formulas) - 1}ALUMROF"

    return _FORMULA.sub(place, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Replace the placeholders by MathML; a formula on lines of its own also replaces its paragraph."""

    def show(found: re.Match[str]) -> str:
        formula = page.formulas[int(found["number"])]
        if formula.startswith("<div"):
            return formula
        return found[0].replace(f"FORMULA{found['number']}ALUMROF", formula)

    return _PLACE.sub(show, html)


def to_mathml(latex: str, *, block: bool) -> str:
    """A formula as MathML; one on lines of its own may be scrolled on a narrow screen."""
    formula = convert(latex.strip(), display="block" if block else "inline")
    return f'<div style="overflow-x: auto; margin: 1em 0">{formula}</div>' if block else formula
