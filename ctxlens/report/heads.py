"""The sections on heads and on drift."""

from __future__ import annotations

from collections.abc import Sequence

from ctxlens.report.blocks import Block, Cell, Figure, Figures, Table, figure_json, in_text, interval_cell
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.drift import drift_by_layer, drift_map, drift_slider
from ctxlens.report.plots.heads import NAMES, gradient_scatter, head_curves, head_map
from ctxlens.report.plots.tradeoff import trade_off
from ctxlens.results import Ability, Drift, HeadCurves, HeadMap, correlate_maps

_TRUTHS = ("steer", "blind", "zero", "mean")
_EXPLAINED = {
    "user share": "how much of its attention each head gives to the user's tokens where the answer begins, "
    "without template; the paper's retrieval head is the best of each layer.",
    "copying": "how often the token that the head attends to most is the very needle token being said "
    "(the retrieval score of Wu et al. 2024), 0 to 1.",
    "gradient": "how fast the needle's log-probability grows as the head alone is steered to the user, from "
    "one backward pass a cell: above zero, more attention to the user would help.",
    "steer": "what steering this head alone does to the needle.",
    "blind": "what hiding the user's tokens from this head alone does to the needle: below zero, the needle "
    "passes through what this head reads.",
    "zero": "what silencing this head alone does to the needle.",
    "mean": "what replacing this head's output by its mean does to the needle.",
}


_GROUPS = (
    ("Who reads and copies the needle", ("user share", "copying")),
    ("What more attention to the user does", ("gradient", "steer")),
    ("What the needle passes through", ("blind", "zero", "mean")),
)


def heads_blocks(run: RunContents) -> list[Block]:
    """Head maps, how far the gradient agrees with true effects, curves, and the trade-off of steering."""
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
        lost = found.kind in ("zero", "mean", "blind")
        top = ", ".join(f"{layer}.{head}" for layer, head in found.ranking(ascending=lost)[:3])
        name = _sentence_case(NAMES.get(found.kind, found.kind))
        if found.kind == "steer" and "alpha" in found.meta:
            name += f", α {found.meta['alpha']:g}"
        label = f"Heatmap by layer and head: {name}; first heads {top}."
        figures.append(Figure(figure_json(head_map(found)), label, title=name))
        told.append(f"{name}: {_EXPLAINED.get(found.kind, '')} First heads (layer.head): {top}.")
    cells, texts = len(maps[0].effects), len(set(maps[0].contexts.tolist()))
    told.append(f"Means over {cells} needle cells of {texts} texts.")
    if any(found.kind not in ("copying", "user share") for found in maps):
        told.append("In parentheses: the 95 % interval over texts holds zero.")
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
        "Correlation over heads of the gradient with what really happens, with a 95 % bootstrap over texts. "
        "Steering goes up the gradient, so agreement is near +1; an ablation takes the head away, so "
        "agreement is near −1. A gradient sees small changes only: where a head's attention is saturated, it "
        "is near zero however much the needle depends on the head.",
        title="Gradient against true effects",
    )
    pairs = [figures[i : i + 2] for i in range(0, len(figures), 2)]
    caption = "Every point is a head; bars are 95 % intervals over texts."
    return [table, *(Figures(pair, caption) for pair in pairs)]


def _curves(curves: HeadCurves) -> list[Block]:
    action = str(curves.meta.get("action", ""))
    name = NAMES.get(action, action)
    strength = f", α {curves.meta['alpha']:g}" if "alpha" in curves.meta else ""
    caption = (
        f"The first k heads of each ranking at once ({name}{strength}), against k heads drawn at random "
        f"({curves.meta.get('draws', 0)} draws). Heads are ranked on other texts than those measured here. "
        "Bands: 95 % intervals over texts; for random heads, over the draws."
    )
    figure = Figure(figure_json(head_curves(curves)), f"Effect by number of heads: {name}.")
    blocks: list[Block] = [Figures([figure], caption, title=f"More and more heads: {name}")]
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
            "Minus the mean of as many random heads, paired by cell, with 95 % intervals over texts; the "
            "drawn sets are taken as they are.",
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
                        "Each point is one strength of steering (the strongest one's α beside it), "
                        "beginning with none. Up: more of the needle. Left panel: questions without any "
                        "document, answered; right panel: how surprising the model finds their right "
                        "answers. Bars are 95 % intervals.",
                        title="What steering gains, and what it costs",
                    )
                )
    return blocks


def drift_blocks(run: RunContents) -> list[Block]:
    """Role shares of two sides: by layer, by head, and role by role."""
    blocks: list[Block] = []
    for drift in run.all(Drift).values():
        blocks += _drift(drift)
    return blocks


def _drift(drift: Drift) -> list[Block]:
    first, second = drift.sides
    n_texts = len(set(drift.contexts.tolist()))
    what = f"{second} minus {first}; {drift.shares.shape[3]} conversations of {n_texts} texts"
    lines = [
        Figure(
            figure_json(drift_by_layer(drift, role, view)),
            f"Share of {role} by layer, {first} and {second}, {view}.",
            title=title,
        )
        for role, view, title in (
            ("user", "raw", "user, raw"),
            ("assistant", "raw", "assistant, raw"),
            ("user", "renormalised", "user, renormalised without template tokens"),
            ("user", "without sinks", "user, without the first token (sink)"),
        )
    ]
    maps = [
        Figure(
            figure_json(drift_map(drift, "user", view, excess=excess)),
            f"Change of the user's share by layer and head, {title}.",
            title=title,
        )
        for view, excess, title in (
            ("raw", False, "user, raw"),
            ("raw", True, "user, raw, beyond what token counts explain"),
            ("renormalised without sinks", False, "user, without template and sink"),
        )
    ]
    return [
        Figures(lines[:2], "", title=f"{first} against {second}"),
        Figures(
            lines[2:],
            "How much attention each layer gives a role, mean over heads and for the head that reads the "
            "user most without template. Dotted: the share if every token got the same attention, from token "
            "counts alone. Raw shares mislead: a template adds tokens, and most heads rest on the first "
            "token; so the same is shown renormalised, and with that token left out.",
        ),
        Figures(
            maps,
            f"{what}. Framed: the retrieval head of each layer. In parentheses: the 95 % interval over texts "
            "holds zero.",
            title="Change by head",
        ),
        _drift_table(drift),
        Figures(
            [
                Figure(
                    figure_json(drift_slider(drift)), "Role by head in one layer, with a slider over layers."
                )
            ],
            "All roles, one layer at a time: move the slider. Mean over conversations, raw shares.",
            title="Role by head, layer by layer",
        ),
    ]


def _drift_table(drift: Drift) -> Table:
    rows = []
    views = ("raw", "renormalised", "without sinks", "renormalised without sinks")
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
