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
    """The attempts on one conversation, from one rendering up to one per field and way of marking."""

    def __init__(
        self, render: Renderer, messages: Sequence[Mapping[str, Any]], fields: Sequence[Field], template: str
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
        """Mark whole texts; where that changes the rendering, mark inside the white space; then in pieces."""
        whole = [_Mark(number, 0, len(field.text)) for number, field in enumerate(self.fields)]
        found = self.attempt(whole)
        if found is not None:
            return [Place(start, end, mark.field) for mark, start, end in found]
        return self.trimmed([_inner(mark, self.fields[mark.field].text) for mark in whole]) or self.singly()

    def trimmed(self, marks: Sequence[_Mark | None]) -> list[Place] | None:
        """Places where the template strips white space; ``None`` where that is not what it does."""
        kept = [mark for mark in marks if mark is not None]
        found = self.attempt(kept)
        blank = [number for number, mark in enumerate(marks) if mark is None]
        if found is None or any(self.replaced({number: ""}) != self.text for number in blank):
            return None
        return self.with_edges(found)

    def with_edges(self, found: list[tuple[_Mark, int, int]]) -> list[Place] | None:
        """Give back to each place the white space around it that the template kept.

        Rendering without that white space shows how much of it there was: equal text means that the
        template had dropped it and that any white space there is the template's own.
        """
        edges = [(0, mark.start, mark.end, len(self.fields[mark.field].text)) for mark, _, _ in found]
        starts = [start for _, start, _ in found]
        ends = [end for _, _, end in found]
        for side in ("lead", "trail"):
            if not any((e[0] < e[1]) if side == "lead" else (e[2] < e[3]) for e in edges):
                continue
            bare: dict[int, str] = {}
            marks = []
            for mark, _, _ in found:
                if mark.field in bare:
                    continue
                text = self.fields[mark.field].text
                bare[mark.field] = text[mark.start :] if side == "lead" else text[: mark.end]
                shift = mark.start if side == "lead" else 0
                marks.append(_Mark(mark.field, mark.start - shift, mark.end - shift))
            unedged = self.attempt(marks, bare)
            if unedged is None or len(unedged) != len(found):
                return None
            text_bare = self.replaced(bare) or ""
            for number, (mark, start, end) in enumerate(found):
                if unedged[number][0].field != mark.field:
                    return None
                said = self.fields[mark.field].text
                before, after = unedged[number][1], unedged[number][2]
                if side == "lead":
                    gap = self.text[ends_before(found, number) : start]
                    gap_bare = text_bare[ends_before(unedged, number) : before]
                    count = len(gap) - len(gap_bare)
                    if (
                        not 0 <= count <= mark.start
                        or gap != gap_bare + said[mark.start - count : mark.start]
                    ):
                        return None
                    starts[number] = start - count
                else:
                    gap = self.text[end : starts_after(found, number, len(self.text))]
                    gap_bare = text_bare[after : starts_after(unedged, number, len(text_bare))]
                    count = len(gap) - len(gap_bare)
                    if (
                        not 0 <= count <= len(said) - mark.end
                        or gap != said[mark.end : mark.end + count] + gap_bare
                    ):
                        return None
                    ends[number] = end + count
        return [Place(starts[n], ends[n], mark.field) for n, (mark, _, _) in enumerate(found)]

    def singly(self) -> list[Place]:
        """Each field by itself, in the first way of marking that leaves the rendering unchanged."""
        places: list[Place] = []
        for number, field in enumerate(self.fields):
            mine = self.one_field(number, field)
            if mine is None:
                raise RenderError(
                    f"The chat template rewrites the {field.name} of message {field.turn} "
                    f"({self.messages[field.turn].get('role')}) in a way that cannot be followed exactly, so its "
                    "tokens cannot be labelled; change that text or use another chat template."
                )
            places.extend(mine)
        places.sort()
        if any(after.start < before.end for before, after in zip(places, places[1:], strict=False)):
            raise RenderError(
                "The chat template mixes the texts of several messages; they cannot be told apart."
            )
        return places

    def one_field(self, number: int, field: Field) -> list[Place] | None:
        whole = _Mark(number, 0, len(field.text))
        found = self.attempt([whole])
        if found is not None:
            return [Place(start, end, number) for _, start, end in found]
        inner = _inner(whole, field.text)
        if inner is None:
            return [] if self.replaced({number: ""}) == self.text else None
        found = self.attempt([inner])
        if found is not None:
            return self.with_edges(found)
        return self.in_pieces(number, field.text)

    def in_pieces(self, number: int, text: str) -> list[Place] | None:
        """Follow a text that the template takes apart at words of its own, such as ``</think>``.

        The words come from the template's quoted strings. The pieces between them are located; what
        stands between or beside two pieces is the message's where it is, character for character,
        what the message has there, and the template's otherwise.
        """
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
        places: list[Place] = []
        said_end, text_end = 0, 0
        for mark, start, end in found:
            between = text[said_end : mark.start]
            if mark.start < said_end:
                places.append(Place(start, end, number))
            elif places and self.text[text_end:start] == between:
                places[-1] = Place(places[-1].start, end, number)
            elif not places and between and self.text[max(0, start - len(between)) : start] == between:
                places.append(Place(start - len(between), end, number))
            else:
                places.append(Place(start, end, number))
            said_end, text_end = mark.end, end
        rest = text[said_end:]
        if rest and self.text[text_end : text_end + len(rest)] == rest:
            places[-1] = Place(places[-1].start, text_end + len(rest), number)
        return places

    def attempt(
        self, marks: Sequence[_Mark], texts: Mapping[int, str] | None = None
    ) -> list[tuple[_Mark, int, int]] | None:
        """Render with these marks; the places found, or ``None`` if the marks changed the rendering."""
        if not marks and texts is None:
            return []
        sentinels = self.sentinels(2 * len(marks))
        by_field: dict[int, list[int]] = {}
        for position, mark in enumerate(marks):
            by_field.setdefault(mark.field, []).append(position)
        replaced = dict(texts or {})
        for number, positions in by_field.items():
            text = replaced.get(number, self.fields[number].text)
            parts, done = [], 0
            for position in positions:
                mark = marks[position]
                parts += [text[done : mark.start], sentinels[2 * position]]
                parts += [text[mark.start : mark.end], sentinels[2 * position + 1]]
                done = mark.end
            replaced[number] = "".join([*parts, text[done:]])
        try:
            marked = self.render(self.with_texts(replaced))
        except RenderError:
            return None
        return self.read(marked, marks, sentinels, self.text if texts is None else self.replaced(texts))

    @staticmethod
    def read(
        marked: str, marks: Sequence[_Mark], sentinels: str, expected: str
    ) -> list[tuple[_Mark, int, int]] | None:
        pattern = re.compile(f"[{sentinels}]")
        number_of = {sentinel: number for number, sentinel in enumerate(sentinels)}
        found: list[tuple[_Mark, int, int]] = []
        opened: tuple[int, int] | None = None
        for removed, match in enumerate(pattern.finditer(marked)):
            number, at = number_of[match.group()], match.start() - removed
            if opened is None:
                if number % 2:
                    return None
                opened = number, at
            else:
                if number != opened[0] + 1:
                    return None
                found.append((marks[number // 2], opened[1], at))
                opened = None
        if opened is not None or pattern.sub("", marked) != expected:
            return None
        return found

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
                messages[field.turn] = {**messages[field.turn], field.path[0]: text}
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


def ends_before(found: Sequence[tuple[_Mark, int, int]], number: int) -> int:
    """Where the located text before this one ends, or 0."""
    return found[number - 1][2] if number else 0


def starts_after(found: Sequence[tuple[_Mark, int, int]], number: int, default: int) -> int:
    """Where the located text after this one starts, or the text's end."""
    return found[number + 1][1] if number + 1 < len(found) else default


def _inner(mark: _Mark, text: str) -> _Mark | None:
    """The mark without white space at its ends; ``None`` if nothing else is in it."""
    stretch = text[mark.start : mark.end]
    lead = len(stretch) - len(stretch.lstrip())
    core = stretch.strip()
    return _Mark(mark.field, mark.start + lead, mark.start + lead + len(core)) if core else None


def _quoted_words(template: str) -> list[str]:
    words = (single or double for single, double in _QUOTED.findall(template))
    return [
        w.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"') for w in words if len(w.strip()) > 1
    ]
