"""Print head experiments and drift as small tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxlens.cli._screen import note, show_table

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


def _show_map(found: HeadMap) -> None:
    values, (low, high) = found.values, found.interval()
    rows = [
        [f"{at[0]}.{at[1]}", f"{values[at]:+.3f}", f"[{low[at]:+.3f}, {high[at]:+.3f}]"]
        for at in found.ranking(ascending=found.kind in _LOSSES)[:_SHOWN]
    ]
    title = f"{found.kind}: {found.meta.get('quantity', '')}, {len(found.effects)} cells"
    show_table(title, ["head", "mean", "95 % interval"], rows)


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
    rows = [[str(k), *(points[name][k].format() for name in names)] for k in curves.sizes]
    show_table(
        f"the first k heads, {curves.meta.get('action')}: {curves.meta.get('quantity')}", ["k", *names], rows
    )


def _show_sweep(run: Run) -> None:
    from ctxlens.report.plots import trade_off_points
    from ctxlens.results import Ability, NeedleGrid

    grid = NeedleGrid.load(run.path("steering.parquet"))
    ability = None
    if run.has("steering-ability.parquet"):
        ability = Ability.load(run.path("steering-ability.parquet"))
    rows = []
    for point in trade_off_points(grid, ability):
        costs = [one.format() if one else "" for one in (point.closed_book, point.nats)]
        rows.append([point.heads, f"{point.alpha:g}", point.recall.format(), *costs])
    show_table(
        "steering: needle recall, and the cost where no context is needed",
        ["heads", "α", "needle recall", "closed book", "nats per token"],
        rows,
        n_labels=2,
    )


def show_drift(drift: Drift) -> None:
    """Print the user's share by layer on both sides and its paired change, in several views."""
    from ctxlens.chat.roles.left_out import describe_left_out

    first, second = drift.sides
    for heads in ("mean", "retrieval"):
        rows = []
        for layer, (before, after, change) in zip(
            drift.layers, drift.by_layer("user", heads=heads), strict=True
        ):
            head = [] if heads == "mean" else [str(drift.retrieval[drift.layers.index(layer)])]
            rows.append(
                [str(layer), *head, f"{before.estimate:.3f}", f"{after.estimate:.3f}", change.format(3)]
            )
        who = "mean over heads" if heads == "mean" else "head that attends most to the user without template"
        show_table(
            f"share of attention to the user's tokens, {who}",
            ["layer", *(["head"] if heads == "retrieval" else []), "first", "second", "second minus first"],
            rows,
        )
    uniform = drift.uniform("user").mean(1)
    note(f"first: {first}; second: {second}; {drift.shares.shape[3]} conversations")
    note(f"if attention were uniform: {uniform[0]:.3f} and {uniform[1]:.3f}")
    for line in describe_left_out(drift.meta.get("left_out", {})):
        note(line)
    rows = []
    for view in ("renormalised", "without sinks", "renormalised without sinks"):
        share = drift.by_layer("user", view)
        rows.append([view, *(one[2].format(3) for one in share)])
    show_table("the same difference in other views, by layer", ["view", *map(str, drift.layers)], rows)
