"""The section of the model card about the effect of the training, and its place in the card."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ctxlens.chat.condition import SPELLING
from ctxlens.evals.needle import Cell
from ctxlens.results import Drift
from ctxlens.results.markdown import escape_markdown
from ctxlens.results.tables import name_length
from ctxlens.sft.before_after.comparison import Row
from ctxlens.sft.before_after.plan import EvaluationPlan
from ctxlens.stats import Interval

BEGIN, END = "<!-- before and after -->", "<!-- end of before and after -->"
_MOST_LAYERS = 16


def make_section(
    plan: EvaluationPlan,
    base_name: str,
    against_base: Sequence[Row],
    treatments: Sequence[Row],
    drifts: Sequence[Drift],
    *,
    no_drift: str = "",
) -> str:
    """The section as Markdown; what comes from data and names is escaped.

    Args:
        plan: what was asked.
        base_name: name of the model that the training started from.
        against_base: rows of `models_rows`.
        treatments: rows of `treatments_rows`.
        drifts: attention of both models, without the indicator and, if there is one, with it.
        no_drift: why the drift was not measured; only needed without `drifts`.
    """
    lines = [
        "## Before and after", "", *_asked(plan, base_name), "",
        *_table(against_base), "",
        "### Effect of template and indicator", "",
        *(_table(treatments) if treatments else ["The model has no chat template."]), "",
        "### Attention drift", "", *_drift(plan.folder, drifts, no_drift), "",
        f"All figures: [`{plan.folder}/report.html`]({plan.folder}/report.html), which works offline; as "
        f"data: `{plan.folder}/evaluation.json`.",
    ]  # fmt: skip
    return "\n".join(lines)


def _asked(plan: EvaluationPlan, base_name: str) -> list[str]:
    config = plan.config
    lengths = ", ".join(_name_lengths(plan.cells))
    depths = ", ".join(f"{d:g}" for d in dict.fromkeys(cell.depth_percent for cell in plan.cells))
    kinds = ", ".join(
        escape_markdown(name) for name in dict.fromkeys(cell.needle.name for cell in plan.cells)
    )
    lines = [
        f"*base* is {escape_markdown(base_name)}, *trained* is this checkpoint; both answer the same "
        "questions with greedy decoding.", "",
        f"- needles: {kinds}; {len(plan.cells)} cells in {escape_markdown(plan.haystack)}: contexts of "
        f"{lengths} tokens, depths {depths} %, {config.cases_per_cell} texts for each, at most "
        f"{config.max_new_tokens} new tokens, seed {config.seed}; recall is the share of the needle's "
        "keywords that the answer contains",
        f"- conditions: {SPELLING}",
        f"- closed book: {len(plan.questions)} questions without context" if plan.questions else
        "- closed book: **not measured**; no questions were given (`evaluate_questions`)",
        "- differences are paired; brackets contain 95 % bootstrap intervals over contexts (or questions); "
        "the reading names a difference only if a sign-flip test confirms it (p ≤ 0.05)",
    ]  # fmt: skip
    return lines


def _name_lengths(cells: Sequence[Cell]) -> list[str]:
    """The mean lengths of the contexts, each with what was requested if that differs."""
    built: dict[int, list[int]] = {}
    for cell in cells:
        built.setdefault(cell.context_tokens, []).append(cell.context.tokens)
    return [name_length(round(fmean(tokens)), length) for length, tokens in built.items()]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| measure | first | second | mean of first | of second | difference | reading |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        found = row.found
        names = [escape_markdown(text) for text in (row.measure, row.first, row.second)]
        figures = [found.first.format(), found.second.format(), signed(found.difference)]
        lines.append(f"| {' | '.join([*names, *figures, f'{found.reading} (p {found.p_value:.3f})'])} |")
    return lines


def signed(interval: Interval, digits: int = 2) -> str:
    """An interval as text, with the sign of its estimate."""
    text = interval.format(digits)
    return text if text.startswith("-") else f"+{text}"


def _drift(folder: str, drifts: Sequence[Drift], no_drift: str) -> list[str]:
    if not drifts:
        return [f"Not measured: {escape_markdown(no_drift)}"]
    lines = [
        f"![Change of the attention on the user's tokens by layer and head]({folder}/drift.svg)", "",
        "Share of the attention that goes to the user's tokens where the answer begins: mean over heads, "
        "and the layer's retrieval head:", "",
        "| comparison | layer | before | after | change | change of the retrieval head |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for drift in drifts:
        mean, followed = (drift.by_layer("user", heads=heads) for heads in ("mean", "retrieval"))
        order = sorted(range(len(mean)), key=lambda i: -abs(mean[i][2].estimate))[:_MOST_LAYERS]
        name = escape_markdown(f"{drift.sides[1]} against {drift.sides[0]}")
        for i in sorted(order):
            before, after, change = mean[i]
            cells = [before.format(), after.format(), signed(change), signed(followed[i][2])]
            head = f" (head {int(drift.retrieval[i])})"
            lines.append(f"| {name} | {drift.layers[i]} | {' | '.join(cells)}{head} |")
        if len(mean) > _MOST_LAYERS:
            lines.append(f"| {name} | {len(mean) - _MOST_LAYERS} more layers with smaller changes | | | | |")
    return lines


def insert_section(card: str, section: str) -> str:
    """Insert the section into a card: in place of an earlier one, otherwise at the end."""
    marked = f"{BEGIN}\n{section}\n{END}"
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{marked}{after}"
    return f"{card.rstrip()}\n\n{marked}\n"


__all__ = ["BEGIN", "END", "insert_section", "make_section", "signed"]
