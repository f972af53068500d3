"""A number that identifies the conversations of a data set, and that can be added up part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ctxlens.chat.data.conversations import Conversation, as_conversations
from ctxlens.chat.data.given_rows import Source

_MODULUS = 2**128


class Fingerprint:
    """The sum of the digests of conversations. Parts can be added, and their order does not matter.

    A digest covers a conversation's id and messages, but not its labels. Equal sums mean equal
    conversations, unless somebody constructs a collision on purpose.
    """

    def __init__(self, text: str = "") -> None:
        """Start empty, or from the text of another fingerprint (`str`)."""
        self._sum = int(text or "0", 16)

    def add(self, conversation: Conversation) -> None:
        """Add a conversation."""
        self._sum = (self._sum + _digest(conversation.id, conversation.messages)) % _MODULUS

    def __iadd__(self, other: Fingerprint) -> Fingerprint:
        self._sum = (self._sum + other._sum) % _MODULUS
        return self

    def __str__(self) -> str:
        return f"{self._sum:032x}"


def fingerprint_conversations(conversations: Iterable[Conversation] | Source) -> str:
    """Return the fingerprint of a data set: 32 hexadecimal digits that do not depend on the order.

    `Scores.meta["fingerprint"]` holds the fingerprint of the conversations that were scored, so that
    scores cannot be mistaken for those of another data set.
    """
    fingerprint = Fingerprint()
    for conversation in as_conversations(conversations):
        fingerprint.add(conversation)
    return str(fingerprint)


def _digest(name: str, messages: Iterable[Mapping[str, Any]]) -> int:
    content = json.dumps([name, [dict(message) for message in messages]], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:16], "big")
