"""The section on role bias: attention by layer and head, by layer, and token by token."""

from __future__ import annotations

import numpy as np

from ctxlens.chat.roles import ROLE_LABELS, Role
from ctxlens.report.blocks import Block, Explorer, Figure, Figures, Tokens, figure_json
from ctxlens.report.collect import RunContents, short_name
from ctxlens.report.plots.allocation import layer_panel, layer_shares, mean_over_queries, shown_roles
from ctxlens.report.plots.theme import DIVERGING, INK, SEQUENTIAL, colorscale
from ctxlens.report.plots.tokens import token_markup
from ctxlens.results import RoleAllocation, TokenView

MOST_WEIGHTS = 400_000
_FACTS = {"gold": "The context says", "answer": "The answer read along", "response": "The model answers"}
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


def _explorer(models: dict[str, dict[str, RoleAllocation]], group: str) -> Explorer:
    everything = [one for parts in models.values() for one in parts.values()]
    roles = shown_roles(everything)
    views = {c: c for parts in models.values() for c in parts}
    options = list(views.items())
    pair = _pair(models)
    if pair:
        options.append(("difference", f"{pair[1]} minus {pair[0]}"))
    data = {
        "group": group,
        "roles": roles,
        "role": "user" if "user" in roles else roles[0],
        "role_options": [(role, role) for role in roles],
        "views": views,
        "options": options,
        "pair": pair,
        "view": "template" if "template" in views else options[0][0],
        "model": "vanilla" if "vanilla" in models else next(iter(models)),
        "model_options": [(model, model) for model in models],
        "models": {
            model: {c: _entry(one, roles) for c, one in parts.items()} for model, parts in models.items()
        },
        "frames": {
            m: parts["plain"].retrieval_heads().tolist() for m, parts in models.items() if "plain" in parts
        },
        "sequential": colorscale(SEQUENTIAL),
        "diverging": colorscale(DIVERGING),
        "ink": INK.built,
    }
    queries = _QUERIES.get(everything[0].queries, everything[0].queries)
    caption = (
        "Every square is one attention head; its number is the share of attention that the head gives to the "
        f"chosen role, mean over the conversations, seen from {queries}. "
        "Renormalised shares leave out the template's own tokens, so that with and without template compare. "
        "Below zero in a difference: attention is taken away. "
    )
    if data["frames"]:
        caption += "Framed: the head of each layer with most attention on the user without template."
    return Explorer(data, caption, _by_layer(models, group, roles), title="Attention by layer and head")


def _pair(models: dict[str, dict[str, RoleAllocation]]) -> tuple[str, str] | None:
    """The two conditions whose difference is shown: with and without template, else the only two."""
    views = list(dict.fromkeys(condition for parts in models.values() for condition in parts))
    pair = ("plain", "template") if {"plain", "template"} <= set(views) else tuple(views)
    if len(pair) != 2 or not any(set(pair) <= parts.keys() for parts in models.values()):
        return None
    return pair[0], pair[1]


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


def _by_layer(models: dict[str, dict[str, RoleAllocation]], group: str, roles: list[str]) -> Figures:
    figures = []
    pair = _pair(models)
    for model, parts in models.items():
        for key in ("raw", "renormalised"):
            shares = {c: layer_shares(one, renormalised=key == "renormalised") for c, one in parts.items()}
            panels = [(c, parts[c].layers, values, False) for c, values in shares.items()]
            if pair and set(pair) <= parts.keys() and parts[pair[0]].layers == parts[pair[1]].layers:
                change = shares[pair[1]] - shares[pair[0]]
                panels.append((f"{pair[1]} minus {pair[0]}", parts[pair[0]].layers, change, True))
            for title, layers, values, difference in panels:
                label = f"Shares of attention by role and layer, {model}, {title}, {key} shares."
                figure = figure_json(layer_panel(values, layers, difference=difference, legend=roles))
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
        best = pattern[..., np.asarray(view.token_roles) == Role.USER].sum(-1).mean(-1).argmax(1)
        pattern = np.stack([pattern.mean(1), pattern[np.arange(len(best)), best]], axis=1)
        heads = ["mean over heads", "head with most attention on the user"]
        remark = " The pattern is large: of each layer, the mean over heads and the strongest head are kept."
    user = pattern[..., np.asarray(view.token_roles) == Role.USER].sum(-1)
    layer, head, query = (int(i) for i in np.unravel_index(user.argmax(), user.shape))
    start = view.query_positions[query]
    data = {
        "start": {"layer": layer, "head": head, "query": query},
        "layers": list(view.layers),
        "heads": heads,
        "queries": [
            {"position": p, "token": view.tokens[p] if 0 <= p < len(view.tokens) else ""}
            for p in view.query_positions
        ],
        "roles": [ROLE_LABELS[int(role)] for role in view.token_roles],
        "weights": np.round(pattern * 10_000).astype(int).tolist(),
    }
    meta = view.meta
    facts = [(name, str(meta[key])) for key, name in _FACTS.items() if key in meta]
    where = " · ".join(short_name(meta[key]) for key in ("model", "condition") if key in meta)
    caption = (
        "One conversation as the model sees it. A token's colour is its role (named where a stretch "
        "begins; grey: the template's own tokens), its depth of colour and the bar below it show how much "
        "attention the chosen head pays to it from the outlined token, on a square-root scale. Point at a "
        "token for its weight. Shown first: the layer, head and position with most attention on the user."
    )
    title = str(meta.get("title", "One conversation, token by token")).rstrip(".")
    return Tokens(
        token_markup(view, start), data, caption + remark, facts, f"{title} ({where})" if where else title
    )
