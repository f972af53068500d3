"""Copying heads: how often a head's most attended token is the needle token being generated.

The retrieval score of Wu et al. 2024 (Retrieval Head Mechanistically Explains Long-Context Factuality,
arXiv 2404.15574), and the attention to the user by which the paper's B.3 chooses heads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.evals.needle.prompts import Cell
from ctxlens.heads.answers import Answers, needle_tokens
from ctxlens.heads.parts import ARRAY_PARTS
from ctxlens.models import Model
from ctxlens.results import HeadMap
from ctxlens.runs import Parts, Progress, Run


def copying_map(
    model: Model,
    answers: Answers,
    *,
    own: bool = False,
    out: Run | None = None,
    progress: Progress | None = None,
) -> HeadMap:
    """The retrieval score of every head, 0 to 1, by cell.

    While a needle token is generated, a head scores if the token that it attends to most, among all visible
    ones, belongs to the needle in the context and is the same token. The score is the share of the generated
    needle tokens that the head copies in this way. With teacher forcing, these are the tokens after the
    needle's prefix.

    Args:
        model: the model.
        answers: the cells and how they are asked.
        own: use the model's own greedy answer instead of the needle. A token of the answer counts if it
            occurs in the needle; the score is the number of such tokens that the head copies, divided by the
            number of all needle tokens after the prefix.
        out: a run folder in which finished cells are kept.
        progress: called with the number of finished cells and the total.

    Returns:
        Scores by cell; NaN for a cell whose needle sentence shares no token with the needle in the context.
    """
    wanted = [
        int(np.isin(chat.tokens[answers.positions(chat, cell)], chat.tokens[needle_tokens(chat, cell)]).sum())
        for chat, cell in zip(answers.said(model), answers.cells, strict=True)
    ]
    made_of = [model.identity, answers.as_dict(), own]
    parts = Parts(out, "copying", made_of, form=ARRAY_PARTS)
    if own:
        said = _own_answers(model, answers, Parts(out, "copying-responses", made_of))
    else:
        said = [cell.needle.sentence for cell in answers.cells]
    effects = []
    for number, (chat, cell) in enumerate(zip(answers.said(model, said), answers.cells, strict=True)):

        def score(chat: RenderedChat = chat, cell: Cell = cell, number: int = number) -> np.ndarray:
            if said[number] == answers.given(cell):  # the model adds nothing
                return np.zeros((model.n_layers, model.n_heads))
            positions = answers.positions(chat, cell, said[number])
            return score_copying(model, chat, needle_tokens(chat, cell), positions, wanted[number])

        effects.append(parts.get(str(number), score))
        if progress:
            progress(number + 1, len(said))
    meta = {
        **answers.describe(model),
        "quantity": "share of the needle's tokens that the head copies",
        "own": own,
    }
    return HeadMap(np.stack(effects), answers.contexts, "copying", meta)


def _own_answers(model: Model, answers: Answers, parts: Parts) -> list[str]:
    """The given words followed by the model's own answer."""
    texts = parts.get("all", lambda: answers.generate(model))
    return [answers.given(cell) + text.rstrip() for cell, text in zip(answers.cells, texts, strict=True)]


def score_copying(
    model: Model, chat: RenderedChat, needle: np.ndarray, positions: np.ndarray, n_wanted: int
) -> Float[np.ndarray, "layer head"]:
    """The copying score of every head in one conversation.

    Args:
        model: the model.
        chat: the conversation.
        needle: which tokens belong to the needle in the context, `[pos]`.
        positions: the generated tokens; only those that occur in the needle can be copied.
        n_wanted: number of tokens that a perfect head would copy.
    """
    said = positions[np.isin(chat.tokens[positions], chat.tokens[needle])]
    if not n_wanted:
        return np.full((model.n_layers, model.n_heads), np.nan)
    if not len(said):
        return np.zeros((model.n_layers, model.n_heads))
    pattern = model.read_patterns(chat, queries=(said - 1).tolist())
    best = pattern.argmax(-1)
    copied = needle[best] & (chat.tokens[best] == chat.tokens[said])
    return np.minimum(copied.sum(-1) / n_wanted, 1.0)


def user_share_map(model: Model, answers: Answers, *, progress: Progress | None = None) -> HeadMap:
    """Attention from the answer's first position to the user's tokens, without template and without sinks.

    Attention that rests on sinks among the user's tokens does not count where sinks can be measured. The
    share as the paper has it, sinks included, is `meta["with_sinks"]`, the mean by layer and head. The best
    head in each layer is the paper's retrieval head (B.3).
    """
    plain = replace(answers, condition="plain+prefix", indicator=False)
    read = model.read_roles(
        plain.prompts(model), queries="first_answer", batch_tokens=answers.batch_tokens, progress=progress
    )
    counted = np.stack([one.share(Role.USER)[..., 0] for one in read]).astype(float)
    measured = all(one.resting is not None for one in read)
    seen = [one.with_sinks_apart() if measured else one for one in read]
    shares = np.stack([one.share(Role.USER)[..., 0] for one in seen]).astype(float)
    meta = {
        **plain.describe(model),
        "quantity": "share of attention to the user's tokens" + (", without sinks" if measured else ""),
        **({"with_sinks": counted.mean(0).tolist()} if measured else {}),
    }
    return HeadMap(shares, answers.contexts, "user share", meta)


__all__ = ["copying_map", "score_copying", "user_share_map"]
