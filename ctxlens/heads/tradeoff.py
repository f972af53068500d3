"""What steering gains and costs: needle recall compared with answers that need no context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctxlens.errors import InputError
from ctxlens.evals.closed_book import AnsweredQuestion, run_closed_book
from ctxlens.models import Model
from ctxlens.results import Ability, NeedleGrid
from ctxlens.runs import Parts, Progress, Run


def answer_nats(
    model: Model,
    questions: Sequence[AnsweredQuestion],
    *,
    template: bool = True,
    batch_tokens: int = 8192,
) -> Float[np.ndarray, " question"]:
    """How surprising the model finds the right answers to questions that are asked without context.

    The result is in mean nats per token (the logarithm of the perplexity) over the words after each answer's
    prefix; less is better. Active steering applies.
    """
    render = model.render if template else model.render_plain
    chats, starts = [], []
    for item in questions:
        answer = {"role": "assistant", "content": item.sentence}
        chat = render([{"role": "user", "content": item.question}, answer], continue_final_message=True)
        given = len(item.prefix) if item.sentence.startswith(item.prefix) else 0
        starts.append(chat.text.rindex(item.sentence) + given)
        chats.append(chat)
    found = model.logprobs(chats, batch_tokens=batch_tokens)
    nats = []
    for chat, start, by_token in zip(chats, starts, found, strict=True):
        counted = chat.spans[chat.response_positions(), 1] > start
        nats.append(-by_token[counted].mean())
    return np.array(nats, dtype=float)


def side_effects(
    model: Model,
    grid: NeedleGrid,
    questions: Sequence[AnsweredQuestion],
    *,
    template: bool = True,
    max_new_tokens: int = 30,
    label: str | None = None,
    out: Run | None = None,
    progress: Progress | None = None,
) -> Ability:
    """Ask questions without context under every setting of a steering sweep.

    Args:
        model: the model of the sweep.
        grid: a grid from `steering_sweep`, whose α, head sets and mode are used.
        questions: questions with the right answers.
        template: whether the chat template is applied.
        max_new_tokens: maximum length of a response, in tokens.
        label: the name in the table; by default the model's own.
        out: a run folder in which each finished setting is kept.
        progress: called with the number of finished settings and the total.

    Returns:
        One row per question and setting, with the additional columns `alpha`, `heads`, `draw` and
        `nats_per_token` (of the right answer).

    Raises:
        InputError: there are no questions, or the grid is not from a sweep.
    """
    if "head_sets" not in grid.meta:
        raise InputError(
            "this grid is not from a steering sweep, so it has no settings to measure side effects for."
        )
    chosen: dict[tuple[str, int], Any] = {
        (one["heads"], one["draw"]): one["chosen"] for one in grid.meta["head_sets"]
    }
    settings = list(grid.frame[["alpha", "heads", "draw"]].drop_duplicates().itertuples(index=False))
    asked = [[one.question, one.sentence, one.prefix] for one in questions]
    made_of = [model.identity, asked, template, max_new_tokens, grid.meta.get("fingerprint")]
    parts = Parts(out, "side-effects", made_of)
    tables = []
    for done, (alpha, heads, draw) in enumerate(settings, start=1):

        def ask(alpha: float = alpha, heads: str = heads, draw: int = draw) -> list[dict[str, Any]]:
            with model.steer(alpha, heads=_heads(chosen.get((heads, draw), "all")), mode=grid.meta["mode"]):
                table = run_closed_book(
                    model, questions, template=template, max_new_tokens=max_new_tokens,
                    label=label or model.name,
                ).to_frame()  # fmt: skip
                nats = answer_nats(model, questions, template=template)
            return json.loads(table.assign(nats_per_token=nats).to_json(orient="records"))

        rows = pd.DataFrame(parts.get(f"{alpha:g}-{heads}-{draw}", ask))
        tables.append(rows.assign(alpha=alpha, heads=heads, draw=draw))
        if progress:
            progress(done, len(settings))
    meta = {"model": label or model.name, "identity": dict(model.identity), "template": template}
    return Ability(pd.concat(tables, ignore_index=True), meta)


def _heads(chosen: Any) -> Any:
    return chosen if chosen == "all" else tuple((int(layer), int(head)) for layer, head in chosen)


__all__ = ["answer_nats", "side_effects"]
