"""What a chat template does not show of a conversation, in words that can be counted over a data set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctxlens.chat.roles.chat import Message, RenderedChat, content_text
from ctxlens.chat.roles.locate import Followed, Template
from ctxlens.chat.roles.said import REASONING_KEYS

SCHEMAS = "tool schemas"
_TOOLS = re.compile(r"\btools\b")


def find_left_out(template: Template, followed: Followed, messages: Sequence[Message]) -> dict[str, int]:
    """What a template leaves out, such as `{"the content of system messages": 1}`, and how often.

    A message's content, its reasoning and its tool calls count separately, and each only if nothing of it is
    shown. Tool schemas count where the template does not mention `tools`, or the text lacks the tool's name.
    """
    shown = {(place.field.turn, _part(place.field.path[0])) for place in followed.places}
    missing = Counter(
        f"the {part} of {message['role']} messages"
        for turn, message in enumerate(messages)
        for part in _parts(message)
        if (turn, part) not in shown
    )
    hidden = [tool for tool in template.options.get("tools") or () if not _is_shown(tool, template, followed)]
    return {**missing, **({SCHEMAS: len(hidden)} if hidden else {})}


def count_left_out(chats: Iterable[RenderedChat]) -> dict[str, int]:
    """What a template leaves out of several conversations, the most frequent first."""
    total: Counter[str] = Counter()
    for chat in chats:
        total.update(chat.left_out)
    return dict(total.most_common())


def describe_left_out(counts: Mapping[str, int]) -> list[str]:
    """One line for each entry of `count_left_out`."""
    return [f"left out by the chat template, {count} times: {what}" for what, count in counts.items()]


def _part(key: str | int) -> str:
    if key in REASONING_KEYS:
        return "reasoning"
    return "tool calls" if key == "tool_calls" else str(key)


def _parts(message: Message) -> list[str]:
    """What a message says: content, reasoning, tool calls."""
    thoughts = [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)]
    said = {
        "content": content_text(message.get("content")).strip(),
        "reasoning": "".join(thoughts).strip(),
        "tool calls": message.get("tool_calls"),
    }
    return [part for part, is_said in said.items() if is_said]


def _is_shown(tool: Any, template: Template, followed: Followed) -> bool:
    if not _TOOLS.search(template.source):
        return False
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else getattr(tool, "__name__", None)
    return not isinstance(name, str) or name in followed.text


__all__ = ["SCHEMAS", "count_left_out", "describe_left_out", "find_left_out"]
