"""What all results have in common: a tidy table, a figure, and files by suffix."""

from __future__ import annotations

import importlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ctxlens.errors import InputError
from ctxlens.files import plain_value, write_atomic

if TYPE_CHECKING:
    import pandas as pd

_FIGURES = "ctxlens.report.figures"
"""The module that draws results. It belongs to a higher room, so that it is named here, in one place, and
imported only when a figure is asked for."""

_MOST_ROWS = 20


class Shown(ABC):
    """A result that can be printed, tabulated, drawn and saved.

    A class gives `NATIVE`, `to_frame`, `describe` and `write`; the rest follows from them and from the figure
    that `ctxlens.report.figures` has for the class.
    """

    NATIVE: ClassVar[str] = ""
    """The suffix of the class's own file format, which `load` reads; empty if there is none."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The result as one tidy table: one row per observation, one column per variable."""

    @abstractmethod
    def describe(self) -> str:
        """Size and origin of the result, in a few words."""

    def overview(self) -> pd.DataFrame:
        """The table that `show` prints where no browser can be opened; by default that of `to_frame`."""
        return self.to_frame()

    def write(self, path: str | Path) -> None:
        """Write the class's own file format, whatever the file's name.

        Raises:
            InputError: the class has none.
        """
        raise InputError(
            f"{type(self).__name__} has no file format of its own; save {path} as .html, .png, .csv or .json."
        )

    def __repr__(self) -> str:
        return " ".join(f"{type(self).__name__}({self.describe()})".split())

    def figure(self, **options: Any) -> Any:
        """Draw the result.

        Args:
            **options: options of the class's figure, see `ctxlens.report.figures.draw`.

        Returns:
            A plotly figure; for a `TokenView` a piece of HTML.

        Raises:
            InputError: there is nothing to draw.
        """
        return _figures().draw(self, **options)

    def show(self, **options: Any) -> None:
        """Show the figure: in the notebook, else in a browser. Without a browser, print a table.

        Args:
            **options: options of the figure.
        """
        if _in_notebook() or _has_browser():
            _figures().show(self, in_notebook=_in_notebook(), **options)
            return
        print(repr(self))
        print(self.overview().to_string(index=False, max_rows=_MOST_ROWS, max_colwidth=60))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result in the format that the suffix names, atomically.

        The class's own format (`NATIVE`) keeps everything, and `load` reads it. `.html` is a page with the
        figure that needs no network, `.png` a picture of it, `.csv` the table of `to_frame`, and `.json` the
        same table as a list of records (null for NaN).

        Args:
            path: the file.
            overwrite: whether an existing file may be replaced. A file in the class's own format always is.

        Returns:
            The path.

        Raises:
            InputError: an unknown suffix, an existing file, or a PNG without the packages that it needs.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if self.NATIVE and suffix == self.NATIVE:
            return write_atomic(path, self.write)
        formats: dict[str, Callable[[], bytes | str]] = {
            ".html": lambda: _figures().page(self),
            ".png": lambda: _figures().picture(self),
            ".csv": lambda: self.to_frame().to_csv(index=False),
            ".json": lambda: json.dumps(to_records(self.to_frame()), indent=1, ensure_ascii=False) + "\n",
        }
        if suffix not in formats:
            known = [self.NATIVE] * (self.NATIVE not in ("", *formats)) + list(formats)
            raise InputError(
                f"{path} has {f'the suffix {suffix}' if suffix else 'no suffix'}; a {type(self).__name__} "
                f"is saved as {', '.join(known)}."
            )
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already; choose another name, or give overwrite=True.")
        return write_atomic(path, formats[suffix]())

    def _repr_html_(self) -> str:
        return _figures().notebook(self)


def to_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON values, one mapping per row; null for NaN and infinities."""
    rows = frame.itertuples(index=False, name=None)
    return [plain_value(dict(zip(frame.columns, row, strict=True))) for row in rows]


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 row`, `2 rows`, `3 queries`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def join_names(names: Iterable[Any], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    found = list(dict.fromkeys(map(str, names)))
    more = [f"{len(found) - most} more"] if len(found) > most else []
    return ", ".join([*found[:most], *more])


def _figures() -> Any:
    return importlib.import_module(_FIGURES)


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel, which displays figures by itself."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _has_browser() -> bool:
    """Whether a graphical browser can be opened from here."""
    import os
    import webbrowser

    shown = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        return shown and webbrowser.get() is not None
    except webbrowser.Error:
        return False


__all__ = ["Shown", "count", "join_names", "to_records"]
