"""The shared look: text is readable on its background, and every colour has a light and a dark shade."""

import re
from pathlib import Path

import pytest

from ctxlens.chat.roles import ROLE_LABELS
from ctxlens.report.plots.look import (
    INK,
    MUTED,
    PAGE,
    ROLE_SHADES,
    ROLE_TEXTS,
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
