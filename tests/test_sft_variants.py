"""Other ways to train on selected turns: each does what it says to the data, and to nothing else."""

import json

import pytest
from conftest import build_toy_tokenizer
from sft_cases import ARGUMENTS, make_data, talk, tiny, write_recipe

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import Role, render, render_plain
from ctxlens.errors import InputError
from ctxlens.models import load_model
from ctxlens.sft import IndicatorWarning, build_rows, read_config, train
from ctxlens.sft.keys import make_train_config
from ctxlens.sft.marks import mark_data
from ctxlens.sft.variants import draw_control, drop_marks, mark_rest, repeat_selected

DATA = make_data()
CHOSEN = {(f"c{k}", 1) for k in range(5)}


def mark(selection=CHOSEN, *, seed=0, data=DATA, **options):
    return mark_data(data, selection, make_train_config({"indicator": "[IND]", **options}), seed=seed)


def marks(data):
    return {one.id: mark for one in data for message in one.messages if (mark := message.get("indicator"))}


def test_a_message_may_carry_a_text_of_its_own_as_indicator(toy_tokenizer):
    said = [
        {"role": "user", "content": "Hello", "indicator": "[MEM]"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "why?", "indicator": True},
    ]
    for chat in (
        render(toy_tokenizer, said, indicator="[IND]"),
        render_plain(toy_tokenizer, said, indicator="[IND]"),
    ):
        pieces = [
            t for t, role in zip(chat.token_strings(), chat.role, strict=True) if role == Role.INDICATOR
        ]
        assert "".join(pieces).split() == ["[MEM]", "[IND]"]
        assert chat.text.index("Hello [MEM]") < chat.text.index("why? [IND]")
    assert "[MEM]" not in render(toy_tokenizer, said).text


def test_random_control_draws_as_many_answered_turns_by_its_seed():
    data = [*DATA, talk("two", "Hello", "fine", "why?", "so", "unanswered")]
    drawn = draw_control(data, 5, seed=3)
    everything = {(one.id, 1) for one in DATA} | {("two", 1), ("two", 3)}
    assert len(drawn) == 5
    assert drawn < everything
    assert draw_control(data, 5, seed=3) == drawn != draw_control(data, 5, seed=4)
    assert draw_control(data, 14, seed=0) == everything
    with pytest.raises(InputError, match="15 turns are selected, but only 14 turns of the data answer"):
        draw_control(data, 15, seed=0)
    controlled = marks(mark(selection_control="random", seed=3))
    assert len(controlled) == len(marks(mark())) == 5
    assert (
        controlled.keys()
        == {name for name, _ in draw_control(DATA, 5, seed=3)}
        != {f"c{k}" for k in range(5)}
    )


def test_dropout_takes_a_share_of_the_marks_and_nothing_else():
    left = mark(indicator_dropout=0.4)
    assert len(marks(left)) == 3
    assert marks(left).keys() < {name for name, _ in CHOSEN}
    assert [one.messages[0]["content"] for one in left] == [one.messages[0]["content"] for one in DATA]
    assert drop_marks(left, 0.0, 0) == left
    assert marks(mark(indicator_dropout=0.4, seed=1)) != marks(left) or marks(
        mark(indicator_dropout=0.4, seed=2)
    ) != marks(left)


def test_the_rest_is_marked_where_it_is_answered():
    data = [talk("a", "Hello", "fine", "why?"), talk("b", "Hello", "fine", "why?", "so")]
    marked = mark({("b", 3)}, data=data, negative_indicator="[MEM]")
    assert [[m.get("indicator") for m in one.messages] for one in marked] == [
        ["[MEM]", None, None],
        ["[MEM]", None, True, None],
    ]
    assert marks(mark_rest(DATA, "[MEM]", indicator="[IND]")) == dict.fromkeys(
        (one.id for one in DATA), "[MEM]"
    )
    dropped = mark({("b", 3)}, data=data, negative_indicator="[MEM]", indicator_dropout=0.9)
    assert [m.get("indicator") for m in dropped[1].messages] == ["[MEM]", None, None, None]


def test_upsampling_repeats_the_selected_conversations_with_and_without_indicator():
    plain = mark(indicator=None, upsample_selected=3)
    assert [one.id for one in plain][:4] == ["c0", "c0", "c0", "c1"]
    assert len(plain) == len(DATA) + 2 * 5
    assert not marks(plain)
    both = mark(upsample_selected=2)
    assert len(both) == len(DATA) + 5
    assert sum(bool(one.messages[0].get("indicator")) for one in both) == 10
    assert repeat_selected(DATA, CHOSEN, 1) == list(DATA)


def test_both_tokens_reach_the_rows_and_are_counted(toy_tokenizer):
    marked = mark({("c0", 1)}, negative_indicator="[MEM]", data=DATA[:3])
    rows = build_rows(toy_tokenizer, marked, indicator="[IND]")
    texts = [toy_tokenizer.decode(row["input_ids"]) for row in rows.rows]
    assert ["[IND]" in text for text in texts] == [True, False, False]
    assert ["[MEM]" in text for text in texts] == [False, True, True]
    assert (rows.counts["indicator_messages"], rows.counts["negative_messages"]) == (1, 2)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"indicator_dropout": 1.0}, r"indicator_dropout must be at least 0 and below 1, got 1\.0"),
        ({"upsample_selected": 0}, "upsample_selected must be at least 1, got 0"),
        (
            {"negative_indicator": "[IND]"},
            r"negative_indicator must differ from the indicator, got '\[IND\]'",
        ),
        (
            {"negative_indicator": "[M]", "indicator": None},
            "negative_indicator has no effect without an indicator",
        ),
        (
            {"indicator_dropout": 0.5, "indicator": None},
            "indicator_dropout has no effect without an indicator",
        ),
        ({"selection_control": "twice"}, 'selection_control must be "none" or "random"'),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, complaint):
    with pytest.raises(InputError, match=complaint):
        make_train_config({"indicator": "[IND]", **keys})


@pytest.mark.parametrize("keys", [{"upsample_selected": 2}, {"selection_control": "random"}])
def test_what_needs_a_selection_says_so(keys):
    with pytest.raises(InputError, match="need a selection; give one"):
        mark(None, **keys)


def test_a_negative_indicator_in_the_data_is_refused():
    data = [talk("a", "Hello [MEM]", "fine"), talk("b", "Hello", "fine")]
    with pytest.raises(InputError, match=r"already contain the indicator \[MEM\] as text"):
        mark({("b", 1)}, data=data, negative_indicator="[MEM]")


@pytest.mark.parametrize("peft", [False, True])
def test_both_tokens_are_trained_and_saved(tmp_path, peft):
    tokenizer = build_toy_tokenizer()
    hf_model = tiny(tokenizer)
    model_args = (
        {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_r": 2} if peft else None
    )
    if peft:
        pytest.importorskip("peft")
    out = train(
        DATA, out=tmp_path / "out", model=hf_model, tokenizer=tokenizer, selection=CHOSEN,
        args=ARGUMENTS, model_args=model_args, indicator="[IND]", negative_indicator="[MEM]",
    )  # fmt: skip
    trained = load_model(out, backend="native")
    assert trained.indicator == "[IND]"
    numbers = trained.tokenizer.convert_tokens_to_ids(["[IND]", "[MEM]"])
    embedding = trained.backend.hf_model.get_input_embeddings().weight.detach()
    start = embedding[: len(tokenizer) - 2].mean(dim=0)
    moved = [float((embedding[number] - start).abs().max()) for number in numbers]
    assert all(step > 1e-3 for step in moved), moved
    assert float((embedding[numbers[0]] - embedding[numbers[1]]).abs().max()) > 1e-3
    record = json.loads((out / "config.json").read_text())["ctxlens_indicator"]
    assert record == {"text": "[IND]", "as": "token", "negative": "[MEM]"}
    assert "negative indicator: `[MEM]`" in (out / "README.md").read_text()
    other = load_model(out, backend="native", indicator="[MEM]")
    asked = other.render([{"role": "user", "content": "Hello", "indicator": True}])
    assert int(numbers[1]) in asked.tokens.tolist()


def test_recipes_take_the_keys(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(
        path.read_text() + "indicator_dropout: 0.25\nnegative_indicator: '[MEM]'\nupsample_selected: 2\n"
    )
    config, _, _ = read_config(path, {"selection_control": "random"})
    assert (config.indicator_dropout, config.negative_indicator) == (0.25, "[MEM]")
    assert (config.upsample_selected, config.selection_control) == (2, "random")


def test_a_message_with_the_indicator_in_its_text_is_not_of_the_rest():
    data = [talk("a", "Hello [IND]", "fine"), talk("b", "Hello", "fine")]
    options = {"indicator": "[IND]", "negative_indicator": "[NO]", "indicator_in_data": "keep"}
    with pytest.warns(IndicatorWarning, match="they are kept"):
        marked = mark_data(data, None, make_train_config(options))
    assert [one.messages[0].get("indicator") for one in marked] == [None, "[NO]"]


def test_two_selected_turns_that_answer_one_message_are_one_in_the_control():
    messages = (
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"},
    )  # fmt: skip
    data = [Conversation("a", messages, "test", {}), *(talk(f"b{k}", "Hello", "fine") for k in range(5))]
    counts = []
    for control in ("none", "random"):
        config = make_train_config({"indicator": "[IND]", "selection_control": control})
        marked = mark_data(data, {("a", 1), ("a", 3)}, config)
        counts.append(sum(message.get("indicator") is True for one in marked for message in one.messages))
    assert counts == [1, 1]
