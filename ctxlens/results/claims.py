"""The five claims of the paper, each tested on measured results by a rule fixed in advance.

The rules are constants of this module and are printed beside every verdict. A claim about a direction is
*supported* when the whole 95 % interval lies on the claimed side of zero, *not supported* when the whole
interval lies on the other side or closer to zero than `MARGIN`, and *inconclusive* otherwise, or with fewer
than `MIN_UNITS` independent units. A claim with several parts is supported when all parts are, and not
supported when one part is not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ctxlens.chat.roles import Role
from ctxlens.results.arrays import SINKS_NOT_MEASURED, RoleAllocation
from ctxlens.results.scores import Scores
from ctxlens.results.tables import Ability, NeedleGrid, Selection
from ctxlens.results.verdicts import Verdict
from ctxlens.stats import Interval, auroc_interval, bootstrap_mean, paired_difference

MARGIN = 0.02
"""Differences smaller than this (in recall or share, 0 to 1) count as no difference."""
ABILITY_TOLERANCE = 0.03
"""How far closed-book recall may fall below the vanilla model's and still count as unharmed."""
RECALL_LOSS = 0.25
"""The report calls a loss large if the whole interval shows a fall of at least this much (recall, 0 to 1)."""
MIN_UNITS = 10
"""With fewer independent units than this, every verdict is inconclusive."""

PAPERS_FIGURE = "paper's figure, sinks counted"
"""Begins the notes with a figure that the paper computes in another way than the verdict's."""

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"

RULES: Mapping[str, str] = {
    "loss": "Supported if the fine-tuned model's recall with template is below its recall without (whole "
    "interval), and falls by more than the base model's does (whole interval of the difference).",
    "role bias": "Shares are taken without the template's tokens and without attention sinks. Supported if "
    "the template takes attention from the user's tokens in the fine-tuned model (whole interval below 0), "
    "and more than in the base model (whole interval).",
    "cause": "α is chosen on one half of the cells. Supported if steering all heads to the user's tokens "
    "raises recall on the other half (whole interval above 0), and steering the retrieval heads raises it by "
    "more than steering as many random heads (whole interval above 0).",
    "source": "Supported if the chosen turns are context-dependent more often than all turns are (whole "
    "interval of precision minus base rate above 0), and the score ranks them above turns that have a "
    "document but are answered from memory (AUROC, whole interval above 0.5).",
    "cure": "Supported if recall with template and indicator is above the vanilla model's with template "
    f"(whole interval above 0), and closed-book recall is not lower by more than {ABILITY_TOLERANCE}.",
}  # fmt: skip


_WITH_SINKS = "Attention sinks were not measured here, so they count."


def judge(difference: Interval, *, direction: int, margin: float = MARGIN) -> str:
    """Verdict on a difference that is claimed to be positive (`direction` 1) or negative (-1).

    A difference that is surely smaller than `margin` in the claimed direction does not support the claim.

    Raises:
        ValueError: another direction, which would scale the interval against `MARGIN`.
    """
    if direction not in (1, -1):
        raise ValueError(f"a claim's direction is 1 or -1, got {direction}.")
    low, high = sorted((direction * difference.low, direction * difference.high))
    if difference.n < MIN_UNITS or math.isnan(low) or math.isnan(high):
        return INCONCLUSIVE
    if low > 0:
        return SUPPORTED
    return NOT_SUPPORTED if high < margin else INCONCLUSIVE


def combine(parts: Iterable[str]) -> str:
    """Verdict on a claim that is supported only if all its parts are."""
    parts = list(parts)
    if NOT_SUPPORTED in parts:
        return NOT_SUPPORTED
    return SUPPORTED if all(part == SUPPORTED for part in parts) else INCONCLUSIVE


def claim_loss(grid: NeedleGrid, *, base: str = "base", tuned: str = "vanilla") -> Verdict:
    """Claim 1: after fine-tuning, recall falls when the template is applied to the same weights.

    Args:
        grid: cells of both models in `plain+prefix` and `template+prefix`, unsteered.
        base: name of the base model in the grid.
        tuned: name of the fine-tuned model.
    """
    known = conflicting(grid)
    plain, template = (_recall(known, tuned, condition) for condition in ("plain+prefix", "template+prefix"))
    base_plain, base_template = (
        _recall(known, base, condition) for condition in ("plain+prefix", "template+prefix")
    )
    fall = known.difference(plain, template)
    excess = known.difference(base_template - base_plain, template - plain)
    notes = (
        (f"{base}, no template: recall", known.mean(base_plain)),
        (f"{base}, template: recall", known.mean(base_template)),
        (f"{tuned}, no template: recall", known.mean(plain)),
        (f"{tuned}, template: recall", known.mean(template)),
        (f"change of {tuned} minus change of {base}", excess),
    )
    size = "a large" if fall.high <= -RECALL_LOSS else "a measurable" if fall.high < 0 else "no clear"
    return Verdict(
        "loss",
        f"With the chat template, the fine-tuned model finds {_points(fall)} of the needle's words "
        f"than the same weights find without it: {size} loss of context.",
        fall,
        "recall with template minus without, fine-tuned model, paired by cell",
        RULES["loss"],
        combine([judge(fall, direction=-1), judge(excess, direction=-1)]),
        notes,
    )


def claim_role_bias(
    tuned_plain: RoleAllocation,
    tuned_template: RoleAllocation,
    base_plain: RoleAllocation,
    base_template: RoleAllocation,
    *,
    contexts: Collection[Any] | None = None,
) -> Verdict:
    """Claim 2: with the template, attention moves from the user's tokens to the assistant's.

    All four allocations are of the same conversations in the same order. Shares are renormalised without
    template tokens and attention sinks, and averaged over layers and heads, with one value per conversation.
    The paper's figure, in which sinks count, stands beside it. Allocations without measured sinks are judged
    by the paper's figure, and the verdict says so. `contexts` says which conversations share a text
    (`NeedleGrid.contexts`); intervals are computed over texts.
    """
    tuned, base = (tuned_plain, tuned_template), (base_plain, base_template)
    measured = all(one.resting is not None for one in (*tuned, *base))
    view = "renormalised without sinks" if measured else "renormalised"

    def change(pair: Collection[RoleAllocation], role: Role, view: str) -> Interval:
        return paired_difference(*(_mean_share(one, role, view) for one in pair), clusters=contexts)

    def excess(view: str) -> Interval:
        user = [_mean_share(one, Role.USER, view) for one in (*base, *tuned)]
        return paired_difference(user[1] - user[0], user[3] - user[2], clusters=contexts)

    shift, beyond = change(tuned, Role.USER, view), excess(view)
    heads = tuned_plain.retrieval_heads()
    followed = [_followed_share(one, heads, view) for one in tuned]
    whose = "without template and sinks" if measured else "renormalised"
    notes = [
        ("change of the fine-tuned model minus change of the base", beyond),
        (f"assistant's share, {whose}: change", change(tuned, Role.ASSISTANT, view)),
        ("user's share, raw (template tokens counted): change", change(tuned, Role.USER, "raw")),
        (f"retrieval heads' user share, {whose}: change", paired_difference(*followed, clusters=contexts)),
        (
            "template's own share, raw",
            bootstrap_mean(_mean_share(tuned[1], Role.TEMPLATE), clusters=contexts),
        ),
    ]
    verdict = _judge_shift(shift, beyond)
    if measured:
        paper = change(tuned, Role.USER, "renormalised"), excess("renormalised")
        notes[1:1] = [
            (f"{PAPERS_FIGURE}: user's share, renormalised", paper[0]),
            (f"{PAPERS_FIGURE}: change of the fine-tuned model minus change of the base", paper[1]),
            ("user's share, without sinks (template tokens counted): change",
             change(tuned, Role.USER, "without sinks")),
        ]  # fmt: skip
        beside = (
            f"without attention sinks. By the paper's figure, which counts sinks, it gives them "
            f"{_points(paper[0])} (verdict: {_judge_shift(*paper)})."
        )
    else:
        beside = f"renormalised as in the paper, attention sinks included: {SINKS_NOT_MEASURED}."
    return Verdict(
        "role bias",
        f"At the answer, the fine-tuned model gives the user's tokens {_points(shift)} of its attention when "
        f"the template is applied (mean over layers and heads), {beside}",
        shift,
        f"user share {whose}, with template minus without, paired by conversation",
        RULES["role bias"] if measured else f"{RULES['role bias']} {_WITH_SINKS}",
        verdict,
        tuple(notes),
    )


def _judge_shift(shift: Interval, beyond: Interval) -> str:
    """The verdict on role bias from the change of the user's share and its excess over the base model's."""
    return combine([judge(shift, direction=-1), judge(beyond, direction=-1)])


def claim_cause(sweep: NeedleGrid, *, ability: Mapping[float, Ability] | None = None) -> Verdict:
    """Claim 3: steering attention back to the user's tokens raises recall, at a cost.

    Args:
        sweep: cells with template at several α; `heads` is `all`, `retrieval` or `random` (several
            draws); rows with α = 1 are the unsteered model. α is chosen on the even cells and judged on
            the odd ones.
        ability: closed-book answers under steering of all heads, by α.
    """
    known = conflicting(sweep)
    unsteered = known.where(alpha=1.0).recall()
    choose, judged = unsteered.index % 2 == 0, unsteered.index % 2 == 1
    alphas = sorted(set(known.frame["alpha"]) - {1.0})

    def gain(heads: str, alpha: float):
        return known.where(heads=heads, alpha=alpha).recall().reindex(unsteered.index) - unsteered

    best = {h: max(alphas, key=lambda a: gain(h, a)[choose].mean()) for h in ("all", "retrieval")}
    all_gain = known.mean(gain("all", best["all"])[judged])
    over_random = known.difference(
        gain("random", best["retrieval"])[judged], gain("retrieval", best["retrieval"])[judged]
    )
    memory = known.where(heads="all", alpha=best["all"]).recall("memory_recall").reindex(unsteered.index)
    notes = [
        ("retrieval heads' gain at their α", known.mean(gain("retrieval", best["retrieval"])[judged])),
        ("random heads' gain at the same α", known.mean(gain("random", best["retrieval"])[judged])),
        ("retrieval minus random", over_random),
        ("answers from memory: change with all heads", known.mean(
            (memory - known.where(alpha=1.0).recall("memory_recall"))[judged])),
    ]  # fmt: skip
    if ability and 1.0 in ability and best["all"] in ability:
        cost = paired_difference(ability[1.0].frame["recall"], ability[best["all"]].frame["recall"])
        notes.append(("closed-book recall: change with all heads", cost))
    return Verdict(
        "cause",
        f"Steering all heads to the user's tokens (α = {best['all']:g}, chosen on other cells) makes the "
        f"model find {_points(all_gain)} of the needle's words under the template.",
        all_gain,
        "recall steered minus unsteered, paired by cell, on cells not used to choose α",
        RULES["cause"],
        combine([judge(all_gain, direction=1), judge(over_random, direction=1)]),
        tuple(notes),
    )


def claim_source(scores: Scores, selection: Selection) -> Verdict:
    """Claim 4: an attention score distinguishes the context-dependent turns of a data set from the others.

    Args:
        scores: scores with the true `kind` of every turn (`document`, `memory`, `closed`).
        selection: the chosen turns, made from one layer and reduction of these scores.
    """
    layer, reduction = selection.meta["layer"], selection.meta["reduction"]
    rows = scores.frame[scores.frame["layer"] == layer].reset_index(drop=True)
    turns = list(zip(rows["conversation"].astype(str), rows["turn"].astype(int), strict=True))
    chosen = np.array([turn in selection.turns for turn in turns])
    true = (rows["kind"] == "document").to_numpy()
    conversations = rows["conversation"].to_numpy()
    precision = bootstrap_mean(true[chosen], clusters=conversations[chosen])
    recall = bootstrap_mean(chosen[true], clusters=conversations[true])
    base_rate = float(true.mean()) if len(true) else float("nan")
    over_base = _shifted(precision, -base_rate)
    values = rows[reduction].to_numpy(float)
    against_all = auroc_interval(values[true], values[~true])
    hard = (rows["kind"] == "memory").to_numpy()
    against_memory = auroc_interval(values[true], values[hard])
    return Verdict(
        "source",
        f"{chosen.mean():.0%} of the turns score above the threshold; {precision.estimate:.0%} of these are "
        f"truly answered from the context, where {base_rate:.0%} of all turns are.",
        over_base,
        "precision of the selection minus the base rate",
        RULES["source"],
        combine([judge(over_base, direction=1), judge(_shifted(against_memory, -0.5), direction=1)]),
        (
            ("precision of the selection", precision),
            ("recall of the selection", recall),
            ("AUROC against all other turns", against_all),
            ("AUROC against turns with a document answered from memory", against_memory),
        ),
    )


def claim_cure(
    grid: NeedleGrid,
    ability: Ability,
    *,
    vanilla: str = "vanilla",
    cured: str = "indicator",
) -> Verdict:
    """Claim 5: fine-tuning with the indicator restores context use when the user asks for it.

    Args:
        grid: cells of both models with template, the cured one with and without the indicator.
        ability: closed-book answers of both models, without indicator.
        vanilla: name of the model fine-tuned without indicator.
        cured: name of the model fine-tuned with it.
    """
    known = conflicting(grid)
    before = known.where(model=vanilla, condition="template+prefix", indicator=False).recall()
    plain = known.where(model=vanilla, condition="plain+prefix", indicator=False).recall()
    asked = known.where(model=cured, condition="template+prefix", indicator=True).recall()
    unasked = known.where(model=cured, condition="template+prefix", indicator=False).recall()
    gain = known.difference(before, asked)
    loss = float((plain - before).mean())
    answers = [ability.where(model=name, indicator=False).frame for name in (vanilla, cured)]
    paired = answers[0].merge(answers[1], on="question", suffixes=("_vanilla", "_cured"))
    cost = paired_difference(paired["recall_vanilla"], paired["recall_cured"])
    level = cost.estimate >= -ABILITY_TOLERANCE
    notes = [
        ("recall with indicator", known.mean(asked)),
        ("trained with the indicator, asked without it: change from vanilla",
         known.difference(before, unasked)),
        ("closed-book recall: change", cost),
    ]  # fmt: skip
    if loss > MARGIN:
        restored = Interval(gain.estimate / loss, gain.low / loss, gain.high / loss, gain.n)
        notes.insert(0, ("share of the loss restored", restored))
    return Verdict(
        "cure",
        f"Trained with the indicator and asked with it, the model finds {_points(gain)} of the needle's "
        "words than the vanilla model under the same template.",
        gain,
        "recall with indicator minus vanilla, both with template, paired by cell",
        RULES["cure"],
        combine([judge(gain, direction=1), SUPPORTED if level else NOT_SUPPORTED]),
        tuple(notes),
    )


def conflicting(grid: NeedleGrid) -> NeedleGrid:
    """The cells in which memory and context disagree; all cells if no needle has a memorised counterpart."""
    frame = grid.frame
    known = frame["memory_recall"].notna()
    return NeedleGrid(frame[known].reset_index(drop=True), grid.meta) if known.any() else grid


def _recall(grid: NeedleGrid, model: str, condition: str):
    return grid.where(model=model, condition=condition, indicator=False, alpha=1.0).recall()


def _mean_share(allocation: RoleAllocation, role: Role, view: str = "raw") -> np.ndarray:
    return np.nanmean(allocation.share(role, view=view), axis=(0, 1))


def _followed_share(allocation: RoleAllocation, heads: np.ndarray, view: str) -> np.ndarray:
    share = allocation.share(Role.USER, view=view)
    return np.nanmean(share[np.arange(len(heads)), heads], axis=0)


def _shifted(interval: Interval, by: float) -> Interval:
    return Interval(interval.estimate + by, interval.low + by, interval.high + by, interval.n)


def _points(difference: Interval) -> str:
    if math.isnan(difference.estimate):
        return "no measured share"
    word = "more" if difference.estimate >= 0 else "less"
    return f"{abs(difference.estimate) * 100:.0f} percentage points {word}"
