"""In which form a chat template takes a conversation.

Templates differ in what they accept: contents as text or in parts, the arguments of tool calls as a mapping
or as JSON text, `content: null`, the names of roles. A conversation is passed on as it is wherever the
template takes it, and otherwise in the first form that it does take. Every form says the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ctxlens.chat.roles.chat import OTHER_ROLES, Message, content_text
from ctxlens.chat.roles.locate import Followed, Template
from ctxlens.errors import RenderError

Messages = Sequence[Message]

_NEVER_LEFT_OUT = ("user", *OTHER_ROLES)


def follow_in_form(
    template: Template, messages: Messages, marks: Mapping[int, str] | None = None
) -> Followed:
    """Follow a conversation in the first form that the template takes.

    Raises:
        RenderError: It takes none of them; the reason is the one for the conversation as it is.
    """
    messages = _contents_in_form(template, messages)
    try:
        followed = template.follow(messages, marks)
        refused = None
    except RenderError as error:
        followed, refused = None, error
    if followed is None or _misses_something(followed, messages):
        for form in _other_forms(template, messages):
            try:
                other = template.follow(form, marks)
            except RenderError:
                continue
            if not _misses_something(other, form):
                return other
    if followed is None:
        assert refused is not None
        raise refused
    return followed


def _misses_something(followed: Followed, messages: Messages) -> bool:
    """Whether a template that accepts a conversation does not show it as its author meant.

    It leaves out what a user said, or a role that has another name too, or it prints JSON text as an escaped
    string.
    """
    shown = {place.field.turn for place in followed.places}
    left_out = (message for turn, message in enumerate(messages) if turn not in shown)
    if any(m["role"] in _NEVER_LEFT_OUT and content_text(m.get("content")).strip() for m in left_out):
        return True
    return any(
        place.field.path[-1] == "arguments" and followed.text[place.start : place.end] not in place.field.text
        for place in followed.places
    )


def _other_forms(template: Template, messages: Messages) -> Iterator[Messages]:
    """Other ways of saying the same: one change at a time, then several."""
    changes = [_without_null, _with_usual_roles, _with_mappings, _with_json_text]
    forms = [change(messages) for change in changes]
    usual = _with_usual_roles(_without_null(messages))
    forms += [usual, _with_mappings(usual), _with_json_text(usual)]
    if _probe(template, _TALK) is None:
        forms += [_in_parts(form) for form in (messages, *forms)]
    tried = [messages]
    for form in forms:
        if form not in tried:
            tried.append(form)
            yield form


def _contents_in_form(template: Template, messages: Messages) -> Messages:
    """Contents in parts stay as they are only where the template reads parts."""
    if not any(isinstance(message.get("content"), (list, tuple)) for message in messages):
        return messages
    if _reads_parts(template):
        return messages
    return [
        {**message, "content": content_text(message["content"])}
        if isinstance(message.get("content"), (list, tuple))
        else message
        for message in messages
    ]


_TALK = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def _probe(template: Template, messages: Messages) -> Followed | None:
    """What a template makes of a question and an answer; ``None`` if it does not show both."""
    try:
        followed = replace(template, options={}).follow(messages)
    except RenderError:
        return None
    return followed if {place.field.turn for place in followed.places} == {0, 1} else None


def _reads_parts(template: Template) -> bool:
    """Whether contents in parts look like texts; a template that does not know them prints their keys."""
    in_parts, in_text = _probe(template, _in_parts(_TALK)), _probe(template, _TALK)
    if in_parts is None:
        return False
    return in_parts.text == in_text.text if in_text is not None else "'type'" not in in_parts.text


def _in_parts(messages: Messages) -> Messages:
    return _changed(messages, "content", lambda text: [{"type": "text", "text": text}], str)


def _without_null(messages: Messages) -> Messages:
    """The messages with an empty text for `content: null`, and without `function: null`."""

    def without(call: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in call.items() if key != "function" or value is not None}

    filled = [{**m, "content": ""} if m.get("content") is None else m for m in messages]
    return _changed(filled, "tool_calls", lambda calls: [without(call) for call in calls], (list, tuple))


def _with_usual_roles(messages: Messages) -> Messages:
    return [{**m, "role": OTHER_ROLES.get(m["role"], m["role"])} for m in messages]


def _with_mappings(messages: Messages) -> Messages:
    return _with_arguments(messages, _parsed)


def _with_json_text(messages: Messages) -> Messages:
    return _with_arguments(
        messages, lambda given: given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    )


def _parsed(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
    except ValueError:
        value = None
    return value if isinstance(value, Mapping) else arguments


def _with_arguments(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    """The messages with other arguments in their tool calls."""

    def changed_call(call: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": changed_call(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else dict(call)

    return _changed(
        messages, "tool_calls", lambda calls: [changed_call(call) for call in calls], (list, tuple)
    )


def _changed(messages: Messages, key: str, change: Callable[[Any], Any], kind: Any) -> Messages:
    return [{**m, key: change(m[key])} if isinstance(m.get(key), kind) else m for m in messages]
