"""The pictures of the tutorials, drawn from what the tutorials' own examples compute.

    python -m experiments.tutorial_pictures

It runs the examples of each page in order, as a reader does, and draws one of their results. A line such as
`STEPS = 10  # full size: 173` gets the value of its comment. Cost: 5 minutes on one CPU core, nearly all of
them for the tutorial that trains.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctxlens.files import write_atomic
from ctxlens.report.figures import draw
from ctxlens.report.plots.context import context_curves

DOCS = Path(__file__).parents[1] / "docs"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Draw the picture of every tutorial that has one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(PICTURES), help="the picture of one tutorial")
    parser.add_argument("--out", type=Path, default=DOCS / "images", help="folder of the pictures")
    given = parser.parse_args()
    for name, make in PICTURES.items():
        if given.only not in (None, name):
            continue
        figure = make(run_examples(DOCS / "tutorials" / f"{name}.md"))
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
        image = figure.to_image("svg", width=760, height=figure.layout["height"])
        print(write_atomic(given.out.resolve() / f"tutorial-{name}.svg", image.decode()))


def full_size(code: str) -> str:
    """Examples whose sizes are those of their comments, see above."""
    return re.sub(r"^(\w+ = )\S+(?=  # full size: (\S+)$)", r"\1\2", code, flags=re.MULTILINE)


def run_examples(page: Path) -> dict[str, Any]:
    """What a page's examples have computed at full size, by name."""
    code = full_size("\n".join(_EXAMPLE.findall(page.read_text(encoding="utf-8"))))
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(code, str(page), "exec"), names)  # the project's own page
        finally:
            os.chdir(before)
    return names


PICTURES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "ignored_document": lambda names: draw(names["drift"], role="user", heads=True),
    "fine_tune": lambda names: context_curves(names["readings"]),
    "data": lambda names: draw(names["selection"]),
}
"""By tutorial, the figure that is drawn from its results."""

if __name__ == "__main__":
    main()
