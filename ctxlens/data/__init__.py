"""Conversations in: from the field's layouts and files, cleaned as in the paper, every step counted.

Layouts (`load_conversations` finds out which, or is told):

* ``messages``: a column ``messages`` (or ``conversations``) of mappings with ``role`` and ``content``;
* ``sharegpt``: a column ``conversations`` of mappings with ``from`` and ``value``, or of bare texts that
  alternate between user and assistant; a ``chosen`` turn beside it is its last answer;
* ``alpaca``: ``instruction``, ``output`` (or ``response``), optionally ``input`` (or ``context``),
  ``history`` and ``system``;
* ``prompt-completion``: ``prompt`` and ``completion`` (or ``response``, ``chosen``), texts or messages.

Cleaning (paper, appendix on data): empty turns, turns before the first user turn other than the system's,
and a last user turn without answer are dropped. All other columns are kept as labels.
"""

from ctxlens.data.conversations import (
    Conversation,
    ConversationSet,
    load_conversations,
    read_messages_file,
    write_conversations,
)
from ctxlens.data.layouts import LAYOUTS

__all__ = [
    "LAYOUTS",
    "Conversation",
    "ConversationSet",
    "load_conversations",
    "read_messages_file",
    "write_conversations",
]
