"""Views that are HTML instead of plotly figures."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from markupsafe import escape

from ctxlens.files import write_atomic
from ctxlens.report.plots.look import FONT


@dataclass(frozen=True)
class HtmlView:
    """A piece of HTML that notebooks display; all text from data is escaped.

    Attributes:
        body: the markup.
        css: the style sheet that the markup needs.
        title: the title when it is saved as a page.
    """

    body: str
    css: str
    title: str = "ctxlens"

    def _repr_html_(self) -> str:
        return f"<style>{self.css}</style>{self.body}"

    def page(self) -> str:
        """The view as a complete HTML page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(self.title)}</title>"
            "<style>:root{color-scheme:light dark}"
            f"body{{font:15px/1.5 {FONT};margin:1.5rem}}{self.css}</style></head>"
            f"<body>{self.body}</body></html>"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file."""
        return write_atomic(path, self.page())

    def show(self, path: str | Path = "ctxlens-view.html") -> None:
        """Write the page and open it in a browser."""
        webbrowser.open(self.save(path).resolve().as_uri())
