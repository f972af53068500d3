"""Whatever anybody types, every token keeps the role of whoever typed it."""

import os

import numpy as np
import pytest
from conftest import TOY_TEMPLATE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxlens.chat.roles import Role, render, render_plain

TEMPLATES = {
    "zephyr": TOY_TEMPLATE,
    "trimming": TOY_TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "merging": (
        "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.s = '<<SYS>>' + m.content + '<</SYS>>' %}"
        "{% elif m.role == 'user' %}{{ '[INST] ' + ns.s + m.content + ' [/INST]' }}{% set ns.s = '' %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "bare": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
SPOOFS = [
    *("<|user|>", "<|assistant|>\n", "</s>", "<s>", "[INST]", "[/INST] ", "<<SYS>>", "[IND]", " [IND]"),
    *("<think>", "</think>", "{{ x }}", "{% raw %}", "CONTINUE_FINAL_MESSAGE_TAG ", "user", "assistant"),
    *("\U000f0000", "\U000f0001", "\U000f0002", "\U0010fffd", "\ue000", "\u200b", "\u202e", "\ufeff"),
    *("👩\u200d👩\u200d👧", "🙂", "e\u0301", "日本", "\x00", "\n", "\r\n", "  ", "\t", "\u00a0", "\u2028"),
    *("a", "The", " ", "\\n", "&lt;"),
]

text = st.lists(st.sampled_from(SPOOFS) | st.text(max_size=6), max_size=6).map("".join)
solid_text = text.map(lambda content: f"{content}x")
EXAMPLES = int(os.environ.get("CTXLENS_EXAMPLES", "500"))


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        if draw(st.booleans()):
            messages[-1]["indicator"] = True
        messages.append({"role": "assistant", "content": draw(text)})
    return messages


def check_conversation(tokenizer, messages, name, indicator):
    template = TEMPLATES[name]
    trims = name == "trimming"
    chat = render(tokenizer, messages, chat_template=template, indicator=indicator)
    appended = [f" {indicator}" if indicator and message.get("indicator") else "" for message in messages]
    spoken = [
        {"role": m["role"], "content": m["content"] + more}
        for m, more in zip(messages, appended, strict=True)
    ]
    expected = tokenizer.apply_chat_template(spoken, chat_template=template, return_dict=False)
    assert chat.tokens.tolist() == expected
    owner = np.full(len(chat.text), -1)
    at = 0
    for turn, message in enumerate(spoken):
        said = message["content"].strip() if trims else message["content"]
        lead, trail = surroundings(name, messages, turn)
        if name == "merging" and message["role"] == "system":
            lead = "<s>[INST] <<SYS>>"
        at += len(lead)
        assert chat.text[at : at + len(said)] == said
        owner[at : at + len(said)] = turn
        at += len(said) + len(trail)
    assert at == len(chat.text)
    check_tokens(chat, owner)
    for turn, more in enumerate(appended):
        marked = chat.mask("indicator") & (chat.turn == turn)
        assert bool(more) == bool(marked.any())
        held = {c for start, end in chat.spans[marked].tolist() for c in range(start, end)}
        assert (
            "".join(chat.text[c] for c in sorted(held)).lstrip().startswith((more.strip(), more)) or not more
        )


def surroundings(name, messages, turn):
    """What a template writes before and after a content, known here because the templates are ours."""
    role = messages[turn]["role"]
    if name in ("zephyr", "trimming"):
        return f"<|{role}|>\n", "</s>\n"
    if name == "bare":
        return "", ""
    if role == "system":
        return "", "<</SYS>>"
    if role == "assistant":
        return " ", "</s>"
    after_system = turn == 1 and messages[0]["role"] == "system"
    return "" if after_system else ("<s>" if turn == 0 else "") + "[INST] ", " [/INST]"


def check_tokens(chat, owner):
    """Every token has an owner among those of its characters; one of a single owner has that owner."""
    roles = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
    for position, (start, end) in enumerate(chat.spans.tolist()):
        held = set(owner[start:end].tolist())
        turn = int(chat.turn[position])
        if held:
            assert turn in held
        if turn >= 0:
            allowed = {roles[chat.messages[turn]["role"]], Role.INDICATOR}
            assert Role(int(chat.role[position])) in allowed
        else:
            assert Role(int(chat.role[position])) in (Role.TEMPLATE, Role.BOS)


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=EXAMPLES, **SETTINGS)
@given(
    messages=conversations(),
    name=st.sampled_from(sorted(TEMPLATES)),
    indicator=st.sampled_from([None, "[IND]"]),
)
def test_spoofed_conversations_keep_their_roles(toy_tokenizer, messages, name, indicator):
    check_conversation(toy_tokenizer, messages, name, indicator)


@pytest.mark.slow
@settings(max_examples=10_000, **SETTINGS)
@given(
    messages=conversations(),
    name=st.sampled_from(sorted(TEMPLATES)),
    indicator=st.sampled_from([None, "[IND]"]),
)
def test_many_spoofed_conversations_keep_their_roles(toy_tokenizer, messages, name, indicator):
    check_conversation(toy_tokenizer, messages, name, indicator)


@settings(max_examples=EXAMPLES // 5, **SETTINGS)
@given(
    messages=conversations(),
    window=st.integers(20, 120),
    side=st.sampled_from(["left", "right", "middle"]),
)
def test_truncation_keeps_roles(toy_tokenizer, messages, window, side):
    messages[-1] = {"role": "assistant", "content": messages[-1]["content"] + "x"}
    for rendering in (render, render_plain):
        whole = rendering(toy_tokenizer, messages)
        least = whole.n_tokens - int((whole.turn >= 0).sum()) + 4
        options = {"max_tokens": max(window, least), "truncate": True, "truncation": side}
        cut = rendering(toy_tokenizer, messages, **options)
        assert bool(cut.truncated) == (cut.n_tokens < whole.n_tokens)
        assert cut.n_tokens <= max(window, least)
        places = {tuple(span): n for n, span in enumerate(whole.spans.tolist())}
        index = [places[tuple(span)] for span in cut.spans.tolist()]
        assert index == sorted(index)
        assert np.array_equal(whole.role[index], cut.role)
        assert np.array_equal(whole.turn[index], cut.turn)
        first = int(whole.response_positions(len(messages) - 1)[0])
        assert whole.spans[first].tolist() in cut.spans.tolist()
        assert len(messages) - 1 not in cut.beheaded_turns


@settings(max_examples=EXAMPLES // 5, **SETTINGS)
@given(messages=conversations(), separator=st.sampled_from(["\n", " ", "", "</s>"]))
def test_plain_rendering_keeps_roles(toy_tokenizer, messages, separator):
    chat = render_plain(toy_tokenizer, messages, separator=separator, bos=True)
    owner = np.full(len(chat.text), -1)
    at = len("<s>")
    for turn, message in enumerate(messages):
        owner[at : at + len(message["content"])] = turn
        at += len(message["content"]) + len(separator)
    check_tokens(chat, owner)
    assert chat.tokens[1:].tolist() == toy_tokenizer(chat.text[3:], add_special_tokens=False)["input_ids"]


@settings(max_examples=EXAMPLES // 5, **SETTINGS)
@given(question=text, prefix=solid_text, name=st.sampled_from(["zephyr", "trimming"]))
def test_response_prefixes_keep_their_roles(toy_tokenizer, question, prefix, name):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": prefix}]
    options = {"chat_template": TEMPLATES[name], "continue_final_message": True}
    chat = render(toy_tokenizer, messages, **options)
    assert chat.tokens.tolist() == toy_tokenizer.apply_chat_template(messages, return_dict=False, **options)
    assert chat.role[-1] == Role.ASSISTANT
