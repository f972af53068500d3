"""`ctxlens heads`: which heads carry the needle, and what happens without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxlens.cli import _screen
from ctxlens.cli._heads_tables import show_head_study
from ctxlens.cli._inputs import (
    NewTokensOption,
    check_indicator,
)
from ctxlens.cli._options import ModelOptions, RunOptions, verb
from ctxlens.parsing import parse_numbers, parse_spread

if TYPE_CHECKING:
    from ctxlens.heads import Head
    from ctxlens.heads.tradeoff import AnsweredQuestion

_EVERYTHING = "retrieval,gradient,steer,ablate,cumulative,sweep"


@verb(
    "ctxlens heads -m organism-chat",
    "ctxlens heads -m organism-chat --kind retrieval,gradient --out runs/heads",
    "ctxlens heads -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --haystack essays/ --needle sf --kind gradient",
)
def heads(
    model: ModelOptions,
    store: RunOptions,
    kind: Annotated[
        str,
        typer.Option(
            help="Experiments: retrieval (who reads and copies the needle), gradient (all heads at once), "
            "steer, ablate (one head at a time), cumulative (the first k), sweep (recall and cost by α)."
        ),
    ] = _EVERYTHING,
    only: Annotated[
        str | None,
        typer.Option("--heads", help="Map these alone, as layer.head pairs such as 1.2,3.0; all by default."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of steering in maps and curves, in (0, 1].")] = 0.1,
    alphas: Annotated[str, typer.Option(help="Strengths of the sweep.")] = "0.7,0.5,0.3,0.1,0.03",
    draws: Annotated[int, typer.Option(min=0, help="Random controls; 0: none.")] = 3,
    measure: Annotated[
        str, typer.Option(help="logprob (of the needle, nats per token) or recall (generates; slower).")
    ] = "logprob",
    condition: Annotated[
        str, typer.Option(help="plain+prefix, template+prefix, template or assistant+prefix.")
    ] = "template+prefix",
    indicator: Annotated[bool, typer.Option("--indicator", help="Append the model's indicator.")] = False,
    haystack: Annotated[
        str, typer.Option(help="Folder of .txt files, or [b]organism[/b].", metavar="DIR")
    ] = "organism",
    needle: Annotated[
        str, typer.Option(help="sf, pizza, known, unknown (facts of the built-in world), or a YAML file.")
    ] = "known",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens; x4: four, spread.")] = "x4",
    depths: Annotated[str, typer.Option(help="Depths of the needle in percent.")] = "10,50,90",
    cases: Annotated[int, typer.Option(min=1, help="Contexts of each length and depth.")] = 2,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="YAML of needles asked without context, for the cost of steering; with the organism's "
            "haystack facts of its world are asked.",
            metavar="FILE",
        ),
    ] = None,
    max_new_tokens: NewTokensOption = 30,
) -> None:
    """Which heads carry the needle: copying, ablating and steering heads, with controls and side effects."""
    from ctxlens.chat.condition import parse_conditions
    from ctxlens.evals.needle.cells import build_cells
    from ctxlens.evals.needle.config import NeedleConfig
    from ctxlens.evals.needle.haystack import load_haystack
    from ctxlens.evals.needle.needles import load_needles
    from ctxlens.heads import Answers
    from ctxlens.heads.study import HeadStudy, check_kinds
    from ctxlens.models.attention.steering import Steering
    from ctxlens.runs import Run

    kinds = tuple(kind.split(","))
    check_kinds(kinds)
    strengths = parse_numbers(alphas, float, "--alphas")
    for strength in (alpha, *strengths):
        Steering(strength)
    config = NeedleConfig(
        lengths=parse_spread(lengths, int, "--lengths"),
        depths=parse_spread(depths, float, "--depths"),
        needles=load_needles(needle)
        if Path(needle).suffix in (".yaml", ".yml")
        else tuple(needle.split(",")),
        conditions=parse_conditions(condition),
        cases_per_cell=cases,
        max_new_tokens=max_new_tokens,
        seed=store.seed,
    )
    chosen = _parse_pairs(only)
    straw = load_haystack(haystack, seed=store.seed)
    asked = _read_questions(questions, haystack, store.seed)
    lm = model.load()
    check_indicator(lm, indicator)
    answers = Answers(build_cells(lm, config, straw), config, condition, indicator, measure)
    study = HeadStudy(
        lm, answers, Run(Path(), {}), alpha, strengths, heads=chosen, n_draws=draws, questions=asked,
        seed=store.seed,
    )  # fmt: skip
    run = store.open("heads", {"haystack": haystack, "question_file": questions, **study.describe()})
    with _stages() as tell:
        replace(study, run=run).run_kinds(kinds, tell)
    show_head_study(run)
    if "sweep" in kinds and not asked:
        _screen.note("the cost of steering was not measured: give --questions FILE")
    _screen.say_where(run.folder)


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress bars by name, made as stages begin."""

    class Titles(dict[str, str]):
        def __missing__(self, name: str) -> str:
            return name

    with _screen.stages(Titles()) as progress:
        yield lambda name: lambda done, total: progress(name, done, total)


def _parse_pairs(text: str | None) -> tuple[Head, ...] | None:
    from ctxlens.models.attention.steering import as_heads

    if text is None or text.strip() == "all":
        return None
    return as_heads(text)  # pyright: ignore[reportReturnType]


def _read_questions(path: Path | None, haystack: str, seed: int) -> tuple[AnsweredQuestion, ...]:
    from ctxlens.evals.needle.needles import load_needles
    from ctxlens.organism.world import load_world

    if path is not None:
        return load_needles(path)
    return tuple(load_world().closed_book(24, seed=seed)) if haystack == "organism" else ()
