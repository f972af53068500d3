"""The examples of the README and the documentation run as written, and no text names a foreign package."""

import re
from pathlib import Path

import griffe
import pytest
from mktestdocs import check_md_file

import ctxlens

ROOT = Path(__file__).parent.parent
READ_IN_ORDER = ("python.md",)
"""Pages whose examples build on those before them, as the cells of a notebook do."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: None)
    check_md_file(fpath=page, memory=page.name in READ_IN_ORDER)


def test_a_broken_example_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport ctxlens\nctxlens.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        check_md_file(fpath=page)


INSTALL_FROM_AN_INDEX = re.compile(
    r"(?<![\w./-])ctxlens\["
    r"|(?:pip3?|uv|pipx|poetry|conda)\s+(?:install|add)\b[^\n`&|;]*?[\s'\"]ctxlens(?![\w.-])"
)
"""On a package index, `ctxlens` may be somebody else's; this distribution is called `ctxlens-interp`."""
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".cff", ".j2", ".json", ".jinja", ""}


def texts_of_the_tree(root: Path) -> dict[str, str]:
    """Every text file of the project that a reader may see, by its path."""
    tops = ["ctxlens", "docs", "experiments", "tests", ".ci", ".github"]
    paths = [path for top in tops for path in sorted((root / top).rglob("*"))]
    paths += sorted(path for path in root.iterdir() if path.name != ".git")
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path.stat().st_size < 2**20
        if "__pycache__" not in path.parts and path != Path(__file__)
    }


def test_nothing_tells_anybody_to_install_ctxlens_from_an_index():
    texts = texts_of_the_tree(ROOT)
    assert {"README.md", "pyproject.toml", "ctxlens/cli/__init__.py", "tests/conftest.py"} <= texts.keys()
    assert [name for name, text in texts.items() if INSTALL_FROM_AN_INDEX.search(text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install ctxlens", True),
        ("pip install -U 'ctxlens'", True),
        ("uv add ctxlens", True),
        ("install ctxlens[eval], or nltk", True),
        ("pip install 'ctxlens-interp[eval]'", False),
        ("pip install -c constraints.txt -e . && ctxlens demo", False),
        ('pip install -c constraints.txt -e ".[dev]" && pytest', False),
        ("ctxlens needle --model MODEL", False),
    ],
)
def test_a_text_that_names_ctxlens_as_a_package_is_found(text, found):
    assert bool(INSTALL_FROM_AN_INDEX.search(text)) == found


def test_the_design_names_code_that_exists():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    lines = re.findall(r"\*\*Where\.\*\*(.*(?:\n  .*)*)", text)
    places = re.findall(r"`([^`]+)`", "".join(lines))
    assert len(places) > 50
    roots = (ROOT / "ctxlens", ROOT)
    assert [place for place in places if not any((root / place).exists() for root in roots)] == []


def test_every_decision_of_the_design_has_its_four_parts():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    decisions = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert len(decisions) >= 45
    for decision in decisions:
        assert re.findall(r"^- \*\*(\w+)\.\*\*", decision, re.MULTILINE) == [
            "Decision", "Why", "Alternatives", "Where",
        ], decision.splitlines()[0]  # fmt: skip


def names_on_the_api_page(text: str) -> set[str]:
    """The names that the API reference shows, as its generator sees them: without importing anything."""
    package = griffe.load("ctxlens", search_paths=[str(ROOT)])
    shown: set[str] = set()
    for path in re.findall(r"^::: ctxlens\.([\w.]+)$", text, re.MULTILINE):
        module = package[path]
        exports = module.exports
        shown |= {
            name
            for name, member in module.members.items()
            if (name in exports if exports is not None else not member.is_alias)
        }
    return shown


def test_the_api_page_shows_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(ctxlens.__all__) - names_on_the_api_page(text) == set()


def test_a_package_that_exports_lazily_shows_nothing_by_itself():
    assert "load_model" in names_on_the_api_page("::: ctxlens.models.factory\n")
    assert "load_model" not in names_on_the_api_page("::: ctxlens.models\n")


def test_the_changelog_sends_nobody_to_a_module_that_does_not_exist():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    modules = re.findall(r"^\| `ctxlens\.[^|]+ \| `(ctxlens[\w.]+)` \|$", text, re.MULTILINE)
    assert len(modules) > 40
    for new in modules:
        place = ROOT / new.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), new
