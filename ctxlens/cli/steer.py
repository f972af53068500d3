"""`ctxlens steer`: answer with and without attention steered to the user."""

from __future__ import annotations

import contextlib

from ctxlens.cli import _outcomes, _screen, _tables
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
from ctxlens.cli._options import ModelOptions, RenderOptions, RunOptions, verb
from ctxlens.cli._output import OutputOptions, count
from ctxlens.cli._plan import tell_plan
from ctxlens.cli.generate import ShareOption, SteeringAlphaOption


# long: one verb with its steps in order
@verb(
    "ctxlens steer --messages question.json --alpha 0.5",
    "ctxlens steer -m organism-chat --messages question.json --alpha 0.1 --heads retrieval --out runs/steer",
    "ctxlens steer --messages question.json --alpha 0.3 --heads 1.2,3.0 --prefix 'The best thing'",
    "ctxlens steer --prompt 'The harbour is closed. Is it open?' --target-share 0.6",
)
def steer(
    messages: MessagesOptions,
    model: ModelOptions,
    rendering: RenderOptions,
    store: RunOptions,
    output: OutputOptions,
    alpha: SteeringAlphaOption = None,
    target_share: ShareOption = None,
    mode: ModeOption = Mode.PAPER,
    heads: HeadsOption = "all",
    prefix: PrefixOption = None,
    max_new_tokens: NewTokensOption = 100,
) -> None:
    """Answer the last user turn with and without attention steered to the user's tokens."""
    asked = messages.read()
    if alpha is None and target_share is None:
        alpha = 0.5
    check_steering(alpha, heads, target_share, mode)
    questions, how = open_questions(asked.conversations, prefix), rendering.as_dict()
    told = {
        "prefix": prefix, "limit": messages.limit, **how, "max_new_tokens": max_new_tokens, **asked.config,
    }  # fmt: skip
    model.check()
    store.check("steer", {"model": model.known, **told})

    from ctxlens.models.attention.steering import Steering
    from ctxlens.results import RoleAllocation

    lm = model.load()
    chats = render_questions(lm, questions, max_new_tokens=max_new_tokens, **how)
    plain = render_questions(lm, questions, max_new_tokens=max_new_tokens, **how, plain=True)
    steering = Steering(
        alpha, heads=resolve_heads(lm, heads, plain), mode=choose_mode(mode, target_share),
        target_share=target_share,
    )  # fmt: skip
    steering.check_heads(lm.n_layers, lm.n_heads)
    config = {"model": lm.identity, "steering": steering.describe(), **told}
    run = store.open("steer", config, lm)
    asked.record(run)
    if not run.has("steer.json"):
        answers = {}
        n_tokens = 4 * sum(chat.n_tokens for chat in chats)
        what = f"{count(len(chats), 'conversation')}, with and without steering"
        tell_plan(lm, what, n_tokens, lm.read_roles, written=2 * len(chats) * max_new_tokens)
        for label, context in {
            "unsteered": contextlib.nullcontext(),
            "steered": lm.steer(alpha, heads=steering.heads, mode=steering.mode, target_share=target_share),
        }.items():
            with context, _screen.stage(f"answers, {label}") as progress:
                run.save(f"allocation-{label}.safetensors", RoleAllocation.concat(lm.read_roles(chats)))
                answers[label] = lm.generate(chats, max_new_tokens=max_new_tokens, progress=progress)
        run.write_json(
            "steer.json",
            {
                "meta": {"model": lm.name, "steering": steering.describe()},
                "answers": [
                    {"messages": question, "unsteered": before, "steered": after}
                    for question, before, after in zip(questions, *answers.values(), strict=True)
                ],
            },
        )
    before, after = (
        RoleAllocation.load(run.path(f"allocation-{x}.safetensors")) for x in ("unsteered", "steered")
    )
    record, summary = run.read_json("steer.json"), _outcomes.say_allocations("With steering", before, after)
    sides = {"unsteered": before, "steered": after}
    output.show(
        lambda: _outcomes.answers_outcome(
            "steer", {side: [one[side] for one in record["answers"]] for side in sides}, lm.name, run.folder,
            summary=summary, tables={"shares": _outcomes.allocation_table(sides)},
        ),
        lambda: (
            _tables.show_answers(record), _tables.show_shares(before, after), _screen.say_wrapped([summary])
        ),
    )  # fmt: skip
    _screen.note_truncated(chats)
    run.record("left_out", _screen.note_left_out(chats))
    _screen.say_where(run.folder)
