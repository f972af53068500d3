"""Map the tokens of a text to its characters, and give every token an owner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ctxlens.errors import RenderError

_METASPACE = "\u2581"


def encode_with_spans(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a text as `apply_chat_template` does and find each token's characters.

    Fast tokenizers report offsets. Slow tokenizers do not, and byte-level tokenizers that trim offsets
    leave out white space; there the bytes of the tokens are matched against the text, which they must
    cover exactly.

    Returns:
        Token ids ``[pos]`` and character spans ``[pos, 2]``. Tokens that share one character (byte
        pieces of an emoji) all have that character as their span. A token without characters has an
        empty span.

    Raises:
        RenderError: The tokenizer has no offsets and its tokens do not spell the text.
    """
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        spans = np.asarray(encoding["offset_mapping"], dtype=np.int32).reshape(-1, 2)
        if _leaves_out_space(text, spans):
            covered = _cover(tokenizer, ids, text)
            spans = spans if covered is None else covered
        return ids, _without_gaps(text, spans)
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    covered = _cover(tokenizer, ids, text)
    if covered is None:
        raise RenderError(
            f"The tokenizer {type(tokenizer).__name__} gives no offsets and its tokens do not spell the "
            "text, so roles cannot be assigned exactly; load its fast version (use_fast=True)."
        )
    return ids, covered


def _gaps(text: str, spans: np.ndarray) -> list[tuple[int, int, int]]:
    """Characters ``[start, end)`` that no token holds, each with the number of tokens before it."""
    if not len(spans):
        return []
    ends = np.insert(np.maximum.accumulate(spans[:, 1]), 0, 0)
    starts = np.append(spans[:, 0], len(text))
    return [(int(n), int(ends[n]), int(starts[n])) for n in np.flatnonzero(starts > ends)]


def _leaves_out_space(text: str, spans: np.ndarray) -> bool:
    return any(text[start:end].isspace() for _, start, end in _gaps(text, spans))


def _without_gaps(text: str, spans: np.ndarray) -> np.ndarray:
    """The spans, with every character in one of them.

    Where a tokenizer composes characters (NFC), the offsets of the composed character cover only the first
    of them. The others belong to the same token; white space that is left out belongs to the next token.
    """
    gaps = _gaps(text, spans)
    if not gaps:
        return spans
    filled = spans.copy()
    for before, start, end in gaps:
        solid = start
        while before and solid < end and not text[solid].isspace():
            solid += 1
        if before == len(spans):
            solid = end
        same = before - 1
        while solid > start and same >= 0 and spans[same, 1] == start:
            filled[same, 1] = solid
            same -= 1
        if solid < end:
            filled[before, 0] = solid
    return filled


def _cover(tokenizer: Any, ids: np.ndarray, text: str) -> np.ndarray | None:
    """Spans from matching the tokens' bytes against the text; ``None`` if they do not spell it."""
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    added = {int(i): str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    for surface_of in (_byte_level_surface, _metaspace_surface):
        surfaces = [
            added[i].encode() if i in added else surface_of(token)
            for i, token in zip(ids.tolist(), tokens, strict=True)
        ]
        if all(surface is not None for surface in surfaces):
            spans = _lay([s for s in surfaces if s is not None], text)
            if spans is not None:
                return spans
    return None


def _lay(surfaces: Sequence[bytes], text: str) -> np.ndarray | None:
    """Character spans of byte strings that together spell the text in UTF-8.

    A leading space that the text does not have (SentencePiece's dummy prefix) is not part of the token.
    """
    data = text.encode("utf-8", "surrogatepass")
    ends: list[int] = []
    starts: list[int] = []
    at = 0
    for surface in surfaces:
        if not data.startswith(surface, at) and surface.startswith(b" ") and data.startswith(surface[1:], at):
            surface = surface[1:]
        if not data.startswith(surface, at):
            return None
        starts.append(at)
        at += len(surface)
        ends.append(at)
    if at != len(data):
        return None
    raw = np.frombuffer(data, dtype=np.uint8)
    is_start = (raw & 0xC0) != 0x80
    char_of_byte = np.cumsum(is_start) - 1
    first = np.append(char_of_byte, len(text))[np.asarray(starts, dtype=np.int64)]
    last = np.where(
        np.asarray(ends) > np.asarray(starts),
        np.append(char_of_byte, 0)[np.asarray(ends, dtype=np.int64) - 1] + 1,
        first,
    )
    return np.stack([first, last], axis=1).astype(np.int32)


def _byte_level_surface(token: str) -> bytes | None:
    table = _byte_of_char()
    try:
        return bytes(table[c] for c in token)
    except KeyError:
        return None


def _metaspace_surface(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_METASPACE, " ").encode("utf-8", "surrogatepass")


@cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2's tokenizer, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + n): b for n, b in enumerate(others)})
    return table


def label_tokens(text: str, spans: np.ndarray, bounds: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Give every token the owner of its characters.

    A token may hold characters of several owners. White space counts only if the token holds nothing
    else. Among the other characters, what somebody said takes precedence over the template's own text,
    and the first speaker takes precedence over the second. A token without characters gets the owner of
    the character after it.

    Args:
        text: The rendered text.
        spans: ``[pos, 2]`` character spans of the tokens.
        bounds: ``[segment]`` positions where the segments of the text start, ascending, the first at 0.
        owner: ``[segment]`` the owner of each segment; -1 is the template.

    Returns:
        ``[pos]`` owners.
    """
    start = spans[:, 0]
    last = np.maximum(spans[:, 1] - 1, start)
    first_segment = np.searchsorted(bounds, start, side="right") - 1
    last_segment = np.searchsorted(bounds, last, side="right") - 1
    owners = owner[first_segment]
    for position in np.flatnonzero(first_segment != last_segment).tolist():
        begin, end = int(spans[position, 0]), int(spans[position, 1])
        held = [int(owner[np.searchsorted(bounds, c, side="right") - 1]) for c in range(begin, end)]
        solid = [o for o, c in zip(held, text[begin:end], strict=True) if not c.isspace()] or held
        owners[position] = next((o for o in solid if o >= 0), -1)
    return owners
