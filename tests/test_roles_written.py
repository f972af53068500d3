"""What a model has to write by itself: from the generation prompt to the token that ends the turn."""

import re

import numpy as np
import pytest
from chat_cases import BYTES, assistant, byte_tokenizer, user
from conftest import TOY_TEMPLATE

from ctxlens.chat.roles import render, render_plain

CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<a>' }}"
    "{% if m.thinking %}{{ '#think#' + m.thinking + '#end#' }}{% endif %}{{ '#final#' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ eos_token }}"
    "{% else %}{{ '<u>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
"""The model has to name a channel before it says anything, as in gpt-oss."""


def written(chat):
    runs = np.split(np.arange(chat.n_tokens), np.flatnonzero(np.diff(chat.mask_written().astype(int))) + 1)
    return [
        chat.text[chat.spans[run[0]][0] : chat.spans[run[-1]][1]]
        for run in runs
        if chat.mask_written()[run[0]]
    ]


def test_a_response_and_its_stop_token():
    chat = render(BYTES, [user("a"), assistant("It is"), user("b"), assistant("Six")])
    assert written(chat) == ["It is</s>", "Six</s>"]
    assert chat.openings == {}
    assert written(render_plain(BYTES, [user("a"), assistant("It is")])) == ["It is"]
    assert not render(BYTES, [user("a")], add_generation_prompt=True).mask_written().any()


def test_the_templates_own_text_after_the_generation_prompt():
    chat = render(BYTES, [user("a"), assistant("b", thinking="c")], chat_template=CHANNELS)
    assert chat.text == "<u>a</s><a>#think#c#end##final#b</s>"
    assert written(chat) == ["#think#c#end##final#b</s>"]
    assert chat.openings == {1: chat.text.index("#think#") - len("</s>") + 1}
    assert chat.first_answer_position() == chat.openings[1] + len("#think#") - 1


def test_the_syntax_of_tool_calls_up_to_the_stop_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<call>", "</call>"])
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [user("a"), assistant("b", tool_calls=[call]), user("c")]
    chat = render(tokenizer, messages, chat_template=CHANNELS)
    assert chat.text == "<u>a</s><a>#final#b<call>f</call></s><u>c</s>"
    assert written(chat) == ["#final#b<call>f</call></s>"]
    assert chat.tokens[chat.stops[1]] == tokenizer.eos_token_id


def test_a_speaker_who_imitates_the_generation_prompt_changes_nothing():
    honest = render(BYTES, [user("xx"), assistant("b")], chat_template=CHANNELS)
    spoof = render(BYTES, [user("<a>"), assistant("<a>b<a>")], chat_template=CHANNELS)
    assert written(honest) == ["#final#b</s>"]
    assert written(spoof) == ["#final#<a>b<a></s>"]


def test_cutting_keeps_it():
    messages = [user("abcdefghij"), assistant("klm")]
    chat = render(BYTES, messages, chat_template=CHANNELS, max_tokens=25, truncate=True)
    assert chat.n_tokens == 25
    assert "".join(np.asarray(chat.token_strings())[chat.mask_written()]).endswith("klm</s>")
    assert int(chat.mask_written().sum()) == len("#final#klm") + 1


def test_a_template_without_generation_prompt_has_what_was_said():
    template = TOY_TEMPLATE.split("{% if add_generation_prompt %}")[0]
    chat = render(BYTES, [user("a"), assistant("It is")], chat_template=template)
    assert written(chat) == ["It is</s>"]


HARMONY = (
    "{% set ns = namespace(f='') %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}{{ '<start>assistant<channel>analysis<message>' + m.thinking + '<end>' }}"
    "{% endif %}"
    "{% if m.tool_calls %}{% set ns.f = m.tool_calls[0].function.name %}"
    "{{ '<start>assistant to=' + ns.f + '<message>' }}"
    "{{ (m.tool_calls[0].function.arguments | tojson) + '<call>' }}"
    "{% else %}{{ '<start>assistant<channel>final<message>' + m.content + '<return>' }}{% endif %}"
    "{% else %}{{ '<start>' + (ns.f + ' to=assistant' if m.role == 'tool' else m.role) }}"
    "{{ '<message>' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"
)
"""Reasoning and calls are messages of their own, in the manner of gpt-oss."""

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}


def test_reasoning_and_a_call_are_written_to_the_end_of_the_call():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{mark}>" for mark in ("start", "channel", "message", "end", "call", "return")])
    messages = [
        user("u"),
        assistant(None, thinking="hm", tool_calls=[CALL]),
        {"role": "tool", "content": "3"},
    ]
    reply = '<channel>analysis<message>hm<end><start>assistant to=f<message>{"x": "y"}<call>'
    for end in ([], [assistant("Three.")]):
        chat = render(tokenizer, [*messages, *end], chat_template=HARMONY)
        assert written(chat) == [reply, *["<channel>final<message>Three.<return>"][: len(end)]]
        assert chat.text[chat.spans[chat.stops[1]][0] :].startswith("<call><start>f to=assistant<message>3")
    last = render(tokenizer, messages[:2], chat_template=HARMONY)
    assert written(last) == [reply]


def test_a_header_that_the_generation_prompt_goes_beyond():
    # The prompt opens a think block, which the template leaves out in front of earlier answers and of calls.
    template = (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>\\n' }}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<a>\\n<think>\\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<call>", "</call>"])
    chat = render(tokenizer, [user("u"), assistant("", tool_calls=[CALL])], chat_template=template)
    assert chat.text == "<u>u</s><a>\n<call>f</call></s>"
    assert written(chat) == ["<call>f</call></s>"]


REPLIES = {
    "huggingface+trl/gptoss": (
        "<|channel|>analysis<|message|>Hm.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": "y"}<|call|>'
    ),
    "axolotl-ai-cloud+axolotl/gemma4": (
        '<|channel>thought\nHm.\n<channel|><|tool_call>call:f{x:<|"|>y<|"|>}<tool_call|><|tool_response>'
    ),
    "huggingface+trl/qwen3": (
        "<think>\nHm.\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": "y"}}\n</tool_call><|im_end|>'
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_calls_of_real_templates_are_written_whole(test_data, name):
    template = (test_data / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(sorted(set(re.findall(r"<\|?/?[a-z_]+\|?>", template))))
    messages = [user("u"), assistant(None, reasoning_content="Hm.", tool_calls=[CALL])]
    messages.append({"role": "tool", "content": "3"})
    chat = render(tokenizer, messages, chat_template=template)
    assert written(chat) == [REPLIES[name]]
    results = [
        chat.text[a:b] for (a, b), turn in zip(chat.spans.tolist(), chat.turn, strict=True) if turn == 2
    ]
    assert "".join(results) == "3"
