"""A tokenizer read without transformers renders as the one that transformers loads."""

import json
import shutil
from pathlib import Path

import pytest

from ctxlens.chat.roles import render, render_plain
from ctxlens.errors import RenderError
from ctxlens.models.bare_tokenizer import read_bare_tokenizer
from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "a b"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "  Hi <s> there 🙂</s> é\n\n\tnaïve "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is the mayor?"},
        {"role": "assistant", "content": "Ada.", "reasoning_content": "Think.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "Since "}, {"type": "text", "text": "when?"}]},
        {"role": "assistant", "content": "Since 19"},
    ],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
]
SHOWS_ALL = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}:{{ m.reasoning_content }}{{ m.thinking }}"
    "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls is defined }}{{ m.name is defined }}"
    "{{ eos_token }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{{ strftime_now('%Y') }}{{ style }}"
)

TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


def outcome(renderer, tokenizer, messages, **options):
    """Everything about a rendering, or that it is refused."""
    try:
        chat = renderer(tokenizer, messages, **options)
    except RenderError:
        return "refused"
    arrays = (chat.tokens, chat.role, chat.turn, chat.spans)
    return (
        chat.text, [each.tolist() for each in arrays], dict(chat.stops), dict(chat.openings),
        chat.spoofed_special_tokens, chat.left_out_turns(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["organism", "organism-chat"])
def test_it_renders_as_the_one_of_transformers(name):
    source = locate_checkpoint(name)
    bare, full = read_bare_tokenizer(source), load_tokenizer(source)
    assert bare is not None
    assert len(bare) == len(full)
    for fact in ("special_tokens_map", "bos_token_id", "eos_token_id", "chat_template"):
        assert getattr(bare, fact) == getattr(full, fact)
    assert set(bare.all_special_ids) == set(full.all_special_ids)
    assert bare.added_tokens_decoder.keys() == full.added_tokens_decoder.keys()
    compared = 0
    for messages in CONVERSATIONS:
        for template in (None, SHOWS_ALL):
            for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
                if "continue_final_message" in options and messages[-1]["role"] == "user":
                    continue
                options = {**options, "chat_template": template}
                if template:
                    options |= {"tools": [{"type": "function"}], "template_args": {"style": ["é"]}}
                expected = outcome(render, full, messages, **options)
                assert outcome(render, bare, messages, **options) == expected
                compared += expected != "refused"
        assert outcome(render_plain, bare, messages) == outcome(render_plain, full, messages)
    assert compared > 8


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"pad_token": "<new>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<|user|>"}}),
        ("tokenizer.json", {"post_processor": None}),
        ("tokenizer.json", {"truncation": TRUNCATION}),
        ("config.json", {"model_type": "gemma3_text"}),
    ],
)  # fmt: skip
def test_what_transformers_would_change_is_left_to_it(tmp_path, file, change):
    folder = Path(shutil.copytree(locate_checkpoint("organism"), tmp_path / "model"))
    assert read_bare_tokenizer(folder) is not None
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_bare_tokenizer(folder) is None


def test_a_model_on_the_hub_is_left_to_transformers():
    assert read_bare_tokenizer("owner/name") is None


def test_named_templates(tmp_path):
    bare = read_bare_tokenizer(locate_checkpoint("organism"))
    assert bare is not None
    bare.chat_template = {"default": "d", "tool_use": "t"}
    assert [bare.get_chat_template(None, tools) for tools in (None, [{}])] == ["d", "t"]
    assert [bare.get_chat_template(name, None) for name in ("tool_use", "{{ x }}")] == ["t", "{{ x }}"]
    bare.chat_template = {"other": "o"}
    with pytest.raises(ValueError, match=r"no default; choose from \['other'\]"):
        bare.get_chat_template(None, None)
