"""Runs to sections: one a claim, in the order of the argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctxlens.report.attention import bias_blocks
from ctxlens.report.blocks import Block, Note, Part, Section
from ctxlens.report.collect import RunContents
from ctxlens.report.evaluation import evaluation_blocks
from ctxlens.report.heads import drift_blocks, heads_blocks
from ctxlens.report.making import making_blocks, training_blocks
from ctxlens.report.mt_bench import mt_bench_blocks
from ctxlens.report.needles import cause_blocks, compare_blocks, cure_blocks, loss_blocks
from ctxlens.report.source import source_blocks


@dataclass(frozen=True)
class _Topic:
    claim: str
    question: str
    title: str
    lead: str
    missing: str
    build: Callable[[RunContents, int], Sequence[Block]]


_TOPICS = (
    _Topic(
        "loss", "Does the chat template cost context?", "Needles in a haystack",
        "A fact (the needle) stands somewhere in a long text that the user gives, and the user asks for "
        "it. The same weights answer with the chat template around the conversation and without it.",
        "needle grid", lambda run, _: loss_blocks(run),
    ),
    _Topic(
        "role bias", "Where does attention go instead?", "Attention by role",
        "Every token has a role: the user's text, the assistant's, the template's own markers. Attention "
        "is summed by role, in every layer and head, at the place where the answer begins.",
        "role allocation", bias_blocks,
    ),
    _Topic(
        "cause", "Is attention the cause?", "Steering attention",
        "Watching is not enough, so attention is changed by hand: every token that is not the user's is "
        "weakened by a factor α, in all heads, in the heads that retrieve, and in as many heads drawn at "
        "random.",
        "steering sweep", lambda run, _: cause_blocks(run),
    ),
    _Topic(
        "source", "Which training examples teach it?", "Context-dependency scores",
        "Many examples of instruction data can be answered without reading what the user wrote. A score from "
        "attention tells how much each answer drew on the user's tokens.",
        "context-dependency scores", lambda run, _: source_blocks(run),
    ),
    _Topic(
        "cure", "Can it be cured?", "Before and after the indicator",
        "The context-dependent examples get an indicator token, [IND], during fine-tuning. At inference "
        "the user adds it when the answer should come from the context.",
        "a model trained with the indicator, closed-book ability", lambda run, _: cure_blocks(run),
    ),
)  # fmt: skip


def build_sections(runs: Sequence[RunContents]) -> tuple[list[Section], list[str]]:
    """The sections that the runs hold something for, and the names of what they do not hold."""
    sections, missing = [], []
    has_demo = any(run.is_demo for run in runs)
    for topic in _TOPICS:
        parts = []
        for i, run in enumerate(runs):
            blocks = list(topic.build(run, i))
            verdict = run.verdicts().get(topic.claim)
            if not blocks and run.is_demo:
                blocks = [Note(f"Not in this run: {topic.missing}.")]
            if blocks or verdict:
                parts.append(Part(run.name, blocks, verdict))
        if topic.claim == "loss" and (blocks := compare_blocks(runs)):
            parts.append(Part("all runs", blocks))
        if not any(part.verdict or not isinstance(part.blocks[0], Note) for part in parts):
            missing.append(topic.missing)
        if parts:
            argued = has_demo or any(part.verdict for part in parts)
            heading = (topic.question, topic.lead) if argued else (topic.title, "")
            slug = topic.claim.replace(" ", "-")
            sections.append(Section(slug, *heading, parts, topic.claim if argued else ""))
    for slug, title, build in (
        ("evaluation", "Evaluation", evaluation_blocks),
        ("mt-bench", "MT-Bench", mt_bench_blocks),
        ("drift", "Attention drift", drift_blocks),
        ("heads", "Heads", heads_blocks),
        ("training", "Training", training_blocks),
    ):
        if parts := [Part(run.name, blocks) for run in runs if (blocks := build(run))]:
            sections.append(Section(slug, title, "", parts))
    parts = [Part(run.name, making_blocks(run)) for run in runs]
    sections.append(Section("making", "How it was made", "", parts))
    return sections, missing
