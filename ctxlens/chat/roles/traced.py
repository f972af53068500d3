"""A text that remembers which of its characters each message said.

`Traced` is a `str` whose characters have owners. Every operation that a chat template can apply to a text
(slicing, splitting, stripping, joining, replacing, formatting, changing case) returns a text whose characters
have the right owners: a character that is copied keeps its owner, and a character that the template writes
belongs to the template. A template therefore runs as always, on texts that can be followed.

An operation that cannot be followed never guesses. Its result is owned by `Rewritten`, unless it returns
exactly the text that it was given.

```python
>>> said = Traced.said(" a cat ", owner=0)
>>> list(pieces("<" + said.strip().replace("cat", "DOG") + ">"))
[('<', -1), ('a ', 0), ('DOG>', -1)]

```
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, NamedTuple, SupportsIndex

_WORDS = re.compile(r"\S+")

TEMPLATE = -1
"""The owner of characters that no message said."""


class NotFollowedError(TypeError):
    """An operation whose result is not a text, so that it cannot say who owns its characters."""


class Rewritten(NamedTuple):
    """The owner of characters that were made from what was said in a way that cannot be followed."""

    by: str
    owners: tuple[int, ...]


Owner = int | Rewritten
Run = tuple[int, Owner]
"""A number of consecutive characters with one owner, and that owner."""


class Traced(str):
    """A `str` whose characters have owners. `runs` covers it from start to end."""

    __slots__ = ("runs",)
    runs: tuple[Run, ...]

    @classmethod
    def said(cls, text: str, owner: int) -> Traced:
        """A text with one owner."""
        return _make(text, ((len(text), owner),) if text else ())

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return quoted(self)

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        return concat(repeat(self, max(0, count.__index__())))

    def __rmul__(self, count: SupportsIndex) -> str:
        return self * count

    def __mod__(self, values: Any) -> str:
        return percent(self, values)

    def __rmod__(self, pattern: str) -> str:
        return percent(pattern, self)

    def __format__(self, spec: str) -> str:
        return rewritten(str.__format__(self, spec), "a format", self)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            at = range(len(self))[key]
            return part(self, at, at + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return part(self, start, max(start, stop))
        return concat(part(self, at, at + 1) for at in range(start, stop, step))

    def __iter__(self) -> Iterator[str]:
        for character, owner in zip(str.__iter__(self), owner_of_each(self), strict=True):
            yield _make(character, ((1, owner),))

    def strip(self, chars: str | None = None, /) -> str:
        return _trimmed(self, str.lstrip(self, chars), str.strip(self, chars))

    def lstrip(self, chars: str | None = None, /) -> str:
        return _trimmed(self, str.lstrip(self, chars), str.lstrip(self, chars))

    def rstrip(self, chars: str | None = None, /) -> str:
        return part(self, 0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return part(self, len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return part(self, 0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return _in_order(self, str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return _in_order(self, str.rsplit(self, sep, maxsplit), sep)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = _in_order(self, str.partition(self, sep), "")
        return first, middle, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = _in_order(self, str.rpartition(self, sep), "")
        return first, middle, last

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, at = [], 0
        for line, whole in zip(str.splitlines(self), str.splitlines(self, True), strict=True):
            lines.append(part(self, at, at + len(whole if keepends else line)))
            at += len(whole)
        return lines

    def join(self, texts: Iterable[str], /) -> str:
        return interleave(self, texts)

    def replace(self, old: str, new: str, /, count: SupportsIndex = -1) -> str:
        return replaced(self, old, new, count.__index__())

    def lower(self) -> str:
        return recased(self, str.lower)

    def upper(self) -> str:
        return recased(self, str.upper)

    def casefold(self) -> str:
        return recased(self, str.casefold)

    def swapcase(self) -> str:
        return recased(self, str.swapcase)

    def title(self) -> str:
        return recased(self, str.title)

    def capitalize(self) -> str:
        return recased(self, str.capitalize)


def _not_followed(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def apply(self: Traced, *values: Any, **named: Any) -> str:
        return rewritten(method(self, *values, **named), name, self)

    apply.__name__ = name
    return apply


for _name in ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"):
    setattr(Traced, _name, _not_followed(_name))


def _make(text: str, runs: tuple[Run, ...]) -> Traced:
    traced = str.__new__(Traced, text)
    traced.runs = runs
    return traced


def plain_text(text: str) -> str:
    """The same characters as an ordinary `str`."""
    return str.__str__(text)


def runs_of(text: str) -> tuple[Run, ...]:
    """The runs of a text; a plain `str` is the template's."""
    if type(text) is Traced:
        return text.runs
    return ((len(text), TEMPLATE),) if text else ()


def pieces(text: str) -> Iterator[tuple[str, Owner]]:
    """The text cut where the owner changes, with the owners."""
    plain, at = plain_text(text), 0
    for length, owner in runs_of(text):
        yield plain[at : at + length], owner
        at += length


def owner_of_each(text: str) -> Iterator[Owner]:
    """The owner of every character."""
    for length, owner in runs_of(text):
        yield from repeat(owner, length)


def owners_in(value: Any) -> set[int]:
    """Who said something in a text, or in the texts that a structure holds."""
    if isinstance(value, str):
        found: set[int] = set()
        for _, owner in value.runs if type(value) is Traced else ():
            found.update(owner.owners if isinstance(owner, Rewritten) else [owner] if owner >= 0 else [])
        return found
    if isinstance(value, dict):
        return set().union(*map(owners_in, value), *map(owners_in, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return set().union(*map(owners_in, value))
    return set()


def concat(texts: Iterable[str]) -> str:
    """Join texts; the result is a plain `str` if all of it is the template's."""
    texts = list(texts)
    runs: list[Run] = []
    for text in texts:
        for length, owner in runs_of(text):
            if runs and runs[-1][1] == owner:
                runs[-1] = (runs[-1][0] + length, owner)
            else:
                runs.append((length, owner))
    joined = "".join(texts)
    return joined if not runs or runs[0] == (len(joined), TEMPLATE) else _make(joined, tuple(runs))


def interleave(separator: str, texts: Iterable[str]) -> str:
    """`str.join`."""
    return concat([piece for text in texts for piece in (separator, text)][1:])


def part(text: str, start: int, stop: int) -> str:
    """The characters ``[start, stop)`` of a text with their owners."""
    cut = str.__getitem__(text, slice(start, stop))
    runs = runs_of(text)
    if not cut:
        return ""
    if len(runs) == 1:
        return _make(cut, ((len(cut), runs[0][1]),))
    kept: list[Run] = []
    at = 0
    for length, owner in runs:
        overlap = min(at + length, stop) - max(at, start)
        if overlap > 0:
            kept.append((overlap, owner))
        at += length
    return _make(cut, tuple(kept))


def rewritten(result: Any, by: str, *sources: Any) -> Any:
    """What an operation that cannot be followed returned; texts in it are owned by `Rewritten`.

    A text that is exactly one of the sources keeps that source's owners.
    """
    if isinstance(result, str):
        same = next((s for s in sources if isinstance(s, str) and str.__eq__(s, result)), None)
        if same is not None or not result:
            return same if same is not None else result
        owners = tuple(sorted(set().union(*map(owners_in, sources))))
        return _make(plain_text(result), ((len(result), Rewritten(by, owners)),)) if owners else result
    if isinstance(result, dict):
        return {key: rewritten(value, by, *sources) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(rewritten(value, by, *sources) for value in result)
    return result


def mapped(text: str, change: Callable[[str], str]) -> str:
    """Change a text piece by piece; for changes that treat every character by itself (escapes)."""
    changed = ((change(piece), owner) for piece, owner in pieces(text))
    return concat(_make(piece, ((len(piece), owner),)) for piece, owner in changed if piece)


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """`str.replace`: what is put in belongs to whoever owns `new`.

    Where `new` is the beginning or the end of `old`, the rest of `old` is left out, and nothing is put in.
    """
    if old:
        kept = _in_order(text, str.split(text, old, count), old)
        if not new or not (old.startswith(new) or old.endswith(new)):
            return interleave(new, kept)
        skip = 0 if old.startswith(new) else len(old) - len(new)
        ends, at = list[str](), 0
        for piece in kept[:-1]:
            at += len(piece) + skip
            ends += [piece, part(text, at, at + len(new))]
            at += len(old) - skip
        return concat([*ends, *kept[-1:]])
    limit = len(text) + 1 if count < 0 else count
    characters = [part(text, at, at + 1) for at in range(len(text))]
    begun = [piece for character in characters[:limit] for piece in (new, character)]
    return concat([*begun, *(characters[limit:] or [new] * (limit > len(text)))])


def recased(text: str, change: Callable[[str], str]) -> str:
    """A change of case, either of the same length or one that treats every character by itself."""
    result = change(text)
    if len(result) == len(text):
        return _make(result, runs_of(text))
    by_character = mapped(text, lambda piece: "".join(map(change, piece)))
    if str.__eq__(by_character, result):
        return by_character
    return rewritten(result, "a change of case", text)


def respaced(text: str, result: str, by: str) -> str:
    """The same words with other white space: white space that differs is the template's."""
    said, shown = list(_WORDS.finditer(text)), list(_WORDS.finditer(result))
    if [word[0] for word in said] != [word[0] for word in shown]:
        return rewritten(result, by, text)
    kept, before, after = list[str](), 0, 0
    for old, new in zip([*said, None], [*shown, None], strict=True):
        start, begin = old.start() if old else len(text), new.start() if new else len(result)
        unchanged = text[before:start] == result[after:begin]
        kept += [
            part(text, before, start) if unchanged else result[after:begin],
            part(text, *old.span()) if old else "",
        ]
        before, after = old.end() if old else start, new.end() if new else begin
    return concat(kept)


def quoted(text: str) -> str:
    """`repr` of a text: the quotes are the template's, an escape belongs to the character it stands for."""
    shown = repr(plain_text(text))
    mark = shown[0]

    def escape(piece: str) -> str:
        others = "'\"".replace(mark, "")
        return "".join(c if c in others else f"\\{c}" if c == mark else repr(c)[1:-1] for c in piece)

    result = concat((mark, mapped(text, escape), mark))
    return result if str.__eq__(result, shown) else rewritten(shown, "repr", text)


def percent(pattern: str, values: Any) -> str:
    """`pattern % values`, followed where the pattern holds nothing but ``%s`` and ``%%``."""
    result = str.__mod__(plain_text(pattern), values)
    given = list(values) if isinstance(values, tuple) else [values]
    parts = replaced(pattern, "%%", "\0").split("%s") if "\0" not in pattern else []
    if len(parts) == len(given) + 1 and not any("%" in text for text in parts):
        texts = [value if isinstance(value, str) else str(value) for value in given]
        shown = [piece for pair in zip(parts, [*texts, ""], strict=True) for piece in pair]
        followed = replaced(concat(shown), "\0", "%")
        if str.__eq__(followed, result):
            return followed
    return rewritten(plain_text(result), "%", pattern, values)


def _trimmed(text: str, from_start: str, kept: str) -> str:
    start = len(text) - len(from_start)
    return part(text, start, start + len(kept))


def _in_order(text: str, parts: Iterable[str], sep: str | None) -> list[str]:
    """Parts that follow each other in a text, with one separator (or white space) between two of them."""
    found, at = [], 0
    for piece in parts:
        if sep is None:
            at = str.index(text, piece, at)
        found.append(part(text, at, at + len(piece)))
        at += len(piece) + len(sep or "")
    return found
