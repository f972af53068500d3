"""Text from data in Markdown, escaped so that none of it is read as markup."""

from __future__ import annotations

import html
import re

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$>:@])")


def one_line(text: str) -> str:
    """Text on one line, with control characters made visible."""
    line = " ".join(text.split())
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in line)


def escape_markdown(text: str) -> str:
    """Text on one line that Markdown shows unchanged: no markup, no HTML, visible control characters."""
    return _MARKUP.sub(r"\\\1", html.escape(one_line(text), quote=False).replace("&gt;", ">"))


def code_span(text: str) -> str:
    """Text on one line as Markdown code, even if it contains backticks."""
    line = one_line(text)
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str = "") -> list[str]:
    """The lines of a Markdown code block; the text cannot close it early."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", text, fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


__all__ = ["code_block", "code_span", "escape_markdown", "one_line"]
