"""Run folders as one self-contained HTML page.

The page opens without a network: style, scripts (plotly.js, once) and data are inside, and its content
security policy allows nothing else to be loaded or run. All text from data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ctxlens.errors import InputError
from ctxlens.files import write_atomic
from ctxlens.report.blocks import bounds, embed, number
from ctxlens.report.collect import RunContents, collect_runs, short_name
from ctxlens.report.making import demo_command, honest_notes
from ctxlens.report.plots.theme import SEQUENTIAL, colour_schemes
from ctxlens.report.plots.tokens import TOKEN_CSS
from ctxlens.report.sections import build_sections

CLAIMS = ("loss", "role bias", "cause", "source", "cure")
_PAGE = "page"

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
    scripts = [_script(get_plotlyjs()), _script(_asset("report.js"))]
    return environment.get_template("report.html.j2").render(
        title=title or _title(runs),
        summary=_summary(runs),
        warnings=_warnings(runs),
        claims=_claims(runs),
        runs=runs,
        sections=sections,
        missing=missing,
        notes=honest_notes(runs),
        css=Markup(TOKEN_CSS + _scale_css() + _asset("report.css")),
        scripts=scripts,
        script_hashes=" ".join(_hash(script) for script in scripts),
        schemes=embed({built: list(pair) for built, pair in colour_schemes().items()}),
        commands=[command for run in runs if (command := demo_command(run))],
    )


def _title(runs: Sequence[RunContents]) -> str:
    if all(run.is_demo for run in runs):
        return "Does fine-tuning make a model forget its context?"
    return "ctxlens: " + ", ".join(dict.fromkeys(run.study for run in runs))


def _summary(runs: Sequence[RunContents]) -> str:
    if all(run.is_demo for run in runs):
        return (
            "A model that is fine-tuned on instructions can make less use of the text that a user gives it. "
            "This page follows that argument in five claims, from the loss to its cure. All results were "
            "measured live on a small embedded language model that was built to show the effect. For each "
            "claim the page gives the measured value, its 95 % interval, and the rule that decides on the "
            "claim, which was fixed before the measurement."
        )
    told = []
    for run in runs:
        model = run.config.get("model")
        name = model.get("name") if isinstance(model, dict) else model
        study = f"{run.study} ({run.name})"
        told.append(f"{study} on {short_name(name)}" if name else study)
    return (
        f"This page shows the results of {'one run' if len(runs) == 1 else f'{len(runs)} runs'}: "
        f"{'; '.join(told)}. All figures are drawn from the result files in the run folders. Intervals are "
        "95 % bootstrap intervals."
    )


def _warnings(runs: Sequence[RunContents]) -> list[str]:
    return [
        f"{run.name} is a smoke run: it does a few steps of every stage to check an installation. "
        "Its figures and verdicts have no meaning."
        for run in runs
        if run.is_demo and run.config.get("smoke")
    ]


def _claims(runs: Sequence[RunContents]) -> list[dict[str, Any]]:
    """One row per claim, with the verdict of every run."""
    found = [run.verdicts() for run in runs]
    own = list(dict.fromkeys(claim for verdicts in found for claim in verdicts))
    names = dict.fromkeys([*CLAIMS, *own]) if all(run.is_demo for run in runs) else own
    return [
        {"claim": name, "verdicts": [verdicts.get(name) for verdicts in found]}
        for name in names
        if any(name in verdicts for verdicts in found)
    ]


def _asset(name: str) -> str:
    return files("ctxlens.report").joinpath(_PAGE, name).read_text(encoding="utf-8")


def _script(source: str) -> Markup:
    """A script's source, changed so that no part of it can end the script element."""
    text = source.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return Markup("\n" + text.strip() + "\n")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _scale_css() -> str:
    light, dark = (", ".join(getattr(stop, side) for stop in SEQUENTIAL) for side in ("light", "dark"))
    return f":root{{--scale:{light}}}@media screen and (prefers-color-scheme:dark){{:root{{--scale:{dark}}}}}"


__all__ = ["render_report", "write_report"]
