"""The README's and the documentation's Python examples run as written."""

from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_md_file(fpath=page)


def test_a_broken_example_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport ctxlens\nctxlens.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        check_md_file(fpath=page)
