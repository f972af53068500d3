"""The template's switch gives the very tokens that ctxlens renders with the indicator."""

import json
import os
from pathlib import Path

import pytest
from conftest import build_toy_tokenizer
from sft_cases import ARGUMENTS, make_data, tiny
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ctxlens.chat.roles import render
from ctxlens.cli import app
from ctxlens.errors import RenderError
from ctxlens.models import Model, load_model
from ctxlens.models.indicator_token import add_indicator
from ctxlens.sft import IndicatorWarning, add_switch, train
from ctxlens.sft.switch import install_switch, switch_works

MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": "What is 'four'?"},
]


@pytest.fixture(scope="module")
def marking_tokenizer():
    tokenizer = build_toy_tokenizer()
    add_indicator(tiny(tokenizer), tokenizer)
    return tokenizer


def find_templates():
    import trl

    own = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    field = sorted(Path(os.environ.get("CTXLENS_TEST_DATA", "nowhere")).glob("chat_templates/*/*.jinja"))
    return own[::16], field


def refuses_everything(tokenizer, template):
    try:
        render(tokenizer, MESSAGES[:1], chat_template=template)
    except RenderError:
        return True
    return False


def check(tokenizer, paths):
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    refused = {name for name, text in texts.items() if refuses_everything(tokenizer, text)}
    good = {name for name, text in texts.items() if switch_works(tokenizer, text, "[IND]")}
    return texts.keys() - refused - good, len(good)


def test_switch_on_templates_of_the_field(marking_tokenizer):
    broken, n_good = check(marking_tokenizer, find_templates()[0])
    assert (broken, n_good > 0) == (set(), True)


@pytest.mark.slow
def test_switch_on_all_templates(marking_tokenizer):
    paths = find_templates()[1]
    if not paths:
        pytest.skip("needs the templates in CTXLENS_TEST_DATA")
    broken, n_good = check(marking_tokenizer, paths)
    assert broken == set()
    assert n_good > 150


@pytest.mark.parametrize("indicator", ["[IND]", 'it\'s \\ "so"'])
def test_switch_equals_the_rendering(marking_tokenizer, indicator):
    tokenizer = marking_tokenizer
    template = add_switch(tokenizer.chat_template, indicator)
    options = {"chat_template": template, "add_generation_prompt": True, "return_dict": True}
    plain = render(tokenizer, MESSAGES, add_generation_prompt=True)
    marked = [*MESSAGES[:2], {**MESSAGES[2], "indicator": True}]
    wanted = render(tokenizer, marked, indicator=indicator, add_generation_prompt=True)
    switched = tokenizer.apply_chat_template(MESSAGES, context_dependent=True, **options)["input_ids"]
    assert switched == wanted.tokens.tolist() != plain.tokens.tolist()
    assert tokenizer.apply_chat_template(MESSAGES, **options)["input_ids"] == plain.tokens.tolist()


def test_a_switch_is_replaced_by_another(marking_tokenizer):
    once = add_switch("{{ messages[-1].content }}", "it's \\ so")
    assert add_switch(once, "[IND]") == add_switch("{{ messages[-1].content }}", "[IND]")


def test_a_template_in_which_the_switch_fails_is_left_alone():
    tokenizer = build_toy_tokenizer()
    add_indicator(tiny(tokenizer), tokenizer)
    works = tokenizer.chat_template
    fails = works + "{% if ctxlens is defined %}!{% endif %}"
    tokenizer.chat_template = {"default": works, "other": fails}
    with pytest.warns(IndicatorWarning, match="template other does not work with the switch"):
        assert not install_switch(tokenizer, "[IND]")
    assert tokenizer.chat_template == {"default": add_switch(works, "[IND]"), "other": fails}


def test_a_checkpoint_carries_the_switch_and_ctxlens_renders_the_same(tmp_path):
    tokenizer = build_toy_tokenizer()
    folder = train(
        make_data(), out=tmp_path / "r", model=tiny(tokenizer), tokenizer=tokenizer, selection={("c1", 1)},
        indicator="[IND]", args=ARGUMENTS | {"max_steps": 1},
    )  # fmt: skip
    model = load_model(folder, backend="native")
    marked = [*MESSAGES[:2], {**MESSAGES[2], "indicator": True}]
    switched = model.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, context_dependent=True, return_dict=True
    )
    chat = model.render(marked, add_generation_prompt=True)
    assert switched["input_ids"] == chat.tokens.tolist()
    assert "context_dependent=True" in (folder / "README.md").read_text()


@pytest.mark.parametrize("says_something_before", [False, True])
def test_generate_asks_with_the_prompt_of_any_server(tmp_path, monkeypatch, says_something_before):
    """`ctxlens generate --indicator`, transformers, and a server that renders text and then tokenizes it."""
    tokenizer = build_toy_tokenizer()
    folder = train(
        make_data(), out=tmp_path / "r", model=tiny(tokenizer), tokenizer=tokenizer, selection={("c1", 1)},
        indicator="[IND]", args=ARGUMENTS | {"max_steps": 1},
    )  # fmt: skip
    messages = MESSAGES if says_something_before else MESSAGES[2:]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    asked = []
    monkeypatch.setattr(Model, "generate", lambda self, chats, **_: asked.extend(chats) or [""] * len(chats))
    words = ["generate", "--model", str(folder), "--messages", str(tmp_path / "chat.json"), "--indicator"]
    words += ["--quiet"]  # no timing, which asks the model too
    result = CliRunner().invoke(app, [*words, "--backend", "native", "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    delivered = AutoTokenizer.from_pretrained(folder)
    kwargs = json.loads('{"context_dependent": true}')  # as `chat_template_kwargs` of a request
    ids = delivered.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **kwargs)
    text = delivered.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
    assert asked[0].tokens.tolist() == ids["input_ids"]
    assert delivered(text, add_special_tokens=False)["input_ids"] == ids["input_ids"]
    assert ids["input_ids"].count(delivered.convert_tokens_to_ids("[IND]")) == 1
