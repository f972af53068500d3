"""Conversations as people write them, rendered for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ctxlens.chat.condition import Condition
from ctxlens.chat.data import read_messages
from ctxlens.chat.data.annotate import mark_last_question
from ctxlens.chat.roles import RenderedChat, check_messages
from ctxlens.errors import InputError
from ctxlens.models.indicator_token import require_indicator
from ctxlens.models.queries import Queries, find_queries

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Given: TypeAlias = "RenderedChat | str | Path | Messages | Sequence[RenderedChat | str | Messages]"
"""One conversation or several: rendered, as messages, as the text of one user message, or in a file."""

ASKED = ("template", "plain", "template+indicator", "plain+indicator")
"""The conditions under which messages can be rendered without further material."""


@runtime_checkable
class Renders(Protocol):
    """What rendering requires of a model; `ctxlens.load_model` returns one."""

    @property
    def name(self) -> str: ...
    @property
    def indicator(self) -> str | None: ...

    def render(self, messages: Messages, **options: Any) -> RenderedChat:
        """Render with the chat template."""
        ...

    def render_plain(self, messages: Messages, **options: Any) -> RenderedChat:
        """Render without it."""
        ...


def render_given(
    model: Renders,
    given: Given | Any,
    condition: Condition | str | None = None,
    *,
    continues: bool = False,
    **options: Any,
) -> tuple[list[RenderedChat], bool]:
    """Render conversations for a model; rendered ones are taken as they are.

    A conversation that ends with a user turn is followed by the generation prompt.

    Args:
        model: the model.
        given: see `Given`; or anything else that `read_messages` takes, such as the path of a file.
        condition: one of `ASKED`, by default `template`.
        continues: whether a last message of the assistant is the beginning of the answer, not all of it.
        **options: as in `ctxlens.render`.

    Returns:
        The rendered conversations, and whether a single conversation was given.

    Raises:
        InputError: no conversation, one that cannot be rendered, a condition that is not in `ASKED`, or a
            condition or options for a conversation that is rendered already.
    """
    chats, single = list_conversations(given)
    rendered = [chat for chat in chats if isinstance(chat, RenderedChat)]
    if rendered and (condition is not None or options or len(rendered) < len(chats)):
        raise InputError(
            "a rendered conversation cannot be rendered again; give messages, or rendered conversations "
            "alone without condition and options."
        )
    if rendered or not chats:
        return rendered, single
    asked = Condition.parse("template" if condition is None else condition)
    if asked.name not in ASKED:
        raise InputError(f"messages cannot be rendered as {asked.name!r}; choose from {', '.join(ASKED)}.")
    if asked.indicator:
        require_indicator(model)
        chats = [mark_last_question(messages) for messages in chats]
    if continues:
        options["continue_final_message"] = True
    return render_each(model.render if asked.template else model.render_plain, chats, **options), single


def list_conversations(given: Any) -> tuple[list[Any], bool]:
    """Conversations, each as messages or rendered, and whether a single one was given.

    Raises:
        InputError: a text that is empty or names a file, or messages that are malformed.
    """
    if isinstance(given, str | RenderedChat):
        return [_as_messages(given) if isinstance(given, str) else given], True
    if not isinstance(given, list | tuple):
        return list(read_messages(given).conversations), False
    if given and all(isinstance(one, Mapping) for one in given):
        if any("role" in one for one in given):
            return [_as_messages(given)], True
        return list(read_messages(list(given)).conversations), False
    return [one if isinstance(one, RenderedChat) else _as_messages(one) for one in given], False


def render_each(
    render: Callable[..., RenderedChat], conversations: Sequence[Messages], **options: Any
) -> list[RenderedChat]:
    """Render every conversation; one that ends with a user turn is left open for the answer.

    Args:
        render: renders one conversation, such as `Model.render`.
        conversations: the messages of each.
        **options: options of `render`. With `continue_final_message`, only conversations that end with an
            assistant turn are continued.

    Raises:
        InputError: a conversation is malformed, too long, or refused by the template; the message says which.
    """
    chats = []
    continues = options.pop("continue_final_message", False)
    for i, messages in enumerate(conversations):
        try:
            is_open = messages[-1]["role"] != "assistant"
            how = {"add_generation_prompt": is_open, **options}
            if continues and not is_open:
                how["continue_final_message"] = True
            chats.append(render(messages, **how))
        except InputError as error:
            if len(conversations) == 1:
                raise
            raise type(error)(f"conversation {i}: {error}") from error
    return chats


def check_queries(chats: Sequence[RenderedChat], queries: Queries) -> None:
    """Raise `InputError` if a conversation lacks the positions whose attention is read; says which one."""
    for i, chat in enumerate(chats):
        try:
            find_queries(chat, queries, None)
        except InputError as error:
            raise InputError(f"conversation {i}: {error}") from error


def _as_messages(given: Any) -> list[Mapping[str, Any]]:
    """One conversation as messages; a text is one user message."""
    if isinstance(given, str):
        if not given.strip():
            raise InputError("the text of the user message is empty.")
        if len(given) < 256 and "\0" not in given and Path(given).is_file():
            raise InputError(
                f"{given} is a file, and a text is taken as one user message; give pathlib.Path({given!r}), "
                "or the messages themselves."
            )
        return [{"role": "user", "content": given}]
    check_messages(given)
    return list(given)


__all__ = [
    "ASKED", "Given", "Messages", "Renders", "check_queries", "list_conversations", "render_each",
    "render_given",
]  # fmt: skip
