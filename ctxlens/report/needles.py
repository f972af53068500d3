"""The sections on needles: loss, cause and cure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from ctxlens.report.blocks import (
    Block,
    Cell,
    Figure,
    Figures,
    Note,
    Table,
    figure_json,
    in_text,
    interval_cell,
    number,
)
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.compare import compare_models, cure_models
from ctxlens.report.plots.conditions import explain_conditions
from ctxlens.report.plots.needle import (
    COLUMNS,
    NeedlePanel,
    needle_difference,
    needle_panel,
    needle_panels,
    score_range,
    split_by_memory,
)
from ctxlens.report.plots.steering import LINES, steering_curves, steering_points
from ctxlens.results import Ability, NeedleGrid
from ctxlens.results.tables import name_length
from ctxlens.stats import Interval, bootstrap_mean

NamedGrid = tuple[str, NeedleGrid]
"""A run's name and one of its grids."""

_LONGEST_QUESTION = 280
_MOST_DIFFERENCES = 6
_SCORES = ("recall", "contains", "needle_logprob")
_MOST_OPEN_ROWS = 24
"""Longer tables are folded at first."""
_NOTHING_SHOWN = ("no difference shown", "too few to tell")
_SQUARES = (
    "Each square is one context length, as built (left to right), and one depth of the needle in the context "
    "(top to bottom). A darker square (on a dark page: a brighter one) means that the model "
)
_HOW_TO_READ = _SQUARES + "repeats more of the needle's keywords (1: all of them, 0: none). "
_HOW_TO_READ_LOGPROB = _SQUARES + (
    "finds the words of the needle more likely once its first words are given, in nats per token (0: "
    "certain). No answer is generated for this score. "
)


def loss_blocks(run: RunContents) -> list[Block]:
    """Needle heatmaps of the models before the cure, their differences, and tables that compare them."""
    blocks: list[Block] = []
    for name, grid in run.grids(steered=False).items():
        models = cure_models(grid)
        shown = _without(grid, models[1]) if models else grid
        contested, free = split_by_memory(shown)
        title = str(grid.meta.get("title", "Needle in a haystack" if name == "needle" else name))
        for column in contested.scores:
            if column != "contains":
                blocks += _heatmaps(contested, free, column, title)
        if "recall" in contested.scores:
            blocks.append(_means(needle_panels(contested), contested, free))
        blocks += [_differences(contested, column) for column in contested.scores]
        blocks += [_profile(contested, axis) for axis in ("length", "depth")]
        blocks += [Note(sentence) for sentence in _what_went_wrong(shown)]
    return blocks


def compare_blocks(runs: Sequence[RunContents]) -> list[Block]:
    """Needle grids of several runs side by side, paired where their cells are the same texts."""
    grids = [(run.name, grid) for run in runs for grid in run.grids(steered=False).values()]
    blocks: list[Block] = [_side_by_side(grids)] if len(grids) > 1 else []
    by_cells: dict[str, list[NamedGrid]] = {}
    for name, grid in grids:
        by_cells.setdefault(str(grid.meta.get("cells", f"of {name}")), []).append((name, grid))
    for group in by_cells.values():
        if len(group) > 1:
            merged = _merge(group)
            blocks += [_differences(merged, column, "Runs compared") for column in merged.scores]
    if len(by_cells) > 1:
        blocks.append(
            Note(
                "Runs are paired only where they ask about the same texts; these runs differ in lengths, "
                "seed, tokenizer or window, so they are not paired."
            )
        )
    return blocks


def _side_by_side(grids: Sequence[NamedGrid]) -> Table:
    """Every variant of every run with the mean of each score."""
    known = [column for column in _SCORES if any(column in grid.frame for _, grid in grids)]
    rows = [
        [Cell(panel.title, name), *(_mean_cell(grid, panel, column) for column in known)]
        for name, grid in grids
        for panel in needle_panels(grid)
    ]
    return Table(
        ["run", *(COLUMNS[column] for column in known)],
        rows,
        "Every model and condition of every run: the mean over the cells of that run, with its 95 % "
        "interval. Runs with different cells are not comparable number by number.",
        title="Runs side by side",
        folded=len(rows) > _MOST_OPEN_ROWS,
    )


def _mean_cell(grid: NeedleGrid, panel: NeedlePanel, column: str) -> Cell:
    if column not in grid.frame:
        return Cell("–")
    return interval_cell(grid.mean(grid.recall(column, **panel.rows)))


def _merge(group: Sequence[NamedGrid]) -> NeedleGrid:
    """Grids with the same cells as one, the run's name before the model's."""
    return NeedleGrid.concat(
        [
            NeedleGrid(grid.frame.assign(model=name + ": " + grid.frame["model"].astype(str)), grid.meta)
            for name, grid in group
        ]
    )


def _heatmaps(contested: NeedleGrid, free: NeedleGrid | None, column: str, title: str) -> list[Block]:
    panels = needle_panels(contested, column)
    limits = score_range(panels, column)
    how = _HOW_TO_READ if column == "recall" else _HOW_TO_READ_LOGPROB
    how += explain_conditions(panel.condition for panel in panels)
    low, high = (number(limit) for limit in limits)
    figures = [_figure(panel, column, limits) for panel in panels]
    blocks: list[Block] = [
        Figures(
            figures,
            how + " " + _which_cells(contested, free) + f"The scale goes from {low} to {high}.",
            title=title if column == "recall" else f"{title}: {COLUMNS[column]}",
            scale="recall" if column == "recall" else "",
            conclusion=_loss_sentence(contested) if column == "recall" else "",
        )
    ]
    changes = [
        Figure(
            figure_json(needle_difference(contested, first, second, column)),
            f"Heatmap of the difference in {COLUMNS[column]}, {second.title} minus {first.title}.",
            title=f"{second.title} minus {first.title}",
        )
        for first, second in _neighbours(panels)[:_MOST_DIFFERENCES]
    ]
    if changes:
        caption = (
            "Each square is the value of the condition named first minus that of the second, on the same "
            "cell. Blue: the first is higher; brown: it is lower; pale: both are equal. Each square holds "
            "its number or shows it when you point at it."
        )
        blocks.append(Figures(changes, caption, title=f"Differences in {COLUMNS[column]}"))
    return blocks


def _differences(grid: NeedleGrid, column: str, title: str = "Differences, paired by cell") -> Table:
    """Every pair of variants that differ in one thing."""
    rows, shown = [], 0
    for first, second in _neighbours(needle_panels(grid, column)):
        pair = grid.compare(first.rows, second.rows, column=column)
        if not pair.pairs:
            continue
        shown += pair.reading not in _NOTHING_SHOWN
        p = "<\u00a00.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"
        rows.append(
            [
                Cell(f"{second.title}, minus {first.title}"),
                interval_cell(pair.difference, signed=True),
                Cell(p),
                Cell(pair.reading),
                Cell(str(pair.pairs), f"in {pair.difference.n} contexts"),
            ]
        )
    return Table(
        ["difference", COLUMNS[column], "p", "reading", "cells"],
        rows,
        "Each row compares two variants on the same cells. The interval is a 95 % bootstrap interval over "
        "contexts (cells of one length and case share their text and are drawn together); p is that of a "
        "two-sided sign-flip test over contexts. “No difference shown” means that the interval contains zero "
        "or that p is above 0.05; it does not mean that the variants are equal.",
        title=f"{title}: {COLUMNS[column]}",
        conclusion=f"{shown} of {len(rows)} comparisons show a difference." if rows else "",
        folded=len(rows) > _MOST_OPEN_ROWS,
    )


def _neighbours(panels: Sequence[NeedlePanel]) -> list[tuple[NeedlePanel, NeedlePanel]]:
    """The pairs of panels that differ in one thing only."""
    return [
        (first, second)
        for first, second in combinations(panels, 2)
        if sum(first.key[name] != second.key[name] for name in first.key) == 1
    ]


def _profile(grid: NeedleGrid, axis: Literal["length", "depth"]) -> Table:
    """The mean of each variant at each length or depth."""
    column = grid.scores[0]
    panels = needle_panels(grid, column)
    tables = [grid.by(axis, column, **panel.rows) for panel in panels]
    places = sorted({float(value) for table in tables for value in table.iloc[:, 0]})
    rows = []
    for panel, table in zip(panels, tables, strict=True):
        found = {
            float(row[1]): Interval(float(row[2]), float(row[3]), float(row[4]), int(row[5]))
            for row in table.itertuples()
        }
        cells = [_interval_or_mean(found[at]) if at in found else Cell("–") for at in places]
        rows.append([Cell(panel.title), *cells])
    head = [f"{at:g} %" for at in places]
    if axis == "length":
        built = grid.built_lengths
        head = [f"{name_length(built[int(at)], int(at))} tokens" for at in places]
    return Table(
        ["variant", *head],
        rows,
        f"{COLUMNS[column].capitalize()} at each {axis}: the mean over the cells there, with a 95 % interval "
        "over contexts where there are several. A row that falls from left to right shows a loss that grows "
        f"with {axis}.",
        title=f"By {'context length' if axis == 'length' else 'depth'}",
    )


def _interval_or_mean(interval: Interval) -> Cell:
    return Cell(number(interval.estimate)) if math.isnan(interval.low) else interval_cell(interval)


def _what_went_wrong(grid: NeedleGrid) -> list[str]:
    found = []
    if len(failed := grid.failed):
        reason = failed["error"].mode().iloc[0]
        found.append(
            f"{len(failed)} of {len(grid)} answers failed and are left out of every mean. The most frequent "
            f"reason: {reason}"
        )
    if len(silent := grid.silent):
        found.append(f"{len(silent)} of {len(grid)} answers are empty; they count as recall 0.")
    return found


def cause_blocks(run: RunContents) -> list[Block]:
    """Steering curves, side effects, and answers with and without steering."""
    blocks: list[Block] = []
    for name, grid in run.grids(steered=True).items():
        contested, free = split_by_memory(grid)
        points = steering_points(contested)
        if not points:
            continue
        ability = run.steered_ability(list(grid.frame["model"].unique()))
        blocks.append(
            Figures(
                [Figure(figure_json(steering_curves(contested, ability)), _steering_sentence(contested))],
                "Recall while the attention to all tokens but the user's is multiplied by α, which falls "
                "from left to right. Lines are means over cells, bands are 95 % bootstrap intervals. If "
                "attention is the cause of the loss, the line of all heads rises, and the line of the "
                "retrieval heads rises further than that of equally many random heads. The lower panels show "
                "how often the model answers from memory instead and, where it was measured, how well it "
                "answers questions without a document under the same steering. "
                + _which_cells(contested, free),
                conclusion=_steering_sentence(contested),
                title="Steering attention to the user" if name == "steering" else name,
            )
        )
        if free is not None and steering_points(free):
            blocks.append(_side_effect(free))
    answers = run.extras.get("steer")
    if isinstance(answers, dict) and isinstance(answers.get("answers"), list):
        blocks.append(_answers(answers["answers"]))
    return blocks


def cure_blocks(run: RunContents) -> list[Block]:
    """Heatmaps and a table before and after the cure, and the closed-book ability."""
    blocks: list[Block] = []
    ability = run.ability()
    for grid in run.grids(steered=False).values():
        models = cure_models(grid)
        if models is None:
            continue
        contested, free = split_by_memory(grid)
        panels = [p for p in needle_panels(contested) if p.key["model"] in models]
        templated = [p for p in panels if p.condition.startswith("template")] or panels
        after = models[1]
        templated.sort(key=lambda p, after=after: (p.key["model"] == after, p.key["indicator"]))
        blocks.append(
            Figures(
                [_figure(panel) for panel in templated],
                _HOW_TO_READ
                + "All panels use the chat template. The cure works if the last panel (+indicator) shows as "
                "much recall as the panel without the template in the first section. The panel of the same "
                "model without +indicator shows what the training costs a user who does not ask for the "
                "context. " + _which_cells(contested, free),
                title="Before and after indicator training",
                scale="recall",
            )
        )
        blocks.append(_before_after(contested, ability, *models, free))
    if ability is not None:
        blocks.append(_ability(ability))
    return blocks


def _figure(panel: NeedlePanel, column: str = "recall", limits: tuple[float, float] = (0.0, 1.0)) -> Figure:
    mean = number(float((panel.mean * panel.count)[panel.count > 0].sum() / max(panel.count.sum(), 1)))
    return Figure(
        figure_json(needle_panel(panel, column=column, limits=limits)),
        f"Heatmap of {COLUMNS[column]} by context length and depth, {panel.title}. Mean {mean}.",
        title=panel.title,
    )


def _means(panels: list[NeedlePanel], contested: NeedleGrid, free: NeedleGrid | None) -> Table:
    head = ["model and condition", "recall", "answered from memory"]
    if free is not None:
        head[1:] = ["recall, memory disagrees", "answered from memory", "recall, nothing memorised"]
    rows = []
    for panel in panels:
        cells = [
            Cell(panel.title),
            interval_cell(contested.mean(_unsteered(contested, panel, "recall"))),
            interval_cell(contested.mean(_unsteered(contested, panel, "memory_recall"))),
        ]
        if free is not None:
            cells.append(interval_cell(free.mean(_unsteered(free, panel, "recall"))))
        rows.append(cells)
    return Table(
        head,
        rows,
        "Mean over the cells, with its 95 % bootstrap interval over contexts. “Answered from memory” is the "
        "share of the memorised keywords that the model says instead of the needle's; above 0, memory "
        "overrides the text.",
        title="Mean recall by model and condition",
    )


def _unsteered(grid: NeedleGrid, panel: NeedlePanel, column: str):
    key = {name: panel.key[name] for name in ("model", "condition", "indicator")}
    return grid.recall(column, **key)


def _loss_sentence(grid: NeedleGrid) -> str:
    sentences = []
    for model in dict.fromkeys(grid.frame["model"]):
        plain = grid.recall(model=model, condition="plain+prefix", indicator=False)
        template = grid.recall(model=model, condition="template+prefix", indicator=False)
        both = plain.index.intersection(template.index)
        if both.empty:
            continue
        change = grid.difference(plain, template)
        sentences.append(
            f"The mean recall of {model} is {number(float(plain[both].mean()))} without the template and "
            f"{number(float(template[both].mean()))} with it, with the same weights: "
            f"a difference of {in_text(change, signed=True)}. "
        )
    return "".join(sentences)


def _which_cells(contested: NeedleGrid, free: NeedleGrid | None) -> str:
    if free is None:
        return ""
    return (
        f"The figures show the {contested.frame['cell'].nunique()} cells whose needle contradicts what the "
        f"model knows by heart; in the other {free.frame['cell'].nunique()} cells the model knows nothing "
        "about the subject. "
    )


def _steering_sentence(grid: NeedleGrid) -> str:
    parts = []
    points = steering_points(grid)
    for heads in dict.fromkeys(point.heads for point in points):
        best = max((p for p in points if p.heads == heads), key=lambda p: p.interval.estimate)
        parts.append(f"{LINES.get(heads, heads)} {in_text(best.interval)} at α {best.alpha:g}")
    start = next((p.interval for p in points if p.alpha == 1.0), None)
    unsteered = f"Recall without steering: {in_text(start)}. " if start else ""
    return f"{unsteered}Highest mean recall on each line: {'; '.join(parts)}."


def _answers(answers: list) -> Table:
    rows = []
    for one in answers:
        asked = [m for m in one.get("messages", ()) if m.get("role") == "user"]
        question = str(asked[-1].get("content", "")) if asked else ""
        shown = question if len(question) <= _LONGEST_QUESTION else "… " + question[-_LONGEST_QUESTION:]
        rows.append([Cell(shown), Cell(str(one.get("unsteered", ""))), Cell(str(one.get("steered", "")))])
    return Table(
        ["last user message", "answer, not steered", "answer, steered"],
        rows,
        "The same weights answer the same question greedily, without and with steering. If the answers "
        "differ, the steered attention made the difference.",
        title="Answers",
    )


def _side_effect(free: NeedleGrid) -> Table:
    points = steering_points(free)
    alphas = sorted({p.alpha for p in points}, reverse=True)
    rows = []
    for heads in dict.fromkeys(p.heads for p in points):
        by_alpha = {p.alpha: p.interval for p in points if p.heads == heads}
        cells = [interval_cell(by_alpha[a]) if a in by_alpha else Cell("–") for a in alphas]
        rows.append([Cell(LINES.get(heads, heads)), *cells])
    return Table(
        ["heads", *(f"α {a:g}" for a in alphas)],
        rows,
        "Recall under the same steering in the cells where the model has memorised nothing. A fall from "
        "left to right is a side effect of steering.",
        title="Side effects of steering on other needles",
    )


def _before_after(
    contested: NeedleGrid, ability: Ability | None, before: str, after: str, free: NeedleGrid | None
) -> Table:
    rows = []
    groups = [("" if free is None else "memory disagrees", contested, ability)]
    if free is not None:
        groups.append(("nothing memorised", free, None))
    for remark, grid, table in groups:
        for row in compare_models(grid, table, before=before, after=after):
            label = Cell(row.measure, "" if row.measure.startswith("closed") else remark)
            values = [interval_cell(row.before), interval_cell(row.after)]
            rows.append([label, *values, interval_cell(row.difference, signed=True)])
    return Table(
        ["measure", f"before: {before}", f"after: {after}", "difference, paired"],
        rows,
        "Mean and 95 % bootstrap interval; a difference above zero means that the value is higher after the "
        "cure. The model before the cure has no indicator. Rows with "
        "+indicator compare the model after the cure, asked with the indicator, to the model before, "
        "asked without it, on the same cells.",
        title="Before and after",
    )


def _ability(ability: Ability) -> Table | Note:
    frame = ability.frame
    rows = []
    for (model, indicator), group in frame.groupby(["model", "indicator"], sort=False):
        name = f"{model}, +indicator" if indicator else str(model)
        rows.append(
            [Cell(name), interval_cell(bootstrap_mean(group["recall"].to_numpy())), Cell(str(len(group)))]
        )
    if not rows:
        return Note("The table of closed-book answers is empty.")
    return Table(
        ["model", "recall", "questions"],
        rows,
        "Recall on questions without any document, which the model answers from what it knows. A cure that "
        "lowers this recall would only trade one ability for another. Mean and 95 % bootstrap interval.",
        title="Closed-book ability",
    )


def _without(grid: NeedleGrid, model: str) -> NeedleGrid:
    return NeedleGrid(grid.frame[grid.frame["model"] != model].reset_index(drop=True), grid.meta)


__all__ = ["cause_blocks", "compare_blocks", "cure_blocks", "loss_blocks"]
