"""`ctxlens heads`: which heads the model needs to find the needle."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxlens.cli import _outcomes, _screen
from ctxlens.cli._heads_tables import show_head_study
from ctxlens.cli._inputs import NewTokensOption
from ctxlens.cli._options import ModelOptions, RunOptions, verb
from ctxlens.cli._output import OutputOptions, count
from ctxlens.cli._plan import tell_plan_later
from ctxlens.errors import InputError
from ctxlens.parsing import check_choice, parse_heads, parse_numbers, parse_spread

if TYPE_CHECKING:
    from ctxlens.evals.closed_book import AnsweredQuestion
    from ctxlens.heads import Head

_EVERYTHING = "retrieval,gradient,steer,ablate,cumulative,sweep"


@verb(
    "ctxlens heads -m organism-chat",
    "ctxlens heads -m organism-chat --kind retrieval,gradient --out runs/heads",
    "ctxlens heads -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --haystack essays/ --needle sf --kind gradient",
)
def heads(
    model: ModelOptions,
    store: RunOptions,
    output: OutputOptions,
    kind: Annotated[
        str,
        typer.Option(
            help="Experiments, separated by commas: retrieval (heads that read and copy the needle), "
            "gradient (all heads at once), steer, ablate (one head at a time), cumulative (the first k "
            "heads), sweep (recall and side effects by α). [dim]default: all[/dim]",
            metavar="KINDS",
            show_default=False,
        ),
    ] = _EVERYTHING,
    only: Annotated[
        str | None,
        typer.Option(
            "--heads",
            help="Heads to map, as layer.head pairs such as 1.2,3.0. [dim]default: all[/dim]",
            metavar="HEADS",
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Steering in maps and curves, in (0, 1]; smaller steers more.", metavar="A")
    ] = 0.1,
    alphas: Annotated[
        str, typer.Option(help="Values of α in the sweep, separated by commas.", metavar="ALPHAS")
    ] = "0.7,0.5,0.3,0.1,0.03",
    draws: Annotated[
        int, typer.Option(min=0, help="Number of random controls; 0 for none.", metavar="N")
    ] = 3,
    measure: Annotated[
        str,
        typer.Option(
            help="logprob (of the needle, nats per token) or recall (generates answers; slower).",
            metavar="NAME",
        ),
    ] = "logprob",
    condition: Annotated[
        str,
        typer.Option(
            help="Condition: plain, template or assistant, then +prefix as needed.", metavar="CONDITION"
        ),
    ] = "template+prefix",
    indicator: Annotated[
        bool, typer.Option("--indicator", help="Append the model's indicator to the question.")
    ] = False,
    haystack: Annotated[
        str | None,
        typer.Option(
            help="Folder of .txt or .md files, [b]neutral[/b] or [b]organism[/b]. [dim]default: organism "
            "for the built-in model, else neutral[/dim]",
            metavar="DIR",
        ),
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(
            help="neutral (invented facts), sf, pizza, known, unknown (facts of the built-in world), or a "
            "YAML file. [dim]default: known in the built-in world, else neutral[/dim]",
            metavar="NEEDLE",
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(help="Context lengths in tokens; x4 spreads four over the window.", metavar="LENGTHS"),
    ] = "x4",
    depths: Annotated[
        str, typer.Option(help="Depths of the needle in percent.", metavar="DEPTHS")
    ] = "10,50,90",
    cases: Annotated[
        int, typer.Option(min=1, help="Number of contexts for each length and depth.", metavar="N")
    ] = 2,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of questions without context, to measure the cost of steering. "
            "[dim]default: facts of the built-in world, if --haystack is organism[/dim]",
            metavar="FILE",
        ),
    ] = None,
    max_new_tokens: NewTokensOption = 30,
) -> None:
    """Find the heads that carry the needle: maps, ablations and steering, with controls and side effects."""
    kinds, strengths = _check_words(kind, measure, alpha, alphas)
    chosen = _parse_pairs(only)
    from ctxlens.chat.condition import parse_conditions
    from ctxlens.evals.needle.cells import build_cells
    from ctxlens.evals.needle.config import NeedleConfig
    from ctxlens.evals.needle.defaults import choose_texts
    from ctxlens.evals.needle.haystack import load_haystack
    from ctxlens.evals.needle.needles import parse_needles

    texts = choose_texts(model.model, haystack, needle)
    config = NeedleConfig(
        lengths=parse_spread(lengths, int, "--lengths"),
        depths=parse_spread(depths, float, "--depths"),
        needles=parse_needles(texts.needles),
        conditions=parse_conditions(condition),
        cases_per_cell=cases,
        max_new_tokens=max_new_tokens,
        seed=store.seed,
    )
    model.check()
    known = {"model": model.known, "haystack": texts.haystack, "question_file": questions, **config.as_dict()}
    store.check("heads", known)

    straw = load_haystack(texts.haystack, seed=store.seed)
    asked = _read_questions(questions, texts.in_world, store.seed)

    from ctxlens.heads import Answers
    from ctxlens.heads.study import HeadStudy
    from ctxlens.models.indicator_token import require_indicator

    lm = model.load()
    if indicator:
        require_indicator(lm)
    answers = Answers(build_cells(lm, config, straw), config, condition, indicator, measure)
    study = HeadStudy(
        lm, answers, None, alpha, strengths, heads=chosen, n_draws=draws, questions=asked, seed=store.seed
    )
    told = {"haystack": texts.haystack, "question_file": questions, **study.describe()}
    run = store.open("heads", told, lm)
    tell_plan_later(lm, f"{count(len(answers.cells), 'cell')}; experiments: {', '.join(kinds)};")
    with _screen.stages({}) as progress:
        replace(study, run=run).run_kinds(kinds, lambda stage: partial(progress, stage))
    output.show(lambda: _outcomes.heads_outcome(run, lm.name), lambda: show_head_study(run))
    _screen.note_texts(texts.note)
    if "sweep" in kinds and not asked:
        _screen.note("the cost of steering was not measured; give --questions FILE to measure it")
    _screen.say_where(run.folder)


def _check_words(
    kind: str, measure: str, alpha: float, alphas: str
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The experiments and the strengths of steering.

    Raises:
        InputError: one of them, or the measure, cannot be used.
    """
    from ctxlens.chat.condition import Condition

    check_choice(measure, ("logprob", "recall"), "measure")
    kinds = tuple(kind.split(","))
    for each in kinds:
        check_choice(each, _EVERYTHING.split(","), "kind")
    strengths = parse_numbers(alphas, float, "--alphas")
    for strength in (alpha, *strengths):
        Condition(alpha=strength)
    return kinds, strengths


def _parse_pairs(text: str | None) -> tuple[Head, ...] | None:
    """The heads of --heads; None: all heads."""
    heads = parse_heads(text or "all")
    if heads == "retrieval":
        raise InputError("the retrieval heads depend on a model and an input; give all or layer.head pairs.")
    return None if heads == "all" else heads


def _read_questions(path: Path | None, in_world: bool, seed: int) -> tuple[AnsweredQuestion, ...]:
    """Questions without context: those of the file, else facts of the built-in world for its haystack."""
    from ctxlens.evals.needle.needles import load_needles
    from ctxlens.organism.world import load_world

    if path is not None:
        return load_needles(path)
    return tuple(load_world().closed_book(24, seed=seed)) if in_world else ()
