"""The examples of the README and the documentation run as written, and no text names a foreign package."""

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from mktestdocs import check_md_file, grab_code_blocks

import ctxlens
from experiments.tutorial_pictures import full_size, run_examples

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))
import formulas  # noqa: E402
import notebooks  # noqa: E402
import reference  # noqa: E402

TUTORIALS = [page for page in sorted((DOCS / "tutorials").glob("*.md")) if "```python" in page.read_text()]
READ_IN_ORDER = (DOCS / "python.md", *TUTORIALS)
"""Pages whose examples build on those before them, as the cells of a notebook do."""
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def address(page: Path) -> str:
    """A page by its path, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


def run_in_order(page: Path, model: Path | None = None) -> None:
    """Run all examples of a page in one namespace, with another model in the place of the embedded one."""
    code = "\n".join(grab_code_blocks(page.read_text(encoding="utf-8"), lang="python"))
    if model is not None:
        code = re.sub(r'"organism(-chat)?"', lambda _: repr(str(model)), code)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=address)
def test_python_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: None)
    if page not in READ_IN_ORDER:
        check_md_file(fpath=page)
        return
    run_in_order(page)
    assert lines_not_printed(page.read_text(encoding="utf-8"), capsys.readouterr().out) == []


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=address)
def test_a_tutorial_runs_at_full_size(page, test_models, tmp_path, monkeypatch):
    """On a real model the examples run, too; what they print is that model's."""
    [model] = [one for one in test_models.iterdir() if one.name.lower() == "smollm2"] or [None]
    if model is None:
        pytest.skip("no SmolLM2 among the test models")
    monkeypatch.chdir(tmp_path)
    run_in_order(page, model)


def test_the_sizes_of_an_example_can_be_those_of_its_comments():
    assert full_size("STEPS = 10  # full size: 173\nprint(1)  # full size: 2\n") == (
        "STEPS = 173  # full size: 173\nprint(1)  # full size: 2\n"
    )


@pytest.mark.slow
def test_the_tutorial_that_trains_shows_the_cure_at_full_size():
    recall = run_examples(DOCS / "tutorials" / "fine_tune.md")["recall"]
    plain, _, marked = [found.mean() for found in recall.values()]
    assert plain < 0.5
    assert marked > plain + 0.1


def lines_not_printed(page: str, printed: str) -> list[str]:
    """The lines of output that a page shows, as comments at the start of a line, but that do not come out."""
    shown = re.findall(r"^# (.+)$", "\n".join(grab_code_blocks(page, lang="python")), re.MULTILINE)
    lines = {line.rstrip() for line in printed.splitlines()}
    return [line for line in shown if line.rstrip() not in lines]


@pytest.mark.parametrize("page", TUTORIALS, ids=address)
def test_the_notebook_of_a_tutorial_holds_the_same_examples(page):
    """The cells are the examples of the page in order, so what runs on the page runs in the notebook."""
    text = page.read_text(encoding="utf-8")
    first, *cells = [cell for cell in notebooks.to_notebook(text).cells if cell.cell_type == "code"]
    assert [cell.source.strip() for cell in cells] == [
        code.strip() for code in grab_code_blocks(text, lang="python")
    ]
    assert "%pip" in first.source


def test_a_notebook_by_hand():
    page = (
        "# Title\n\nSee [the log](../log.md) and [a paper](https://x.org/y).\n\n![A plot](../a.svg)\n\n"
        "[![A page](../b.png){ width=9 }](../b.html)\n\n```python\nprint(1)\n```\n\n```bash\nls\n```\n"
    )
    cells = notebooks.to_notebook(page).cells[1:]
    assert [cell.cell_type for cell in cells] == ["markdown", "code", "markdown"]
    assert cells[0].source == "# Title\n\nSee the log and [a paper](https://x.org/y)."
    assert cells[1].source == "print(1)"
    assert cells[2].source == "```bash\nls\n```"
    assert not notebooks.is_tutorial("tutorials/index.md", "# No example\n")
    assert not notebooks.is_tutorial("python.md", page)


def test_output_that_a_page_invents_is_found():
    page = "```python\nprint(1)\n# 1\nprint(2)  # two\n# 3\n```\n"
    assert lines_not_printed(page, "1\n2\n") == ["3"]


def test_a_broken_example_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport ctxlens\nctxlens.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        check_md_file(fpath=page)


INSTALL_FROM_AN_INDEX = re.compile(
    r"(?<![\w./-])ctxlens\["
    r"|(?:pip3?|uv|pipx|poetry|conda)\s+(?:install|add)\b(?:(?! -e )[^\n`&|;])*?"
    r"[\s'\"]ctxlens(?:-interp)?(?![\w./-])"
)
"""On a package index, `ctxlens` and `ctxlens-interp` may be somebody else's; texts install from a clone."""
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
        ("pip install 'ctxlens-interp[eval]'", True),
        ("run: pip install ctxlens-interp", True),
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


def api_pages() -> list[str]:
    return [page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))]


def test_the_api_pages_show_every_public_name():
    assert set(ctxlens.__all__) - reference.find_names(api_pages()).keys() == set()


def test_a_package_that_exports_lazily_shows_nothing_by_itself():
    assert "load_model" in reference.find_names(["::: ctxlens.models.factory\n"])
    assert "load_model" not in reference.find_names(["::: ctxlens.models\n"])


def test_no_module_is_on_two_api_pages():
    modules = re.findall(r"^::: (\S+)$", "\n".join(api_pages()), re.MULTILINE)
    assert sorted(modules) == sorted(set(modules))


@pytest.mark.parametrize("verb", reference.load_verbs())
def test_the_page_of_a_verb_has_every_option_and_argument(verb):
    page = reference.verb_page(verb)
    for one in reference.load_verbs()[verb].params:
        assert (f"`{one.opts[0]}`" in page) if one.param_type_name == "option" else (one.metavar in page), one
    assert f"ctxlens {verb}" in page
    assert "[/" not in page


def test_help_text_becomes_markdown():
    said = "Folder, or [b]organism[/b]. [dim]default: <none> of {these}[/dim]"
    assert reference.to_markdown(said) == "Folder, or **organism**. *default: &lt;none> of {these}*"
    assert reference.table(("a", "b"), [("1|2", "x\ny")]).splitlines()[-1] == "| 1\\|2 | x y |"


def test_the_recipe_page_has_every_key():
    from ctxlens.sft.keys import TrainConfig

    page = reference.on_page_markdown((DOCS / "reference" / "recipe.md").read_text(encoding="utf-8"))
    shown = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(shown) == sorted(TrainConfig.model_fields)
    assert "| `save_steps` |" not in page
    assert "| `loss_on` | `assistant`, `all` | `assistant` |" in page


def test_the_page_of_file_formats_names_every_column_and_array():
    from ctxlens import results

    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    for one in get_args(results.Result):
        if columns := getattr(one, "COLUMNS", ()):
            named = set(re.findall(r"`(\w+)`", sections[one.__name__]))
            assert set(columns) - named == set(), one.__name__
        elif one.NATIVE == ".safetensors":
            row = next(line for line in page.splitlines() if line.startswith(f"| `{one.__name__}` |"))
            arrays = {one.name for one in fields(one) if "np.ndarray" in str(one.type)}
            assert arrays == set(re.findall(r"`(\w+)`", row.split("|")[2])), one.__name__
    from ctxlens.chat.roles import Role

    said = " ".join(page.split())
    assert f"has the order {', '.join(role.label for role in Role)}." in said


def test_formulas_become_mathml_and_nothing_else_changes():
    class Page:
        pass

    page = Page()
    text = "Before_x_ $`a_q`$ after.\n\n$$\\sum_{k \\le q} P_{q,k}$$\n\ncosts 5$ and 6$"
    marked = formulas.on_page_markdown(text, page)
    assert "a_q" not in marked
    assert "P_{q,k}" not in marked
    assert marked.endswith("costs 5$ and 6$")
    html = formulas.on_page_content(f"<p>{marked}</p>".replace("\n\n", "</p>\n\n<p>"), page)
    assert html.count("<math") == 2
    assert "FORMULA" not in html
    assert "<p><div" not in html
    assert "<p>Before_x_ <math" in html


def test_no_page_has_a_formula_that_would_be_shown_raw():
    for page in PAGES:
        text = formulas.on_page_markdown(page.read_text(encoding="utf-8"), type("Page", (), {})())
        assert "$$" not in text, page
        assert "$`" not in text, page


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w/]+\.md", str(nav))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])


def test_the_changelog_sends_nobody_to_a_module_that_does_not_exist():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    modules = re.findall(r"^\| `ctxlens\.[^|]+ \| `(ctxlens[\w.]+)` \|$", text, re.MULTILINE)
    assert len(modules) > 40
    for new in modules:
        place = ROOT / new.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), new
