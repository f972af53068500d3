"""The values of a chat template's own variables, such as `enable_thinking`.

They are given in three places, of which the later ones take precedence: once for a tokenizer, by
`bind_arguments`; for one conversation, under `TEMPLATE_ARGS_KEY` of one of its messages, where the column of
that name in a data set is put; and in the call of `ctxlens.render`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ctxlens.chat.roles.chat import TEMPLATE_ARGS_KEY, Message
from ctxlens.chat.roles.template import variables_of
from ctxlens.chat.roles.traced import NotFollowedError
from ctxlens.errors import InputError

Named = str | Mapping[str, str]
"""A chat template's Jinja text, or several with their names, as tokenizers hold them."""

_ALWAYS_GIVEN = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "extra_special_tokens"]
    + ["additional_special_tokens"]
    + [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
)


def own_variables(template: Named) -> frozenset[str] | None:
    """The variables that a template uses and that only its caller can give; None if it is not a template."""
    sources = template.values() if isinstance(template, Mapping) else [template]
    try:
        return frozenset().union(*map(variables_of, sources)) - _ALWAYS_GIVEN
    except (TemplateError, NotFollowedError):
        return None


def check_arguments(template: Named, arguments: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the arguments of a template if it uses all of them.

    A text that is not a template is not refused here; rendering says what is wrong with it.

    Raises:
        InputError: It does not; the sentence names the variables that it uses.
    """
    own = own_variables(template) if arguments else None
    unknown = sorted(set(arguments or ()) - own) if own is not None else []
    if unknown:
        uses = f"it uses {', '.join(sorted(own or ()))}" if own else "it uses none"
        raise InputError(
            f"The chat template has no variable {', '.join(map(repr, unknown))} of its own; {uses}."
        )
    return arguments or {}


def bind_arguments(template: Named | None, arguments: Mapping[str, Any] | None) -> Named | None:
    """Give some variables of a chat template new defaults.

    The result renders as the template does when it is called with these arguments. A call that gives a
    variable itself still has its way. Whoever has the tokenizer gets the defaults with its template.

    Args:
        template: The template, or several of them; each gets the variables that it uses.
        arguments: JSON values for its variables.

    Raises:
        InputError: A template does not use a variable, or there is no template.
    """
    if not arguments:
        return template
    if not template:
        raise InputError(
            f"Values were given for {', '.join(arguments)}, but the tokenizer has no chat template."
        )
    check_arguments(template, arguments)
    if isinstance(template, Mapping):
        return {name: _bind(source, arguments) for name, source in template.items()}
    return _bind(template, arguments)


def _bind(source: str, arguments: Mapping[str, Any]) -> str:
    """Jinja statements in front of a template; each leaves nothing behind, not even its line."""
    own = own_variables(source) or frozenset()
    head = (
        f"{{% set {name} = {name} if {name} is defined else {value!a} %}}\n"
        for name, value in sorted(arguments.items())
        if name in own
    )
    return "".join(head) + source


def read_arguments(given: Any) -> dict[str, Any]:
    """The arguments in a column of a data set: a mapping, or JSON text of one.

    A null counts as not given, because data sets in columns fill missing keys with it.

    Raises:
        InputError: It is neither.
    """
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        value = given
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(
            f"{TEMPLATE_ARGS_KEY} must be a mapping of variables of the chat template, or JSON text of one, "
            f"but it is {str(given)[:60]!r}."
        )
    return {name: each for name, each in value.items() if each is not None}


def put_arguments(messages: Sequence[Message], given: Any) -> list[Message]:
    """The messages, of which the first carries the arguments of the conversation, if there are any."""
    arguments = read_arguments(given)
    if not arguments or not messages:
        return list(messages)
    return [{**messages[0], TEMPLATE_ARGS_KEY: arguments}, *messages[1:]]


def take_arguments(messages: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
    """The messages without the arguments that one of them carries, and these arguments."""
    arguments: dict[str, Any] = {}
    for message in messages:
        arguments |= read_arguments(message.get(TEMPLATE_ARGS_KEY))
    bare = [
        {key: value for key, value in message.items() if key != TEMPLATE_ARGS_KEY}
        if TEMPLATE_ARGS_KEY in message
        else message
        for message in messages
    ]
    return bare, arguments


__all__ = [
    "Named", "bind_arguments", "check_arguments", "own_variables", "put_arguments", "read_arguments",
    "take_arguments",
]  # fmt: skip
