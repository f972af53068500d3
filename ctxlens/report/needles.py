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
from ctxlens.stats import Interval, bootstrap_mean

_LONGEST_QUESTION = 280
_MOST_DIFFERENCES = 6
_SCORES = ("recall", "contains", "needle_logprob")
_HOW_TO_READ_LOGPROB = (
    "Each square is one context length (left to right) and one depth of the needle in it (top to bottom); "
    "the darker it is (on a dark page: the brighter), the likelier the model finds the needle's words after "
    "their beginning, in nats per token (0: certain). Nothing is generated for this."
)
_HOW_TO_READ = (
    "Each square is one context length (left to right) and one depth of the needle in it (top to bottom); "
    "the darker it is (on a dark page: the brighter), the more of the needle's keywords the model repeats "
    "(1: all, 0: none). The first words of the answer are given, where nothing else is said. "
)


def loss_blocks(run: RunContents) -> list[Block]:
    """Needle heatmaps of the models before the cure, in pairs with their difference, and comparisons."""
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
    by_cells: dict[str, list[tuple[str, NeedleGrid]]] = {}
    for name, grid in grids:
        by_cells.setdefault(str(grid.meta.get("cells", f"of {name}")), []).append((name, grid))
    blocks: list[Block] = []
    if len(grids) > 1:
        rows = []
        for name, grid in grids:
            for panel in needle_panels(grid):
                values = panel.rows
                scores = (grid.mean(grid.recall(c, **values)) if c in grid.frame else None for c in _SCORES)
                cells = [Cell("–") if one is None else interval_cell(one) for one in scores]
                rows.append([Cell(panel.title, name), *cells])
        blocks.append(
            Table(
                ["run", *(COLUMNS[column] for column in _SCORES)],
                rows,
                "Every model and condition of every run. Mean over its own cells with its 95 % interval.",
                title="Runs side by side",
            )
        )
    for group in by_cells.values():
        if len(group) > 1:
            merged = NeedleGrid.concat(
                [
                    NeedleGrid(one.frame.assign(model=name + ": " + one.frame["model"].astype(str)), one.meta)
                    for name, one in group
                ]
            )
            blocks += [_differences(merged, column, "Runs compared") for column in merged.scores]
    if len(by_cells) > 1:
        blocks.append(
            Note(
                "Runs whose cells are other texts (other lengths, seed, tokenizer or window) are not paired."
            )
        )
    return blocks


def _heatmaps(contested: NeedleGrid, free: NeedleGrid | None, column: str, title: str) -> list[Block]:
    panels = needle_panels(contested, column)
    limits = score_range(panels, column)
    how = _HOW_TO_READ + _loss_sentence(contested) if column == "recall" else _HOW_TO_READ_LOGPROB
    low, high = (number(limit) for limit in limits)
    figures = [_figure(panel, column, limits) for panel in panels]
    blocks: list[Block] = [
        Figures(
            figures,
            how + " " + _which_cells(contested, free) + f"The scale goes from {low} to {high}.",
            title=title if column == "recall" else f"{title}: {COLUMNS[column]}",
            scale="recall" if column == "recall" else "",
        )
    ]
    pairs = [
        (first, second)
        for first, second in combinations(panels, 2)
        if sum(first.key[name] != second.key[name] for name in first.key) == 1
    ]
    changes = [
        Figure(
            figure_json(needle_difference(contested, first, second, column)),
            f"Heatmap of the difference in {COLUMNS[column]}, {second.title} minus {first.title}.",
            title=f"{second.title} minus {first.title}",
        )
        for first, second in pairs[:_MOST_DIFFERENCES]
    ]
    if changes:
        caption = (
            "Paired by cell. Blue: the first named is higher; brown: lower; pale: no difference. The number "
            "stands in each square, or shows on hover."
        )
        blocks.append(Figures(changes, caption, title=f"Differences in {COLUMNS[column]}"))
    return blocks


def _differences(grid: NeedleGrid, column: str, title: str = "Differences, paired by cell") -> Table:
    """Every pair of variants that differ in one thing."""
    rows = []
    for first, second in combinations(needle_panels(grid, column), 2):
        if sum(first.key[name] != second.key[name] for name in first.key) != 1:
            continue
        pair = grid.compare(first.rows, second.rows, column=column)
        if not pair.pairs:
            continue
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
        "Both variants answer the same cells. 95 % bootstrap interval over contexts (cells of one length and "
        "case share their text and are drawn together); p of a two-sided sign-flip test over contexts. "
        "“No difference shown”: the interval holds zero, or p is above 0.05.",
        title=f"{title}: {COLUMNS[column]}",
    )


def _profile(grid: NeedleGrid, axis: Literal["length", "depth"]) -> Table:
    """Each variant at each length or depth."""
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
    unit = "tokens" if axis == "length" else "%"
    return Table(
        ["variant", *(f"{at:g} {unit}" for at in places)],
        rows,
        f"{COLUMNS[column].capitalize()} at each {axis}, mean over the cells there. 95 % interval over "
        "contexts, where there are several.",
        title=f"By {'context length' if axis == 'length' else 'depth'}",
    )


def _interval_or_mean(interval: Interval) -> Cell:
    return Cell(number(interval.estimate)) if math.isnan(interval.low) else interval_cell(interval)


def _what_went_wrong(grid: NeedleGrid) -> list[str]:
    found = []
    if len(failed := grid.failed):
        reason = failed["error"].mode().iloc[0]
        found.append(
            f"{len(failed)} of {len(grid)} answers failed and are left out of every mean; most often: "
            f"{reason}"
        )
    if len(silent := grid.silent):
        found.append(f"{len(silent)} of {len(grid)} answers are without a word; they count as recall 0.")
    return found


def cause_blocks(run: RunContents) -> list[Block]:
    """Steering curves."""
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
                "Recall as the attention to everything but the user's tokens is weakened by α (steps to "
                "the right: weaker). Lines are means over cells, bands 95 % bootstrap intervals. If "
                "attention is the cause, the line of all heads rises, and the retrieval heads rise "
                "further than as many random ones. Below: how often the model answers from memory "
                "instead, and, where it was measured, what the same steering does to questions without a "
                "document. " + _which_cells(contested, free) + _steering_sentence(contested),
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
    """Heatmaps before and after, the table, and the closed-book ability."""
    blocks: list[Block] = []
    ability = run.ability()
    for grid in run.grids(steered=False).values():
        models = cure_models(grid)
        if models is None:
            continue
        contested, free = split_by_memory(grid)
        panels = [p for p in needle_panels(contested) if p.key["model"] in models]
        templated = [p for p in panels if "template" in p.key["condition"]] or panels
        after = models[1]
        templated.sort(key=lambda p, after=after: (p.key["model"] == after, p.key["indicator"]))
        blocks.append(
            Figures(
                [_figure(panel) for panel in templated],
                _HOW_TO_READ
                + "All under the chat template. The question is whether the last panel is as full "
                "as the model without template was above; the panel without [IND] shows what the "
                "training costs "
                "a user who does not ask for the context. " + _which_cells(contested, free),
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
    return Table(head, rows, "Mean over the cells with its 95 % bootstrap interval over contexts.")


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
            f"The model {model} finds {number(float(plain[both].mean()))} without the template and "
            f"{number(float(template[both].mean()))} with it, on the same weights: "
            f"a difference of {in_text(change, signed=True)}."
        )
    return " ".join(sentences)


def _which_cells(contested: NeedleGrid, free: NeedleGrid | None) -> str:
    if free is None:
        return ""
    return (
        f"Shown are the {contested.frame['cell'].nunique()} cells whose needle contradicts what the model "
        f"knows by heart; in the other {free.frame['cell'].nunique()} it knows nothing about the subject. "
    )


def _steering_sentence(grid: NeedleGrid) -> str:
    parts = []
    points = steering_points(grid)
    for heads in dict.fromkeys(point.heads for point in points):
        best = max((p for p in points if p.heads == heads), key=lambda p: p.interval.estimate)
        parts.append(f"{LINES.get(heads, heads)} {in_text(best.interval)} at α {best.alpha:g}")
    start = next((p.interval for p in points if p.alpha == 1.0), None)
    unsteered = f"Not steered: {in_text(start)}. " if start else ""
    return f"{unsteered}Highest mean recall of each line: {'; '.join(parts)}."


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
        "The same question, answered greedily by the same weights without and with steering.",
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
        "Where nothing is memorised: recall under the same steering. A fall here is a side effect.",
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
        "Mean and 95 % bootstrap interval. The model before has no indicator: rows with [IND] compare the "
        "model after, asked with it, to the model before, asked plainly, on the same cells.",
        title="Before and after",
    )


def _ability(ability: Ability) -> Table | Note:
    frame = ability.frame
    rows = []
    for (model, indicator), group in frame.groupby(["model", "indicator"], sort=False):
        name = f"{model} + [IND]" if indicator else str(model)
        rows.append(
            [Cell(name), interval_cell(bootstrap_mean(group["recall"].to_numpy())), Cell(str(len(group)))]
        )
    if not rows:
        return Note("The ability table is empty.")
    return Table(
        ["model", "recall", "questions"],
        rows,
        "Questions without any document, answered from what the model knows: a cure that costs this ability "
        "would be none. Mean and 95 % bootstrap interval.",
        title="Closed-book ability",
    )


def _without(grid: NeedleGrid, model: str) -> NeedleGrid:
    return NeedleGrid(grid.frame[grid.frame["model"] != model].reset_index(drop=True), grid.meta)


__all__ = ["cause_blocks", "compare_blocks", "cure_blocks", "loss_blocks"]
