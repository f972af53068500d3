"""What a model has to write by itself: from the generation prompt to the token that ends the turn."""

import numpy as np
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
