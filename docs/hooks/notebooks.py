"""MkDocs hook: every tutorial with Python examples also becomes a notebook, when the site is built.

The notebook holds the text and the examples of the page, so both always say the same. Commands stay text. Its
first cell installs ctxlens where it is missing, for instance on Colab.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import nbformat
from nbformat import v4

FOLDER = "tutorials/"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"\[?!\[[^\]]*\]\((?!https?:)[^)]+\)(?:\{[^}]*\})?(?:\]\([^)]+\))?\n*")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)")
INSTALL = """\
# On Colab, or where ctxlens is not installed yet: SOURCE is the address of its repository, with git+ before
# it, or an uploaded wheel (python -m build makes one).
SOURCE = ""
if SOURCE:
    %pip install -q {SOURCE}"""


def on_files(files: Any, config: Any) -> Any:
    """Add a notebook beside every tutorial that has Python examples."""
    from mkdocs.structure.files import File

    for page in list(files):
        if is_tutorial(page.src_uri, page.content_string if page.src_uri.endswith(".md") else ""):
            notebook = nbformat.writes(to_notebook(page.content_string))
            files.append(File.generated(config, notebook_of(page.src_uri), content=notebook))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a link to the notebook below the heading."""
    if not is_tutorial(page.file.src_uri, markdown):
        return markdown
    heading, rest = markdown.split("\n", 1)
    name = PurePosixPath(notebook_of(page.file.src_uri)).name
    link = f'<a href="../{name}" download>Download this tutorial as a notebook</a> (Jupyter, Colab)'
    return f"{heading}\n\n{link}\n{rest}"


def is_tutorial(address: str, markdown: str) -> bool:
    """Whether a page is a tutorial that can be run."""
    return address.startswith(FOLDER) and bool(_EXAMPLE.search(markdown))


def notebook_of(address: str) -> str:
    """The address of the notebook of a page."""
    return address.removesuffix(".md") + ".ipynb"


def to_notebook(markdown: str) -> nbformat.NotebookNode:
    """The page as a notebook: its text and its Python examples, in order.

    Links to other pages become plain text, because a notebook is read elsewhere; so pictures are left out.
    """
    cells = [v4.new_code_cell(INSTALL), *_cells(markdown)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same page makes the same file
    notebook = v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    nbformat.validate(notebook)
    return notebook


def _cells(markdown: str) -> Iterator[nbformat.NotebookNode]:
    for number, part in enumerate(_EXAMPLE.split(markdown)):
        text = part.strip("\n")
        if number % 2:
            yield v4.new_code_cell(text)
        elif text:
            yield v4.new_markdown_cell(_LINK.sub(r"\1", _IMAGE.sub("", text)).strip("\n"))
