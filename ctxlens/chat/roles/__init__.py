"""Who said each token: render a conversation, with or without its chat template, and label every token.

`render` returns exactly the tokens of ``tokenizer.apply_chat_template(..., tokenize=True)``, each with its
role, its turn and its characters. The template runs on texts that remember who said them
(`ctxlens.chat.roles.traced`); nothing is searched for in the rendered text, so text that imitates a
template's markers keeps the role of whoever wrote it.

The roles:

* ``bos``: beginning-of-sequence tokens at the very start, written by the template (or by `render_plain`).
  Where the template writes the tokenizer's BOS token before every turn (``<|im_start|>`` in some models),
  it is a role marker, and all of them are ``template``, also the first.
* ``system``, ``user``, ``assistant``, ``tool``: the contents of the messages. A message's reasoning, and
  the strings of its tool calls (function name, arguments), are its own words too; the JSON or XML around
  them is ``template``. The name of a called function counts where it occurs first; templates repeat it in
  front of the tool's result. The role ``developer`` counts as ``system``, ``model`` as ``assistant``, and
  ``function``, ``ipython`` and ``observation`` count as ``tool``.
* ``template``: everything else that the template writes: markers, separators, end-of-turn tokens, dates,
  default system prompts, tool schemas, the generation prompt, and whatever it inserts into a message.
* ``indicator``: what ctxlens itself appended to a message that carries ``{"indicator": True}`` (or a text).
* ``pad`` and ``sink`` occur only in batches and in attention.

A message's character keeps its role wherever the template copies it, also as a JSON or HTML escape or in
another case. If a template drops the white space around a message and writes white space of its own, that
is the template's. A token that holds characters of several owners follows the rule of
`ctxlens.chat.roles.spans.label_tokens`: white space counts only in a token that holds nothing else, and
what somebody said takes precedence over what the template wrote.
"""

from ctxlens.chat.roles.chat import (
    DEFAULT_INDICATOR,
    INDICATOR_KEY,
    MESSAGE_ROLES,
    N_ROLES,
    ROLE_LABELS,
    TEMPLATE_ARGS_KEY,
    TOOLS_KEY,
    TRAIN_KEY,
    Message,
    RenderedChat,
    Role,
    content_text,
)
from ctxlens.chat.roles.checks import check_messages
from ctxlens.chat.roles.rendering import render, render_plain
from ctxlens.chat.roles.variables import bind_arguments, check_arguments, put_arguments

__all__ = [
    "DEFAULT_INDICATOR",
    "INDICATOR_KEY",
    "MESSAGE_ROLES",
    "N_ROLES",
    "ROLE_LABELS",
    "TEMPLATE_ARGS_KEY",
    "TOOLS_KEY",
    "TRAIN_KEY",
    "Message",
    "RenderedChat",
    "Role",
    "bind_arguments",
    "check_arguments",
    "check_messages",
    "content_text",
    "put_arguments",
    "render",
    "render_plain",
]
