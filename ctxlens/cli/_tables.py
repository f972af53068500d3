"""Print results as small tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.cli._output import few_note, say_interval, show_interval
from ctxlens.cli._screen import note, say_wrapped, show_lines, show_table

if TYPE_CHECKING:
    from ctxlens.results import Evaluation, NeedleGrid, RoleAllocation, Selection

_ALWAYS = ("bos", "sink")
NO_SINKS = "the view without sinks is not available: sinks were not measured in this result"
NOTHING_LEFT = "–: all attention rests on sinks, so that nothing is left without them"


def list_roles(shown: Sequence[str]) -> list[str]:
    """The roles of a table of shares, in the order of `Role`: those shown, and always `bos` and `sink`."""
    from ctxlens.chat.roles import ROLE_LABELS

    return [role for role in ROLE_LABELS if role in shown or role in _ALWAYS]


def show_share(share: Any) -> str:
    """A share (of Python or numpy) with three digits, or a dash where there is none."""
    return "–" if share != share else f"{share:.3f}"


def mean_share(shares: Any) -> float:
    """The mean of an array without NaN; NaN if nothing else is there."""
    import numpy as np

    known = shares[~np.isnan(shares)]
    return float(known.mean()) if known.size else float("nan")


def show_allocation(plain: RoleAllocation, template: RoleAllocation) -> None:
    """Print the user's mean share by layer, without sinks and as in the paper, and who gets the rest."""
    pair = (plain, template)
    measured = all(one.resting is not None for one in pair)
    views = {"without sinks": "", "renormalised": "*"} if measured else {"renormalised": "*"}
    heads = plain.retrieval_heads()
    rows = []
    for i, layer in enumerate(plain.layers):
        shares = [mean_share(one.share("user", view=view)[i]) for view in views for one in pair]
        followed = [one.share("user")[i, heads[i]].mean() for one in pair]
        rows.append([str(layer), *map(show_share, shares), str(heads[i]), *map(show_share, followed)])
    if len(rows) > 1:
        means = [mean_share(one.share("user", view=view)) for view in views for one in pair]
        layers = range(len(plain.layers))
        kept = [mean_share(one.share("user")[layers, heads]) for one in pair]
        rows.append(["mean", *map(show_share, means), "", *map(show_share, kept)])
    columns = [f"{name}{mark}" for mark in views.values() for name in ("plain", "templ.")]
    show_table(
        f"attention to the user, mean over {plain.shares.shape[1]} heads, "
        f"{plain.shares.shape[2]} conversations",
        ["layer", *columns, "head", "plain", "templ."],
        rows,
    )
    if measured:
        note("plain, templ.: attention sinks left out; template tokens count")
    else:
        note(NO_SINKS)
    note("*: as in the paper, renormalised without template tokens; attention sinks count")
    note("head: the head that attends most to the user without template, and its raw user shares")
    if any("–" in row for row in rows):
        note(NOTHING_LEFT)
    _show_roles(template)


def _show_roles(template: RoleAllocation) -> None:
    """Print the raw shares of all roles with template by layer, with what rests on sinks apart."""
    from ctxlens.report.plots.allocation import shown_roles

    measured = template.resting is not None
    seen = template.with_sinks_apart() if measured else template
    roles, several = list_roles(shown_roles([seen])), len(template.layers) > 1
    show_table(
        "raw shares with template" + (", attention sinks apart" if measured else ""),
        ["layer", *roles],
        [
            [str(layer), *(show_share(mean_share(seen.share(role)[i])) for role in roles)]
            for i, layer in enumerate(template.layers)
        ]
        + ([["mean", *(show_share(mean_share(seen.share(role))) for role in roles)]] if several else []),
    )
    if measured:
        note("sink: attention sinks of any role, such as the first token or BOS, and learned sinks")


def show_shares(before: RoleAllocation, after: RoleAllocation) -> None:
    """Print the user's mean share by layer without and with steering, without sinks and raw."""
    measured = before.resting is not None and after.resting is not None
    views = (*(("without sinks",) if measured else ()), "raw")
    rows = [
        [str(layer), *(show_share(mean_share(one.share("user", view=view)[i])) for view in views
                       for one in (before, after))]
        for i, layer in enumerate(before.layers)
    ]  # fmt: skip
    if len(rows) > 1:
        means = [mean_share(one.share("user", view=view)) for view in views for one in (before, after)]
        rows.append(["mean", *map(show_share, means)])
    names = [f"{side}{', raw' if view == 'raw' and measured else ''}" for view in views
             for side in ("unsteered", "steered")]  # fmt: skip
    title = "share of attention to the user's tokens" + (", without sinks and raw" if measured else "")
    show_table(title, ["layer", *names], rows)
    if not measured:
        note(NO_SINKS)


def show_answers(record: Mapping[str, Any]) -> None:
    """Print answers without and with steering side by side."""
    steering = record["meta"]["steering"]
    names = {"alpha": "α", "target_share": "user's share"}
    strength = ", ".join(f"{name} = {steering[key]:g}" for key, name in names.items() if key in steering)
    rows = [[answer["unsteered"], answer["steered"]] for answer in record["answers"]]
    show_table("answers, one conversation per row", ["unsteered", f"steered, {strength}"], rows, texts=True)


_SCORES = {
    "recall": "needle recall",
    "contains": "answers that contain the needle word for word",
    "needle_logprob": "log-probability of the needle, nats per token",
}


def show_needles(grid: NeedleGrid) -> None:
    """Print each score by condition with its interval, paired differences, and failures."""
    names = condition_names(grid)
    wholes = [grid.mean(grid.recall(column)) for column in grid.scores]
    for column in grid.scores:
        contexts = grid.mean(grid.recall(column, condition=next(iter(names)))).n
        show_table(
            f"{_SCORES[column]}: {grid.frame['cell'].nunique()} cells, 95 % intervals over "
            f"{contexts} {'context' if contexts == 1 else 'contexts'}",
            ["condition", "mean", *(("difference", "reading") if len(names) > 1 else ())],
            _needle_rows(grid, column, names),
        )
    if len(names) > 1:
        first = next(iter(names.values()))
        note(f"difference: minus {first}, paired by cell; p is that of a sign-flip test over contexts")
    if few := few_note(wholes):
        note(few)
    if any(built != length for length, built in grid.built_lengths.items()):
        lengths, built = (", ".join(map(str, some)) for some in zip(*grid.built_lengths.items(), strict=True))
        note(f"contexts have {built} tokens on average; {lengths} were requested")
    if len(failed := grid.failed):
        reason, count = Counter(failed["error"]).most_common(1)[0]
        note(f"{len(failed)} of {len(grid)} answers failed and are left out ({count} times: {reason})")
    if len(silent := grid.silent):
        note(f"{len(silent)} of {len(grid)} answers are empty; they count as recall 0")


def condition_names(grid: NeedleGrid) -> dict[str, str]:
    """The full name of every value of the column `condition`, with the run's indicator and steering."""
    from ctxlens.report.plots.needle import needle_panels

    return {panel.key["condition"]: panel.condition for panel in needle_panels(grid)}


def _needle_rows(grid: NeedleGrid, column: str, names: Mapping[str, str]) -> list[list[str]]:
    """One row per condition: its mean and, for all but the first, the difference from the first."""
    first = next(iter(names))
    rows = []
    for condition, name in names.items():
        row = [name, show_interval(grid.mean(grid.recall(column, condition=condition)))]
        if condition != first:
            pair = grid.compare({"condition": first}, {"condition": condition}, column=column)
            p = f", p {_chance(pair.p_value)}" if pair.reading in ("higher", "lower") else ""
            row += [show_interval(pair.difference), pair.reading + p]
        elif len(names) > 1:
            row += ["", ""]
        rows.append(row)
    return rows


_READINGS = {"no difference shown": "no diff. shown"}


_FAULTS = {
    "truncated": "prompts were truncated",
    "empty": "answers are empty",
    "cut": "answers were cut off at their longest",
}


def show_evaluation(evaluation: Evaluation) -> None:
    """Print every metric by task, model and condition, with paired differences from the first variant."""
    from ctxlens.report.empties import explain_empties

    models, conditions = ({variant[i] for variant in evaluation.variants} for i in (0, 1))
    compared = len(evaluation.variants) > 1
    head = ["", "mean", "difference", "reading", "McNemar"][: 5 if compared else 2]
    lines = [
        line if isinstance(line, str) else line[: len(head)]
        for line in _evaluation_lines(evaluation, len(models) > 1, len(conditions) > 1)
    ]
    common = [one for names in (models, conditions) if len(names) == 1 for one in names]
    show_lines(", ".join(["evaluation", *common]), head, lines)
    say_wrapped([say_evaluation(evaluation)])
    if compared:
        note(f"difference: minus {', '.join(evaluation.variants[0])}, paired by example; interval and")
        note("sign-flip test over the texts of the questions; McNemar: exact p over examples")
    for column, what in _FAULTS.items():
        if column in evaluation.frame and (count := int(evaluation.frame[column].sum())):
            note(f"{count} of {len(evaluation)} {what}")
    if sentence := explain_empties(evaluation):
        note(sentence)
    for one in evaluation.meta["left_out"]:
        note(f"left out: {one['model']}, {one['condition']}: {one['reason']}")


def _evaluation_lines(
    evaluation: Evaluation, many_models: bool, many_conditions: bool
) -> Iterator[str | list[str]]:
    """A heading for every task and metric, one for every model if needed, and a row for every variant."""
    from ctxlens.report.empties import describe_faults

    examples = evaluation.frame.groupby("task")["example"].nunique()
    heading, model_heading = None, None
    for task, metric, variant in evaluation.rows():
        model, condition = variant
        if (task, metric) != heading:
            is_new = heading is None or heading[0] != task
            heading, model_heading = (task, metric), None
            yield f"{task}: {metric}, {_count(int(examples[task]), 'example')}"
            if is_new:
                yield from (f"  {line}" for line in describe_faults(evaluation, task))
        if many_models and many_conditions and model != model_heading:
            model_heading = model
            yield f" {model}"
        row = [f"  {condition if many_conditions or not many_models else model}"]
        row.append(show_interval(evaluation.mean(task, metric, variant)))
        is_first = variant == evaluation.variants[0]
        yield row + (["", "", ""] if is_first else _compared(evaluation, task, metric, variant))


def _compared(evaluation: Evaluation, task: str, metric: str, variant: Any) -> list[str]:
    first = evaluation.variants[0]
    pair = evaluation.compare(task, metric, first, variant)
    if not pair.pairs:
        return ["–", "no pairs", ""]
    reading, test = _READINGS.get(pair.reading, pair.reading), ""
    if reading in ("higher", "lower"):
        reading += ", p " + _chance(pair.p_value)
    if evaluation.is_binary(task, metric):
        test = _chance(evaluation.mcnemar(task, metric, first, variant).p_value)
    return [show_interval(pair.difference), reading, test]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say_evaluation(evaluation: Evaluation) -> str:
    """What an evaluation shows, in one sentence about its first task and metric."""
    task, metric, first = next(iter(evaluation.rows()))
    others = [one for one in evaluation.variants if one != first]
    if not others:
        mean = evaluation.mean(task, metric, first)
        return f"The mean {metric} in {task} with {', '.join(first)} is {say_interval(mean)}."
    pair = evaluation.compare(task, metric, first, others[0])
    if not pair.pairs:
        return f"In {task}, {', '.join(first)} and {', '.join(others[0])} share no example."
    return (
        f"In {task} the {metric} with {', '.join(others[0])} differs from that with {', '.join(first)} by "
        f"{say_interval(pair.difference)}: {pair.reading}."
    )


def _chance(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def score_records(path: Path, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Quantiles, threshold and shares above it of the scores, by layer and for the mean of the layers."""
    import numpy as np

    from ctxlens.results.scores import read_values
    from ctxlens.stats import mixture_threshold

    values = read_values(path, "mean_of_best")
    columns = [(int(layer), score) for layer, score in zip(meta["layers"], values.T, strict=True)]
    found = []
    for layer, score in [*columns, *([("mean", values.mean(1))] if len(columns) > 1 else [])]:
        low, median, high = np.quantile(score, (0.1, 0.5, 0.9))
        beta = mixture_threshold(score)
        found.append(
            {
                "layer": layer, "answers": len(score), "quantile_10": low, "median": median,
                "quantile_90": high, "beta": beta, "above_beta": (score > beta).mean(),
                "above_0.6": (score > 0.6).mean(),
            }
        )  # fmt: skip
    return found


def say_scores(path: Path, meta: Mapping[str, Any]) -> str:
    """What the scores show, in one sentence about the highest layer that was scored."""
    records = [one for one in score_records(path, meta) if one["layer"] != "mean"]
    if not records or not records[-1]["answers"]:
        return "No answer was scored."
    last = records[-1]
    return (
        f"In layer {last['layer']} half of the {last['answers']:,} answers score above {last['median']:.2f}, "
        f"and {last['above_beta']:.0%} above the estimated threshold of {last['beta']:.2f}."
    )


def show_scores(path: Path, meta: Mapping[str, Any], skipped: Sequence[Mapping[str, str]]) -> None:
    """Print the distribution of the scores by layer, and what was truncated, skipped or dropped."""
    records = score_records(path, meta)
    rows = []
    for one in records:
        spread = [f"{one[key]:.2f}" for key in ("quantile_10", "median", "quantile_90", "beta")]
        rows.append([str(one["layer"]), *spread, *(f"{one[key]:.0%}" for key in ("above_beta", "above_0.6"))])
    done = meta["conversations"] - len(meta["skipped"])
    show_table(
        f"scores (mean_of_best) of {records[0]['answers'] if records else 0} answers in {done} conversations",
        ["layer", "10 %", "median", "90 %", "β (mixture)", "above β", "above 0.6"],
        rows,
    )
    say_wrapped([say_scores(path, meta)])
    read = meta["conversations"] + meta["data"]["rows_left_out"]
    note(f"{read} rows read (layout {meta['data']['layout']}): {done} kept, {read - done} skipped")
    note(f"{meta['truncated']} conversations truncated to {meta['max_tokens']} tokens")
    for reason, count in Counter(entry["reason"] for entry in skipped).most_common(8):
        note(f"{count} skipped: {reason}")
    for reason, count in meta["data"]["turns_dropped"].items():
        note(f"{count} turns dropped: {reason}")
    _note_reading(meta.get("left_out", {}), meta["data"].get("noted", {}))


def show_selection(selection: Selection) -> None:
    """Print the threshold, the rule behind it, and how many answers it selected."""
    meta = selection.meta
    chosen = f"{meta['selected']} of {meta['turns']} ({meta['selected'] / max(1, meta['turns']):.1%})"
    threshold, layer = meta["threshold"], meta["layer"]
    row = [chosen, "by length" if threshold is None else f"{threshold:.3f}"]
    row += ["–" if layer is None else str(layer), meta["reduction"]]
    show_table("context-dependent answers", ["selected", "β", "layer", "reduction"], [row])
    note(f"rule: {meta['rule']}")
    if not meta["selected"]:
        highest = selection.frame["score"].max()
        note(f"warning: nothing was selected; the highest score is {highest:.3f}")
    elif meta["selected"] == meta["turns"]:
        note("warning: everything was selected; a model learns nothing from an indicator on every answer")


def training_records(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Steps, seconds, losses and counts of a finished training as names and values, and one sentence."""
    import json

    log = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in log["log"]]
    values = {"steps": log["steps"], "wall_seconds": log["wall_seconds"]}
    values |= {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
    records = [{"name": name, "value": value} for name, value in {**values, **log["counts"]}.items()]
    fell = f" The loss went from {losses[0]:.3f} to {losses[-1]:.3f}." if losses else ""
    return records, f"{log['steps']} optimizer steps in {log['wall_seconds']:.0f} s.{fell}"


def show_training(folder: Path) -> None:
    """Print steps, loss and counts of a finished training."""
    import json

    from ctxlens.runs import MANIFEST

    log = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in log["log"]]
    rows = [["optimizer steps", str(log["steps"])], ["wall seconds", f"{log['wall_seconds']:.0f}"]]
    rows += [["loss, first and last logged", f"{losses[0]:.3f} → {losses[-1]:.3f}"]] if losses else []
    rows += [[name.replace("_", " "), str(value)] for name, value in log["counts"].items()]
    show_table("training", ["", ""], rows)
    note_rows(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("rows") or {})
    for reason, count in Counter(entry["reason"] for entry in log["skipped"]).most_common(8):
        note(f"{count} skipped: {reason}")
    _note_reading(log.get("left_out", {}), log.get("noted", {}))


def _note_reading(left_out: Mapping[str, int], noted: Mapping[str, int]) -> None:
    """Print what the chat template leaves out, and what was read in another way than the data have it."""
    from ctxlens.chat.roles.left_out import describe_left_out

    for line in describe_left_out(left_out):
        note(line)
    for what, count in noted.items():
        note(f"{count} {what}")


def note_rows(counts: Mapping[str, Any]) -> None:
    """Print how many rows of a data set were read, kept and skipped; see `describe_reading`."""
    if "rows_read" in counts:
        read, kept, skipped = (counts[key] for key in ("rows_read", "rows_kept", "rows_skipped"))
        note(f"{read} rows read (layout {counts['layout']}): {kept} kept, {skipped} skipped")


def show_evaluations(folder: Path) -> None:
    """Print recall before and after training, for every evaluation in the folder of a training.

    One heading per measure, then one row per pair of treatments; long names get a line of their own.
    """
    import json

    from ctxlens.sft.before_after import RESULT, Row

    for path in sorted(folder.glob(f"*/{RESULT}")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row.of(record) for record in (*found["rows"], *found["treatments"])]
        groups: dict[str, list[list[str]]] = {}
        for row in rows:
            if "recall" in row.measure:
                means = f"{row.found.first.estimate:.2f} → {row.found.second.estimate:.2f}"
                line = [f"  {row.first} → {row.second}", means, show_interval(row.found.difference)]
                groups.setdefault(row.measure, []).append(line)
        lines = [line for measure, group in groups.items() for line in (measure, *group)]
        show_lines(f"before and after, {path.parent.name}", ["", "means", "difference"], lines)
        note(f"table and figures are in {folder / 'README.md'} and {path.parent / 'report.html'}")


def show_verdicts(folder: Path) -> None:
    """Print the verdict on each claim with the measured value."""
    from ctxlens.results import Verdicts
    from ctxlens.results.claims import PAPERS_FIGURE

    verdicts = Verdicts.load(folder / "verdicts.json").verdicts
    rows = [
        [one.claim, one.verdict, show_interval(one.figure, unit="case"), one.quantity] for one in verdicts
    ]
    show_table("verdicts", ["claim", "verdict", "value", "what"], rows, n_labels=4)
    for verdict in verdicts:
        for what, interval in verdict.notes:
            if what.startswith(PAPERS_FIGURE):
                note(f"{verdict.claim}, {what}: {interval.format()}")
