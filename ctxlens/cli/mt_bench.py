"""`ctxlens mt-bench`: answer MT-Bench and have a judge rate the answers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli import _screen
from ctxlens.cli._inputs import BatchOption, HeadsOption, NewTokensOption, check_steering, resolve_heads
from ctxlens.cli._options import ModelOptions, RunOptions, verb
from ctxlens.cli._output import (
    Outcome,
    OutputOptions,
    Table,
    count,
    interval_cells,
    say_interval,
    show_interval,
)
from ctxlens.cli._plan import tell_plan_later
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.evals.judge import Endpoint
    from ctxlens.evals.mt_bench import MTQuestion
    from ctxlens.results import Ratings
    from ctxlens.runs import Run


@verb(
    "ctxlens mt-bench -m organism-chat --questions question.jsonl --out runs/mt-bench",
    "ctxlens mt-bench -m runs/train --indicator --questions question.jsonl --out runs/mt-bench",
    "ctxlens mt-bench --questions question.jsonl --out runs/mt-bench --judge-only "
    "--judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen3-32B --references gpt-4.jsonl",
)
def mt_bench(
    model: ModelOptions,
    store: RunOptions,
    output: OutputOptions,
    questions: Annotated[
        str,
        typer.Option(
            help="FastChat's question.jsonl, or a data set such as HuggingFaceH4/mt_bench_prompts.",
            metavar="DATA",
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N questions.", metavar="N")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Name of these answers. [dim]default: model and condition[/dim]", metavar="NAME"),
    ] = None,
    indicator: Annotated[
        bool, typer.Option("--indicator", help="Append the model's indicator to the user's message.")
    ] = False,
    alpha: Annotated[
        float, typer.Option(help="Steer to the user's tokens; 1 means no steering.", metavar="A")
    ] = 1.0,
    heads: HeadsOption = "all",
    max_new_tokens: NewTokensOption = 1024,
    batch_tokens: BatchOption = 8192,
    judge_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server that rates the answers. [dim]default: no rating[/dim]",
            metavar="URL",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The judge's name on that server.", metavar="NAME")
    ] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the server's API key.", metavar="NAME")
    ] = None,
    judge_timeout: Annotated[
        float, typer.Option(help="Upper bound on one judgment, in seconds.", metavar="SECONDS")
    ] = 120.0,
    judge_tries: Annotated[
        int, typer.Option(min=1, help="Upper bound on the attempts for one judgment.", metavar="N")
    ] = 5,
    judge_max_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Longest reply, with its thinking; a rating in a longer one is not used.", metavar="N"
        ),
    ] = 4096,
    judge_threads: Annotated[
        int, typer.Option(min=1, help="Number of judgments requested at once.", metavar="N")
    ] = 4,
    judge_only: Annotated[
        bool, typer.Option("--judge-only", help="Rate the answers in the folder without loading a model.")
    ] = False,
    references: Annotated[
        Path | None,
        typer.Option(help="Reference answers for the judge, in FastChat's layout.", metavar="FILE"),
    ] = None,
) -> None:
    """Answer MT-Bench's two-turn questions greedily, in FastChat's layout, and have a judge rate the answers.

    Use the same --out for several models or conditions: each gets a file of its own, and all are compared.
    """
    from ctxlens.evals.mt_bench import (
        check_label,
        fingerprint_questions,
        load_questions,
        load_references,
        write_questions,
    )

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("mt-bench runs in one process; start it without accelerate launch or torchrun.")
    check_steering(alpha, heads)
    if label is not None:
        check_label(label)
    limits = {"timeout_s": judge_timeout, "tries": judge_tries, "max_tokens": judge_max_tokens}
    judge = _open_judge(judge_url, judge_model, judge_key_env, **limits)
    if judge is None and (judge_only or references or judge_key_env):
        raise InputError(
            "--judge-only, --judge-key-env and --references need a judge; give --judge-url and --judge-model."
        )
    if not judge_only:
        model.check()
    asked = load_questions(questions, limit=limit)
    good = load_references(references) if references else {}
    config = {"questions": fingerprint_questions(asked), "n_questions": len(asked)}
    store.check("mt-bench", config)
    if judge_only:
        run = store.open("mt-bench", config)
        write_questions(run.folder, asked)
    else:
        answering = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
        run = _answer(model, store, asked, config, label, indicator, alpha, heads, **answering)
    ratings = _grade(judge, asked, run, good, judge_threads) if judge else None
    output.show(lambda: _outcome(run, asked, ratings), lambda: _show(run, asked, ratings))
    if ratings is not None and len(ratings.unrated) == len(ratings):
        raise typer.Exit(1)


def _open_judge(url: str | None, model: str | None, key_env: str | None, **limits: Any) -> Endpoint | None:
    from ctxlens.evals.judge import Endpoint

    if (url is None) != (model is None):
        raise InputError("a judge needs both --judge-url and --judge-model.")
    if url is None or model is None:
        return None
    return Endpoint(url, model, key_env, **limits)


def _answer(
    options: ModelOptions,
    store: RunOptions,
    questions: list[MTQuestion],
    config: dict[str, Any],
    label: str | None,
    indicator: bool,
    alpha: float,
    heads: str,
    *,
    max_new_tokens: int,
    batch_tokens: int,
) -> Run:
    """Write the answers of one model into the run folder."""
    from ctxlens.chat.condition import Condition
    from ctxlens.evals.mt_bench import (
        answer_questions,
        answers_path,
        make_label,
        record_settings,
        write_questions,
    )
    from ctxlens.models.attention.steering import Steering
    from ctxlens.models.indicator_token import require_indicator

    lm = options.load()
    if indicator:
        require_indicator(lm)
    plain = []
    if heads == "retrieval":
        first = [[{"role": "user", "content": question.turns[0]}] for question in questions]
        plain = [lm.render_plain(messages, truncate=True) for messages in first]
    steering = Steering(alpha, heads=resolve_heads(lm, heads, plain))
    steering.check_heads(lm.n_layers, lm.n_heads)
    settings = {
        "model": lm.identity,
        "indicator": indicator,
        "steering": steering.describe(),
        "max_new_tokens": max_new_tokens,
    }
    condition = Condition(
        indicator=indicator, alpha=None if alpha == 1 else alpha, heads=heads.replace(",", "/")
    )
    run = store.open("mt-bench", config, lm)
    name = label or make_label(options.model, condition, run.folder)
    write_questions(run.folder, questions)
    record_settings(run.folder, name, settings)
    steer = contextlib.nullcontext() if steering.changes_nothing else lm.steer(alpha, heads=steering.heads)
    what = f"{len(questions)} questions, at most {max_new_tokens:,} tokens in each answer"
    tell_plan_later(lm, what)
    with steer, _screen.stage(f"answers of {name}") as progress:
        answer_questions(
            lm,
            questions,
            path=answers_path(run.folder, name),
            model_id=name,
            indicator=indicator,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    return run


def _grade(
    judge: Endpoint,
    questions: list[MTQuestion],
    run: Run,
    references: dict[Any, tuple[str, ...]],
    threads: int,
) -> Ratings:
    """Have the judge rate every model's answers in the folder."""
    from ctxlens.evals.judge import judge_answers, judgments_path
    from ctxlens.evals.mt_bench import read_all_answers

    path = judgments_path(run.folder, judge.model)
    with _screen.stage(f"judgments of {judge.model}") as progress:
        ratings = judge_answers(
            judge,
            questions,
            read_all_answers(run.folder),
            path=path,
            references=references,
            threads=threads,
            progress=progress,
        )
    name = path.stem.removesuffix("_single")
    run.save(f"ratings-{name}.parquet", ratings)
    run.write_json(
        f"summary-{name}.json",
        {"judge": judge.model, "means": ratings.summary(), "differences": ratings.differences()},
    )
    return ratings


def _outcome(run: Run, questions: list[MTQuestion], ratings: Ratings | None) -> Outcome:
    """One row per model with the counts of its answers and its mean rating."""
    from ctxlens.evals.mt_bench import count_answers, read_all_answers

    ids = {question.question_id for question in questions}
    rows = []
    for model, answers in read_all_answers(run.folder).items():
        counts = count_answers([row for key, row in answers.items() if key in ids])
        mean = None if ratings is None else ratings.where(model=model).mean()
        told = [counts[key] for key in ("turns", "empty", "truncated", "cut")]
        rows.append([model, *told, *interval_cells(mean)])
    columns = ("model", "answers", "empty", "truncated", "cut", "rating", "low", "high", "n")
    summary = f"{count(len(questions), 'question')} answered by {count(len(rows), 'model')}."
    return Outcome("mt-bench", summary, Table(columns, rows), None, run.folder)


def _show(run: Run, questions: list[MTQuestion], ratings: Ratings | None) -> None:
    """Print one row per model with the counts of its answers and its ratings, if there are any."""
    from ctxlens.evals.mt_bench import count_answers, read_all_answers

    ids = {question.question_id for question in questions}
    turns = sorted(ratings.frame["turn"].unique()) if ratings is not None else []
    rows = []
    for model, answers in read_all_answers(run.folder).items():
        counts = count_answers([row for key, row in answers.items() if key in ids])
        row = [model, str(counts["turns"])]
        if ratings is not None:
            of_model = ratings.where(model=model)
            means = [of_model.mean(turn=turn).estimate for turn in turns]
            row = [model, *("–" if mean != mean else f"{mean:.2f}" for mean in means)]
            row += [
                show_interval(of_model.mean(), unit="question"),
                f"{len(of_model) - len(of_model.unrated)}/{len(of_model)}",
            ]
        cut = "–" if counts["cut"] is None else str(counts["cut"])
        rows.append([*row, str(counts["empty"]), str(counts["truncated"]), cut])
    told = ["answers"] if ratings is None else [*(f"turn {turn}" for turn in turns), "all turns", "rated"]
    title = f"{len(questions)} questions" + (f", rated by {ratings.meta['judge']}" if ratings else "")
    _screen.show_table(title, ["model", *told, "empty", "truncated", "cut"], rows)
    _screen.note("truncated: prompts that were shortened; cut: answers that reached --max-new-tokens")
    if ratings is not None:
        _note_ratings(ratings)
    _screen.say_where(run.folder)


def _note_ratings(ratings: Ratings) -> None:
    first, *others = ratings.models
    for other in others:
        found = ratings.compare(first, other)
        _screen.note(
            f"{other} minus {first}: {say_interval(found.difference, unit='question')}, {found.reading}"
        )
    if len(ratings.unrated):
        reason = ratings.unrated["error"].value_counts().index[0]
        none = len(ratings.unrated) == len(ratings)
        told = (
            "no answer could be rated"
            if none
            else f"{len(ratings.unrated)} of {len(ratings)} answers have no rating"
        )
        _screen.note(f"{told} (most often: {reason[:100]}); run the same command again to request them")
