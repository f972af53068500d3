"""Where in a rendered conversation each message's own text is, decided by following it through the template.

The template runs on texts that remember who said each of their characters (`ctxlens.chat.roles.traced`). What
it copies is the speaker's, what it writes itself is the template's, and what it changes beyond recognition is
refused. Nothing is searched for, so text that looks like a marker, or like another message, changes nothing.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from ctxlens.chat.roles.chat import Message
from ctxlens.chat.roles.said import REASONING_KEYS, Field, plain_data, trace_messages
from ctxlens.chat.roles.template import run_template
from ctxlens.chat.roles.traced import Rewritten, Traced, concat, part, pieces, plain_text
from ctxlens.errors import InputError, RenderError, first_line

DATE_VARIABLE = "CTXLENS_DATE"
"""Environment variable with the date and time (ISO 8601) that templates print as the present."""

_LEFT_OPEN = "CONTINUE_FINAL_MESSAGE_TAG "
"""What transformers appends to a message that is left open, to find the place where it cuts the text."""

_TAG = -2
"""The owner of that tag."""


class Place(NamedTuple):
    """Characters ``[start, end)`` of the rendered text that a field said."""

    start: int
    end: int
    field: Field


@dataclass(frozen=True)
class Followed:
    """A rendered text with the places of what was said.

    Attributes:
        text: What `apply_chat_template` renders.
        places: In order of their start. A field that the template leaves out has no place; one that it
            repeats has several.
    """

    text: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Template:
    """A chat template with everything that decides what it renders, except the messages.

    Attributes:
        tokenizer: The tokenizer whose `apply_chat_template` is followed.
        source: The template's Jinja text.
        options: `tools`, `add_generation_prompt` and `continue_final_message`, as needed.
        arguments: Values for the template's own variables.
    """

    tokenizer: Any
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, messages: Sequence[Message]) -> str:
        """Render messages with `apply_chat_template`.

        Raises:
            RenderError: The template refuses them.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self.source, **self.options, **self.arguments
            )
        except Exception as error:  # templates are code, and may raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RenderError(f"The chat template refuses this conversation: {reason}") from error

    def run(self, messages: Sequence[Message]) -> str:
        """Render messages without `apply_chat_template`, as the current version of transformers does."""
        plain = [
            {key: plain_data(value) for key, value in message.items() if value is not None}
            for message in messages
        ]
        return plain_text(self._render([_with_reasoning_names(message) for message in plain], date_of_run()))

    def follow(self, messages: Sequence[Message], marks: Mapping[int, str] | None = None) -> Followed:
        """Render messages and find what each of them said.

        Args:
            messages: The conversation.
            marks: Texts to append to the contents of some messages; they become fields of their own.

        Raises:
            RenderError: The template refuses the messages, or changes a text so that it cannot be followed.
        """
        traced, fields = trace_messages(messages, marks or {})
        expected = self.apply([plain_data(message) for message in traced])
        rendered = self._run(traced, expected)
        return Followed(plain_text(rendered), _places(rendered, fields, messages))

    def _run(self, traced: list[dict[str, Any]], expected: str) -> str:
        """The expected text with owners; only the date may differ.

        Newer versions of transformers pass reasoning on under further names, which older ones do not.
        """
        for conversation in ([_with_reasoning_names(message) for message in traced], traced):
            rendered = self._render(conversation, date_of_run())
            if str.__eq__(rendered, expected):
                return rendered
            dated = "strftime_now" in self.source
            if dated and str.__eq__(self._render(conversation, datetime.now()), expected):
                return rendered
        raise RenderError(
            "The tokenizer renders this conversation differently from the Jinja text of its chat template, "
            "so roles cannot be assigned exactly; use its plain chat template (chat_template=)."
        )

    def _render(self, conversation: list[dict[str, Any]], now: datetime) -> str:
        left_open = bool(self.options.get("continue_final_message"))
        if left_open:
            *before, final = conversation
            conversation = [*before, {**final, "content": _tagged(final["content"])}]
        variables = {
            **self.tokenizer.special_tokens_map,
            **plain_data(dict(self.arguments)),
            "messages": conversation,
            "tools": _schemas(self.options.get("tools")),
            "documents": None,
            "add_generation_prompt": self.options.get("add_generation_prompt", False),
        }
        try:
            rendered = run_template(self.source, variables, now=now)
        except Exception as error:  # it did not raise this in `apply`
            raise RenderError(
                f"The chat template cannot be followed exactly ({first_line(error)}), so its tokens cannot "
                "be labelled; use another chat template."
            ) from error
        return _cut_at_tag(rendered) if left_open else rendered


@cache
def date_of_run() -> datetime:
    """The date and time that templates print as the present: one for the whole process.

    It is the time of the first rendering, or what the environment variable `CTXLENS_DATE` says.

    Raises:
        InputError: The variable does not hold a date.
    """
    given = os.environ.get(DATE_VARIABLE)
    try:
        return datetime.fromisoformat(given) if given else datetime.now()
    except ValueError:
        raise InputError(f"{DATE_VARIABLE} is {given!r}; expected a date such as 2026-01-31.") from None


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that transformers gives it."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return (
        message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def _schemas(tools: Any) -> Any:
    if not tools:
        return tools
    return [
        _schema_of(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else plain_data(tool)
        for tool in tools
    ]


def _schema_of(function: Any) -> Any:
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(function)


def _tagged(content: Any) -> Any:
    tag = Traced.said(_LEFT_OPEN, _TAG)
    if isinstance(content, str):
        return concat((content, tag))
    last = max(n for n, each in enumerate(content) if "text" in each)
    return [
        {**each, "text": concat((each["text"], tag))} if n == last else each for n, each in enumerate(content)
    ]


def _cut_at_tag(rendered: str) -> str:
    """The text before the tag, without white space at its end where the template trims messages."""
    at = str.rindex(rendered, _LEFT_OPEN.strip())
    before = part(rendered, 0, at)
    return before if str.startswith(rendered, _LEFT_OPEN, at) else before.rstrip()


def _places(rendered: str, fields: Sequence[Field], messages: Sequence[Message]) -> tuple[Place, ...]:
    """The places of all fields; the name of a called function counts where it occurs first.

    Templates repeat that name in front of the tool's result, where the assistant does not write it.
    """
    places: list[Place] = []
    written: Counter[int] = Counter()
    at = 0
    for piece, owner in pieces(rendered):
        if isinstance(owner, Rewritten):
            raise _rewritten_error(owner, [fields[n] for n in owner.owners if n >= 0], messages)
        if owner >= 0:
            said = fields[owner]
            if not said.is_function_name or written[owner] < len(said.text):
                places.append(Place(at, at + len(piece), said))
            written[owner] += len(piece)
        at += len(piece)
    return tuple(places)


def _rewritten_error(owner: Rewritten, fields: Sequence[Field], messages: Sequence[Message]) -> RenderError:
    names = " and ".join(
        f"the {field.name} of message {field.turn} ({messages[field.turn].get('role')})" for field in fields
    )
    return RenderError(
        f"The chat template rewrites {names or 'a text'} with {owner.by} in a way that cannot be followed "
        "exactly, so its tokens cannot be labelled; change that text or use another chat template."
    )
