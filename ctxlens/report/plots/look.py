"""The look of everything that ctxlens shows: colours of the roles, of scales and of pages, and typography.

Figures, reports, the explorer and the documentation take their colours from here. Colour-blind readers can
tell the colours apart (after Okabe and Ito). Scales change steadily in lightness, so that they survive a
greyscale print. Everything that a colour shows is also shown by a shape, a pattern or a number. Each colour
has one shade for light pages and one for dark pages. Text has a contrast of at least 4.5:1 on its background.

Nothing here needs plotly or a browser; `page_css` gives the same values as custom properties of CSS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"

SIZES: dict[str, str] = {
    "title": "clamp(1.55rem, 3.4vw, 2.2rem)",
    "section": "clamp(1.25rem, 2.4vw, 1.55rem)",
    "block": "1.05rem",
    "text": "1rem",
    "caption": ".9rem",
    "small": ".8rem",
}
"""Sizes of text by its job, in CSS."""


@dataclass(frozen=True)
class Shade:
    """One colour: the shade that figures are built with, and the shades for light and dark pages."""

    built: str
    light: str
    dark: str

    def faded(self, opacity: float = 0.18) -> str:
        """The built shade with some transparency, for bands behind a line."""
        return with_opacity(self.built, opacity)


INK = Shade("#6b7280", "#2a3038", "#dfe3e8")
MUTED = Shade("#7b828d", "#5d6570", "#a3abb6")
GRID = Shade("rgba(154,160,168,0.2)", "#e3e6ea", "#313843")

PAGE: dict[str, Shade] = {
    name: Shade(light, light, dark)
    for name, light, dark in (
        ("paper", "#fcfcfb", "#12161b"), ("card", "#ffffff", "#181d24"), ("ink", "#20262e", "#e2e6eb"),
        ("soft", "#57606c", "#a4adb8"), ("line", "#e1e4e8", "#2e353f"),
        ("accent", "#0068a8", "#63b3ec"), ("accent-soft", "#e7f1f8", "#16293a"),
        ("yes", "#005f46", "#7fe0bd"), ("yes-soft", "#dcf2e9", "#10352a"),
        ("no", "#8f3a00", "#ffb37c"), ("no-soft", "#fbe9dc", "#40230d"),
        ("open", "#4b525c", "#c3cad3"), ("open-soft", "#eceef1", "#2a3039"),
        ("alert", "#c0392b", "#e5705f"), ("mark", "#ffe7a3", "#5a4a12"),
    )
}  # fmt: skip
"""Colours of pages by their job: background, cards, text, lines, links, the three kinds of verdict, what is
suspicious, and words to be noticed."""

ROLE_SHADES: dict[str, Shade] = {
    "bos": Shade("#4d5561", "#4d5561", "#c3c9d1"),
    "system": Shade("#b5568f", "#b5568f", "#e29cc6"),
    "user": Shade("#0068a8", "#0068a8", "#56aee8"),
    "assistant": Shade("#d55e00", "#d55e00", "#f39245"),
    "tool": Shade("#a67c00", "#a67c00", "#e3bf4a"),
    "template": Shade("#8a929d", "#8a929d", "#8f98a5"),
    "indicator": Shade("#00865f", "#00865f", "#3ccb9d"),
    "pad": Shade("#c2c7ce", "#c2c7ce", "#4b535f"),
    "sink": Shade("#6a4fa0", "#6a4fa0", "#ab8fe0"),
}
"""The colour of each role's surfaces: bars, bands, backgrounds of tokens."""

ROLE_TEXTS: dict[str, Shade] = {
    **ROLE_SHADES,
    "system": Shade("#b5568f", "#a8487f", "#e29cc6"),
    "assistant": Shade("#d55e00", "#b34f00", "#f39245"),
    "tool": Shade("#a67c00", "#806000", "#e3bf4a"),
    "template": Shade("#8a929d", "#666e79", "#a3abb6"),
    "indicator": Shade("#00865f", "#00775c", "#3ccb9d"),
    "pad": Shade("#c2c7ce", "#666e79", "#a3abb6"),
}
"""The colour of a role's name where it is written, readable on `paper` and `card`."""

ROLE_PATTERNS: dict[str, str] = {
    "user": "", "assistant": "/", "template": ".", "bos": "x", "system": "\\", "tool": "-",
    "indicator": "+", "pad": "", "sink": "|",
}  # fmt: skip
"""Patterns that tell the roles apart without colour, in plotly's names."""

SERIES = (ROLE_SHADES["user"], ROLE_SHADES["assistant"], ROLE_SHADES["template"],
          ROLE_SHADES["indicator"], ROLE_SHADES["system"], ROLE_SHADES["tool"])  # fmt: skip
PATTERNS = ("", "/", ".", "x", "\\", "-")

SEQUENTIAL = tuple(
    Shade(light, light, dark)
    for light, dark in (
        ("#f1f5f9", "#1d2632"), ("#c6daec", "#1f4165"), ("#8ab6da", "#28659a"),
        ("#4489c0", "#4693cd"), ("#175a96", "#8ac3ea"), ("#0a2d57", "#e2f1fc"),
    )
)  # fmt: skip
DIVERGING = tuple(
    Shade(light, light, dark)
    for light, dark in (
        ("#7c3a02", "#ffc588"), ("#c8690f", "#dd8a36"), ("#f2bd83", "#87531f"), ("#f6f4f1", "#2a2f37"),
        ("#a4c8e4", "#2a5a85"), ("#3a80ba", "#4b94cf"), ("#083a6b", "#aad8fb"),
    )
)  # fmt: skip

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
"""Line styles and symbols that tell curves apart without colour."""


def colour_schemes() -> dict[str, tuple[str, str]]:
    """Every colour that figures are built with, and its shades on light and on dark pages."""
    shades = [INK, MUTED, GRID, *ROLE_SHADES.values(), *SERIES, *SEQUENTIAL, *DIVERGING]
    schemes = {shade.built: (shade.light, shade.dark) for shade in shades}
    schemes |= {s.faded(): (with_opacity(s.light, 0.18), with_opacity(s.dark, 0.18)) for s in SERIES}
    return schemes


def page_css() -> str:
    """Custom properties of CSS for light and dark pages.

    The properties are `--paper`, `--ink` and so on (`PAGE`), `--role-user` and `--role-user-text` (surfaces
    and names of the roles), `--scale` and `--scale-signed` (stops of a gradient), `--font`, `--mono` and
    `--size-title` and so on (`SIZES`).
    """
    fixed = {"font": FONT, "mono": MONO, **{f"size-{name}": size for name, size in SIZES.items()}}
    light, dark = ("".join(_properties(side)) for side in ("light", "dark"))
    return (
        f":root{{color-scheme:light dark;{_declared(fixed)}{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    )


def role_css() -> str:
    """The custom properties of the roles, of alerts and of code, for views that are put into other pages."""
    light, dark = (
        _declared({"alert": getattr(PAGE["alert"], side), "mono": MONO} | _roles(side))
        for side in ("light", "dark")
    )
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def docs_css() -> str:
    """The look as a style sheet of MkDocs Material, whose pages have a switch for light and dark."""
    blocks = []
    for scheme, side in (("default", "light"), ("slate", "dark")):
        shades = {
            "md-primary-fg-color": getattr(PAGE["accent"], side),
            "md-accent-fg-color": getattr(PAGE["accent"], side),
            "md-typeset-a-color": getattr(PAGE["accent"], side),
            "md-default-bg-color": getattr(PAGE["paper"], side),
            "md-default-fg-color": getattr(PAGE["ink"], side),
            "md-default-fg-color--light": getattr(PAGE["soft"], side),
        }
        if side == "dark":
            shades["md-primary-bg-color"] = PAGE["paper"].dark
        lines = "".join(f"  --{name}: {value};\n" for name, value in (shades | _roles(side)).items())
        blocks.append(f'[data-md-color-scheme="{scheme}"] {{\n{lines}}}\n')
    fonts = f"body {{\n  --md-text-font-family: {FONT};\n  --md-code-font-family: {MONO};\n}}\n"
    return "\n".join([*blocks, fonts])


def _properties(side: str) -> Iterator[str]:
    yield _declared({name: getattr(shade, side) for name, shade in PAGE.items()})
    yield _declared(_roles(side))
    yield _declared({"scale": _stops(SEQUENTIAL, side), "scale-signed": _stops(DIVERGING, side)})


def _roles(side: str) -> dict[str, str]:
    surfaces = {f"role-{name}": getattr(shade, side) for name, shade in ROLE_SHADES.items()}
    return surfaces | {f"role-{name}-text": getattr(shade, side) for name, shade in ROLE_TEXTS.items()}


def _stops(scale: Sequence[Shade], side: str) -> str:
    return ",".join(getattr(stop, side) for stop in scale)


def _declared(values: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in values.items())


def with_opacity(colour: str, opacity: float) -> str:
    """A colour such as `#0068a8` with some transparency."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def contrast(first: str, second: str) -> float:
    """The contrast of two colours such as `#0068a8`, from 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


__all__ = [
    "DASHES", "DIVERGING", "FONT", "GRID", "INK", "MARKERS", "MONO", "MUTED", "PAGE", "PATTERNS",
    "ROLE_PATTERNS", "ROLE_SHADES", "ROLE_TEXTS", "SEQUENTIAL", "SERIES", "SIZES", "Shade", "colour_schemes",
    "contrast", "docs_css", "page_css", "role_css", "with_opacity",
]  # fmt: skip
