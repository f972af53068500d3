"""Labels against an independent oracle, which itself is tested by hand first."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chat_cases import assistant, user

from ctxlens.chat.roles import render
from ctxlens.errors import InputError

FOLDER = Path(__file__).parents[1] / "experiments" / "role_oracle"


def load(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


oracle, judging = load("oracle"), load("judge_templates")
BYTES = judging.byte_tokenizer()
TEMPLATE, UNDECIDED = oracle.TEMPLATE, oracle.UNDECIDED


def truth(source, messages):
    def apply(conversation):
        return BYTES.apply_chat_template(conversation, chat_template=source, tokenize=False)

    found = oracle.find_truth(apply, messages)
    letters = "".join({TEMPLATE: ".", UNDECIDED: "?"}.get(owner, str(owner)) for owner in found.owner)
    return found.text, letters


@pytest.mark.parametrize(
    ("source", "contents", "text", "owners"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", ["a b", "c2."], "<a b><c2.>", ".000..111."),
        ("{% for m in messages %}{{ m.content | trim }}\n{% endfor %}", [" a \n", "b\n"], "a\nb\n", "0.1."),
        ("{% for m in messages %}{{ m.content.split('</t>')[-1] }};{% endfor %}", ["u", "x</t>\n y"],
         "u;\n y;", "0.111."),
        ("{{ messages[0].content | replace('cat', 'dog!') }}", ["a cat."], "a dog!.", "00....0"),
        ("{{ messages[0].content | tojson }}{{ messages[0].content }}", ['a"\n'], '"a\\"\\n"a"\n',
         ".00000.000"),
        ("{{ messages[0].content }}{{ messages[0].content }}", ["ab"], "abab", "0000"),
        ("{{ '</x>' if '</x>' in messages[0].content }}{{ messages[0].content }}", ["a</x>b"], "</x>a</x>b",
         "????0????0"),
        ("{{ messages[0].content | upper }}", ["Ab c"], "AB C", "0000"),
    ],
)  # fmt: skip
def test_the_oracle_finds_who_said_what(source, contents, text, owners):
    messages = [(user, assistant)[n % 2](content) for n, content in enumerate(contents)]
    assert truth(source, messages) == (text, owners)


def test_the_name_of_a_called_function_is_the_assistants_once():
    source = "{{ messages[1].tool_calls[0].function.name }}={{ messages[1].tool_calls[0].function.name }}"
    call = {"function": {"name": "f1", "arguments": {}}}
    assert truth(source, [user("a"), assistant("", tool_calls=[call])]) == ("f1=f1", "11...")


def off_by_one(tokenizer, messages, **options):
    """Labels that are wrong by one token."""
    chat = render(tokenizer, messages, **options)
    return replace(chat, turn=chat.turn[[0, *range(chat.n_tokens - 1)]])


def test_the_oracle_notices_wrong_labels():
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    messages = [user("ab"), assistant("c")]
    good = oracle.judge(BYTES, source, messages, {}, render, InputError)
    assert (good.outcome, good.wrong, good.characters) == ("exact", (), 7)
    bad = oracle.judge(BYTES, source, messages, {}, off_by_one, InputError)
    assert bad.outcome == "mislabel"
    assert bad.wrong == ((1, "a", 0, -1), (3, ">", -1, 0), (5, "c", 1, -1), (6, ">", -1, 1))
    refusing = "{{ raise_exception('no') }}"
    assert oracle.judge(BYTES, refusing, messages, {}, render, InputError).outcome == "template"


QUICK = {
    "chat_templates/axolotl-ai-cloud+axolotl/gemma4.jinja",
    "chat_templates/huggingface+trl/deepseekv3.jinja",
    "chat_templates/huggingface+trl/gptoss.jinja",
    "chat_templates/huggingface+trl/qwen3.jinja",
    "chat_templates/ikawrakow+ik_llama.cpp/MiniMax-M3.jinja",
    "chat_templates/ikawrakow+ik_llama.cpp/Reka-Edge.jinja",
    "chat_templates_2026/deepseek-ai-DeepSeek-V3.1.jinja",
    "chat_templates_2026/unsloth-Apriel-1.5.jinja",
}


def check(templates, names):
    found = judging.summary(judging.judge_all(templates, names))
    assert found["templates"] == len(templates) > 0
    assert found["mislabels"] == found["refused"] == {}
    assert found["outcomes"]["exact"] > 0.7 * len(templates) * len(names)
    assert sum(found["undecided_characters"].values()) < 0.02 * found["characters"]


def test_labels_agree_with_the_oracle_on_hard_templates(test_data):
    templates = {k: v for k, v in judging.load_templates(test_data).items() if k in QUICK}
    assert set(templates) == QUICK
    check(templates, judging.QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", judging.CONVERSATIONS)
def test_labels_agree_with_the_oracle_on_every_template(test_data, name):
    check(judging.load_templates(test_data), [name])
