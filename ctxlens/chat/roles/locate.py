"""Where in a rendered conversation each message's own text stands, decided by rendering.

The conversation is rendered as it is, and once more with sentinel characters around every said
text; with the sentinels taken out both must be the same, and then the places are known, not guessed.
Templates that strip or rewrite what was said get the sentinels further inside; what still cannot be
located is a `RenderError`. No marker string of any template is ever searched for, so text that looks
like a marker changes nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ctxlens.errors import RenderError

Renderer = Callable[[list[dict[str, Any]]], str]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PRIVATE_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")


@dataclass(frozen=True)
class Field:
    """One text that somebody said: a message's content, its reasoning, or a string of a tool call."""

    turn: int
    path: tuple[str | int, ...]
    text: str

    @property
    def name(self) -> str:
        """The place in the message in words, such as ``tool_calls.0.function.name``."""
        return ".".join(str(part) for part in self.path)


class Place(NamedTuple):
    """Characters ``[start, end)`` of the rendered text that a field said."""

    start: int
    end: int
    field: int


class _Mark(NamedTuple):
    """A stretch ``[start, end)`` of a field's text to be wrapped in a pair of sentinels."""

    field: int
    start: int
    end: int


Found = tuple[_Mark, int, int]
"""A mark and the characters ``[start, end)`` of the rendered text where it was found."""


def said_fields(messages: Sequence[Mapping[str, Any]]) -> list[Field]:
    """List every non-empty text that the messages say: content, reasoning, and strings of tool calls."""
    fields: list[Field] = []
    for turn, message in enumerate(messages):
        for key in ("content", *REASONING_KEYS):
            if isinstance(message.get(key), str) and message[key]:
                fields.append(Field(turn, (key,), message[key]))
        for number, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            base = ("tool_calls", number, "function") if "function" in call else ("tool_calls", number)
            for key in ("name", "arguments"):
                for path, text in _strings(function.get(key), (*base, key)):
                    fields.append(Field(turn, path, text))
    return fields


def _strings(value: Any, path: tuple[str | int, ...]) -> list[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, str):
        return [(path, value)] if value else []
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _strings(item, (*path, key))]
    if isinstance(value, (list, tuple)):
        return [leaf for number, item in enumerate(value) for leaf in _strings(item, (*path, number))]
    return []


def locate_fields(
    render: Renderer, messages: Sequence[Mapping[str, Any]], fields: Sequence[Field], template: str
) -> tuple[str, list[Place]]:
    """Render the messages and find each field's characters in the text.

    Args:
        render: Renders a list of messages to text with one template and fixed options.
        messages: The conversation.
        fields: What was said, from `said_fields`.
        template: The template's source; only its quoted words are looked at, and only to choose
            where sentinels go when a template rewrites a message.

    Returns:
        The rendered text, and the places in order of their start. A field that the template leaves
        out has no place; one that it repeats has several.

    Raises:
        RenderError: The template rewrites a field in a way that cannot be followed exactly.
    """
    search = _Search(render, messages, fields, template)
    return search.text, sorted(search.run())


class _Search:
    """The attempts on one conversation, from one rendering up to a few per field."""

    def __init__(
        self,
        render: Renderer,
        messages: Sequence[Mapping[str, Any]],
        fields: Sequence[Field],
        template: str,
    ) -> None:
        self.render = render
        self.messages = [dict(message) for message in messages]
        self.fields = fields
        self.template = template
        self.text = render(self.messages)
        self.used = set(_PRIVATE.findall(self.text))
        for field in fields:
            self.used.update(_PRIVATE.findall(field.text))

    def run(self) -> list[Place]:
        """Mark whole texts; where that changes the rendering, mark inside white space; then one by one."""
        whole = [_Mark(number, 0, len(field.text)) for number, field in enumerate(self.fields)]
        found = self.attempt(whole)
        if found is not None:
            return [Place(start, end, mark.field) for mark, start, end in found]
        places = self.trimmed(whole)
        return self.singly(whole) if places is None else places

    def trimmed(self, whole: Sequence[_Mark]) -> list[Place] | None:
        """Places where the template strips white space; ``None`` where that is not what it does."""
        marks = [_inner(mark, self.fields[mark.field].text) for mark in whole]
        blank = {mark.field: "" for mark, inner in zip(whole, marks, strict=True) if inner is None}
        if blank and self.replaced(blank) != self.text:
            return None
        found = self.attempt([mark for mark in marks if mark is not None])
        return None if found is None else self.with_edges(found)

    def with_edges(self, found: Sequence[Found]) -> list[Place] | None:
        """Give back to each place the white space at its ends that the template kept.

        A rendering without that white space shows how much of it there was: where the text stays the
        same, the template had dropped it, and white space that stands there is the template's own.
        """
        lead, trail = self.kept_space(found, leading=True), self.kept_space(found, leading=False)
        if lead is None or trail is None:
            return None
        return [
            Place(start - before, end + after, mark.field)
            for (mark, start, end), before, after in zip(found, lead, trail, strict=True)
        ]

    def kept_space(self, found: Sequence[Found], leading: bool) -> list[int] | None:
        """How many characters of white space the template kept before (or after) each place."""
        texts: dict[int, str] = {}
        marks: dict[int, _Mark] = {}
        spaces: list[str] = []
        for mark, _, _ in found:
            said = self.fields[mark.field].text
            cut = mark.start if leading else 0
            texts[mark.field] = said[mark.start :] if leading else said[: mark.end]
            marks[mark.field] = _Mark(mark.field, mark.start - cut, mark.end - cut)
            spaces.append(said[: mark.start] if leading else said[mark.end :])
        if not any(spaces):
            return [0] * len(found)
        bare_text = self.replaced(texts)
        bare = None if bare_text is None else self.attempt(list(marks.values()), texts, bare_text)
        if bare_text is None or bare is None or [b[0].field for b in bare] != [f[0].field for f in found]:
            return None
        counts: list[int] = []
        for space, gap, bare_gap in zip(
            spaces, _gaps(self.text, found, leading), _gaps(bare_text, bare, leading), strict=True
        ):
            count = len(gap) - len(bare_gap)
            if not 0 <= count <= len(space):
                return None
            if gap != (bare_gap + space[len(space) - count :] if leading else space[:count] + bare_gap):
                return None
            counts.append(count)
        return counts

    def singly(self, whole: Sequence[_Mark]) -> list[Place]:
        """Each field by itself, in the first way of marking that leaves the rendering unchanged."""
        places: list[Place] = []
        for mark in whole:
            found = self.attempt([mark])
            if found is not None:
                places.extend(Place(start, end, mark.field) for _, start, end in found)
                continue
            mine = self.trimmed([mark])
            if mine is None:
                mine = self.in_pieces(mark.field)
            if mine is None:
                field = self.fields[mark.field]
                raise RenderError(
                    f"The chat template rewrites the {field.name} of message {field.turn} "
                    f"({self.messages[field.turn].get('role')}) in a way that cannot be followed exactly, so "
                    "its tokens cannot be labelled; change that text or use another chat template."
                )
            places.extend(mine)
        places.sort()
        if any(after.start < before.end for before, after in pairwise(places)):
            raise RenderError(
                "The chat template mixes several messages' texts, so they cannot be told apart."
            )
        return places

    def in_pieces(self, number: int) -> list[Place] | None:
        """Follow a text that the template takes apart at words of its own, such as ``</think>``.

        The words come from the template's quoted strings. The pieces between them are located; what
        stands between or beside two pieces is the message's where it is, character for character,
        what the message has there, and the template's otherwise.
        """
        text = self.fields[number].text
        words = sorted({w for w in _quoted_words(self.template) if w in text}, key=len, reverse=True)
        if not words:
            return None
        cuts = [match.span() for match in re.finditer("|".join(map(re.escape, words)), text)]
        stretches = zip(
            [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)], strict=True
        )
        marks = [_inner(_Mark(number, start, end), text) for start, end in stretches]
        found = self.attempt([mark for mark in marks if mark is not None])
        if found is None:
            return None
        if not found:
            return [] if self.replaced({number: "x"}) == self.text else None
        return self.joined(number, found)

    def joined(self, number: int, found: Sequence[Found]) -> list[Place]:
        """Join pieces of one field wherever the text between them is what the field has there."""
        said, places = self.fields[number].text, list[Place]()
        said_end, text_end = 0, 0
        for mark, start, end in found:
            between = said[said_end : mark.start]
            follows = mark.start >= said_end
            if follows and places and self.text[text_end:start] == between:
                start = places.pop().start
            elif follows and not places and self.text.endswith(between, 0, start):
                start -= len(between)
            places.append(Place(start, end, number))
            said_end, text_end = mark.end, end
        rest = said[said_end:]
        if self.text.startswith(rest, text_end):
            places[-1] = Place(places[-1].start, text_end + len(rest), number)
        return places

    def attempt(
        self, marks: Sequence[_Mark], texts: Mapping[int, str] | None = None, expected: str | None = None
    ) -> list[Found] | None:
        """Render with these marks; the places found, or ``None`` if the marks changed the rendering.

        Args:
            marks: What to mark; those of one field in ascending order.
            texts: Texts to use instead of some fields' own.
            expected: The rendering of these texts without marks; by default that of the conversation.
        """
        if not marks:
            return []
        sentinels = self.sentinels(2 * len(marks))
        replaced = dict(texts or {})
        parts: dict[int, list[str]] = {}
        done: dict[int, int] = {}
        for position, mark in enumerate(marks):
            text = replaced.get(mark.field, self.fields[mark.field].text)
            parts.setdefault(mark.field, []).extend(
                (
                    text[done.get(mark.field, 0) : mark.start],
                    sentinels[2 * position],
                    text[mark.start : mark.end],
                    sentinels[2 * position + 1],
                )
            )
            done[mark.field] = mark.end
        for number, pieces in parts.items():
            text = replaced.get(number, self.fields[number].text)
            replaced[number] = "".join([*pieces, text[done[number] :]])
        marked = self.replaced(replaced)
        return (
            None
            if marked is None
            else _read(marked, marks, sentinels, self.text if expected is None else expected)
        )

    def replaced(self, texts: Mapping[int, str]) -> str | None:
        """The rendering with other texts in these fields; ``None`` if the template refuses it."""
        try:
            return self.render(self.with_texts(texts))
        except RenderError:
            return None

    def with_texts(self, texts: Mapping[int, str]) -> list[dict[str, Any]]:
        messages = list(self.messages)
        copied: set[int] = set()
        for number, text in texts.items():
            field = self.fields[number]
            if len(field.path) == 1:
                messages[field.turn] = {**messages[field.turn], str(field.path[0]): text}
                continue
            if field.turn not in copied:
                copied.add(field.turn)
                messages[field.turn] = copy.deepcopy(messages[field.turn])
            holder: Any = messages[field.turn]
            for part in field.path[:-1]:
                holder = holder[part]
            holder[field.path[-1]] = text
        return messages

    def sentinels(self, count: int) -> str:
        """Private-use characters that occur nowhere in the conversation."""
        chosen: list[str] = []
        for plane in _PRIVATE_PLANES:
            for code in plane:
                if len(chosen) == count:
                    return "".join(chosen)
                if not self.used or chr(code) not in self.used:
                    chosen.append(chr(code))
        raise RenderError(
            "The conversation uses nearly all private-use characters; none is left to mark texts with."
        )


def _read(marked: str, marks: Sequence[_Mark], sentinels: str, expected: str) -> list[Found] | None:
    """Where the sentinels stand; ``None`` if they are not in pairs or the rest is not the expected text."""
    pattern = re.compile(f"[{sentinels}]")
    if pattern.sub("", marked) != expected:
        return None
    number_of = {sentinel: number for number, sentinel in enumerate(sentinels)}
    seen = [(number_of[m.group()], m.start() - removed) for removed, m in enumerate(pattern.finditer(marked))]
    found: list[Found] = []
    for (opening, start), (closing, end) in zip(seen[::2], [*seen[1::2], (-1, -1)], strict=False):
        if opening % 2 or closing != opening + 1:
            return None
        found.append((marks[opening // 2], start, end))
    return found


def _gaps(text: str, found: Sequence[Found], leading: bool) -> list[str]:
    """The text between each place and the one before it (or after it)."""
    if leading:
        ends = [0, *(end for _, _, end in found)]
        return [text[end:start] for end, (_, start, _) in zip(ends, found, strict=False)]
    starts = [*(start for _, start, _ in found), len(text)]
    return [text[end:start] for (_, _, end), start in zip(found, starts[1:], strict=True)]


def _inner(mark: _Mark, text: str) -> _Mark | None:
    """The mark without white space at its ends; ``None`` if nothing else is in it."""
    stretch = text[mark.start : mark.end]
    lead = len(stretch) - len(stretch.lstrip())
    core = stretch.strip()
    return _Mark(mark.field, mark.start + lead, mark.start + lead + len(core)) if core else None


def _quoted_words(template: str) -> list[str]:
    """The quoted strings of a template's source that could be markers: three solid characters or more."""
    words = (single or double for single, double in _QUOTED.findall(template))
    plain = (w.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"') for w in words)
    return [word for word in plain if len(word.strip()) > 2]
