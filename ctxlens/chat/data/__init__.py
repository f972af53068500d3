"""Read conversations in the field's layouts and files, clean them as the paper does, and count each step.

Layouts (`load_conversations` detects the layout, or takes it as an argument):

* ``messages``: a column ``messages`` (or ``conversations``) of mappings with ``role`` and ``content``;
* ``sharegpt``: a column ``conversations`` of mappings with ``from`` and ``value``, or of bare texts that
  alternate between user and assistant; a ``chosen`` turn beside it is the last answer;
* ``alpaca``: ``instruction``, ``output`` (or ``response``, ``chosen``), optionally ``input`` (or ``context``)
  and ``history``;
* ``prompt-completion``: ``prompt`` and ``completion`` (or ``response``, ``chosen``), texts or messages; or
  ``chosen`` alone, as messages.

In every layout ``system`` is the system message and ``tools`` the tool schemas. A ``label`` that is false
(KTO) keeps the last answer out of the loss, as ``weight: 0`` or ``train: false`` of a message do.

Cleaning (paper, appendix on data) drops empty turns, turns before the first user turn except the system's,
and a last user turn without an answer. On request it also drops conversations that contain a refusal. All
other columns are kept as labels. `open_conversations` reads row by row, `load_conversations` all at once, and
`read_messages` reads the same layouts without cleaning, for questions that are asked of a model.
"""

from ctxlens.chat.data.cleaning import REFUSALS
from ctxlens.chat.data.conversations import (
    Conversation,
    ConversationSet,
    ConversationStream,
    add_skipped,
    are_conversations,
    as_conversations,
    conversation_from_row,
    describe_reading,
    load_conversations,
    open_conversations,
    write_conversations,
)
from ctxlens.chat.data.fingerprint import Fingerprint, fingerprint_conversations
from ctxlens.chat.data.layouts import LAYOUTS
from ctxlens.chat.data.messages import GivenMessages, read_messages, read_messages_file

__all__ = [
    "LAYOUTS", "REFUSALS", "Conversation", "ConversationSet", "ConversationStream", "Fingerprint",
    "GivenMessages", "add_skipped", "are_conversations", "as_conversations", "conversation_from_row",
    "describe_reading", "fingerprint_conversations", "load_conversations", "open_conversations",
    "read_messages", "read_messages_file", "write_conversations",
]  # fmt: skip
