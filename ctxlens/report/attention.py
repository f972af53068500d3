"""The section on role bias: attention by layer and head, by layer, and by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ctxlens.chat.roles import ROLE_LABELS, Role
from ctxlens.report.blocks import Block, Explorer, Figure, Figures, Tokens, figure_json
from ctxlens.report.collect import RunContents, short_name
from ctxlens.report.plots.allocation import layer_panel, layer_shares, mean_over_queries, shown_roles
from ctxlens.report.plots.conditions import explain_conditions
from ctxlens.report.plots.theme import DIVERGING, INK, SEQUENTIAL, colorscale
from ctxlens.report.plots.tokens import token_markup
from ctxlens.results import RoleAllocation, TokenView
from ctxlens.results.arrays import SINKLESS, SINKS_NOT_MEASURED

MOST_WEIGHTS = 400_000
_LONG_ROW = 256
"""Rows of fewer tokens are written out in full."""
_FACTS = {"gold": "The context says", "answer": "The answer that was read", "response": "The model answers"}
_QUERIES = {
    "first_answer": "the position that produces the first token of the answer",
    "response_mean": "the positions of the answer, averaged",
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


# long: the data of one page element
def _explorer(models: dict[str, dict[str, RoleAllocation]], group: str) -> Explorer:
    everything = [one for parts in models.values() for one in parts.values()]
    shown = shown_roles(everything)
    roles = [role for role in ROLE_LABELS if role in shown or role in ("bos", "sink")]
    measured = all(one.resting is not None for one in everything)
    views = _conditions(models)
    options = [(view, view) for view in views]
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
        "share_options": [(share, _SHARES[share]) for share in _shares(everything)],
        "share": _shares(everything)[-1] if measured else "raw",
        "view": "template" if "template" in views else options[0][0],
        "model": "vanilla" if "vanilla" in models else next(iter(models)),
        "model_options": [(model, model) for model in models],
        "models": {
            model: {c: _entry(one, roles, _shares(everything)) for c, one in parts.items()}
            for model, parts in models.items()
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
        "Every square is one attention head. Its number is the share of attention that the head gives to the "
        f"chosen role: the mean over the conversations, seen from {queries}. "
        "Renormalised shares leave out the template's own tokens, as the paper does, so that conditions with "
        f"and without template can be compared. {_about_sinks(models, measured)} If the template draws "
        "attention away from the user, the difference for the role user is below zero. "
        f"{explain_conditions(views)} "
    )
    if data["frames"]:
        caption += "A frame marks the head of each layer that attends most to the user under plain."
    title, conclusion = "Attention by layer and head", _bias_sentence(models, data["share"], pair)
    return Explorer(data, caption, _by_layer(models, group, roles), title=title, conclusion=conclusion)


def _bias_sentence(
    models: Mapping[str, Mapping[str, RoleAllocation]], view: str, pair: tuple[str, str] | None
) -> str:
    """The user's share under the two conditions that are compared, for every model read under both."""
    told = []
    for model, parts in models.items() if pair else ():
        if pair and set(pair) <= parts.keys():
            first, second = (float(np.nanmean(parts[one].share("user", view=view))) for one in pair)
            told.append(
                f"{model} gives {first:.0%} of its attention to the user under {pair[0]}, {second:.0%} under "
                f"{pair[1]}"
            )
    return f"{'; '.join(told)} ({view} shares, mean over layers and heads)." if told else ""


_SHARES = {"raw": "raw", "renormalised": "renormalised (paper)", "without sinks": "without sinks"}
"""The views of the shares, and their names on the page."""


def _shares(everything: Sequence[RoleAllocation]) -> list[str]:
    """The views that all of the allocations have."""
    measured = all(one.resting is not None for one in everything)
    return [view for view in _SHARES if measured or view not in SINKLESS]


def _about_sinks(models: Mapping[str, Mapping[str, RoleAllocation]], measured: bool) -> str:
    """What the view without sinks leaves out, or why there is none."""
    if not measured:
        return f"{SINKS_NOT_MEASURED[0].upper()}{SINKS_NOT_MEASURED[1:]}."
    parts = ", ".join(
        f"{model} {condition} {one.with_sinks_apart().share('sink').mean():.2f}"
        for model, by_condition in models.items()
        for condition, one in by_condition.items()
    )
    return (
        "Most heads rest part of their attention on a few tokens, such as the first one, whoever wrote them "
        f"(attention sinks; mean share: {parts}). Shares without sinks leave these tokens out."
    )


def _conditions(models: dict[str, dict[str, RoleAllocation]]) -> list[str]:
    """The conditions under which any of the models was read."""
    return list(dict.fromkeys(condition for parts in models.values() for condition in parts))


def _pair(models: dict[str, dict[str, RoleAllocation]]) -> tuple[str, str] | None:
    """The two conditions whose difference is shown: plain and template, else the only two that occur."""
    views = _conditions(models)
    pair = ("plain", "template") if {"plain", "template"} <= set(views) else tuple(views)
    if len(pair) != 2 or not any(set(pair) <= parts.keys() for parts in models.values()):
        return None
    return pair[0], pair[1]


def _entry(one: RoleAllocation, roles: list[str], shares: Sequence[str]) -> dict:
    entry = {"layers": list(one.layers), "n": one.shares.shape[2]}
    for key in shares:
        source = one.in_view(key)
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
    views = _shares([one for parts in models.values() for one in parts.values()])
    for model, parts in models.items():
        for key in views:
            shares = {c: layer_shares(one, view=key) for c, one in parts.items()}
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
        "How each layer spreads its attention over the roles, averaged over its heads. Where the template's "
        "bars grow and the user's shrink, the template takes attention from the user. These figures follow "
        "the choice of model and share above.",
        title="Attention by layer",
    )


def _pack(row: np.ndarray) -> list[int] | dict[str, list[int]]:
    """Weights in ten-thousandths; of a long row those above zero, with the steps from each to the next."""
    weights = np.round(row * 10_000).astype(int)
    places = np.flatnonzero(weights)
    if len(weights) < _LONG_ROW or 2 * len(places) > len(weights):
        return weights.tolist()
    return {"steps": np.diff(places, prepend=0).tolist(), "weights": weights[places].tolist()}


def _tokens(view: TokenView) -> Tokens:
    pattern, heads = np.asarray(view.pattern, dtype=float), list(range(view.pattern.shape[1]))
    remark = ""
    if pattern.size > MOST_WEIGHTS:
        best = pattern[..., np.asarray(view.token_roles) == Role.USER].sum(-1).mean(-1).argmax(1)
        pattern = np.stack([pattern.mean(1), pattern[np.arange(len(best)), best]], axis=1)
        heads = ["mean over heads", "head with most attention on the user"]
        remark = " The pattern is large, so the page holds only two rows per layer: the mean and one head."
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
        "weights": [[[_pack(row) for row in of_head] for of_head in of_layer] for of_layer in pattern],
    }
    meta = view.meta
    facts = [(name, str(meta[key])) for key, name in _FACTS.items() if key in meta]
    where = " · ".join(short_name(meta[key]) for key in ("model", "condition") if key in meta)
    caption = (
        "One conversation as the model sees it. The colour of a token shows its role, which is named where "
        "it begins; the template's own tokens are grey. The depth of the colour and the bar below a token "
        "show how much attention the chosen head pays to it from the outlined token, on a square-root scale. "
        "The view opens with the layer, head and position that attend most to the user, at the token of the "
        "user that gets most of it. Point at a token, tap it, or move with the arrow keys to "
        "read its weight. The strip above the text shows where in the conversation the attention lies."
    )
    title = str(meta.get("title", "One conversation, token by token")).rstrip(".")
    return Tokens(
        token_markup(view, start), data, caption + remark, facts, f"{title} ({where})" if where else title
    )
