"""In which form a chat template takes a conversation.

Templates differ in what they accept: contents as text or in parts, the arguments of tool calls as a mapping
or as JSON text, `content: null`, the names of roles. A conversation is passed on as it is wherever the
template takes it, and otherwise in the first form that it does take. Every form says the same. Only the
arguments of tool calls are tried as a mapping first, so that the same call gives the same text, whether the
data hold its arguments as a mapping or as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ctxlens.chat.roles.chat import OTHER_ROLES, Message, content_text
from ctxlens.chat.roles.checks import holds_surrogate
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
    taken = refused = None
    for form in _forms(template, messages):
        try:
            followed = template.follow(form, marks)
        except RenderError as error:
            refused = error if form is messages else refused
            continue
        if not _misses_something(followed, form):
            return followed
        if taken is None or form is messages:
            taken = followed
    if taken is None:
        assert refused is not None
        raise refused
    return taken


def _misses_something(followed: Followed, messages: Messages) -> bool:
    """Whether a template that accepts a conversation does not show it as its author meant.

    It leaves out what a user said, or a role that has another name too, or it prints the arguments of a tool
    call as an escaped string or as Python writes a dictionary.
    """
    shown = {place.field.turn for place in followed.places}
    left_out = (message for turn, message in enumerate(messages) if turn not in shown)
    if any(m["role"] in _NEVER_LEFT_OUT and content_text(m.get("content")).strip() for m in left_out):
        return True
    if any(repr(given) in followed.text for given in _mappings(messages)):
        return True
    return any(
        place.field.path[-1] == "arguments" and followed.text[place.start : place.end] not in place.field.text
        for place in followed.places
    )


def _forms(template: Template, messages: Messages) -> Iterator[Messages]:
    """Ways of saying the same: with mappings, as it is, with one change at a time, then with several."""
    changes = (
        (_with_mappings,), (), (_without_null,), (_with_usual_roles,), (_with_json_text,), _USUAL,
        (*_USUAL, _with_mappings), (*_USUAL, _with_json_text),
    )  # fmt: skip
    tried: list[Messages] = []
    for steps in changes:
        form = messages
        for step in steps:
            form = step(form)
        form = messages if form == messages else form
        if form not in tried:
            tried.append(form)
            yield form
    if _probe(template, _TALK) is None:
        yield from (_in_parts(form) for form in tried)


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
    """Arguments as a mapping if they are JSON text that holds one, and one that can be rendered."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
        return value if isinstance(value, Mapping) and not holds_surrogate(value) else arguments
    except (ValueError, RecursionError):
        return arguments


def _mappings(messages: Messages) -> Iterator[Mapping[str, Any]]:
    """The arguments of tool calls that are given as mappings, except empty ones."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, (list, tuple)) else ():
            function = call.get("function")
            given = (function if isinstance(function, Mapping) else call).get("arguments")
            if isinstance(given, Mapping) and given:
                yield given


_USUAL = (_without_null, _with_usual_roles)


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
