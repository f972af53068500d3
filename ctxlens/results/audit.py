"""The questions of an audit, each answered from results by a rule that was fixed before any was measured.

Every answer is a `Verdict`: *supported* means yes, *not supported* no, *inconclusive* too few to tell. Texts
are the units; with fewer than `claims.MIN_UNITS` of them nothing is decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ctxlens.chat.roles import Role
from ctxlens.results.arrays import RoleAllocation
from ctxlens.results.claims import INCONCLUSIVE, MIN_UNITS, NOT_SUPPORTED, SUPPORTED, combine, judge
from ctxlens.results.heads import HeadMap
from ctxlens.results.tables import Ability, NeedleGrid
from ctxlens.results.verdicts import Verdict
from ctxlens.stats import Interval, bootstrap_mean, paired_difference

LOSS_MARGIN = 0.10
"""A fall of recall that is surely smaller than this (0 to 1) is no loss."""
BIAS_MARGIN = 0.05
"""A fall of the user's share that is surely smaller than this (0 to 1) is no bias."""
GAIN_MARGIN = 0.05
"""A gain of recall by steering that is surely smaller than this (0 to 1) is none."""
COST_MARGIN = 0.10
"""Steering is costly if it surely lowers recall without context; it costs nothing that matters if the fall is
surely smaller than this (0 to 1)."""
LEAST_RECALL = 0.2
"""Below this recall without the template (upper bound of the interval), there is nothing to lose."""

QUESTIONS: Mapping[str, str] = {
    "loss": "Does the model find less in the user's text when the chat template is applied?",
    "template": "Is it the template, rather than the additional tokens?",
    "bias": "Does the template take attention from the user's text, sinks aside?",
    "cause": "Is the attention the cause: does steering it back restore what is lost?",
    "cost": "Does that steering cost answers that need no text?",
}
"""The five questions, in order."""

RULES: Mapping[str, str] = {
    "loss": (
        "Yes if recall with the template is below recall without it at the longest length (whole 95 % "
        f"interval over texts). No if the interval excludes a fall of {LOSS_MARGIN:g} or more. Undecided "
        f"where the model finds almost nothing without the template (below {LEAST_RECALL:g})."
    ),
    "template": (
        "Yes if recall with the template is below recall after neutral text of the same length (whole "
        f"interval). No if the interval excludes a fall of {LOSS_MARGIN:g} or more."
    ),
    "bias": (
        "Yes if the user's share of the attention at the answer, without sinks and template tokens, is lower "
        "with the template (whole interval). No if the interval excludes a fall of "
        f"{BIAS_MARGIN:g} or more."
    ),
    "cause": (
        "α is chosen on one half of the texts. Yes if steering raises recall under the template on the other "
        "half, and by more than it does without the template, and steering the heads that attend to the "
        "facts raises it by more than steering as many random heads (whole intervals above 0). No if one of "
        f"these gains is surely smaller than {GAIN_MARGIN:g}."
    ),
    "cost": (
        "Yes if recall of general knowledge falls under that steering (whole interval over questions). No if "
        f"the interval excludes a fall of {COST_MARGIN:g} or more."
    ),
}

PLAIN, TEMPLATE = "plain+prefix", "template+prefix"


@dataclass(frozen=True)
class Needed:
    """How many texts would probably decide a verdict that is undecided.

    Attributes:
        texts: their number.
        measured: the number that was measured.
    """

    texts: int
    measured: int


def texts_needed(difference: Interval, *, direction: int, margin: float) -> Needed | None:
    """How many texts would decide, if the estimate stayed and the interval shrank with their number's root.

    None if the interval has no width, so that nothing can be said.
    """
    half = (difference.high - difference.low) / 2
    if not half > 0:
        return None
    estimate = direction * difference.estimate
    distance = max(estimate, margin - estimate)
    return Needed(max(MIN_UNITS, int(np.ceil(difference.n * (half / distance) ** 2)) + 1), difference.n)


def answer_loss(grid: NeedleGrid, *, baseline: NeedleGrid | None = None) -> Verdict:
    """Does recall fall with the template?

    Args:
        grid: unsteered cells of one model, at one or more lengths, under `PLAIN` and `TEMPLATE`.
        baseline: the same cells of the model that it is compared with.
    """
    longest = int(grid.frame["context_tokens"].max())
    at = grid.where(context_tokens=longest)
    plain, template = at.recall(condition=PLAIN), at.recall(condition=TEMPLATE)
    fall, found = at.difference(plain, template), at.mean(plain)
    notes = [("recall without template", found), ("recall with template", at.mean(template))]
    for length in sorted(set(grid.frame["context_tokens"]) - {longest}):
        part = grid.where(context_tokens=length)
        notes.append((
            f"change at {length:,} tokens",
            part.difference(part.recall(condition=PLAIN), part.recall(condition=TEMPLATE)),
        ))  # fmt: skip
    if baseline is not None:
        base = baseline.where(context_tokens=longest)
        change = base.recall(condition=TEMPLATE) - base.recall(condition=PLAIN)
        notes += [
            ("change of the model that it is compared with", base.mean(change)),
            ("change of this model minus change of that one", at.difference(change, template - plain)),
        ]
    weak = found.high < LEAST_RECALL
    verdict = INCONCLUSIVE if weak else judge(fall, direction=-1, margin=LOSS_MARGIN)
    outcome = {
        SUPPORTED: "it uses the text less",
        NOT_SUPPORTED: "no loss",
        INCONCLUSIVE: "it finds almost nothing in either case" if weak else "too few texts to tell",
    }[verdict]
    return Verdict(
        "loss",
        f"At {longest:,} tokens the model recalls {found.estimate:.0%} of the facts' words without the chat "
        f"template and {template.mean():.0%} with it: {outcome}.",
        fall, "recall with template minus without, paired by question, over texts", RULES["loss"], verdict,
        tuple(notes),
    )  # fmt: skip


def answer_template(grid: NeedleGrid, controls: NeedleGrid) -> Verdict:
    """Is a fall due to the template itself?

    Args:
        grid: as in `answer_loss`.
        controls: the same cells at one of the lengths under the controls.
    """
    longest = int(controls.frame["context_tokens"].max())
    at = grid.where(context_tokens=longest)
    at = NeedleGrid(at.frame[at.frame["cell"].isin(controls.frame["cell"])].reset_index(drop=True), at.meta)
    plain, template = at.recall(condition=PLAIN), at.recall(condition=TEMPLATE)
    found = {name: controls.recall(condition=name) for name in dict.fromkeys(controls.frame["condition"])}
    matched = found.get("plain+matched+prefix")
    against = plain if matched is None else matched
    own = at.difference(against, template)
    described = {
        "plain+matched+prefix": ("neutral text of the template's length: change from plain", plain),
        "plain+bos+prefix": ("plain after BOS: change from plain", plain),
        "plain+nobos+prefix": ("plain without BOS: change from plain", plain),
        "template+nosystem+prefix": (
            "template without default system prompt: change from template",
            template,
        ),
    }
    notes = [
        (described[name][0], at.difference(described[name][1], values))
        for name, values in found.items()
        if name in described
    ]
    verdict = judge(own, direction=-1, margin=LOSS_MARGIN)
    outcome = {
        SUPPORTED: "the template itself costs it",
        NOT_SUPPORTED: "the template itself costs nothing that matters",
        INCONCLUSIVE: "too few texts to tell",
    }[verdict]
    return Verdict(
        "template",
        f"At {longest:,} tokens, with neutral text in place of the template's tokens, the model recalls "
        f"{against.mean():.0%} of the words, with the template {template.mean():.0%}: {outcome}.",
        own, "recall with template minus recall after neutral text of its length, over texts",
        RULES["template"], verdict, tuple(notes),
    )  # fmt: skip


def answer_bias(
    plain: RoleAllocation, template: RoleAllocation, needle: tuple[HeadMap, HeadMap] | None = None
) -> Verdict:
    """Does the template take attention from the user's tokens?

    Args:
        plain: shares of `first_answer` queries without the template, one per text, with sinks measured.
        template: the same with the template.
        needle: the attention to the fact that is asked for, without and with the template.
    """
    views = {"without sinks": [], "as in the paper": [], "raw": []}
    for one in (plain, template):
        views["without sinks"].append(_user_share(one.without_sinks().renormalised()))
        views["as in the paper"].append(_user_share(one.renormalised()))
        views["raw"].append(_user_share(one))
    shift = paired_difference(*views["without sinks"])
    paper = paired_difference(*views["as in the paper"])
    notes = [
        ("the paper's figure (renormalised, sinks counted): change", paper),
        ("raw share: change", paired_difference(*views["raw"])),
        ("share on sinks without template", bootstrap_mean(_sink_share(plain))),
        ("share on sinks with template", bootstrap_mean(_sink_share(template))),
    ]
    lost = ""
    if needle is not None:
        before, after = (np.nanmean(one.effects, axis=(1, 2)) for one in needle)
        notes.append(("attention to the fact asked for: change", paired_difference(before, after)))
        lost = f"; heads that lose most of the fact: {', '.join(_losers(*needle))}"
    verdict = judge(shift, direction=-1, margin=BIAS_MARGIN)
    outcome = {
        SUPPORTED: "it moves away from the user",
        NOT_SUPPORTED: "no bias",
        INCONCLUSIVE: "too few texts to tell",
    }[verdict]
    shares = [float(np.nanmean(one)) for one in views["without sinks"]]
    return Verdict(
        "bias",
        f"Without sinks, {shares[0]:.0%} of the attention at the answer goes to the user's text without the "
        f"template and {shares[1]:.0%} with it (the paper's figure, sinks counted: "
        f"{paper.estimate:+.0%}): {outcome}{lost}.",
        shift, "user's share of attention with template minus without, no sinks, over texts",
        RULES["bias"], verdict, tuple(notes),
    )  # fmt: skip


def _user_share(allocation: RoleAllocation) -> np.ndarray:
    return np.nanmean(allocation.share(Role.USER), axis=(0, 1))


def _sink_share(allocation: RoleAllocation) -> np.ndarray:
    return allocation.with_sinks_apart().share(Role.SINK).mean((0, 1))


def _losers(before: HeadMap, after: HeadMap, n: int = 3) -> list[str]:
    fall = replace(before, effects=after.effects - before.effects)
    return [f"{layer}.{head}" for layer, head in fall.ranking(ascending=True)[:n]]


def choose_alpha(grid: NeedleGrid, unsteered: NeedleGrid, heads: str) -> float:
    """The steering strength with the best mean recall of a set of heads; the weakest of equals."""
    tried = grid.where(heads=heads, condition=TEMPLATE)
    cells = set(unsteered.where(condition=TEMPLATE).frame["cell"])
    rows = tried.frame[tried.frame["cell"].isin(cells)]
    means = {alpha: rows["recall"][rows["alpha"] == alpha].mean() for alpha in rows["alpha"].unique()}
    return float(max(sorted(means, reverse=True), key=lambda alpha: means[alpha]))


def answer_cause(grid: NeedleGrid, judged: NeedleGrid) -> Verdict:
    """Does steering attention to the user's tokens restore recall?

    Args:
        grid: unsteered cells, as in `answer_loss`, at the length of the steered ones.
        judged: the cells of the texts that were not used to choose α, steered: heads `all`, `retrieval` and
            `random` under the template, and `all` without it.
    """
    cells = judged.frame["cell"].unique()
    at = NeedleGrid(grid.frame[grid.frame["cell"].isin(cells)].reset_index(drop=True), grid.meta)
    unsteered = {name: at.recall(condition=name) for name in (PLAIN, TEMPLATE)}

    def gain(heads: str, condition: str = TEMPLATE):
        return judged.recall(heads=heads, condition=condition) - unsteered[condition]

    everything, without = gain("all"), gain("all", PLAIN)
    excess = at.difference(without, everything)
    over_random = at.difference(gain("random"), gain("retrieval"))
    alphas = {h: float(judged.where(heads=h).frame["alpha"].iloc[0]) for h in ("all", "retrieval")}
    gained, length = at.mean(everything), int(at.frame["context_tokens"].max())
    needed = (
        (gained, "gain by steering with the template", "recall does not rise"),
        (excess, "gain by steering with the template minus gain without it",
         "it rises without the template too"),
        (over_random, "gain by steering the heads that attend to the facts minus gain by random heads",
         "random heads do as much as those that attend to the facts"),
    )  # fmt: skip
    judged_each = [judge(figure, direction=1, margin=GAIN_MARGIN) for figure, _, _ in needed]
    verdict = combine(judged_each)
    decides, quantity, reason = needed[judged_each.index(verdict)]
    outcome = {
        SUPPORTED: "the attention is a cause",
        NOT_SUPPORTED: f"the attention is not shown to be the cause, because {reason}",
        INCONCLUSIVE: "too few texts to tell",
    }[verdict]
    return Verdict(
        "cause",
        f"At {length:,} tokens, steering all heads to the user's text (α = {alphas['all']:g}) changes recall "
        f"by {gained.estimate:+.0%} under the template and by {without.mean():+.0%} without it: {outcome}.",
        decides, f"{quantity}, over texts", RULES["cause"], verdict,
        (
            ("gain with the template, all heads", gained),
            ("gain without the template, all heads", at.mean(without)),
            ("difference of these two", excess),
            (f"gain of the heads that attend to the facts (α = {alphas['retrieval']:g})",
             at.mean(gain("retrieval"))),
            ("gain of as many random heads", at.mean(gain("random"))),
            ("these heads minus random ones", over_random),
        ),
    )  # fmt: skip


def answer_cost(ability: Ability, alpha: float) -> Verdict:
    """Does steering cost answers that need no text?

    Args:
        ability: answers to the same questions with α = 1 and with the chosen α, all heads steered.
        alpha: the chosen α.
    """
    before, after = (ability.where(alpha=one).frame["recall"].to_numpy() for one in (1.0, alpha))
    change = paired_difference(before, after)
    verdict = judge(change, direction=-1, margin=COST_MARGIN)
    outcome = {
        SUPPORTED: "steering costs knowledge",
        NOT_SUPPORTED: "no cost that matters",
        INCONCLUSIVE: "too few questions to tell",
    }[verdict]
    return Verdict(
        "cost",
        f"Without any text the model recalls {before.mean():.0%} of general knowledge unsteered and "
        f"{after.mean():.0%} steered (α = {alpha:g}): {outcome}.",
        change, "recall of general knowledge steered minus unsteered, over questions", RULES["cost"], verdict,
    )  # fmt: skip


def failed(verdicts: Sequence[Verdict], questions: Sequence[str]) -> list[str]:
    """The questions among `questions` that are answered with yes."""
    found: dict[str, Any] = {verdict.claim: verdict.verdict for verdict in verdicts}
    return [name for name in questions if found.get(name) == SUPPORTED]


__all__ = [
    "QUESTIONS", "RULES", "Needed", "answer_bias", "answer_cause", "answer_cost", "answer_loss",
    "answer_template", "choose_alpha", "failed", "texts_needed",
]  # fmt: skip
