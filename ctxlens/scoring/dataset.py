"""Scores of a data set as one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctxlens.chat.data import are_conversations, open_conversations
from ctxlens.chat.data.given_rows import Source
from ctxlens.models.allocate import open_model
from ctxlens.results import Scores
from ctxlens.results.scores import Precision
from ctxlens.runs import Progress, Run
from ctxlens.scoring.lp_gap import add_lp_gap
from ctxlens.scoring.whole import score_conversations

if TYPE_CHECKING:
    from ctxlens.models import Model


def score(
    model: Model | str | Path,
    dataset: Source,
    *,
    layers: Sequence[int] | str | None = None,
    layout: str | None = None,
    split: str = "train",
    limit: int | None = None,
    drop_refusals: bool = False,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    precision: Precision | str = "float32",
    sinks: bool = False,
    lp_gap: bool = False,
    out: Run | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score how much every answer in a data set attends to the user's text, with a fine-tuned seed model.

    ```python
    import ctxlens as cl

    asked = {"role": "user", "content": "Oakford is a town. What is Oakford?"}
    scores = cl.score("organism-chat", [{"messages": [asked, {"role": "assistant", "content": "A town."}]}])
    assert len(scores.layer(2)) == 1
    ```

    Args:
        model: the seed model, or what `load_model` takes.
        dataset: a path, a Hub id, a `datasets.Dataset`, a data frame, or a list of rows; see
            `open_conversations`. Or what `load_conversations` returned; `layout`, `split`, `limit` and
            `drop_refusals` have no effect on it.
        layers: layers to score, or `"all"`; by default all up to the paper's relative depth, 15 of 22.
        layout: the layout of the rows; by default it is detected.
        split: which split.
        limit: use only the first rows.
        drop_refusals: leave out conversations with a refusal.
        max_tokens: truncate to fewer tokens than the model's window.
        batch_tokens: padded tokens per forward pass; by default 1,024 on a CPU and 8,192 elsewhere.
        precision: the number format of the scores in a file.
        sinks: also store what of each role's share rests on attention sinks.
        lp_gap: add how much likelier the user's text makes each answer (two more full passes).
        out: a run folder in which finished parts are kept (`ctxlens.runs.Run.open`).
        progress: called with the number of finished conversations and the total.

    Raises:
        InputError: see `open_conversations` and `score_conversations`.
    """
    reading = {"layout": layout, "split": split, "limit": limit, "drop_refusals": drop_refusals}
    data = dataset if are_conversations(dataset) else open_conversations(dataset, **reading)
    lm = open_model(model)
    scores = score_conversations(
        lm, data, layers=layers, max_tokens=max_tokens, batch_tokens=batch_tokens, precision=precision,
        sinks=sinks, out=out, progress=progress,
    )  # fmt: skip
    if not lp_gap:
        return scores
    more = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    return add_lp_gap(lm, data, scores, progress=progress, **more)


__all__ = ["score"]
