"""The sections on heads and on drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ctxlens.report.blocks import Block, Cell, Figure, Figures, Table, figure_json, in_text, interval_cell
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.allocation import choose_view
from ctxlens.report.plots.drift import drift_by_layer, drift_map, drift_slider
from ctxlens.report.plots.heads import ABLATIONS, NAMES, POSITIVE, gradient_scatter, head_curves, head_map
from ctxlens.report.plots.tradeoff import trade_off
from ctxlens.results import Ability, Drift, HeadCurves, HeadMap, correlate_maps
from ctxlens.results.arrays import SINKLESS, SINKS_NOT_MEASURED

_TRUTHS = ("steer", "blind", "zero", "mean")
_EXPLAINED = {
    "user share": "the share of its attention that each head gives to the user's tokens where the answer "
    "begins, without template and, where they were measured, without attention sinks. The head with the "
    "largest share in a layer is the paper's retrieval head.",
    "copying": "how often the token that the head attends to most is the needle token being produced (the "
    "retrieval score of Wu et al. 2024), from 0 to 1.",
    "gradient": "how fast the needle's log-probability grows when this head alone is steered to the user, "
    "from one backward pass per cell. Above zero, more attention to the user would help.",
    "steer": "the change of the needle's score when this head alone is steered to the user.",
    "blind": "the change of the needle's score when this head alone cannot see the user's tokens. Below "
    "zero, the model finds the needle through what this head reads.",
    "zero": "the change of the needle's score when this head's output is set to zero.",
    "mean": "the change of the needle's score when this head's output is replaced by its mean.",
}
"""What each kind of head map measures."""

_GROUPS = (
    ("Who reads and copies the needle", ("user share", "copying")),
    ("What more attention to the user does", ("gradient", "steer")),
    ("What the needle passes through", ("blind", "zero", "mean")),
)


def heads_blocks(run: RunContents) -> list[Block]:
    """Head maps, the agreement of gradient and measured effects, curves, and the trade-off of steering."""
    blocks: list[Block] = []
    maps = {one.kind: one for one in run.all(HeadMap).values()}
    for title, kinds in _GROUPS:
        if found := [maps[kind] for kind in kinds if kind in maps]:
            blocks.append(_maps(title, found))
    if "gradient" in maps:
        blocks += _agreement(maps)
    for curves in run.all(HeadCurves).values():
        blocks += _curves(curves)
    blocks += _trade_off(run)
    return blocks


def _maps(title: str, maps: Sequence[HeadMap]) -> Figures:
    figures, told = [], []
    for found in maps:
        lost = found.kind in ABLATIONS
        top = ", ".join(f"{layer}.{head}" for layer, head in found.ranking(ascending=lost)[:3])
        name = _sentence_case(NAMES.get(found.kind, found.kind))
        if found.kind == "steer" and "alpha" in found.meta:
            name += f", α {found.meta['alpha']:g}"
        label = f"Heatmap by layer and head: {name}; first heads {top}."
        figures.append(Figure(figure_json(head_map(found)), label, title=name))
        told.append(f"{name}: {_EXPLAINED.get(found.kind, '')} First heads (layer.head): {top}.")
    cells, texts = len(maps[0].effects), len(set(maps[0].contexts.tolist()))
    told.append(f"All numbers are means over {cells} needle cells of {texts} texts.")
    if any(found.kind not in POSITIVE for found in maps):
        told.append(
            "A number stands in parentheses where its 95 % interval over texts contains zero; where there is "
            "no room for numbers, a dot stands there instead."
        )
    return Figures(figures, " ".join(told), title=title)


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _agreement(maps: dict[str, HeadMap]) -> list[Block]:
    gradient = maps["gradient"]
    known = [maps[kind] for kind in _TRUTHS if kind in maps]
    truths = [truth for truth in known if truth.effects.shape == gradient.effects.shape]
    rows, figures = [], []
    for truth in truths:
        pearson, spearman = (correlate_maps(gradient, truth, rank=rank) for rank in (False, True))
        name = NAMES[truth.kind]
        rows.append([Cell(name), interval_cell(pearson, signed=True), interval_cell(spearman, signed=True)])
        figures.append(
            Figure(
                figure_json(gradient_scatter(gradient, truth)),
                f"Every head's gradient against: {name}; Pearson {in_text(pearson, signed=True)}.",
                title=name,
            )
        )
    if not rows:
        return []
    table = Table(
        ["measured", "Pearson", "Spearman"],
        rows,
        "Correlation over heads of the gradient with the measured effect, with a 95 % bootstrap interval "
        "over texts. Steering moves a head up its gradient, so +1 means agreement; an ablation removes "
        "the head, so −1 means agreement. A gradient describes small changes only: where a head's "
        "attention is saturated, the gradient is near zero even if the needle depends on the head.",
        title="Gradient against measured effects",
    )
    pairs = [figures[i : i + 2] for i in range(0, len(figures), 2)]
    caption = (
        "Every point is a head; bars are 95 % intervals over texts. The closer the points lie to one line, "
        "the better the gradient predicts the effect."
    )
    return [table, *(Figures(pair, caption) for pair in pairs)]


def _curves(curves: HeadCurves) -> list[Block]:
    action = str(curves.meta.get("action", ""))
    name = NAMES.get(action, action)
    strength = f", α {curves.meta['alpha']:g}" if "alpha" in curves.meta else ""
    caption = (
        f"The effect of acting on the first k heads of each ranking at once ({name}{strength}), beside k "
        f"heads drawn at random ({curves.meta.get('draws', 0)} draws). A ranking finds the right heads if "
        "its curve leaves the random one at small k. The heads were ranked on other texts than those "
        "measured here. Bands are 95 % intervals over texts; for random heads, over the draws."
    )
    figure = Figure(figure_json(head_curves(curves)), f"Effect by number of heads: {name}.")
    blocks: list[Block] = [Figures([figure], caption, title=f"Effect by number of heads: {name}")]
    if "random" not in set(curves.frame["ranking"]):
        return blocks
    sizes = [k for k in curves.sizes if k < max(curves.sizes)][:6]
    rows = [
        [
            Cell(NAMES.get(str(ranking), str(ranking))),
            *(interval_cell(curves.against_random(ranking, k), signed=True) for k in sizes),
        ]
        for ranking in dict.fromkeys(curves.frame["ranking"])
        if ranking != "random"
    ]
    blocks.append(
        Table(
            ["ranked by", *(f"{k} heads" for k in sizes)],
            rows,
            "The effect of the first k heads minus the mean effect of k random heads, paired by cell, "
            "with 95 % intervals over texts. The intervals do not cover the choice of the random sets.",
        )
    )
    return blocks


def _trade_off(run: RunContents) -> list[Block]:
    blocks: list[Block] = []
    for grid in run.grids(steered=True).values():
        models = set(grid.frame["model"])
        for ability in run.all(Ability).values():
            if "nats_per_token" in ability.frame and set(ability.frame["model"]) <= models:
                blocks.append(
                    Figures(
                        [Figure(figure_json(trade_off(grid, ability)), "Needle recall against its cost.")],
                        "Each point is one strength of steering; a line starts without steering and ends "
                        "at the α beside its last point. Higher points find more of the needle. The left "
                        "panel shows the recall on questions without a document, the right panel how "
                        "surprising the model finds their right answers. A line that rises without moving "
                        "sideways gains recall at no cost. Bars are 95 % intervals.",
                        title="What steering gains, and what it costs",
                    )
                )
    return blocks


def drift_blocks(run: RunContents) -> list[Block]:
    """Role shares of two sides by layer, by head and by role."""
    blocks: list[Block] = []
    for drift in run.all(Drift).values():
        blocks += _drift(drift)
    return blocks


_LINES = (
    ("user", "without sinks", "user, without sinks"),
    ("assistant", "without sinks", "assistant, without sinks"),
    ("user", "renormalised", "user, renormalised as in the paper"),
    ("user", "raw", "user, raw"),
    ("assistant", "raw", "assistant, raw"),
)
"""The figures by layer: role, view and title."""

_CHANGES = (
    ("without sinks", False, "user, without sinks"),
    ("without sinks", True, "user, without sinks, minus the change that token counts explain"),
    ("renormalised without sinks", False, "user, without template and sinks"),
    ("renormalised", False, "user, renormalised as in the paper"),
    ("raw", False, "user, raw"),
)
"""The maps of the change: view, whether the uniform baseline is subtracted, and title."""


def _drift(drift: Drift) -> list[Block]:
    first, second = drift.sides
    return [
        *_drift_lines(drift),
        _drift_maps(drift),
        _drift_table(drift),
        Figures(
            [
                Figure(
                    figure_json(drift_slider(drift)),
                    f"Shares by role and head of one layer, {first} and {second}, with a slider over layers.",
                )
            ],
            f"All roles in one layer, {choose_view([drift])[0]}, averaged over the conversations. Move the "
            "slider to change the layer. The right panel shows which roles gain what the user loses.",
            title="Role by head, layer by layer",
        ),
    ]


def _drift_lines(drift: Drift) -> list[Figures]:
    """Shares by layer, two figures a row."""
    first, second = drift.sides
    lines = [
        Figure(
            figure_json(drift_by_layer(drift, role, view)),
            f"Share of {role} by layer, {first} and {second}, {view}.",
            title=title,
        )
        for role, view, title in _LINES
        if view in drift.views
    ]
    caption = (
        "How much attention each layer gives to a role: the mean over heads, and the head that attends "
        "most to the user without template. The dotted lines show the share if every token got the same "
        "attention, from token counts alone. Raw shares alone can mislead, because a template adds tokens "
        f"and most heads rest on a few tokens, such as the first one (attention sinks). {_about_sinks(drift)}"
    )
    pairs = [lines[i : i + 2] for i in range(0, len(lines), 2)]
    figures = [Figures(pair, "") for pair in pairs]
    figures[0] = replace(figures[0], title=f"{first} against {second}")
    figures[-1] = replace(figures[-1], caption=caption)
    return figures


def _about_sinks(drift: Drift) -> str:
    """What the views without sinks show, or why there are none."""
    if "without sinks" not in drift.views:
        return f"{SINKS_NOT_MEASURED[0].upper()}{SINKS_NOT_MEASURED[1:]}."
    return (
        "The views without sinks leave out what rests on such tokens, measured in every layer; a change that "
        "stays there is a change of the model's attention."
    )


def _drift_maps(drift: Drift) -> Figures:
    """The change of the user's share by layer and head, in several views."""
    first, second = drift.sides
    n_texts = len(set(drift.contexts.tolist()))
    maps = [
        Figure(
            figure_json(drift_map(drift, "user", view, excess=excess)),
            f"Change of the user's share by layer and head, {title}.",
            title=title,
        )
        for view, excess, title in _CHANGES
        if view in drift.views
    ]
    caption = (
        f"{second} minus {first}, over {drift.shares.shape[3]} conversations about {n_texts} texts. Below "
        "zero: the head attends less to the user. A frame marks the retrieval head of each layer; a number "
        "stands in parentheses where its 95 % interval over texts contains zero, or a dot where there is no "
        "room for numbers."
    )
    return Figures(maps, caption, title="Change by head")


def _drift_table(drift: Drift) -> Table:
    rows = []
    views = sorted(drift.views, key=lambda view: view not in SINKLESS)
    found = {view: drift.by_layer("user", view) for view in views}
    followed = drift.by_layer("user", heads="retrieval")
    for i, layer in enumerate(drift.layers):
        cells = [interval_cell(found[view][i][2], signed=True) for view in views]
        head = interval_cell(followed[i][2], signed=True)
        rows.append([Cell(str(layer)), *cells, Cell(head.text, f"head {drift.retrieval[i]} {head.small}")])
    return Table(
        ["layer", *views, "retrieval head, raw"],
        rows,
        f"Change of the user's share ({drift.sides[1]} minus {drift.sides[0]}), mean over heads, paired by "
        "conversation, with 95 % bootstrap intervals over texts.",
        title="Change of the user's share",
    )


__all__ = ["drift_blocks", "heads_blocks"]
