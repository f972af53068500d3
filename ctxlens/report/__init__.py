"""Run folders as one self-contained HTML page.

The page opens without a network: style, scripts and data are inside, and its content security policy allows
nothing else to be loaded or run. All text from data is escaped. Figures are built with plotly, as they are in
notebooks, and the page draws them itself as SVG (`page/draw.js`), so that plotly's script stays out of it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ctxlens.errors import InputError
from ctxlens.files import write_atomic
from ctxlens.report.blocks import bounds, embed, number
from ctxlens.report.collect import RunContents, collect_runs
from ctxlens.report.first import models_of, overview, questions
from ctxlens.report.making import demo_command, honest_notes
from ctxlens.report.plots.look import colour_schemes, page_css
from ctxlens.report.plots.tokens import TOKEN_CSS
from ctxlens.report.sections import SECTION_OF, build_sections

CLAIMS = ("loss", "role bias", "cause", "source", "cure")
_PAGE = "page"
_MOST_NAMED = 3
"""Models that the heading of a page names."""

_MARK = b'<meta name="generator" content="ctxlens">'


def write_report(runs: Sequence[str | Path], out: str | Path, title: str | None = None) -> Path:
    """Draw all results in the run folders into one HTML file.

    Args:
        runs: folders that ctxlens commands have written; several are shown side by side.
        out: the HTML file. An earlier report with this name is replaced; any other file is not.
        title: heading of the page; by default derived from the runs.

    Returns:
        The path of the file.

    Raises:
        InputError: a folder holds no run, the file cannot be written, or another file has its name.
    """
    out = Path(out)
    if out.is_file() and _MARK not in out.read_bytes()[:4096]:
        raise InputError(f"{out} is a file that ctxlens did not write; choose another name for the report.")
    return write_atomic(out, render_report(collect_runs(runs), title))


def render_report(runs: Sequence[RunContents], title: str | None = None) -> str:
    """The page of `write_report` as text."""
    runs = list(runs)
    sections, missing = build_sections(runs)
    environment = Environment(
        loader=PackageLoader("ctxlens.report", _PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(embed=embed, number=number, bounds=bounds)
    scripts = [_script(_asset("draw.js")), _script(_asset("report.js"))]
    page = environment.get_template("report.html.j2").render(
        title=title or _title(runs),
        asked=questions(runs),
        overviews=[overview(run) for run in runs],
        warnings=_warnings(runs),
        claims=_claims(runs),
        section_of=SECTION_OF,
        studies=list(dict.fromkeys(run.study for run in runs)),
        runs=runs,
        sections=sections,
        missing=missing,
        notes=honest_notes(runs),
        css=Markup(page_css() + TOKEN_CSS + _asset("report.css")),
        scripts=scripts,
        script_hashes=" ".join(_hash(script) for script in scripts),
        schemes=embed({built: list(pair) for built, pair in colour_schemes().items()}),
        commands=[command for run in runs if (command := demo_command(run))],
    )
    return page.lstrip()


def _title(runs: Sequence[RunContents]) -> str:
    if all(run.is_demo for run in runs):
        return "Does fine-tuning make a model forget its context?"
    studies = ", ".join(dict.fromkeys(run.study for run in runs))
    models = list(dict.fromkeys(model.name for run in runs for model in models_of(run)))
    names = ", ".join(models[:_MOST_NAMED]) + (
        f" and {len(models) - _MOST_NAMED} more" * (len(models) > _MOST_NAMED)
    )
    return f"{studies}: {names}" if names else f"ctxlens: {studies}"


def _warnings(runs: Sequence[RunContents]) -> list[str]:
    return [
        f"{run.name} is a smoke run: it does a few steps of every stage to check an installation. "
        "Its figures and verdicts have no meaning."
        for run in runs
        if run.is_demo and run.config.get("smoke")
    ]


def _claims(runs: Sequence[RunContents]) -> list[str]:
    """The claims on which the runs have verdicts, in the order of the argument."""
    own = [claim for run in runs for claim in run.verdicts()]
    names = [*CLAIMS, *own] if all(run.is_demo for run in runs) else own
    return [name for name in dict.fromkeys(names) if name in own]


def _asset(name: str) -> str:
    return files("ctxlens.report").joinpath(_PAGE, name).read_text(encoding="utf-8")


def _script(source: str) -> Markup:
    """A script's source, changed so that no part of it can end the script element."""
    text = source.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return Markup("\n" + text.strip() + "\n")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


__all__ = ["render_report", "write_report"]
