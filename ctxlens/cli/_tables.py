"""Results as small tables on stdout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.cli._screen import note, show_lines, show_table

if TYPE_CHECKING:
    from ctxlens.results import Evaluation, NeedleGrid, RoleAllocation, Selection
    from ctxlens.stats import Interval

_ALLOCATED = ("user", "assistant", "template")


def show_allocation(plain: RoleAllocation, template: RoleAllocation) -> None:
    """Mean shares by layer without and with template; the head that reads the user most, followed."""
    import numpy as np

    heads = plain.retrieval_heads()
    after = template.renormalised()
    rows = []
    for i, layer in enumerate(plain.layers):
        without, followed = (a.share("user")[i, heads[i]].mean() for a in (plain, template))
        shares = [np.nanmean(a.share("user")[i]) for a in (plain.renormalised(), after)]
        shares += [np.nanmean(template.share(role)[i]) for role in _ALLOCATED]
        cells = [f"{share:.3f}" for share in (*shares, without, followed)]
        rows.append([str(layer), *cells[:5], str(heads[i]), *cells[5:]])
    show_table(
        f"attention by role, mean over {plain.shares.shape[1]} heads, {plain.shares.shape[2]} conversations",
        ["layer", "user*, plain", "templ.", *_ALLOCATED, "head", "plain", "templ."],
        rows,
    )
    note("user*: share of the user's tokens, renormalised without template tokens so that both compare")
    note(f"{', '.join(_ALLOCATED)}: raw shares with template")
    note("head: the head that attends most to the user without template, and its raw user share in both")


def show_shares(before: RoleAllocation, after: RoleAllocation) -> None:
    """Mean user share by layer before and after steering."""
    rows = [
        [str(layer), f"{before.share('user')[i].mean():.3f}", f"{after.share('user')[i].mean():.3f}"]
        for i, layer in enumerate(before.layers)
    ]
    show_table("share of attention on the user's tokens", ["layer", "unsteered", "steered"], rows)


def show_answers(record: Mapping[str, Any]) -> None:
    """Unsteered and steered answers side by side."""
    alpha = record["meta"]["steering"]["alpha"]
    rows = [[answer["unsteered"], answer["steered"]] for answer in record["answers"]]
    show_table("answers, one conversation a row", ["unsteered", f"steered, α = {alpha:g}"], rows, texts=True)


_SCORES = {
    "recall": "needle recall",
    "contains": "answers that hold the needle word for word",
    "needle_logprob": "log-probability of the needle, nats per token",
}


def show_needles(grid: NeedleGrid) -> None:
    """Each score by condition with its interval, paired differences from the first, and what went wrong."""
    names = grid.frame["condition"].drop_duplicates().tolist()
    for column in grid.scores:
        rows = []
        for name in names:
            mean = grid.mean(grid.recall(column, condition=name))
            row = [name, mean.format()]
            if name != names[0]:
                pair = grid.compare({"condition": names[0]}, {"condition": name}, column=column)
                row += [pair.difference.format(), pair.reading]
                if pair.reading in ("higher", "lower"):
                    row[-1] += ", p < 0.001" if pair.p_value < 0.001 else f", p = {pair.p_value:.3f}"
            elif len(names) > 1:
                row += ["", ""]
            rows.append(row)
        contexts = grid.mean(grid.recall(column, condition=names[0])).n
        show_table(
            f"{_SCORES[column]}: {grid.frame['cell'].nunique()} cells, 95 % intervals over "
            f"{contexts} contexts",
            ["condition", "mean", "difference", "reading"][: len(rows[0])],
            rows,
        )
    if len(names) > 1:
        note(f"difference: paired by cell, from {names[0]}; p of a sign-flip test over contexts")
    if len(failed := grid.failed):
        reason, count = Counter(failed["error"]).most_common(1)[0]
        note(f"{len(failed)} of {len(grid)} answers failed and are left out ({count} times: {reason})")
    if len(silent := grid.silent):
        note(f"{len(silent)} of {len(grid)} answers are without a word; they count as recall 0")


_READINGS = {"no difference shown": "no diff. shown"}


def show_evaluation(evaluation: Evaluation) -> None:
    """Every metric by task, model and condition, with paired differences from the first of these."""
    first = evaluation.variants[0]
    models, conditions = ([v[i] for v in evaluation.variants] for i in (0, 1))
    split = len(set(models)) > 1 and len(set(conditions)) > 1
    head = ["", "mean", "difference", "reading", "McNemar"][: 5 if len(models) > 1 else 2]
    n = evaluation.frame.groupby("task")["example"].nunique()
    lines: list[str | list[str]] = []
    before: tuple[str, ...] = ("", "", "")
    for task, metric, variant in evaluation.rows():
        if (task, metric) != before[:2]:
            lines.append(f"{task}: {metric}, {n[task]} example{'s' * int(n[task] != 1)}")
        if split and (task, metric, variant[0]) != before:
            lines.append(f" {variant[0]}")
        before = (task, metric, variant[0])
        label = variant[1] if len(set(models)) == 1 or split else variant[0]
        row = [f"  {label}", _interval(evaluation.mean(task, metric, variant)), "", "", ""]
        if variant != first:
            row[2:] = _compared(evaluation, task, metric, variant)
        lines.append(row[: len(head)])
    common = [names[0] for names in (models, conditions) if len(set(names)) == 1]
    show_lines(", ".join(["evaluation", *common]), head, lines)
    if len(models) > 1:
        note(f"difference: from {', '.join(first)}, paired by example; interval and sign-flip")
        note("test over the texts that are asked about; McNemar: exact p, over examples")
    for column, what in (("truncated", "prompts were cut in their middle"), ("empty", "answers are empty")):
        if count := int(evaluation.frame[column].sum()):
            note(f"{count} of {len(evaluation)} {what}")
    for one in evaluation.meta["left_out"]:
        note(f"left out: {one['model']}, {one['condition']}: {one['reason']}")


def _compared(evaluation: Evaluation, task: str, metric: str, variant: Any) -> list[str]:
    first = evaluation.variants[0]
    pair = evaluation.compare(task, metric, first, variant)
    if not pair.pairs:
        return ["–", "nothing common", ""]
    reading, test = _READINGS.get(pair.reading, pair.reading), ""
    if reading in ("higher", "lower"):
        reading += ", p " + _chance(pair.p_value)
    if evaluation.is_binary(task, metric):
        test = _chance(evaluation.mcnemar(task, metric, first, variant).p_value)
    return [_interval(pair.difference), reading, test]


def _interval(interval: Interval) -> str:
    return interval.format().replace("(too few for an interval)", "[too few]")


def _chance(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def show_scores(path: Path, meta: Mapping[str, Any], skipped: Sequence[Mapping[str, str]]) -> None:
    """Distribution of the scores in a file by layer, and what was truncated, skipped or dropped."""
    import numpy as np

    from ctxlens.results.scores import read_values
    from ctxlens.stats import mixture_threshold

    values = read_values(path, "mean_of_best")
    rows = []
    for layer, score in zip(meta["layers"], values.T, strict=True):
        spread = [f"{value:.2f}" for value in np.quantile(score, (0.1, 0.5, 0.9))]
        found = mixture_threshold(score)
        above = [f"{(score > beta).mean():.0%}" for beta in (found, 0.6)]
        rows.append([str(layer), *spread, f"{found:.2f}", *above])
    done = meta["conversations"] - len(meta["skipped"])
    show_table(
        f"scores (mean_of_best) of {len(values)} answers in {done} conversations",
        ["layer", "10 %", "median", "90 %", "β (mixture)", "above β", "above 0.6"],
        rows,
    )
    note(f"layout {meta['data']['layout']}")
    note(f"{meta['truncated']} conversations truncated to {meta['max_tokens']} tokens")
    for reason, count in Counter(entry["reason"] for entry in skipped).most_common(8):
        note(f"{count} skipped: {reason}")
    for reason, count in meta["data"]["turns_dropped"].items():
        note(f"{count} turns dropped: {reason}")


def show_selection(selection: Selection) -> None:
    """The threshold, the rule that gave it, and how much was selected."""
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
        note("warning: everything was selected; an indicator that is always there tells a model nothing")


def show_training(folder: Path) -> None:
    """Steps, loss and counts of a finished training."""
    import json

    log = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in log["log"]]
    rows = [["optimizer steps", str(log["steps"])], ["wall seconds", f"{log['wall_seconds']:.0f}"]]
    rows += [["loss, first and last logged", f"{losses[0]:.3f} → {losses[-1]:.3f}"]] if losses else []
    rows += [[name.replace("_", " "), str(value)] for name, value in log["counts"].items()]
    show_table("training", ["", ""], rows)
    for reason, count in Counter(entry["reason"] for entry in log["skipped"]).most_common(8):
        note(f"{count} skipped: {reason}")


def show_evaluations(folder: Path) -> None:
    """Recall before and after of every evaluation in a training's folder."""
    import json

    from ctxlens.sft.before_after import RESULT, Row

    for path in sorted(folder.glob(f"*/{RESULT}")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row.of(record) for record in (*found["rows"], *found["treatments"])]
        show_table(
            f"before and after, {path.parent.name}",
            ["measure", "of", "means", "difference"],
            [
                [
                    row.measure,
                    f"{row.first} → {row.second}",
                    f"{row.found.first.estimate:.2f} → {row.found.second.estimate:.2f}",
                    row.found.difference.format(),
                ]
                for row in rows
                if "recall" in row.measure
            ],
            n_labels=2,
        )
        note(f"table and figures in {folder / 'README.md'} and {path.parent / 'report.html'}")


def show_verdicts(folder: Path) -> None:
    """The verdict on each claim, with its figure."""
    from ctxlens.results import Verdicts

    verdicts = Verdicts.load(folder / "verdicts.json").verdicts
    rows = [
        [verdict.claim, verdict.verdict, verdict.figure.format(), verdict.quantity] for verdict in verdicts
    ]
    show_table("verdicts", ["claim", "verdict", "figure", "what"], rows, n_labels=4)
