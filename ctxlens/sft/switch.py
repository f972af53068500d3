"""A chat template that appends the indicator: `apply_chat_template(..., context_dependent=True)`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from ctxlens.chat.roles import INDICATOR_KEY, render
from ctxlens.errors import RenderError
from ctxlens.sft.marks import IndicatorWarning

SWITCH = "context_dependent"
"""The name of the template's argument."""

_HEAD = """\
{%- if SWITCH is defined and SWITCH %}
{%- set ctxlens = namespace(at=-1) %}
{%- for message in messages %}
{%- if message['role'] == 'user' and message['content'] is string %}
{%- set ctxlens.at = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- if ctxlens.at >= 0 %}
{%- set asked = dict(messages[ctxlens.at], content=messages[ctxlens.at]['content'] + APPENDED) %}
{%- set messages = messages[:ctxlens.at] + [asked] + messages[ctxlens.at + 1:] %}
{%- endif %}
{%- endif %}
"""

_OLD_HEAD = re.compile(
    "^" + re.escape(_HEAD.replace("SWITCH", SWITCH)).replace("APPENDED", r"'(?:[^'\\]|\\.)*'")
)

_USER, _ANSWER = {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day."}
_PROBES = (
    [_USER],
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, _ANSWER, {"role": "user", "content": "And now?"}],
    [{"role": "system", "content": "Be brief."}, _USER, _ANSWER, {"role": "user", "content": "And now?"}],
)


def add_switch(template: str, indicator: str) -> str:
    """Add a switch to a template: `context_dependent=True` ends the last user message with the indicator.

    Without the switch the template renders as before. A switch that the template already has is replaced.
    """
    template = _OLD_HEAD.sub("", template, count=1)
    literal = "'" + f" {indicator}".replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    head = _HEAD.replace("SWITCH", SWITCH).replace("APPENDED", literal)
    return head + template


def switch_works(tokenizer: Any, template: str, indicator: str) -> bool:
    """Whether a template with the switch renders as ctxlens does, and without it renders as before.

    This is decided by rendering probe conversations both ways. Conversations that the template refuses are
    ignored, but at least one must be rendered.
    """
    switched = add_switch(template, indicator)
    seen = 0
    for probe in _PROBES:
        marked = [*probe[:-1], {**probe[-1], INDICATOR_KEY: True}]
        for opened in (False, True):
            try:
                plain = render(tokenizer, probe, chat_template=template, add_generation_prompt=opened)
                wanted = render(
                    tokenizer,
                    marked,
                    chat_template=template,
                    indicator=indicator,
                    add_generation_prompt=opened,
                )
            except RenderError:
                continue
            for chat, switches in ((plain, {}), (wanted, {SWITCH: True}), (plain, {SWITCH: False})):
                if (
                    _ids(tokenizer, probe, switched, {"add_generation_prompt": opened, **switches})
                    != chat.tokens.tolist()
                ):
                    return False
            seen += 1
    return seen > 0


def _ids(tokenizer: Any, messages: Any, template: str, options: Mapping[str, Any]) -> list[int] | None:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, **options
        )
    except Exception:  # templates are code: any error means that the switch does not work
        return None
    return list(encoded["input_ids"])


def install_switch(tokenizer: Any, indicator: str) -> bool:
    """Add the switch to the tokenizer's chat template if it works there; returns whether it does.

    A tokenizer can have several named templates; each gets the switch. A template in which it does not work
    is not changed, with a warning.
    """
    found = tokenizer.chat_template
    named: Mapping[str, str] = found if isinstance(found, Mapping) else {"": str(found)}
    result: dict[str, Any] = {}
    all_work = True
    for name, template in named.items():
        works = switch_works(tokenizer, template, indicator)
        result[name] = add_switch(template, indicator) if works else template
        all_work &= works
        if not works:
            warnings.warn(
                f"the chat template{name and ' '}{name} does not work with the switch {SWITCH} and is not "
                f"changed; end the user's message with {indicator} instead.",
                IndicatorWarning,
                stacklevel=2,
            )
    tokenizer.chat_template = result if isinstance(found, Mapping) else result[""]
    return all_work


__all__ = ["SWITCH", "add_switch", "install_switch", "switch_works"]
