"""Text from data in Markdown: escaped, so that it is read as text only."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$>:@])")


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in line)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, on one line, control characters visible."""
    return _MARKUP.sub(r"\\\1", html.escape(one_line(text), quote=False).replace("&gt;", ">"))


def code_span(text: str) -> str:
    """Text on one line as Markdown code, whatever backticks it holds."""
    line = one_line(text)
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str = "") -> list[str]:
    """The lines of a Markdown code block that no text in it can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", text, fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


__all__ = ["code_block", "code_span", "escape_markdown"]
