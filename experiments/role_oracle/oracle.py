"""Who really said each character of a rendered conversation? An oracle that shares no code with the labels.

The oracle changes one text of one message at a time and watches `apply_chat_template`: the characters of the
rendering that change with a character of a message are that message's; what changes with no message is the
template's. It never asks whether a text is contained in another.

* Letters and digits of a text are all replaced at once, twice, by others of their kind; where the template
  then renders something else than a text of the same length, they are replaced one by one.
* Punctuation and white space are replaced one by one, by each of several others, and left out.
* A character is *undecided* where every change of it changes the shape of the whole rendering, as with the
  letters of `</think>`. Only characters of the rendering that could be that character are undecided then.

The labels to be judged are read with a tokenizer of one token per byte, so that every character is judged.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

TEMPLATE, UNDECIDED = -1, -2
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OTHERS = {
    "space": (" ", "\n", "\t", "\u2003", "_"),
    "mark": (";", "~", "^", "\\", '"', "'"),
}
_ROLES = {
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "model": "assistant",
}

Path = tuple[str | int, ...]
Apply = Callable[[list[dict[str, Any]]], str]


@dataclass
class Truth:
    """Who said each character.

    Attributes:
        text: The rendering.
        owner: For each character the index of a message, `TEMPLATE` or `UNDECIDED`.
        unsettled: How many characters of the messages could not be followed.
    """

    text: str
    owner: list[int]
    unsettled: int = 0


def find_truth(apply: Apply, messages: Sequence[dict[str, Any]]) -> Truth:
    """Decide by perturbation who said each character of a rendering."""
    base = apply([dict(message) for message in messages])
    owner = [TEMPLATE] * len(base)
    doubts: list[tuple[int, str, list[int]]] = []
    unsettled = 0
    for path, text in _texts(messages):
        turn = int(path[0])
        places, unknown = _Watcher(apply, messages, path, text, base).watch()
        if path[-1] == "name":
            places = _first_occurrence(places, len(text))
        for place in places:
            owner[place] = turn
        unsettled += len(unknown)
        doubts += [(turn, stretch, sorted(places)) for stretch in _stretches(text, unknown)]
    for _, stretch, places in doubts:
        for place in _possible(base, stretch, places):
            if owner[place] == TEMPLATE:
                owner[place] = UNDECIDED
    return Truth(base, owner, unsettled)


@dataclass
class _Watcher:
    """Perturbs one text of one message."""

    apply: Apply
    messages: Sequence[dict[str, Any]]
    path: Path
    text: str
    base: str
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def watch(self) -> tuple[set[int], list[int]]:
        """The places of the rendering that follow this text, and the positions that could not be followed."""
        places: set[int] = set()
        unknown: list[int] = []
        plain = [n for n, c in enumerate(self.text) if c.isalnum()]
        together = self.together(plain)
        if together is None:
            plain_left = plain
        else:
            places |= together
            plain_left = []
        for position in [*plain_left, *(n for n, c in enumerate(self.text) if not c.isalnum())]:
            found = self.one(position)
            if found is None:
                unknown.append(position)
            else:
                places |= found
        return places, sorted(unknown)

    def together(self, positions: list[int]) -> set[int] | None:
        changed: set[int] = set()
        for _ in range(2):
            characters = list(self.text)
            for position in positions:
                characters[position] = self.other(characters[position])
            seen = self.differences("".join(characters))
            if seen is None:
                return None
            changed |= seen
        return changed if self.plausible(changed, positions) else None

    def plausible(self, changed: set[int], positions: list[int]) -> bool:
        """Whether what changed are characters of this text, in its order, as often as it is printed."""
        said = "".join(self.text[n] for n in positions).casefold()
        shown = "".join(self.base[n] for n in sorted(changed)).casefold()
        at = 0
        for character in shown:
            at = said.find(character, at)
            if at < 0:
                at = said.find(character)
                if at < 0:
                    return False
            at += 1
        return True

    def one(self, position: int) -> set[int] | None:
        """Places that follow one character: none if it is dropped, ``None`` if nothing can be told."""
        before, character, after = self.text[:position], self.text[position], self.text[position + 1 :]
        told = False
        for other in self.alternatives(character):
            seen = self.differences(before + other + after)
            if seen is None:
                continue
            if seen and all(
                self.base[n].casefold() == character.casefold() or self.escaped(n, character) for n in seen
            ):
                return seen | {n - 1 for n in seen if self.escaped(n, character)}
            told = told or not seen
        return set() if told or self.left_out(position) else None

    def left_out(self, position: int) -> bool:
        """Whether the template drops a character, together with its like beside it."""
        start, stop = position, position + 1
        while start and self.text[start - 1] == self.text[position]:
            start -= 1
        while stop < len(self.text) and self.text[stop] == self.text[position]:
            stop += 1
        return all(
            self.render(self.text[:first] + self.text[last:]) == self.base
            for first, last in ((position, position + 1), (start, stop))
        )

    def escaped(self, place: int, character: str) -> bool:
        return place > 0 and self.base[place - 1] == "\\" and self.base[place] == json.dumps(character)[2:3]

    def alternatives(self, character: str) -> Iterator[str]:
        if character.isalnum():
            yield from (self.other(character) for _ in range(3))
        for other in _OTHERS["space" if character.isspace() else "mark"]:
            if other != character:
                yield other

    def other(self, character: str) -> str:
        kinds = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        kind = next((kind for kind in kinds if character in kind), "éüñøå")
        return self.random.choice([c for c in kind if c != character])

    def differences(self, text: str) -> set[int] | None:
        """Where the rendering differs with another text; ``None`` if its length or its words change too."""
        rendered = self.render(text)
        if rendered is None or len(rendered) != len(self.base):
            return None
        return {n for n, (a, b) in enumerate(zip(self.base, rendered, strict=True)) if a != b}

    def render(self, text: str) -> str | None:
        messages = copy.deepcopy(list(self.messages))
        holder: Any = messages
        for part in self.path[:-1]:
            holder = holder[part]
        holder[self.path[-1]] = text
        try:
            return self.apply(messages)
        except Exception:
            return None


def _texts(messages: Sequence[dict[str, Any]]) -> list[tuple[Path, str]]:
    """Every text that the messages say, by its path."""
    found: list[tuple[Path, str]] = []

    def collect(value: Any, path: Path) -> None:
        if isinstance(value, str):
            if value:
                found.append((path, value))
        elif isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                collect(item, (*path, key))

    for turn, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            for number, part in enumerate(content):
                collect(part["text"], (turn, "content", number, "text"))
        else:
            collect(content, (turn, "content"))
        for key in _REASONING:
            collect(message.get(key), (turn, key))
        for number, call in enumerate(message.get("tool_calls") or ()):
            where: Path = (turn, "tool_calls", number)
            if "function" in call:
                call, where = call["function"], (*where, "function")
            collect(call.get("name"), (*where, "name"))
            collect(call.get("arguments"), (*where, "arguments"))
    return found


def _first_occurrence(places: set[int], length: int) -> set[int]:
    """A called function's name is the assistant's where it stands first; repeats refer to it."""
    ordered = sorted(places)
    return {place for place in ordered if place < ordered[0] + length}


def _stretches(text: str, unknown: list[int]) -> list[str]:
    """The unknown characters of a text, those side by side together."""
    found: list[str] = []
    last = -2
    for position in unknown:
        if position == last + 1:
            found[-1] += text[position]
        else:
            found.append(text[position])
        last = position
    return found


def _possible(base: str, stretch: str, places: list[int]) -> Iterator[int]:
    """Characters of the rendering that could be an unknown stretch.

    A stretch with words could be anywhere that it occurs; white space and marks only inside or beside what
    the same text says.
    """
    if len(stretch) < 3:
        if not places:
            return
        low, high = places[0], places[-1]
        while low > 0 and not base[low - 1].isalnum():
            low -= 1
        while high + 1 < len(base) and not base[high + 1].isalnum():
            high += 1
        yield from (n for n in range(low, high + 1) if base[n] in stretch)
        return
    for match in re.finditer(re.escape(stretch.strip() or stretch), base):
        yield from range(*match.span())


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The conversation as it is, and other ways of passing the same to a template."""
    yield messages
    usual = [
        {
            **m,
            "role": _ROLES.get(m["role"], m["role"]),
            "content": "" if m.get("content") is None else m["content"],
        }
        for m in messages
    ]
    yield [{**m, "content": ""} if m.get("content") is None else m for m in messages]
    yield [{**m, "role": _ROLES.get(m["role"], m["role"])} for m in messages]
    yield usual
    for base in (messages, usual):
        for change in (json.loads, json.dumps):
            changed = copy.deepcopy(base)
            for message in changed:
                for call in message.get("tool_calls") or ():
                    function = call.get("function", call)
                    if isinstance(function.get("arguments"), str if change is json.loads else dict):
                        function["arguments"] = change(function["arguments"])
            yield changed
    for base in (messages, usual):
        yield [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m.get("content"), str)
            else m
            for m in base
        ]
        yield [
            {**m, "content": "".join(p["text"] for p in m["content"])}
            if isinstance(m.get("content"), list)
            else m
            for m in base
        ]


@dataclass
class Verdict:
    """What the oracle says about one rendering.

    Attributes:
        outcome: ``exact``, ``template`` (the template refuses), ``refused`` (ctxlens refuses), ``mislabel``.
        reason: Of a refusal.
        wrong: Characters with a wrong label, with who really said them and the label.
        undecided: Characters that the oracle cannot decide.
        characters: All characters.
    """

    outcome: str
    reason: str = ""
    wrong: tuple[tuple[int, str, int, int], ...] = ()
    undecided: int = 0
    characters: int = 0


def judge(
    tokenizer: Any,
    source: str,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    render: Callable[..., Any],
    error: type[Exception],
) -> Verdict:
    """Render a conversation with labels and compare them with the truth.

    Args:
        tokenizer: A tokenizer of one token per byte.
        source: The template's Jinja text.
        messages: The conversation.
        options: Options of both `apply_chat_template` and `render`.
        render: The function to be judged.
        error: What it raises to refuse.
    """

    def apply(conversation: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(conversation, chat_template=source, tokenize=False, **options)

    try:
        chat = render(tokenizer, messages, chat_template=source, **options)
    except error as refused:
        own = not any(_accepts(apply, form) for form in forms(messages))
        return Verdict("template" if own else "refused", str(refused))
    form = next((form for form in forms(messages) if _renders(apply, form, chat.text)), None)
    if form is None:
        return Verdict("mislabel", "the text is that of no form of this conversation")
    truth = find_truth(apply, form)
    labels = [TEMPLATE] * len(chat.text)
    for (start, end), turn in zip(chat.spans.tolist(), chat.turn.tolist(), strict=True):
        labels[start:end] = [turn] * (end - start)
    wrong = tuple(
        (n, chat.text[n], owner, label)
        for n, (owner, label) in enumerate(zip(truth.owner, labels, strict=True))
        if owner not in (UNDECIDED, label)
    )
    undecided = truth.owner.count(UNDECIDED)
    return Verdict("mislabel" if wrong else "exact", "", wrong, undecided, len(labels))


def _accepts(apply: Apply, messages: list[dict[str, Any]]) -> bool:
    try:
        apply(messages)
    except Exception:
        return False
    return True


def _renders(apply: Apply, messages: list[dict[str, Any]], text: str) -> bool:
    try:
        return apply(messages) == text
    except Exception:
        return False
