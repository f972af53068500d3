"""Who said each token: render a conversation, with or without its chat template, and label every token.

`render` gives the very tokens that ``tokenizer.apply_chat_template(..., tokenize=True)`` gives, each with
its role, its turn and its characters. Places are found by rendering (`ctxlens.chat.roles.locate`), never by
looking for marker strings, so text that imitates a template's markers keeps the role of whoever wrote it.

What counts as what:

* ``bos``: beginning-of-sequence tokens at the very start, written by the template (or by `render_plain`).
* ``system``, ``user``, ``assistant``, ``tool``: the contents of the messages. A message's reasoning, and
  the strings of its tool calls (function name, arguments), are its own words too; the JSON or XML around
  them is ``template``. The role ``developer`` counts as ``system``.
* ``template``: everything else that the template writes: markers, separators, end-of-turn tokens, dates,
  default system prompts, tool schemas, the generation prompt.
* ``indicator``: what ctxlens itself appended to a message that carries ``{"indicator": True}`` (or a text).
* ``pad`` and ``sink`` occur only in batches and in attention.

A token that holds characters of several owners follows the rule of
`ctxlens.chat.roles.spans.label_tokens`: white space counts only in a token that holds nothing else; of the
rest, said text goes before template text.
"""

from ctxlens.chat.roles.chat import (
    DEFAULT_INDICATOR,
    INDICATOR_KEY,
    MESSAGE_ROLES,
    N_ROLES,
    ROLE_LABELS,
    Message,
    RenderedChat,
    Role,
    check_messages,
)
from ctxlens.chat.roles.rendering import render, render_plain

__all__ = [
    "DEFAULT_INDICATOR",
    "INDICATOR_KEY",
    "MESSAGE_ROLES",
    "N_ROLES",
    "ROLE_LABELS",
    "Message",
    "RenderedChat",
    "Role",
    "check_messages",
    "render",
    "render_plain",
]
