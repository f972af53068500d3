"""`ctxlens generate`: answer the last user turn."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from ctxlens.cli import _outcomes, _screen
from ctxlens.cli._inputs import (
    HeadsOption,
    Mode,
    ModeOption,
    NewTokensOption,
    PrefixOption,
    check_steering,
    choose_mode,
    open_questions,
    render_questions,
    resolve_heads,
)
from ctxlens.cli._messages import MessagesOptions
from ctxlens.cli._options import ModelOptions, RenderOptions, note_choice, verb
from ctxlens.cli._output import OutputOptions, count
from ctxlens.cli._plan import tell_plan

_ALPHA = "Steer to the user: factor on the attention to all other tokens, in (0, 1]."
AlphaOption = Annotated[
    float | None, typer.Option(help=f"{_ALPHA} [dim]default: 1 (no steering)[/dim]", metavar="A")
]
SteeringAlphaOption = Annotated[
    float | None,
    typer.Option(help=f"{_ALPHA} [dim]default: 0.5, unless --target-share is given[/dim]", metavar="A"),
]
ShareOption = Annotated[
    float | None,
    typer.Option(
        "--target-share",
        help="Instead of --alpha: share of attention that the user's tokens get, in (0, 1).",
        metavar="T",
    ),
]


@verb(
    "ctxlens generate --prompt 'The best thing to do in Oakford is to paint. What is it?'",
    "ctxlens generate --messages data.parquet --row 3",
    "ctxlens generate -m runs/train --messages question.json --indicator",
    "ctxlens generate -m organism-chat --messages question.json --alpha 0.1 > answer.txt",
)
def generate(
    messages: MessagesOptions,
    model: ModelOptions,
    rendering: RenderOptions,
    output: OutputOptions,
    indicator: Annotated[
        bool,
        typer.Option(
            "--indicator", help="Append the model's indicator, which asks for an answer from the context."
        ),
    ] = False,
    alpha: AlphaOption = None,
    target_share: ShareOption = None,
    mode: ModeOption = Mode.PAPER,
    heads: HeadsOption = "all",
    prefix: PrefixOption = None,
    max_new_tokens: NewTokensOption = 100,
) -> None:
    """Answer the last user turn greedily. Only the answer is printed to stdout."""
    asked = messages.read()
    if alpha is None and target_share is None:
        alpha = 1.0
    check_steering(alpha, heads, target_share, mode)
    questions = open_questions(asked.conversations, prefix, indicator=indicator)
    model.check()

    from ctxlens.models.indicator_token import require_indicator

    lm = model.load()
    if indicator:
        require_indicator(lm)
    how = rendering.as_dict()
    chats = render_questions(lm, questions, max_new_tokens=max_new_tokens, **how)
    steer_ = contextlib.nullcontext()
    if alpha != 1:
        plain = render_questions(lm, questions, max_new_tokens=max_new_tokens, **how, plain=True)
        steer_ = lm.steer(
            alpha, heads=resolve_heads(lm, heads, plain), mode=choose_mode(mode, target_share),
            target_share=target_share,
        )  # fmt: skip
    with steer_:
        note_choice(lm)
        tokens = sum(chat.n_tokens for chat in chats)
        tell_plan(
            lm, count(len(chats), "conversation"), tokens, lambda some: lm.generate(some, max_new_tokens=1),
            written=len(chats) * max_new_tokens,
        )  # fmt: skip
        with _screen.stage("answers") as progress:
            answers = lm.generate(chats, max_new_tokens=max_new_tokens, progress=progress)
    _screen.note_truncated(chats)
    _screen.note_left_out(chats)
    output.show(
        lambda: _outcomes.answers_outcome(
            "generate", {"steered" if alpha != 1 else "unsteered": answers}, lm.name
        ),
        lambda: _screen.say_answers(answers),
    )
