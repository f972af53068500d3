"""The sections on attention: role bias, tokens, and the scores that show its source."""

from __future__ import annotations

import math

import numpy as np

from ctxlens.plots.allocation import layer_panel, layer_shares, mean_over_queries, shown_roles
from ctxlens.plots.scores import KINDS, read_from, score_histogram, selection_quality
from ctxlens.plots.theme import DIVERGING, INK, SEQUENTIAL, colorscale
from ctxlens.plots.tokens import token_markup
from ctxlens.report.blocks import Block, Cell, Explorer, Figure, Figures, Table, Tokens, figure_json, number
from ctxlens.report.collect import RunContents
from ctxlens.results import RoleAllocation, Scores, Selection, TokenView
from ctxlens.roles import ROLE_LABELS, Role
from ctxlens.stats import auroc

VIEWS = {"plain": "no template", "template": "template"}
MOST_WEIGHTS = 400_000
_QUERIES = {
    "first_answer": "the position that produces the first token of the answer",
    "response_mean": "the mean over the answer's own positions",
    "positions": "chosen positions",
}


def bias_blocks(run: RunContents, number_of_run: int) -> list[Block]:
    """The layer × head explorer, shares by layer, and the token views."""
    blocks: list[Block] = []
    models = run.allocations()
    if models:
        blocks.append(_explorer(models, f"bias{number_of_run}"))
    blocks += [_tokens(view) for view in run.token_views()]
    return blocks


def source_blocks(run: RunContents) -> list[Block]:
    """Score histograms with threshold, and the quality of the selection."""
    blocks: list[Block] = []
    for name, scores, selection in run.scored():
        layer, reduction = read_from(scores, selection)
        rule = f" Threshold by: {selection.meta['rule']}." if selection and "rule" in selection.meta else ""
        blocks.append(
            Figures(
                [Figure(figure_json(score_histogram(scores, selection)), _score_label(scores, selection))],
                "How much of its attention each assistant turn pays to the user's tokens (0 to 1), read in layer "
                f"{layer}, reduction {reduction}. Turns to the right of the dashed line are chosen as "
                "context-dependent. If the source of the bias can be found this way, the kinds stand apart."
                + rule,
                title="Context-dependency scores" if name == "scores" else name,
            )
        )
        if selection is not None:
            blocks.append(_selected(scores, selection))
        if "kind" in scores.frame and scores.frame["layer"].nunique() > 1:
            blocks.append(_layers(scores, reduction))
    return blocks


def _explorer(models: dict[str, dict[str, RoleAllocation]], group: str) -> Explorer:
    everything = [one for parts in models.values() for one in parts.values()]
    roles = shown_roles(everything)
    views = {c: VIEWS.get(c, c) for parts in models.values() for c in parts}
    options = list(views.items())
    if any(_comparable(parts) for parts in models.values()):
        options.append(("difference", "difference"))
    data = {
        "group": group,
        "roles": roles,
        "role": "user" if "user" in roles else roles[0],
        "role_options": [(role, role) for role in roles],
        "views": views,
        "options": options,
        "view": "template" if "template" in views else options[0][0],
        "model": "vanilla" if "vanilla" in models else next(iter(models)),
        "model_options": [(model, model) for model in models],
        "models": {model: {c: _entry(one, roles) for c, one in parts.items()} for model, parts in models.items()},
        "frames": {m: parts["plain"].retrieval_heads().tolist() for m, parts in models.items() if "plain" in parts},
        "sequential": colorscale(SEQUENTIAL),
        "diverging": colorscale(DIVERGING),
        "ink": INK.built,
    }
    queries = _QUERIES.get(everything[0].queries, everything[0].queries)
    caption = (
        "Every square is one attention head; its number is the share of attention that the head gives to the "
        f"chosen role, mean over the conversations, seen from {queries}. "
        "Renormalised shares leave out the template's own tokens, so that with and without template compare. "
        "The difference is template minus no template: below zero, the template takes attention away. "
    )
    if data["frames"]:
        caption += "Framed: the head of each layer with most attention on the user without template."
    return Explorer(data, caption, _by_layer(models, group), title="Attention by layer and head")


def _comparable(parts: dict[str, RoleAllocation]) -> bool:
    return {"plain", "template"} <= parts.keys() and parts["plain"].layers == parts["template"].layers


def _entry(one: RoleAllocation, roles: list[str]) -> dict:
    entry = {"layers": list(one.layers), "n": one.shares.shape[2]}
    for key, source in (("raw", one), ("renormalised", one.renormalised())):
        uniform = source.uniform().mean(0)
        entry[key] = {
            role: {
                "z": np.round(mean_over_queries(source.share(role)), 4).tolist(),
                "uniform": round(float(uniform[Role.parse(role)]), 4),
            }
            for role in roles
        }
    return entry


def _by_layer(models: dict[str, dict[str, RoleAllocation]], group: str) -> Figures:
    figures = []
    for model, parts in models.items():
        for key in ("raw", "renormalised"):
            shares = {c: layer_shares(one, renormalised=key == "renormalised") for c, one in parts.items()}
            panels = [(VIEWS.get(c, c), parts[c].layers, values, False) for c, values in shares.items()]
            if _comparable(parts):
                change = shares["template"] - shares["plain"]
                panels.append(("template minus no template", parts["plain"].layers, change, True))
            for title, layers, values, difference in panels:
                label = f"Shares of attention by role and layer, {model}, {title}, {key} shares."
                figure = figure_json(layer_panel(values, layers, difference=difference))
                figures.append(
                    Figure(figure, label, title=f"{model}: {title}", group=group, variant=f"{model}|{key}")
                )
    return Figures(
        figures,
        "The same, mean over heads: how each layer spreads its attention over the roles. It follows the "
        "choice of model and share above.",
        title="Attention by layer",
    )


def _tokens(view: TokenView) -> Tokens:
    pattern, heads = np.asarray(view.pattern, dtype=float), list(range(view.pattern.shape[1]))
    remark = ""
    if pattern.size > MOST_WEIGHTS:
        user = pattern[..., np.asarray(view.token_roles) == Role.USER].sum(-1).mean(-1)
        best = user.argmax(1)
        pattern = np.stack([pattern.mean(1), pattern[np.arange(len(best)), best]], axis=1)
        heads = ["mean over heads", "head with most attention on the user"]
        remark = " The pattern is large: of each layer, the mean over heads and the strongest head are kept."
    start = view.query_positions[-1]
    data = {
        "layers": list(view.layers),
        "heads": heads,
        "queries": [
            {"position": p, "token": view.tokens[p] if 0 <= p < len(view.tokens) else ""} for p in view.query_positions
        ],
        "roles": [ROLE_LABELS[int(role)] for role in view.token_roles],
        "weights": np.round(pattern * 10_000).astype(int).tolist(),
    }
    meta = view.meta
    facts = [(k, str(meta[n])) for k, n in (("The context says", "gold"), ("The model answers", "response")) if n in meta]
    where = " · ".join(str(meta[key]) for key in ("model", "condition") if key in meta)
    caption = (
        "One conversation as the model sees it. A token's colour is its role (named where a stretch begins; grey: "
        "the template's own tokens), its depth of colour and the bar below it show how much attention the "
        "chosen head pays to it from the outlined token, on a square-root scale. Point at a token for its weight."
    )
    title = str(meta.get("title", "One conversation, token by token")).rstrip(".")
    return Tokens(token_markup(view, start), data, caption + remark, facts, f"{title} ({where})" if where else title)


def _score_label(scores: Scores, selection: Selection | None) -> str:
    layer, _ = read_from(scores, selection)
    turns = int((scores.frame["layer"] == layer).sum())
    chosen = f", {int(selection.frame['selected'].sum())} selected" if selection is not None else ""
    return f"Histogram of context-dependency scores of {turns} assistant turns in layer {layer}{chosen}."


def _selected(scores: Scores, selection: Selection) -> Table:
    n, chosen = len(selection), int(selection.frame["selected"].sum())
    rows = [[Cell("chosen turns"), Cell(f"{chosen} of {n}", f"{chosen / max(n, 1):.1%}")]]
    if "threshold" in selection.meta:
        rows.append([Cell("threshold β"), Cell(number(float(selection.meta["threshold"])))])
    quality = selection_quality(scores, selection)
    if quality is not None:
        base = quality.n_true / max(quality.n_turns, 1)
        precision = "of the chosen turns are truly context-dependent"
        recall = "of the truly context-dependent turns are chosen"
        rows += [
            [Cell("precision", precision), Cell(_percent(quality.precision))],
            [Cell("recall", recall), Cell(_percent(quality.recall))],
            [Cell("base rate", "of all turns are truly context-dependent"), Cell(_percent(base))],
        ]
    return Table(["selection", "figure"], rows, "What the threshold selects.")


def _layers(scores: Scores, reduction: str) -> Table:
    positive = set(scores.meta.get("positive_kinds", ["document"]))
    kinds = [kind for kind in KINDS if kind in set(scores.frame["kind"])]
    others = [kind for kind in kinds if kind not in positive]
    rows = []
    for layer, group in scores.frame.groupby("layer"):
        values = {kind: group.loc[group["kind"] == kind, reduction].to_numpy() for kind in kinds}
        true = np.concatenate([values[kind] for kind in kinds if kind in positive] or [np.array([])])
        cells = [Cell(str(layer))]
        cells += [Cell(number(float(values[kind].mean()))) for kind in kinds]
        cells += [Cell(number(auroc(true, values[kind]))) for kind in others]
        rows.append(cells)
    head = ["layer", *(f"mean: {KINDS[kind]}" for kind in kinds), *(f"AUROC against: {KINDS[k]}" for k in others)]
    return Table(
        head,
        rows,
        "Which layer tells the kinds apart. AUROC is the chance that a context-dependent turn scores above one "
        "of the other kind: 1 is perfect, 0.5 is a coin.",
        title="By layer",
    )


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
