"""The shared look: text is readable on its background, and every colour has a light and a dark shade."""

import re
from pathlib import Path

import pytest

from ctxlens.chat.roles import ROLE_LABELS
from ctxlens.report.plots.look import (
    DIVERGING,
    FONT,
    GRID,
    INK,
    MONO,
    MUTED,
    PAGE,
    ROLE_SHADES,
    ROLE_TEXTS,
    SEQUENTIAL,
    contrast,
    docs_css,
    page_css,
    role_css,
)


def test_contrast_follows_the_definition():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#ffffff") == pytest.approx(1)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the example of WCAG


@pytest.mark.parametrize("side", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5(side):
    texts = {name: PAGE[name] for name in ("ink", "soft", "accent", "yes", "no", "open")}
    texts |= {f"role {name}": shade for name, shade in ROLE_TEXTS.items()} | {"figure": INK, "muted": MUTED}
    for name, shade in texts.items():
        for ground in ("paper", "card"):
            found = contrast(getattr(shade, side), getattr(PAGE[ground], side))
            assert found >= 4.5, (name, ground, found)
    for name in ("yes", "no", "open", "accent"):
        assert contrast(getattr(PAGE[name], side), getattr(PAGE[f"{name}-soft"], side)) >= 4.5


def test_every_role_has_a_surface_and_a_text_colour():
    assert set(ROLE_SHADES) == set(ROLE_TEXTS) >= set(ROLE_LABELS)
    for css in (page_css(), role_css()):
        for name in ROLE_SHADES:
            assert len(re.findall(rf"--role-{name}:#", css)) == 2  # light and dark
            assert len(re.findall(rf"--role-{name}-text:#", css)) == 2


def test_the_documentation_has_the_same_look():
    # After a change: python -c "from ctxlens.report.plots.look import docs_css; print(docs_css(), end='')"
    file = Path(__file__).parents[1] / "docs" / "stylesheets" / "look.css"
    assert file.read_text(encoding="utf-8") == docs_css()
    assert "stylesheets/look.css" in (file.parents[2] / "mkdocs.yml").read_text(encoding="utf-8")


LOOK = Path(__file__).parents[1] / "ctxlens" / "report" / "plots" / "look.py"
PACKAGE = LOOK.parents[2]
NEUTRAL = re.compile(r"#(?:0{3}|f{3}|0{4}|0{3}[0-9a-f]|0{6}(?:[0-9a-f]{2})?|f{6})", re.IGNORECASE)
"""Black with any opacity for shadows, and white for the paper of prints."""
SOURCES = (".py", ".css", ".js", ".j2", ".jinja")


def colours_in(text):
    """The colours that are written out in a source; `&#123;` is an entity."""
    written = r"(?<![&\w])#(?!123\b)(?:[0-9a-fA-F]{8}|[0-9a-fA-F]{6}|[0-9a-fA-F]{3,4})\b(?![-\w;]*\{)"
    return set(re.findall(written, text))


def known_colours():
    """Every shade that the look defines."""
    shades = [
        *PAGE.values(),
        *ROLE_SHADES.values(),
        *ROLE_TEXTS.values(),
        INK,
        MUTED,
        GRID,
        *SEQUENTIAL,
        *DIVERGING,
    ]
    return {colour for shade in shades for colour in (shade.built, shade.light, shade.dark)}


def foreign_colours(text):
    """Colours in a source that the look does not define."""
    return {found for found in colours_in(text) - known_colours() if not NEUTRAL.fullmatch(found)}


def test_no_source_has_a_colour_of_its_own():
    paths = [path for path in PACKAGE.rglob("*") if path.suffix in SOURCES and path != LOOK]
    assert any(path.name == "explore.css" for path in paths)
    found = {path.name: foreign_colours(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: colours for name, colours in found.items() if colours} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a{color:#123456}", {"#123456"}),
        ("a{color:#8886;margin:0}", {"#8886"}),
        ("line={'color': '#d55e01'}", {"#d55e01"}),
        ("a{color:#0068a8;box-shadow:0 1px #0000001a;background:#fff}", set()),
        ("'&#123;' '#{:02x}' '#needle-thumb{top:0}'", set()),
    ],
)
def test_a_foreign_colour_is_found(text, found):
    assert foreign_colours(text) == found


def declared(css):
    """The custom properties of a block of CSS."""
    return {name: value.strip() for name, value in re.findall(r"--([\w-]+):([^;}]+)", css)}


def test_the_explorer_has_the_same_look():
    css = (PACKAGE / "explore" / "assets" / "explore.css").read_text(encoding="utf-8")
    light = declared(re.findall(r"^:root\{.*?\}", css, re.MULTILINE | re.DOTALL)[0])
    dark = declared(re.findall(r":root\[data-scheme=dark\]\{.*?\}", css, re.DOTALL)[0])
    shared = set(PAGE) & set(light)
    assert {"paper", "card", "ink", "soft", "line", "accent", "no", "alert", "mark"} <= shared
    assert shared == set(PAGE) & set(dark)
    for name in shared:
        assert (light[name], dark[name]) == (PAGE[name].light, PAGE[name].dark), name
    assert (light["sans"], light["mono"]) == (FONT, MONO)


def test_views_of_roles_and_the_page_name_the_same_colours():
    for name in PAGE:
        assert f"--{name}:{PAGE[name].light};" in page_css()
    assert f"--alert:{PAGE['alert'].dark};" in role_css()
