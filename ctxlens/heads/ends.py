"""One head at a time in long texts: interventions on the question and the answer alone.

The text is read once, untouched. An intervention then acts on the question and the answer, so a map of all
heads takes one reading of the text, and one of the question for each head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from ctxlens.chat.roles import RenderedChat
from ctxlens.evals.needle.prompts import Cell
from ctxlens.heads.acting import Action
from ctxlens.heads.answers import Answers
from ctxlens.heads.parts import ARRAY_PARTS
from ctxlens.models import Model
from ctxlens.models.continued import ContinuedChat
from ctxlens.results import HeadMap
from ctxlens.runs import Parts, Progress, Run


def act_after_the_text(
    model: Model,
    answers: Answers,
    kinds: Sequence[str],
    *,
    alpha: float = 0.1,
    out: Run | None = None,
    progress: Progress | None = None,
) -> dict[str, HeadMap]:
    """Steer or ablate one head at a time at the tokens after the text, and measure the change by cell.

    The measure is the log-probability of the needle's words after its prefix. See `act_on_each_head` for the
    same with interventions on all tokens.

    Args:
        model: the model; its backend must continue after cached tokens (`native`).
        answers: the cells and how they are asked.
        kinds: some of `steer`, `zero`, `mean` and `blind`.
        alpha: strength of steering.
        out: a run folder in which finished cells are kept.
        progress: called with the number of finished cells and the total.

    Returns:
        By kind, the log-probability with the intervention minus that without, in nats per token.

    Raises:
        InputError: an unknown kind, or alpha outside (0, 1].
        UnsupportedModelError: the model cannot continue after cached tokens.
    """
    actions = {kind: Action(model, kind, alpha, answers) for kind in kinds}
    made_of = [model.identity, answers.as_dict(), [action.describe() for action in actions.values()]]
    parts = Parts(out, "maps-after-the-text", made_of, form=ARRAY_PARTS)
    found = []
    for done, (chat, cell) in enumerate(zip(answers.said(model), answers.cells, strict=True), start=1):
        found.append(parts.get(str(cell.number), partial(_effects, model, answers, chat, cell, actions)))
        if progress:
            progress(done, len(answers.cells))
    before = np.array([one[0, 0, 0] for one in found])
    meta = {
        **answers.describe(model),
        "measure": "logprob",
        "acts at": "the tokens after the text",
        "quantity": "change of log-probability of the needle, nats per token",
        "untouched": float(before.mean()),
    }
    return {
        kind: HeadMap(
            np.stack([one[1 + at] for one in found]), answers.contexts, kind, {**meta, **action.describe()}
        )
        for at, (kind, action) in enumerate(actions.items())
    }


def _effects(
    model: Model, answers: Answers, chat: RenderedChat, cell: Cell, actions: Mapping[str, Action]
) -> Float[np.ndarray, "one_and_kind layer head"]:
    """The log-probability without intervention (the same in the whole first map), and the changes."""
    end = ContinuedChat(model, chat, first_after_text(chat, cell))
    positions = answers.positions(chat, cell)
    before = float(end.logprobs(positions).mean())
    maps = np.full((1 + len(actions), model.n_layers, model.n_heads), before)
    for at, action in enumerate(actions.values(), start=1):
        for layer, head in np.ndindex(model.n_layers, model.n_heads):
            with action.apply([(layer, head)]):
                maps[at, layer, head] = end.logprobs(positions).mean() - before
    return maps


def first_after_text(chat: RenderedChat, cell: Cell) -> int:
    """The position of the first token that begins after the cell's text."""
    end = chat.text.index(cell.context.text) + len(cell.context.text)
    return int(np.searchsorted(chat.spans[:, 0], end))


__all__ = ["act_after_the_text", "first_after_text"]
