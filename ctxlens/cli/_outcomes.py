"""The results of the verbs as tidy tables with one sentence each; see docs/cli.md for the columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.cli._output import INTERVAL, Outcome, Table, count, interval_cells, say_interval

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ctxlens.chat.roles import RenderedChat
    from ctxlens.results import Drift, NeedleGrid, RoleAllocation
    from ctxlens.runs import Run


def table_of(frame: pd.DataFrame) -> Table:
    """A data frame as a table."""
    return Table(tuple(map(str, frame.columns)), frame.to_numpy(dtype=object).tolist())


def head_means(shares: np.ndarray) -> np.ndarray:
    """The mean over heads, `[layer, conversation]`; NaN where no head has a share."""
    import numpy as np

    known = ~np.isnan(shares)
    number = known.sum(1)
    total = np.where(known, shares, 0.0).sum(1)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def say_change(
    what: str, before: np.ndarray, after: np.ndarray, layers: Sequence[int], contexts: Any = None
) -> str:
    """One sentence on how the user's share changes: `[layer, conversation]` on both sides.

    The layers named are the neighbours of the layer with the largest change in its direction that have at
    least half of that change.
    """
    import numpy as np

    from ctxlens.stats import bootstrap_mean

    change = after - before
    by_layer = [float(row[~np.isnan(row)].mean()) if (~np.isnan(row)).any() else 0.0 for row in change]
    known = ~np.isnan(change)
    number = known.sum(0)
    per_text = np.divide(
        np.where(known, change, 0.0).sum(0), number, out=np.full(number.shape, np.nan), where=number > 0
    )
    found = bootstrap_mean(per_text, clusters=contexts)
    if found.estimate != found.estimate:
        return f"{what} the user's share of attention cannot be compared: all attention rests on sinks."
    size = abs(found.estimate)
    low, high = sorted(map(abs, (found.low, found.high)))
    if size < 0.005 or (found.low == found.low and found.low <= 0 <= found.high):
        return (
            f"{what} the user's share of attention changes by {say_interval(found)} on average over "
            f"{count(len(layers), 'layer')}: no clear change."
        )
    verb = "falls" if found.estimate < 0 else "rises"
    shown = say_interval(type(found)(size, low, high, found.n))
    first, last = _peak(by_layer, -1 if found.estimate < 0 else 1)
    most = f"in layer {layers[first]}" if first == last else f"in layers {layers[first]} to {layers[last]}"
    return f"{what} the user's share of attention {verb} by {shown} on average; most {most}."


def _peak(values: Sequence[float], sign: int) -> tuple[int, int]:
    """The first and last layer around the largest change that have at least half of it."""
    signed = [sign * value for value in values]
    first = last = max(range(len(signed)), key=signed.__getitem__)
    half = signed[first] / 2
    while first > 0 and signed[first - 1] >= half:
        first -= 1
    while last < len(signed) - 1 and signed[last + 1] >= half:
        last += 1
    return first, last


def user_view(*sides: RoleAllocation) -> str:
    """The view of the user's share: without sinks where they were measured, else raw."""
    return "without sinks" if all(one.resting is not None for one in sides) else "raw"


def say_allocations(what: str, before: RoleAllocation, after: RoleAllocation) -> str:
    """The sentence of `say_change` for two allocations of the same conversations."""
    view = user_view(before, after)
    shares = [head_means(one.share("user", view=view)) for one in (before, after)]
    return say_change(what, shares[0], shares[1], before.layers)


def allocation_table(sides: Mapping[str, RoleAllocation]) -> Table:
    """The share of every role by condition, view and layer: means over heads, with intervals."""
    from ctxlens.chat.roles import Role
    from ctxlens.cli._tables import list_roles
    from ctxlens.report.plots.allocation import shown_roles
    from ctxlens.results.arrays import SINKLESS, VIEWS
    from ctxlens.stats import bootstrap_mean

    roles = list_roles(shown_roles(list(sides.values())))
    rows = []
    for name, one in sides.items():
        for view, dropped in VIEWS.items():
            if one.resting is None and view in SINKLESS:
                continue
            seen = one.in_view(view)
            for role in roles:
                if Role.parse(role) in dropped:
                    continue
                for layer, shares in zip(one.layers, head_means(seen.share(role)), strict=True):
                    rows.append([name, view, role, layer, *interval_cells(bootstrap_mean(shares))])
    return Table(("condition", "view", "role", "layer", "share", *INTERVAL), rows)


def drift_outcome(drift: Drift, folder: Path) -> Outcome:
    """The share of every role on both sides and its paired change, by view and layer."""
    from ctxlens.chat.roles import Role
    from ctxlens.cli._tables import list_roles

    rows = []
    for view in drift.views:
        for role in list_roles(drift.shown_roles()):
            if Role.parse(role) in drift.left_out(view):
                continue
            for heads in ("mean", "retrieval") if role == "user" else ("mean",):
                for layer, found in zip(drift.layers, drift.by_layer(role, view, heads=heads), strict=True):
                    before, after, change = found
                    shares = [before.estimate, after.estimate]
                    rows.append([view, role, heads, layer, *shares, *interval_cells(change)])
    columns = ("view", "role", "heads", "layer", "first", "second", "change", *INTERVAL)
    first, second = drift.sides
    sides = {"first": first, "second": second}
    return Outcome("drift", say_drift(drift), Table(columns, rows), f"{first}; {second}", folder, more=sides)


def say_drift(drift: Drift) -> str:
    """What a comparison shows about the user's share, in one sentence."""
    view = "without sinks" if "without sinks" in drift.views else "raw"
    share = drift.share("user", view)
    before, after = head_means(share[0]), head_means(share[1])
    return say_change("From the first side to the second", before, after, drift.layers, drift.contexts)


def needle_outcome(grid: NeedleGrid, model: str, folder: Path) -> Outcome:
    """Every score by condition, length and depth, and the paired differences from the first condition."""
    from ctxlens.cli._tables import condition_names

    names = condition_names(grid)
    first = next(iter(names))
    rows, differences = [], []
    for column in grid.scores:
        for condition, name in names.items():
            whole = grid.mean(grid.recall(column, condition=condition))
            rows.append([column, name, None, None, *interval_cells(whole)])
            at = grid.where(condition=condition)
            for (length, depth), part in at.frame.groupby(["context_tokens", "depth_percent"]):
                one = at.mean(part.groupby("cell")[column].mean().dropna())
                rows.append([column, name, length, depth, *interval_cells(one)])
            if condition != first:
                pair = grid.compare({"condition": first}, {"condition": condition}, column=column)
                cells = [*interval_cells(pair.difference), pair.p_value, pair.reading]
                differences.append([column, names[first], name, *cells])
    table = Table(("score", "condition", "context_tokens", "depth_percent", "mean", *INTERVAL), rows)
    columns = ("score", "first", "second", "difference", *INTERVAL, "p_value", "reading")
    tables = {"differences": Table(columns, differences)}
    return Outcome("needle", say_needles(grid), table, model, folder, tables)


def say_needles(grid: NeedleGrid) -> str:
    """What a needle grid shows, in one sentence about its first score."""
    from ctxlens.cli._tables import condition_names

    names = condition_names(grid)
    if not grid.scores:
        return "No answer could be scored."
    column, first = grid.scores[0], next(iter(names))
    what = column.replace("_", " ")
    if len(names) == 1:
        mean = grid.mean(grid.recall(column, condition=first))
        return f"The mean {what} with {names[first]} is {say_interval(mean)}."
    condition = next(name for name in names if name != first)
    pair = grid.compare({"condition": first}, {"condition": condition}, column=column)
    return (
        f"With {names[condition]} the {what} differs from that with {names[first]} by "
        f"{say_interval(pair.difference)}: {pair.reading}."
    )


def heads_outcome(run: Run, model: str) -> Outcome:
    """Every head of every map with its interval; the curves as a further table."""
    import pandas as pd

    from ctxlens.results import HeadCurves, HeadMap

    maps = [HeadMap.load(path) for path in sorted(run.folder.glob("map-*.safetensors"))]
    frames = [one.to_frame().assign(kind=one.kind) for one in maps]
    names = ["kind", "layer", "head", "value", "low", "high"]
    table = table_of(pd.concat(frames)[names]) if frames else Table(tuple(names), [])
    curves = []
    for path in sorted(run.folder.glob("curves-*.parquet")):
        one = HeadCurves.load(path)
        for ranking in dict.fromkeys(one.frame["ranking"]):
            action = one.meta.get("action")
            curves += [[action, ranking, k, *interval_cells(at)] for k, at in one.points(ranking)]
    tables = {"curves": Table(("action", "ranking", "k", "effect", *INTERVAL), curves)} if curves else {}
    return Outcome("heads", say_heads(maps), table, model, run.folder, tables)


def say_heads(maps: Sequence[Any]) -> str:
    """Which head comes first in each map, in one sentence."""
    if not maps:
        return "No map was made; the curves and the sweep are in the run folder."
    firsts = []
    for one in maps:
        at = one.ranking(ascending=one.kind in ("zero", "mean", "blind"))[0]
        firsts.append(f"{at[0]}.{at[1]} by {one.kind} ({one.values[at]:+.3f})")
    return f"The first {'head is' if len(firsts) == 1 else 'heads are'} {', '.join(firsts)}."


def answers_outcome(
    verb: str, answers: Mapping[str, Sequence[str]], model: str, folder: Path | None = None, **more: Any
) -> Outcome:
    """Answers by conversation and condition."""
    rows = [
        [number, condition, answer] for condition, given in answers.items()
        for number, answer in enumerate(given)
    ]  # fmt: skip
    summary = more.pop("summary", None) or f"{count(len(rows), 'answer')}."
    return Outcome(verb, summary, Table(("conversation", "condition", "answer"), rows), model, folder, **more)


def roles_outcome(chats: Sequence[RenderedChat], model: str) -> Outcome:
    """One row per token with its role."""
    from ctxlens.chat.roles import Role

    rows = []
    for number, chat in enumerate(chats):
        values = zip(chat.token_strings(), chat.tokens, chat.role, chat.turn, strict=True)
        for position, (text, token, role, turn) in enumerate(values):
            named = None if turn < 0 else int(turn)
            rows.append([number, position, text, int(token), Role(int(role)).label, named])
    table = Table(("conversation", "position", "text", "token", "role", "turn"), rows)
    chats_said = count(len(chats), "conversation")
    return Outcome("roles", f"{chats_said}, {count(len(rows), 'token')}.", table, model)


def records_outcome(
    verb: str, records: Sequence[Mapping[str, Any]], summary: str, model: str | None, folder: Path | None,
    **tables: Table,
) -> Outcome:  # fmt: skip
    """A table of mappings; a nested mapping with an interval gives a column for each of its values."""
    flat = [_flatten(record) for record in records]
    columns = tuple(dict.fromkeys(key for record in flat for key in record))
    rows = [[record.get(key) for key in columns] for record in flat]
    return Outcome(verb, summary, Table(columns, rows), model, folder, tables)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}_")
        elif hasattr(value, "as_dict"):
            flat |= _flatten(value.as_dict(), f"{prefix}{key}_")
        else:
            flat[prefix + key] = value
    return flat
