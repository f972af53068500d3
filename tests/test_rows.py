"""What a row of instruction data holds is read as its author meant, or the reason is one sentence."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from chat_cases import BYTES, assistant, by_template, byte_tokenizer, said, user
from row_cases import CALL, SCHEMA, TALK, TEMPLATES, asked, told

from ctxlens.chat.data import conversation_from_row, fingerprint_conversations, load_conversations
from ctxlens.chat.data.annotate import annotate_messages
from ctxlens.chat.data.marked_files import unmark_file, write_marked
from ctxlens.chat.data.turns import NO_LOSS
from ctxlens.chat.roles import Role, render
from ctxlens.errors import InputError, RenderError
from ctxlens.runs import Run
from ctxlens.scoring import score_conversations
from ctxlens.scoring.card import card_markdown, make_card
from ctxlens.scoring.selection import select_turns
from ctxlens.sft import build_rows
from ctxlens.sft.delivery import VARIANTS, model_card


def read(row, layout="messages", **counters):
    return conversation_from_row(row, layout, identity="r", source="test", **counters)


def turns(conversation):
    return turns_of(*conversation.messages)


def turns_of(*messages):
    return [(message["role"], message["content"]) for message in messages]


def text_of(messages, template="json", **options):
    return render(BYTES, messages, chat_template=TEMPLATES[template], **options).text


def with_template(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


NOON, NOT_YET = "Is it noon?", "Not yet."
FLAT = {"name": "tide", "arguments": {"port": "Saltby"}}


# Tools


def test_schemas_of_a_row_reach_the_template():
    expected = text_of(asked(), tools=[SCHEMA])
    assert expected.startswith('{"type": "function"')
    assert expected == by_template(with_template("json"), asked(), tools=[SCHEMA], tokenize=False)
    calls = told(
        ("human", "How high is the water in Saltby?"),
        ("function_call", json.dumps({"name": "tide", "arguments": {"port": "Saltby"}})),
        ("observation", "2 m"),
        ("gpt", "It stands at 2 m."),
    )
    bare = SCHEMA["function"]
    for row, layout in [
        ({"messages": asked(), "tools": [SCHEMA]}, "messages"),
        ({"messages": asked(), "tools": json.dumps([SCHEMA])}, "messages"),
        ({"messages": asked(), "tools": [json.dumps(SCHEMA), None]}, "messages"),
        ({"messages": asked(), "tools": [{"type": "function", **bare}]}, "messages"),
        ({"conversations": calls, "tools": json.dumps([bare])}, "sharegpt"),
        ({"prompt": asked()[:1], "completion": asked()[1:], "tools": [SCHEMA]}, "prompt-completion"),
        ([{**asked()[0], "tools": [SCHEMA]}, *asked()[1:]], "messages"),
    ]:
        conversation = read(row, layout)
        assert text_of(conversation.messages) == expected
        assert "tools" not in conversation.labels
        rows = build_rows(with_template("json"), [conversation])
        assert BYTES.decode(rows.rows[0]["input_ids"]) == expected
    assert text_of(read({"messages": asked(), "tools": []}).messages) == text_of(asked())


def test_schemas_stay_when_the_first_turn_is_dropped_and_tell_data_sets_apart():
    row = {"messages": [assistant("Welcome!"), *asked()], "tools": [SCHEMA]}
    with_tools, without = read(row), read({"messages": row["messages"]})
    assert text_of(with_tools.messages).startswith('{"type": "function"')
    assert fingerprint_conversations([with_tools]) != fingerprint_conversations([without])
    given = text_of(with_tools.messages, tools=[{"type": "function", "function": {"name": "other"}}])
    assert '"name": "other"' in given
    assert "Height of the tide" not in given


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("a hammer", "'tools' is text that is not JSON"),
        (5, "'tools' must be a list of tool schemas, not int"),
        ([[SCHEMA]], "tool schema 0 in 'tools' is list, not a mapping"),
        (['"\\ud800"'], "tool schema 0 in 'tools' is str, not a mapping"),
        ([{"name": "f", "description": "\ud83d"}], "tools holds half a surrogate pair"),
    ],
)
def test_columns_that_hold_no_schemas(tools, reason):
    with pytest.raises(InputError, match=reason):
        read({"messages": TALK, "tools": tools})


@pytest.mark.parametrize("template", ["json", "either", "text", "bare", "keys"])
def test_arguments_as_text_and_as_a_mapping_render_alike(template):
    as_text = {**CALL, "function": {"name": "tide", "arguments": '{"port": "Saltby"}'}}
    expected = text_of(asked(), template)
    assert text_of(asked(call=as_text), template) == expected
    shown = "tide(port=Saltby;)" if template == "keys" else 'tide({"port": "Saltby"})'
    assert shown in expected
    chat = render(BYTES, asked(call=as_text), chat_template=TEMPLATES[template])
    assert said(chat, 1).startswith("tide")
    assert set(chat.role[chat.turn == 1].tolist()) == {Role.ASSISTANT}


@pytest.mark.parametrize("arguments", ["port Saltby", '["Saltby"]', '{"port": "\\ud83d"}', "[" * 5000])
def test_arguments_that_are_no_mapping_stay_text(arguments):
    call = {**CALL, "function": {"name": "tide", "arguments": arguments}}
    assert f"tide({arguments})" in text_of(asked(call=call), "either")


@pytest.mark.parametrize(
    "calls",
    [
        [json.dumps(CALL)],
        json.dumps([CALL]),
        CALL,
        [None, CALL],
        [FLAT],
        [{**FLAT, "function": None, "id": None}],
        [{"name": "tide", "parameters": {"port": "Saltby"}}],
        [{"function": "tide", "arguments": {"port": "Saltby"}}],
        [{"function": {"name": "tide", "arguments": {"port": "Saltby", "day": None}}, "name": None}],
    ],
)
def test_shapes_of_tool_calls(calls):
    row = {
        "messages": [
            {**message, **({"tool_calls": calls} if "tool_calls" in message else {})} for message in asked()
        ]
    }
    assert text_of(read(row).messages) == text_of(asked())


@pytest.mark.parametrize("arguments", [None, "", " ", {}])
def test_calls_without_arguments(arguments):
    row = {"messages": asked(call={"function": {"name": "tide", "arguments": arguments}})}
    for template in ("json", "either"):
        assert "tide({})" in text_of(read(row).messages, template)


def test_an_empty_list_of_calls_is_no_call():
    counted = Counter()
    row = {"messages": [user("Hi"), {"role": "assistant", "content": "", "tool_calls": []}, *TALK[1:3]]}
    assert turns(read(row, dropped=counted)) == [
        ("user", "Hi"),
        *[(m["role"], m["content"]) for m in TALK[1:3]],
    ]
    assert counted == {"empty turn": 1}


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (5, "turn 1: tool_calls must be a list of mappings, not int"),
        ("tide()", "turn 1: tool_calls is text that is not JSON"),
        ([3], "turn 1: item 0 of tool_calls is int, not a mapping"),
        ([CALL, {"id": "x"}], "turn 1: item 1 of tool_calls has no function with a name"),
        ([{"name": "tide", "arguments": ["Saltby"]}], "arguments of list, not a mapping or JSON text"),
    ],
)
def test_malformed_tool_calls(calls, reason):
    with pytest.raises(InputError, match=reason):
        read({"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": calls}]})


def test_function_calls_of_older_layouts():
    older = [
        user("How high is the water in Saltby?"),
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "tide", "arguments": '{"port": "Saltby"}'},
        },
        {"role": "function", "name": "tide", "content": "2 m"},
        assistant("It stands at 2 m."),
    ]
    new = read({"messages": older})
    assert [message["role"] for message in new.messages] == ["user", "assistant", "tool", "assistant"]
    assert text_of(new.messages) == text_of(asked())
    noted = Counter()
    words = told(
        ("human", "Ask."), ("tool_call", "tide of Saltby"), ("tool_response", "2 m"), ("gpt", "2 m.")
    )
    kept = read({"conversations": words}, "sharegpt", noted=noted)
    assert turns(kept)[1:3] == [("assistant", "tide of Saltby"), ("tool", "2 m")]
    assert noted == {"function-call turns that hold no call in JSON, read as text": 1}


# Nulls, as Arrow adds them


def test_parquet_and_json_lines_give_the_same_tokens(tmp_path):
    datasets = pytest.importorskip("datasets")
    other = {"function": {"name": "lamp", "arguments": {"side": "left", "lit": True}}}
    rows = [
        {"id": "a", "messages": asked(), "tools": [SCHEMA], "system": None},
        {"id": "b", "messages": asked(call=other), "tools": None, "system": "Be brief."},
        {"id": "c", "messages": TALK, "tools": [], "system": None},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    plain, padded = (load_conversations(tmp_path / name) for name in ("rows.jsonl", "rows.parquet"))
    assert len(plain) == len(padded) == 3
    for template in ("json", "keys", "either"):
        tokenizer = with_template(template)
        assert build_rows(tokenizer, padded).rows == build_rows(tokenizer, plain).rows
    assert fingerprint_conversations(padded) == fingerprint_conversations(plain)
    assert padded.noted == {"null arguments of tool calls, left out": 3}  # side, lit; port
    assert plain.noted == {}


def test_columns_that_a_mixed_file_fills_with_null():
    expected = [("user", NOON), ("assistant", NOT_YET)]
    for row, layout in [
        (
            {"messages": None, "conversations": told(("human", NOON), ("gpt", NOT_YET))},
            "sharegpt",
        ),
        (
            {
                "instruction": NOON,
                "input": None,
                "context": "",
                "output": None,
                "response": NOT_YET,
            },
            "alpaca",
        ),
        ({"prompt": NOON, "completion": None, "response": NOT_YET}, "prompt-completion"),
        (
            {"instruction": NOON, "input": float("nan"), "output": NOT_YET, "history": None},
            "alpaca",
        ),
    ]:
        assert turns(read(row, layout)) == expected


# Who speaks


@pytest.mark.parametrize(
    "conversation",
    [
        [{"from": "Human", "value": NOON}, {"from": "GPT", "value": NOT_YET}],
        [{"from": " USER ", "value": NOON}, {"from": "Assistant\n", "value": NOT_YET}],
        [
            {"role": None, "from": "human", "content": None, "value": NOON},
            {"from": "AI", "value": NOT_YET},
        ],
        [{"role": "user", "text": NOON}, {"role": "model", "text": NOT_YET}],
        [
            {"from": "human", "value": NOON},
            {"from": "gpt", "value": None},
            {"from": "gpt", "value": NOT_YET},
        ],
    ],
)
def test_names_of_speakers_and_null_values(conversation):
    expected = [("user", NOON), ("assistant", NOT_YET)]
    assert turns(read({"conversations": conversation}, "sharegpt")) == expected


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": ["user"], "content": "x"}, r"turn 0 has unknown role \"\['user'\]\""),
        ({"role": "ghost", "content": "x"}, "turn 0 has unknown role 'ghost'"),
        ({"content": "x"}, "turn 0 has no role"),
        ({"role": "user", "utterance": "x"}, "turn 0 has none of the keys content, value, text"),
        ({"role": "user", "content": {"text": "x"}}, "turn 0 has content of dict, not text"),
        ({"role": "user", "content": ["x"]}, "turn 0: content must be text or .* part 0 is of type str"),
        ({"role": "user", "content": [{"type": "audio"}]}, "part 0 is of type audio"),
        ({"role": "assistant", "content": "x", "thinking": 5}, "turn 0 has thinking of int, not text"),
        (
            {"role": "assistant", "content": "x", "indicator": True},
            "carries the indicator; only user",
        ),
        ({"role": "user", "content": "x", "indicator": 3}, "turn 0 has indicator of int"),
        (7, "turn 0 is int, not a mapping or a text"),
    ],
)
def test_malformed_turns(turn, reason):
    with pytest.raises(InputError, match=reason):
        read({"messages": [turn, *TALK]})


def test_text_parts_with_the_nulls_of_arrow_are_joined():
    parts = [{"type": "text", "text": "Is it ", "image": None}, {"type": None, "text": "noon?"}]
    row = {"messages": [{"role": "user", "content": parts}, assistant([{"text": NOT_YET}])]}
    assert turns(read(row)) == [("user", NOON), ("assistant", NOT_YET)]


@pytest.mark.parametrize("layout", ["messages", "alpaca", "prompt-completion"])
def test_a_system_column_is_kept_once(layout):
    one = {
        "messages": {"messages": [user(NOON), assistant(NOT_YET)]},
        "alpaca": {"instruction": NOON, "output": NOT_YET},
        "prompt-completion": {"prompt": NOON, "chosen": NOT_YET, "rejected": "Yes."},
    }[layout]
    expected = [("system", "Be brief."), ("user", NOON), ("assistant", NOT_YET)]
    assert turns(read({**one, "system": "Be brief."}, layout)) == expected
    with pytest.raises(InputError, match="'system' is int, not text"):
        read({**one, "system": 5}, layout)


def test_a_system_column_beside_a_system_turn():
    noted = Counter()
    same = {"system": "Answer in one word.", "messages": TALK}
    assert turns(read(same, noted=noted))[:2] == turns_of(*TALK[:2])
    assert not noted
    assert turns(read({**same, "system": "Be long."}, noted=noted))[0] == ("system", "Answer in one word.")
    assert noted == {"system columns that differ from the conversation's own system turn, which is kept": 1}


def test_developer_is_passed_as_system_where_the_template_drops_it():
    messages = [{"role": "developer", "content": "Rhyme."}, user("Hi"), assistant("My")]
    chat = render(BYTES, messages, chat_template=TEMPLATES["three roles"])
    assert chat.text.startswith("<|system|>Rhyme.")
    assert chat.left_out == {}


# What a template leaves out


def test_what_the_template_leaves_out_is_counted_by_kind():
    chat = render(BYTES, read({"messages": asked(reasoning_content="Ask."), "tools": [SCHEMA]}).messages,
                  chat_template=TEMPLATES["three roles"])  # fmt: skip
    assert chat.left_out == {
        "the reasoning of assistant messages": 1, "the tool calls of assistant messages": 1,
        "the content of tool messages": 1, "tool schemas": 1,
    }  # fmt: skip
    assert render(BYTES, asked(), chat_template=TEMPLATES["json"], tools=[SCHEMA]).left_out == {}


def test_cut_tokens_do_not_count_as_left_out():
    long = [user("a" * 50), assistant("b"), user("c"), assistant("d")]
    chat = render(BYTES, long, max_tokens=100, truncate=True)
    assert chat.truncated
    assert chat.left_out == {}


def test_training_rows_say_what_is_left_out():
    data = [read({"messages": asked()}), read({"messages": TALK})]
    rows = build_rows(with_template("three roles"), data)
    assert rows.left_out == {"the tool calls of assistant messages": 1, "the content of tool messages": 1}


# What is not trained on


def corrected(**mark):
    return [user("Which bird?"), assistant("A heron.", **mark), user("Sure?"), assistant("No, a gull.")]


def trained(tokenizer, row):
    return tokenizer.decode([token for token in row["labels"] if token != -100])


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"weight": 1, "train": False}, {"training": False}, {"trainable": 0}],
)
def test_marked_answers_are_context_without_loss(mark):
    noted = Counter()
    conversation = read({"messages": corrected(**mark)}, noted=noted)
    assert conversation.messages[1] == {"role": "assistant", "content": "A heron.", "train": False}
    assert noted == {NO_LOSS: 1}
    rows = build_rows(BYTES, [conversation])
    assert trained(BYTES, rows.rows[0]) == "No, a gull.</s>"
    assert "A heron." in BYTES.decode(rows.rows[0]["input_ids"])
    assert rows.counts["answers_without_loss"] == 1
    everything = build_rows(BYTES, [conversation], loss_on="all")
    assert trained(BYTES, everything.rows[0]).count("A heron.") == 0
    assert "Which bird?" in trained(BYTES, everything.rows[0])


@pytest.mark.parametrize("mark", [{}, {"weight": 1}, {"weight": None}, {"train": True}, {"trainable": 1}])
def test_other_marks_change_nothing(mark):
    assert read({"messages": corrected(**mark)}).messages == tuple(corrected())


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, "turn 1 has weight '0.5'; expected 0 or 1"),
        ({"weight": 2}, "turn 1 has weight '2'"),
        ({"train": "false"}, "turn 1 has train 'false'"),
        ({"weight": float("nan")}, "turn 1 has weight 'nan'"),
        ({"train_detail": []}, "turn 1 has train_detail, but ctxlens trains on whole answers"),
    ],
)
def test_marks_that_ctxlens_does_not_train_by(mark, reason):
    with pytest.raises(InputError, match=reason):
        read({"messages": corrected(**mark)})


def test_rejected_answers_of_kto_are_left_out_of_training():
    rejected, chosen = (
        {"prompt": "Which bird?", "completion": "A gull.", "label": kept} for kept in (False, True)
    )
    data = [read(rejected, "prompt-completion"), read(chosen, "prompt-completion")]
    rows = build_rows(BYTES, data)
    assert rows.counts["conversations"] == rows.counts["conversations_without_loss"] == 1
    assert data[0].labels["label"] is False
    with pytest.raises(InputError, match="exclude every answer from training, by weight 0 or by train"):
        build_rows(BYTES, data[:1])
    assert read({"messages": TALK, "label": 0}).messages == tuple(TALK)
    several = read({"messages": corrected(), "label": False})
    assert [message.get("train") for message in several.messages] == [None, None, None, False]


# What cards and manifests say


def test_scores_their_manifest_and_the_card_name_what_was_not_taken(tmp_path):
    from scoring_cases import FakeModel

    rows = [{"messages": asked(), "tools": [SCHEMA]}, {"messages": corrected(weight=0)}, {"messages": TALK}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_conversations(tmp_path / "rows.jsonl")
    run = Run.open(tmp_path / "run", study="score", config={})
    scores = score_conversations(FakeModel(with_template("three roles")), data, out=run, layers="all")
    left_out = {
        "tool schemas": 1, "the tool calls of assistant messages": 1, "the content of tool messages": 1,
    }  # fmt: skip
    assert scores.meta["left_out"] == left_out
    assert scores.meta["data"]["noted"] == {NO_LOSS: 1}
    assert Run.read(tmp_path / "run").manifest["data"]["left_out"] == left_out
    text = card_markdown(make_card(scores, select_turns(scores, beta=0.1, layer=0), data)).replace("\\", "")
    assert "left out by the chat template | 1: tool schemas" in text
    assert f"noted | 1: {NO_LOSS}" in text


def test_the_model_card_names_what_was_not_taken():
    data = [read({"messages": asked()}), read({"messages": corrected(weight=0)})]
    rows = replace(build_rows(with_template("three roles"), data), noted={NO_LOSS: 1})
    recipe = {
        "model": {"name": "m"}, "indicator": None, "loss_on": "assistant", "arguments": {},
        "model_arguments": {}, **VARIANTS,
    }  # fmt: skip
    card = model_card(recipe, rows, {"log": [], "steps": 1}, has_switch=False).replace("\\", "")
    assert "- answers without loss: 1" in card
    assert "- left out by the chat template, 1 times: the content of tool messages" in card
    assert f"- {NO_LOSS}: 1" in card


# Preference data


QUESTION, CHOSEN, REJECTED = user("Which bird?"), assistant("A gull."), assistant("A boat.")


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        (
            "prompt-completion",
            {"prompt": "Which bird?", "chosen": [QUESTION, CHOSEN], "rejected": [QUESTION, REJECTED]},
        ),
        ("prompt-completion", {"prompt": [QUESTION], "chosen": [QUESTION, CHOSEN]}),
        ("prompt-completion", {"prompt": [QUESTION], "chosen": [CHOSEN]}),
        ("prompt-completion", {"chosen": [QUESTION, CHOSEN], "rejected": [QUESTION, REJECTED]}),
        ("prompt-completion", {"prompt": "Which bird? ", "chosen": CHOSEN}),
        ("messages", {"prompt": "Which bird?", "messages": [QUESTION, CHOSEN], "chosen": [QUESTION, CHOSEN]}),
        (
            "sharegpt",
            {"conversations": told(("human", "Which bird?")), "chosen": {"from": "gpt", "value": "A gull."}},
        ),
        ("messages", {"messages": [QUESTION], "chosen": [QUESTION, CHOSEN]}),
        ("alpaca", {"instruction": "Which bird?", "input": "", "chosen": "A gull.", "rejected": "A boat."}),
    ],
)
def test_the_question_of_preference_data_is_asked_once(tmp_path, layout, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = load_conversations(tmp_path / "rows.jsonl")
    assert data.layout == layout
    assert [(role, text.strip()) for role, text in turns(data[0])] == [
        ("user", "Which bird?"),
        ("assistant", "A gull."),
    ]


def test_a_prompt_that_the_answer_does_not_repeat_is_kept():
    row = {"prompt": [TALK[0]], "completion": [QUESTION, CHOSEN]}
    assert [role for role, _ in turns(read(row, "prompt-completion"))] == ["system", "user", "assistant"]
    row = {"prompt": "Which bird?", "chosen": [TALK[0], QUESTION, CHOSEN]}
    assert [role for role, _ in turns(read(row, "prompt-completion"))] == ["system", "user", "assistant"]


# One bad row


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user(f"Hi {HALF}"), CHOSEN]}, "turn 0: content holds half"),
        ({"messages": [user("Hi", name=HALF), CHOSEN]}, "turn 0: name holds half"),
        ({"messages": [{**QUESTION, HALF: 1}, CHOSEN]}, r"turn 0: \\ud83d holds half"),
        (
            {"messages": asked(call={"name": "tide", "arguments": {"port": [HALF]}})},
            "turn 1: tool_calls holds half",
        ),
        ({"id": f"a{HALF}", "messages": TALK}, "the row: id holds half"),
        ({"note": {"by": HALF}, "messages": TALK}, "the row: note holds half"),
        (
            {"messages": TALK, "extra": [[[]]] * 2 + [json.loads("[" * 90 + "]" * 90)]},
            "the row: extra is nested too deeply",
        ),
    ],
)
def test_a_text_that_cannot_be_encoded_costs_one_row(tmp_path, row, reason):
    rows = [{"id": "first", "messages": TALK}, row, {"id": "last", "messages": TALK}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_conversations(tmp_path / "rows.jsonl")
    assert [c.id for c in data] == ["first", "last"]
    ((identity, given),) = data.skipped
    assert identity == "1"
    assert given.startswith(reason.replace("\\\\", "\\"))


def test_a_schema_or_system_text_that_cannot_be_encoded_is_one_sentence():
    with pytest.raises(InputError, match="tools holds half a surrogate pair"):
        render(BYTES, TALK, tools=[{"name": HALF}])
    with pytest.raises(InputError, match="The system message: content holds half"):
        render(BYTES, TALK[1:], system=HALF)


def test_a_replay_text_that_cannot_be_encoded_is_skipped():
    rows = build_rows(BYTES, [read({"messages": TALK})], replay_texts=["fine", HALF])
    assert rows.counts["replay"] == 1
    assert rows.counts["skipped"] == 1
    assert rows.skipped[0][0] == "replay text 1"


def test_a_conversation_that_no_form_fits_keeps_the_templates_reason():
    template = "{{ raise_exception('no calls') if messages[1].tool_calls else messages[0].content }}"
    with pytest.raises(RenderError, match="no calls"):
        render(BYTES, asked(), chat_template=template)


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("prompt-completion", {"prompt": "Which bird?", "chosen": [QUESTION, CHOSEN], "system": "Be brief."}),
        ("messages", {"messages": [assistant("Welcome!"), *asked()], "tools": [SCHEMA], "system": None}),
        ("messages", {"messages": corrected(weight=0)}),
        ("alpaca", {"instruction": "Which bird?", "input": None, "output": "A gull."}),
    ],
)
def test_rows_are_marked_and_restored(tmp_path, layout, row):
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, [row, {**row, "note": HALF}, {**row, "id": "last"}])))
    data = load_conversations(source, layout=layout)
    assert [c.id for c in data] == ["0", "last"]
    answered = max(at for at, message in enumerate(data[1].messages) if message["role"] == "assistant")
    marked = annotate_messages(data, [("last", answered)])
    assert write_marked(tmp_path / "out.jsonl", source, marked, layout=layout).indicators == 1
    again = load_conversations(tmp_path / "out.jsonl", layout=layout)
    assert ["[IND]" in str(c.messages) for c in again] == [False, True]
    assert len(again[1].messages) == len(data[1].messages)
    unmark_file(tmp_path / "out.jsonl", tmp_path / "back.jsonl")
    lines = [(tmp_path / name).read_text().splitlines() for name in ("rows.jsonl", "back.jsonl")]
    assert list(map(json.loads, lines[0])) == list(map(json.loads, lines[1]))
