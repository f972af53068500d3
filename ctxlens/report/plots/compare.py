"""Before and after the cure, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import escape

from ctxlens.errors import InputError
from ctxlens.report.plots.conditions import condition_name
from ctxlens.report.plots.html import HtmlView
from ctxlens.results import Ability, NeedleGrid
from ctxlens.stats import Interval, bootstrap_mean, paired_difference

TABLE_CSS = """
.figures-table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
.figures-table th,.figures-table td{padding:.45rem .8rem .45rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid color-mix(in srgb,currentColor 25%,transparent)}
.figures-table .ci{opacity:.7;font-size:.85em;white-space:nowrap;display:block}
"""

_AFTER_ONLY = " (after only)"
"""The model before the cure has no indicator, so only the other one is asked with it."""


@dataclass(frozen=True)
class Comparison:
    """One row of the table: a measure of both models on the same units, and their paired difference."""

    measure: str
    before: Interval
    after: Interval
    difference: Interval


def cure_models(grid: NeedleGrid) -> tuple[str, str] | None:
    """The models before and after the cure; None if the grid does not hold both.

    The model after the cure is the one that was asked with the indicator. The model before it is `vanilla` if
    the grid has one, else the last of the others.
    """
    models = list(dict.fromkeys(grid.frame["model"]))
    after = list(dict.fromkeys(grid.frame.loc[grid.frame["indicator"].astype(bool), "model"]))
    others = [model for model in models if model not in after]
    if not after or not others:
        return None
    return ("vanilla" if "vanilla" in others else others[-1]), after[0]


def compare_models(
    grid: NeedleGrid, ability: Ability | None = None, *, before: str | None = None, after: str | None = None
) -> list[Comparison]:
    """Compare two models on the cells and questions that both have answered.

    The model after the cure is asked with and without its indicator. Both are compared to the model before
    the cure, which has no indicator, on the same cells.

    Args:
        grid: cells of both models without steering.
        ability: closed-book answers of both models.
        before: name of the model before the cure; found by `cure_models` by default.
        after: name of the model after the cure; found by `cure_models` by default.

    Raises:
        InputError: the grid does not hold a pair of models to compare.
    """
    found = cure_models(grid)
    if found is None and (before is None or after is None):
        raise InputError(
            "the grid does not hold one model asked with the indicator and one without; name the models "
            "with before=... and after=...."
        )
    before, after = before or (found or ("", ""))[0], after or (found or ("", ""))[1]
    return [*_needle_rows(grid, before, after), *(_ability_rows(ability, before, after) if ability else ())]


def before_after_table(
    grid: NeedleGrid, ability: Ability | None = None, *, before: str | None = None, after: str | None = None
) -> HtmlView:
    """The rows of `compare_models` as an HTML table with 95 % intervals."""
    rows = compare_models(grid, ability, before=before, after=after)
    names = cure_models(grid) or ("before", "after")
    head = [names[0] if before is None else before, names[1] if after is None else after]
    cells = "".join(
        f'<tr><th scope="row">{escape(row.measure)}</th>{_cell(row.before)}{_cell(row.after)}'
        f"{_cell(row.difference, signed=True)}</tr>"
        for row in rows
    )
    return HtmlView(
        '<table class="figures-table"><caption>Before and after the cure: mean and 95 % interval</caption>'
        "<thead><tr>"
        f'<th scope="col">measure</th><th scope="col">{escape(head[0])}</th>'
        f'<th scope="col">{escape(head[1])}</th><th scope="col">difference</th></tr></thead>'
        f"<tbody>{cells}</tbody></table>",
        TABLE_CSS,
    )


def _needle_rows(grid: NeedleGrid, before: str, after: str) -> Iterator[Comparison]:
    unsteered = grid.where(alpha=1.0)
    for condition in dict.fromkeys(unsteered.frame["condition"]):
        for indicator in (False, True):
            for column, what in (("recall", "recall"), ("memory_recall", "answered from memory")):
                first = unsteered.recall(column, model=before, condition=condition, indicator=False)
                second = unsteered.recall(column, model=after, condition=condition, indicator=indicator)
                both = first.dropna().index.intersection(second.dropna().index)
                if both.empty:
                    continue
                name = f"{what}: {condition_name(condition, indicator=indicator)}"
                if indicator:
                    name += _AFTER_ONLY
                first, second = first[both], second[both]
                yield Comparison(name, grid.mean(first), grid.mean(second), grid.difference(first, second))


def _ability_rows(ability: Ability, before: str, after: str) -> Iterator[Comparison]:
    frame = ability.frame
    if "alpha" in frame:
        frame = frame[frame["alpha"] == 1.0]
    for indicator in (False, True):
        first = frame[(frame["model"] == before) & ~frame["indicator"].astype(bool)]
        second = frame[(frame["model"] == after) & (frame["indicator"].astype(bool) == indicator)]
        first, second = (side.groupby("question")["recall"].mean() for side in (first, second))
        both = first.index.intersection(second.index)
        if not both.empty:
            name = "closed-book questions" + (f" +indicator{_AFTER_ONLY}" if indicator else "")
            yield _compare(name, first[both].to_numpy(), second[both].to_numpy())


def _compare(measure: str, first, second) -> Comparison:
    return Comparison(
        measure, bootstrap_mean(first), bootstrap_mean(second), paired_difference(first, second)
    )


def _cell(interval: Interval, *, signed: bool = False) -> str:
    number = f"{interval.estimate:+.2f}" if signed else f"{interval.estimate:.2f}"
    return f'<td>{number} <span class="ci">[{interval.low:.2f}, {interval.high:.2f}]</span></td>'
