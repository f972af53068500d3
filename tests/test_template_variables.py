"""Values of a chat template's own variables: given to a model, in a data row, or in a call."""

import json

import pytest
from chat_cases import BYTES, assistant, user
from conftest import TOY_TEMPLATE

from ctxlens.chat.data import load_conversations, read_messages_file
from ctxlens.chat.roles import TEMPLATE_ARGS_KEY, bind_arguments, render, render_plain
from ctxlens.errors import InputError

THINKING = TOY_TEMPLATE + "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{{ style }}"
AWKWARD = ["é🙂", 'it\'s "quoted" %} {{ x }}', "a\nb\\n", None, True, -1.5e-7, [1, {"a": [False]}], {}, ""]


@pytest.mark.parametrize("template", [THINKING, "\n" + THINKING, "  {% if true %}\n {% endif %}" + THINKING])
@pytest.mark.parametrize("value", AWKWARD)
def test_bound_values_render_as_given_ones(template, value):
    values = {"style": value, "enable_thinking": False}
    bound = bind_arguments(template, values)
    given = render(BYTES, [user("a")], chat_template=template, template_args=values)
    assert "<think></think>" in given.text
    assert render(BYTES, [user("a")], chat_template=bound).text == given.text
    by_transformers = BYTES.apply_chat_template([user("a")], tokenize=False, chat_template=bound)
    assert by_transformers == given.text


def test_a_call_comes_before_a_row_and_a_row_before_what_is_bound():
    bound = bind_arguments(TOY_TEMPLATE + "{{ style }}", {"style": "bound"})
    row = [{**user("a"), TEMPLATE_ARGS_KEY: {"style": "row"}}]

    def ends(messages, **options):
        return render(BYTES, messages, chat_template=bound, **options).text.rpartition("\n")[2]

    assert ends([user("a")]).endswith("bound")
    assert ends(row).endswith("row")
    assert ends(row, template_args={"style": "call"}).endswith("call")
    assert render(BYTES, row, chat_template=bound).messages == (user("a"),)
    assert render_plain(BYTES, row).text == render_plain(BYTES, [user("a")]).text


def test_bound_values_can_be_bound_again():
    once = bind_arguments(TOY_TEMPLATE + "{{ style }}", {"style": "one"})
    twice = bind_arguments(once, {"style": "two"})
    assert render(BYTES, [user("a")], chat_template=twice).text.endswith("two")


def test_every_named_template_gets_what_it_uses():
    named = {"default": THINKING, "tool_use": TOY_TEMPLATE}
    bound = bind_arguments(named, {"style": "x"})
    assert bound["tool_use"] == TOY_TEMPLATE
    assert bound["default"].endswith(THINKING)
    assert bound["default"] != THINKING


@pytest.mark.parametrize(
    ("template", "values", "words"),
    [
        (THINKING, {"thought": 1}, r"no variable 'thought' of its own; it uses enable_thinking, style"),
        (THINKING, {"bos_token": "x"}, r"no variable 'bos_token' of its own; it uses enable_thinking, style"),
        (TOY_TEMPLATE, {"messages": []}, r"no variable 'messages' of its own; it uses none"),
        (None, {"style": "x"}, r"given for style, but the tokenizer has no chat template"),
    ],
)
def test_unknown_variables_are_refused_in_one_sentence(template, values, words):
    with pytest.raises(InputError, match=words) as caught:
        bind_arguments(template, values)
    assert "\n" not in str(caught.value)


def test_rows_of_a_data_set(tmp_path):
    turns = [user("a"), assistant("b")]
    rows = [
        {"messages": turns, "chat_template_kwargs": {"style": "x", "other": None}},
        {"messages": turns, "chat_template_kwargs": '{"style": "y"}'},
        {"messages": turns, "chat_template_kwargs": None},
        {"messages": turns, "chat_template_kwargs": "style"},
        {"messages": turns, "chat_template_kwargs": [1]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = load_conversations(path)
    assert [one.messages[0].get(TEMPLATE_ARGS_KEY) for one in data] == [{"style": "x"}, {"style": "y"}, None]
    assert all(TEMPLATE_ARGS_KEY not in one.messages[1] for one in data)
    assert [name for name, _ in data.skipped] == ["3", "4"]
    assert all("chat_template_kwargs must be a mapping" in reason for _, reason in data.skipped)
    path.write_text(json.dumps(rows[0]))
    assert read_messages_file(path)[0][0][TEMPLATE_ARGS_KEY] == {"style": "x"}


def test_a_model_renders_with_its_values_and_names_them(tmp_path):
    from tiny_models import make_tiny, make_tokenizer

    from ctxlens.models import Model, load_model

    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    make_tiny("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    values = {"enable_thinking": False, "style": "x"}
    plain = load_model(tmp_path, device="cpu")
    model = load_model(tmp_path, device="cpu", template_args=values)
    assert model.render([user("a")]).text == plain.render([user("a")], template_args=values).text
    assert model.render([user("a")]).text != plain.render([user("a")]).text
    assert model.identity == {**plain.identity, "template_args": values}
    wrapped = Model.from_hf(make_tiny("llama"), tokenizer, template_args=values)
    assert wrapped.render([user("a")]).text == model.render([user("a")]).text
    assert tokenizer.chat_template == THINKING
    with pytest.raises(InputError, match="no variable 'thinking' of its own; it uses enable_thinking, style"):
        load_model(tmp_path, device="cpu", template_args={"thinking": False})
