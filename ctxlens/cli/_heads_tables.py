"""Print head experiments and drift as small tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxlens.cli._outcomes import say_heads
from ctxlens.cli._output import count, few_note, show_interval
from ctxlens.cli._screen import note, say_wrapped, show_lines, show_table
from ctxlens.cli._tables import NO_SINKS, NOTHING_LEFT, list_roles, mean_share
from ctxlens.cli._tables import show_share as _share

if TYPE_CHECKING:
    from ctxlens.results import Drift, HeadCurves, HeadMap
    from ctxlens.runs import Run

_SHOWN = 5
_LOSSES = ("zero", "mean", "blind")


def show_head_study(run: Run) -> None:
    """Print the first heads of every map, the agreement with the gradient, the curves and the sweep."""
    from ctxlens.results import HeadCurves, HeadMap

    maps = {}
    for path in sorted(run.folder.glob("map-*.safetensors")):
        found = HeadMap.load(path)
        maps[found.kind] = found
        _show_map(found)
    if "gradient" in maps:
        _show_agreement(maps)
    for path in sorted(run.folder.glob("curves-*.parquet")):
        _show_curves(HeadCurves.load(path))
    if run.has("steering.parquet"):
        _show_sweep(run)
    say_wrapped([say_heads(list(maps.values()))])


def _show_map(found: HeadMap) -> None:
    from ctxlens.stats import Interval

    values, (low, high) = found.values, found.interval()
    n_texts = len(set(found.contexts.tolist()))
    rows = [
        [
            f"{at[0]}.{at[1]}",
            show_interval(Interval(values[at], low[at], high[at], n_texts), 3, signed=True),
        ]
        for at in found.ranking(ascending=found.kind in _LOSSES)[:_SHOWN]
    ]
    title = f"{found.kind}: {found.meta.get('quantity', '')}, {count(len(found.effects), 'cell')}"
    columns = ["head", "mean, 95 % interval"]
    if "with_sinks" in found.meta:
        columns.append("with sinks (paper)")
        for row in rows:
            layer, head = map(int, row[0].split("."))
            row.append(f"{found.meta['with_sinks'][layer][head]:+.3f}")
    show_table(title, columns, rows)


def _show_agreement(maps: dict[str, HeadMap]) -> None:
    from ctxlens.results import correlate_maps

    others = [kind for kind in ("steer", "blind", "zero", "mean") if kind in maps]
    rows = []
    for kind in others:
        both = [correlate_maps(maps["gradient"], maps[kind], rank=rank).format() for rank in (False, True)]
        rows.append([kind, *both])
    if rows:
        show_table(
            "gradient against measured effects: correlation over heads",
            ["effect", "Pearson", "Spearman"],
            rows,
        )
    else:
        note("run with --kind gradient,steer,ablate to compare the gradient with measured effects")


def _show_curves(curves: HeadCurves) -> None:
    names = list(dict.fromkeys(curves.frame["ranking"]))
    points = {name: dict(curves.points(name)) for name in names}
    lines: list[str | list[str]] = []
    for name in names:
        unit = "draw" if name == "random" else "text"
        lines.append(name)
        lines += [[f"  {k}", show_interval(one, unit=unit)] for k, one in points[name].items()]
    title = f"the first k heads, {curves.meta.get('action')}: {curves.meta.get('quantity')}"
    show_lines(title, ["k", "mean"], lines)


def _show_sweep(run: Run) -> None:
    from ctxlens.report.plots import trade_off_points
    from ctxlens.results import Ability, NeedleGrid

    grid = NeedleGrid.load(run.path("steering.parquet"))
    ability = None
    if run.has("steering-ability.parquet"):
        ability = Ability.load(run.path("steering-ability.parquet"))
    rows = []
    for point in trade_off_points(grid, ability):
        costs = [show_interval(one) if one else "" for one in (point.closed_book, point.nats)]
        rows.append([point.heads, f"{point.alpha:g}", show_interval(point.recall), *costs])
    show_table(
        "steering: needle recall, and the cost where no context is needed",
        ["heads", "α", "needle recall", "closed book", "nats per token"],
        rows,
        n_labels=2,
    )


def show_drift(drift: Drift) -> None:
    """Print the user's share by layer on both sides and its paired change, in several views."""
    import numpy as np

    from ctxlens.chat.roles.left_out import describe_left_out

    first, second = drift.sides
    view = "without sinks" if "without sinks" in drift.views else "raw"
    for heads in ("mean", "retrieval"):
        _show_side_by_side(drift, view, heads)
    uniform = drift.uniform("user", view).mean(1)
    note(f"first: {first}; second: {second}; {drift.shares.shape[3]} conversations")
    note(f"if attention were uniform: {uniform[0]:.3f} and {uniform[1]:.3f}")
    for line in describe_left_out(drift.meta.get("left_out", {})):
        note(line)
    if few := few_note([one[2] for one in drift.by_layer("user", view)]):
        note(few)
    note("as in the paper: second minus first, renormalised without the template's tokens, sinks counted")
    if view == "raw":
        note(NO_SINKS)
    elif np.isnan(drift.share("user", view)).all(-1).any():
        note(NOTHING_LEFT)
    show_table(
        "shares by role, raw, mean over layers and heads",
        ["", *_share_columns(drift)],
        [[side, *_mean_shares(drift, i)] for i, side in enumerate(("first", "second"))],
    )
    _show_other_views(drift, view)


def _show_side_by_side(drift: Drift, view: str, heads: str) -> None:
    """Print the user's share on both sides and its change by layer, with a row of means."""
    rows = []
    paper = drift.by_layer("user", "renormalised", heads=heads)
    for i, (before, after, change) in enumerate(drift.by_layer("user", view, heads=heads)):
        head = [] if heads == "mean" else [str(drift.retrieval[i])]
        shares = [_share(before.estimate), _share(after.estimate), show_interval(change, 3)]
        rows.append([str(drift.layers[i]), *head, *shares, show_interval(paper[i][2], 3)])
    if len(rows) > 1:
        means = [
            _mean([pair[i].estimate for pair in drift.by_layer("user", view, heads=heads)]) for i in range(3)
        ]
        last = _mean([pair[2].estimate for pair in paper])
        blank = [] if heads == "mean" else [""]
        rows.append(["mean", *blank, *map(_share, means), _share(last)])
    who = "mean over heads" if heads == "mean" else "head that attends most to the user without template"
    heading = ["layer", *(["head"] if heads == "retrieval" else [])]
    show_table(
        f"share of attention to the user's tokens, {view}, {who}",
        [*heading, "first", "second", "second minus first", "as in the paper"],
        rows,
    )


def _show_other_views(drift: Drift, shown: str) -> None:
    """Print the mean change of the user's share over thirds of the layers, in the views not shown yet."""
    import numpy as np

    parts = [part for part in np.array_split(np.arange(len(drift.layers)), 3) if len(part)]
    names = [_name_layers([drift.layers[i] for i in part]) for part in parts]
    rows = []
    for view in drift.views:
        if view != shown:
            changes = np.array([one[2].estimate for one in drift.by_layer("user", view)])
            means = [mean_share(changes[part]) for part in (*parts, np.arange(len(changes)))]
            rows.append([view, *(f"{mean:+.3f}" if mean == mean else "–" for mean in means)])
    show_table("the same difference in other views, by layers", ["view", *names, "mean"], rows)


def _name_layers(layers: list[int]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _mean(values: list[float]) -> float:
    """The mean of the values that are numbers."""
    import numpy as np

    return mean_share(np.array(values))


def _share_columns(drift: Drift) -> list[str]:
    """The roles of a table of shares; `bos` and `sink` always, and what rests on sinks where it is known."""
    return list_roles(drift.shown_roles()) + (["on sinks"] if drift.resting is not None else [])


def _mean_shares(drift: Drift, side: int) -> list[str]:
    """The mean share of every role on one side."""
    means = [_share(drift.share(role)[side].mean()) for role in list_roles(drift.shown_roles())]
    if drift.resting is not None:
        learned = drift.share("sink")[side].mean()
        means.append(_share(drift.resting[side].sum(-1).mean() + learned))
    return means
