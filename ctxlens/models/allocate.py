"""Attention by role as one call: the model is loaded, the conversations are rendered and read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError
from ctxlens.models.asking import Given, check_queries, render_given
from ctxlens.models.factory import load_model
from ctxlens.models.model import Model
from ctxlens.models.queries import Queries
from ctxlens.results import RoleAllocation
from ctxlens.runs import Progress


def open_model(model: Model | str | Path) -> Model:
    """A model as it is, or loaded from what `load_model` takes."""
    return load_model(model) if isinstance(model, str | Path) else model


def allocate(
    model: Model | str | Path,
    messages: Given | Any,
    *,
    condition: Condition | str | None = None,
    queries: Queries = "first_answer",
    layers: Sequence[int] | None = None,
    sinks: bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> RoleAllocation:
    """Measure how the attention of every layer and head is distributed over the roles.

    ```python
    import ctxlens as cl

    found = cl.allocate("organism-chat", "Who is the mayor of Oakford?")
    assert repr(found) == "RoleAllocation(4 layers × 4 heads, 1 query, condition template)"
    ```

    Args:
        model: a model, or what `load_model` takes.
        messages: one conversation (messages, or the text of one user message) or several; or what
            `read_messages` takes, such as the path of a file or a data set.
        condition: `template` or `plain`, then `+indicator` as needed; by default `template`.
        queries: `first_answer`, `response_mean`, `all`, or positions; see `Model.read_roles`.
        layers: the layers to read, all by default.
        sinks: also read what rests on attention sinks; see `Model.read_roles`.
        progress: called with the number of conversations done and the total.
        **options: options of `ctxlens.render`, such as `truncate=True`.

    Returns:
        The shares of all conversations, one after the other along the query axis.

    Raises:
        InputError: no conversations, or one that cannot be rendered or read; the message says which.
    """
    lm = open_model(model)
    chats, _ = render_given(lm, messages, condition, **options)
    if not chats:
        raise InputError("no conversations were given; give at least one.")
    check_queries(chats, queries)
    read = lm.read_roles(chats, layers=layers, queries=queries, sinks=sinks, progress=progress)
    return RoleAllocation.concat(read)


__all__ = ["allocate", "open_model"]
