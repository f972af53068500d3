"""From runs to sections: one per claim in the order of the argument, then all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctxlens.report.attention import bias_blocks
from ctxlens.report.blocks import Block, Note, Part, Section
from ctxlens.report.checkpoints import checkpoint_blocks
from ctxlens.report.collect import RunContents
from ctxlens.report.context import context_blocks
from ctxlens.report.evaluation import evaluation_blocks
from ctxlens.report.heads import drift_blocks, heads_blocks
from ctxlens.report.making import making_blocks, training_blocks
from ctxlens.report.mt_bench import mt_bench_blocks
from ctxlens.report.needles import cause_blocks, compare_blocks, cure_blocks, loss_blocks
from ctxlens.report.source import source_blocks


@dataclass(frozen=True)
class _Topic:
    """A claim and its section.

    Attributes:
        claim: the claim's name.
        also: further claims whose verdicts stand in this section.
        question: heading where a demo or a verdict argues for the claim.
        title: heading elsewhere.
        lead: the text below `question`.
        missing: what a run without this section lacks.
        build: makes the blocks of a run, given its number on the page.
        compare: makes blocks of all runs together.
    """

    claim: str
    also: tuple[str, ...]
    question: str
    title: str
    lead: str
    missing: str
    build: Callable[[RunContents, int], Sequence[Block]]
    compare: Callable[[Sequence[RunContents]], Sequence[Block]] | None = None


_TOPICS = (
    _Topic(
        "loss", ("template",), "Does the chat template cost context?", "Needles in a haystack",
        "The user gives a long text that holds one fact (the needle) and asks for this fact. The same "
        "weights answer with the chat template around the conversation and without it.",
        "needle grid", lambda run, _: loss_blocks(run), compare_blocks,
    ),
    _Topic(
        "role bias", ("bias",), "Where does attention go instead?", "Attention by role",
        "Every token has a role: it belongs to the user's text, to the assistant's or to the template's own "
        "markers. In every layer and head, attention is summed by role at the position where the answer "
        "begins.",
        "role allocation", bias_blocks,
    ),
    _Topic(
        "cause", ("cost",), "Is attention the cause?", "Steering attention",
        "A correlation is not a cause, so here attention is changed directly: the attention to every token "
        "that is not the user's is multiplied by a factor α below 1, in all heads, in the retrieval heads "
        "only, and in equally many heads drawn at random.",
        "steering sweep", lambda run, _: cause_blocks(run),
    ),
    _Topic(
        "source", (), "Which training examples teach it?", "Context-dependency scores",
        "Many examples in instruction data can be answered without reading what the user wrote. A score "
        "computed from attention estimates how much each answer depends on the user's tokens.",
        "context-dependency scores", lambda run, _: source_blocks(run),
    ),
    _Topic(
        "cure", (), "Can it be cured?", "Before and after the indicator",
        "During fine-tuning the context-dependent examples carry an indicator token, [IND]. At inference "
        "the user adds this token when the answer should come from the context.",
        "a model trained with the indicator, closed-book ability", lambda run, _: cure_blocks(run),
    ),
)  # fmt: skip


SECTION_OF = {
    claim: topic.claim.replace(" ", "-") for topic in _TOPICS for claim in (topic.claim, *topic.also)
}
"""The identifier of the section that holds a claim's verdict."""

_MORE: tuple[tuple[str, str, Callable[[RunContents], Sequence[Block]]], ...] = (
    ("evaluation", "Evaluation", evaluation_blocks),
    ("mt-bench", "MT-Bench", mt_bench_blocks),
    ("drift", "Attention drift", drift_blocks),
    ("heads", "Heads", heads_blocks),
    ("training", "Training", training_blocks),
    ("context", "Context use during the training", context_blocks),
)
"""Sections that belong to no claim: identifier, title and what builds the blocks of a run."""


# long: the sections in the order of the page
def build_sections(runs: Sequence[RunContents]) -> tuple[list[Section], list[str]]:
    """The sections for which the runs hold results, and the names of the results that are missing."""
    sections, missing = [], []
    has_demo = any(run.is_demo for run in runs)
    if parts := [Part(run.name, blocks) for run in runs if (blocks := checkpoint_blocks(run))]:
        is_cure = any(run.study == "cure" for run in runs)
        sections.append(Section("checkpoints", "Before and after" if is_cure else "Checkpoints", "", parts))
    for topic in _TOPICS:
        parts = _topic_parts(topic, runs)
        if not any(_is_told(part) for part in parts):
            missing.append(topic.missing)
        if parts:
            sections.append(_topic_section(topic, parts, argued=has_demo))
    for slug, title, build in _MORE:
        if parts := [Part(run.name, blocks) for run in runs if (blocks := build(run))]:
            sections.append(Section(slug, title, "", parts))
    parts = [Part(run.name, making_blocks(run)) for run in runs]
    sections.append(Section("making", "How it was made", "", parts))
    studies = {run.study for run in runs}
    if studies <= {"checkpoints", "context"} or "cure" in studies:  # each audited model has a page of its own
        missing = []
    return sections, missing


def _topic_parts(topic: _Topic, runs: Sequence[RunContents]) -> list[Part]:
    """What only several runs together show, then what each run contributes to a topic."""
    parts = []
    for number, run in enumerate(runs):
        blocks = list(topic.build(run, number))
        found = run.verdicts()
        verdicts = [found[claim] for claim in (topic.claim, *topic.also) if claim in found]
        if not blocks and run.is_demo:
            blocks = [Note(f"Not in this run: {topic.missing}.")]
        if blocks or verdicts:
            parts.append(Part(run.name, blocks, verdicts))
    if topic.compare is not None and (blocks := topic.compare(runs)):
        parts.insert(0, Part("all runs", blocks))
    return parts


def _is_told(part: Part) -> bool:
    """Whether a part holds more than the note that something is missing."""
    return bool(part.verdicts) or not isinstance(part.blocks[0], Note)


def _topic_section(topic: _Topic, parts: Sequence[Part], *, argued: bool) -> Section:
    """The section of a topic; with the claim's question where a demo or a verdict argues for it."""
    slug = topic.claim.replace(" ", "-")
    if argued or any(part.verdicts for part in parts):
        return Section(slug, topic.question, topic.lead, parts, topic.claim)
    return Section(slug, topic.title, "", parts)
