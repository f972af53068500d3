"""MkDocs hook: reference pages that are written from the code when the site is built.

One page for each verb of the command line, from the parser; the keys of recipes, from their models; and the
table of public names, from the package and from the modules that the API pages show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
VERB_FOLDER = "reference/commands"
MARKERS = {
    "<!-- recipe keys: training -->": lambda: recipe_table("training"),
    "<!-- recipe keys: evaluation -->": lambda: recipe_table("evaluation"),
    "<!-- recipe keys: context -->": lambda: recipe_table("context"),
    "<!-- verbs -->": lambda: verb_table(),
    "<!-- api pages -->": lambda: page_table(),
    "<!-- public names -->": lambda: name_table(),
}
"""Where a page has one of these comments, the table is put."""


def on_config(config: Any) -> Any:
    """Put the pages of the verbs into the navigation, where it has the empty section `Verbs`."""
    for section in _sections(config.nav):
        if "Verbs" in section:
            section["Verbs"] = [{f"ctxlens {verb}": f"{VERB_FOLDER}/{verb}.md"} for verb in load_verbs()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the verbs."""
    from mkdocs.structure.files import File

    for verb in load_verbs():
        files.append(File.generated(config, f"{VERB_FOLDER}/{verb}.md", content=verb_page(verb)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables into the pages that ask for them."""
    for marker, make in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def _sections(entries: Any) -> Iterator[dict[str, Any]]:
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            yield entry
            for below in entry.values():
                yield from _sections(below)


def load_verbs() -> dict[str, Any]:
    """The verbs of the command line, as the parser has them."""
    import typer

    from ctxlens.cli import app

    return typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def verb_table() -> str:
    """One row for each verb, with the first sentence of its help."""
    rows = (
        (f"[`ctxlens {name}`](commands/{name}.md)", (verb.help or "").split("\n")[0])
        for name, verb in load_verbs().items()
    )
    return table(("verb", "what it does"), rows)


def verb_page(name: str) -> str:
    """The page of a verb: what it does, how it is called, examples, and its options by group."""
    verb = load_verbs()[name]
    arguments = [one for one in verb.params if one.param_type_name == "argument"]
    options = [one for one in verb.params if one.param_type_name == "option" and not one.hidden]
    words = " ".join([*(one.metavar or one.name.upper() for one in arguments), "[OPTIONS]"])
    parts = [f"# ctxlens {name}", to_markdown(verb.help or ""), f"```text\nctxlens {name} {words}\n```"]
    if examples := re.findall(r"\$ (.+?)\[/cyan\]", verb.epilog or ""):
        commands = "\n".join(re.sub(r"\[/?(?:dim|b|cyan)\]", "", command) for command in examples)
        parts += ["## Examples", f"```bash\n{commands}\n```"]
    if arguments:
        rows = [(f"`{one.metavar or one.name.upper()}`", to_markdown(one.help or "")) for one in arguments]
        parts += ["## Arguments", table(("argument", "meaning"), rows)]
    groups: dict[str, list[Any]] = {}
    for option in options:
        groups.setdefault(option.rich_help_panel or f"Options of {name}", []).append(option)
    for title in sorted(groups, key=lambda title: not title.startswith("Options of")):
        rows = [(_spell(one), to_markdown(one.help or ""), _default(one)) for one in groups[title]]
        parts += [f"## {title}", table(("option", "meaning", "default"), rows)]
    return "\n\n".join(parts) + "\n"


def _spell(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return f"{names} {option.metavar}".strip() if option.metavar else names


def _default(option: Any) -> str:
    value = getattr(option.default, "value", option.default)
    if option.required:
        return "required"
    if value is None or value is False or callable(value):
        return ""
    return f"`{value}`"


def to_markdown(text: str) -> str:
    """Help text with rich's markup as Markdown; braces and brackets of placeholders stay."""
    for tag, sign in (("b", "**"), ("bold", "**"), ("dim", "*"), ("i", "*"), ("cyan", "`")):
        text = re.sub(rf"\[{tag}\](.*?)\[/{tag}\]", rf"{sign}\1{sign}", text, flags=re.DOTALL)
    return text.replace("\\[", "[").replace("<", "&lt;").strip()


def recipe_table(part: str) -> str:
    """Name, type, default and meaning of ctxlens' own keys of a recipe, for one part of them."""
    from ctxlens.sft.keys import ContextKeys, EvaluationKeys, TrainConfig

    parts = {"evaluation": set(EvaluationKeys.model_fields), "context": set(ContextKeys.model_fields)}
    parts["training"] = set(TrainConfig.model_fields) - parts["evaluation"] - parts["context"]
    rows = [
        (f"`{name}`", _type(field.annotation), f"`{_yaml(field.default)}`", field.description or "")
        for name, field in TrainConfig.model_fields.items()
        if name in parts[part]
    ]
    return table(("key", "value", "default", "meaning"), rows)


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def _type(hint: Any) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    kinds = getattr(hint, "__args__", None)
    if hint in words:
        return words[hint]
    if kinds and all(isinstance(kind, str) for kind in kinds):
        return ", ".join(f"`{kind}`" for kind in kinds)
    if kinds and "dict" not in str(hint):
        return " or ".join(words.get(kind, str(kind)) for kind in kinds)
    return "keys with values"


def page_table() -> str:
    """The pages of the API, each with the modules that it shows."""
    rows = []
    for path in sorted((DOCS / "api").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        modules = ", ".join(
            f"`{name}`" for name in re.findall(r"^::: ctxlens\.([\w.]+)$", text, re.MULTILINE)
        )
        rows.append((f"[{text.splitlines()[0].removeprefix('# ')}](api/{path.name})", modules))
    return table(("page", "modules of `ctxlens`"), rows)


def _modules(text: str) -> list[str]:
    """The modules that a page of the API shows, without the package's name."""
    return re.findall(r"^::: ctxlens\.([\w.]+)$", text, re.MULTILINE)


def name_table() -> str:
    """Every name of `ctxlens.__all__`, with a link to where it is documented and its first sentence."""
    import ctxlens

    places = find_names([path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md"))])
    rows = [
        (f"[`cl.{name}`][{places[name].path}]", _first_sentence(places[name]))
        for name in ctxlens.__all__
        if name in places
    ]
    return table(("name", "what it is"), rows)


def find_names(pages: Sequence[str]) -> dict[str, Any]:
    """What the API pages show, by name, as their generator sees it: without importing anything."""
    package = _load_package()
    found: dict[str, Any] = {}
    for path in _modules("\n".join(pages)):
        module = package[path]
        exports = module.exports
        for name, member in module.members.items():
            if name in exports if exports is not None else not member.is_alias:
                found.setdefault(name, member)
    return found


@cache
def _load_package() -> Any:
    import griffe

    return griffe.load("ctxlens", search_paths=[str(DOCS.parent)])


def _first_sentence(member: Any) -> str:
    said = member.docstring.value if member.docstring else ""
    return " ".join(said.split("\n\n")[0].split())


def table(head: Sequence[str], rows: Any) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
