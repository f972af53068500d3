"""Data that cannot teach the indicator, values that cannot train: told in a sentence, nothing left behind."""

import json
import warnings
from pathlib import Path

import pandas as pd
import pytest
from conftest import build_toy_tokenizer
from sft_cases import ARGUMENTS, make_data, talk, tiny, trained_text, write_recipe

from ctxlens.chat.roles import Role, render
from ctxlens.errors import InputError, RunExistsError
from ctxlens.models import load_model
from ctxlens.results import Selection
from ctxlens.sft import IndicatorWarning, build_rows, read_config, train, train_from_config
from ctxlens.sft.__main__ import main
from ctxlens.sft.arguments import make_sft_config
from ctxlens.sft.keys import make_train_config
from ctxlens.sft.marks import mark_data
from ctxlens.sft.trainer import make_trainer
from ctxlens.sft.variants import answered_messages

DATA = make_data()


def mark(data, selection=None, **options):
    return mark_data(data, selection, make_train_config({"indicator": "[IND]", **options}))


def test_no_selected_turn_is_told_or_refused():
    with pytest.warns(IndicatorWarning, match="no user message carries the indicator .*will mean nothing"):
        mark(DATA, set())
    with pytest.raises(InputError, match=r"no user message carries.*lower the threshold"):
        mark(DATA, set(), require_selected=True)
    with pytest.raises(InputError, match="require_selected needs an indicator"):
        mark(DATA, indicator=None, require_selected=True)


def test_a_threshold_that_selects_everything_is_told():
    everything = {(one.id, 1) for one in DATA}
    with pytest.warns(
        IndicatorWarning, match="all 12 answered user messages carry .*cannot learn a difference"
    ):
        mark(DATA, everything)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked = mark(DATA, everything - {("c3", 1)})
    assert sum(bool(one.messages[0].get("indicator")) for one in marked) == 11


def test_a_selection_of_other_data_is_refused():
    from ctxlens.chat.data import fingerprint_conversations

    frame = pd.DataFrame({"conversation": ["c1"], "turn": [1], "score": [0.9], "selected": [True]})
    own = Selection(frame, {"fingerprint": fingerprint_conversations(DATA)})
    assert sum(bool(one.messages[0].get("indicator")) for one in mark(DATA, own)) == 1
    with pytest.raises(InputError, match="the selection was made from other conversations"):
        mark(DATA[:5], own)
    frame["conversation"] = "elsewhere"
    with pytest.raises(InputError, match="selection belongs to other data"):
        mark(DATA, Selection(frame, {}))


def test_only_answered_messages_count():
    assert answered_messages(talk("a", "Hello", "fine", "Hello")) == {0: 1}
    assert answered_messages(talk("a", "Hello", "fine", "Hello", "fine")) == {0: 1, 2: 3}


def test_indicator_in_the_data_is_an_error_or_kept():
    data = [talk("a", "Hello", "fine"), talk("b", "Hello [IND]", "fine")]
    with pytest.raises(
        InputError, match=r"1 messages of the data .*for instance message 0 of conversation 'b'.*keep"
    ):
        mark(data, {("a", 1)})
    with pytest.warns(IndicatorWarning, match="they are kept"):
        kept = mark(data, {("a", 1)}, indicator_in_data="keep")
    assert kept[0].messages[0]["indicator"]
    assert kept[1] == data[1]
    with pytest.warns(IndicatorWarning, match="1 user messages of the data are already marked"):
        mark(mark([*data[:1], talk("c", "Hello", "fine")], {("a", 1)}), set())


def test_one_bad_conversation_is_an_error_that_names_it(toy_tokenizer):
    bad = [talk("a", "Hello", "fine"), talk("mute", "Hello"), talk("still", "Hello")]
    with pytest.raises(InputError, match=r"'mute' cannot be trained on \(2 such .*unusable: skip"):
        build_rows(toy_tokenizer, bad)
    assert build_rows(toy_tokenizer, bad, unusable="skip").counts["skipped"] == 2


@pytest.mark.parametrize(("side", "kept"), [("left", "Z"), ("right", "A"), ("middle", "AZ")])
def test_the_side_of_truncation_is_a_choice(toy_tokenizer, side, kept):
    one = talk("a", "A" + "Hello " * 40 + "Z", "ok", "why?", "I am fine.")
    marked = mark([one, talk("b", "Hello", "fine")], {("a", 3)})
    n_tokens = render(toy_tokenizer, one.messages).n_tokens
    rows = build_rows(toy_tokenizer, marked, indicator="[IND]", max_tokens=n_tokens - 20, truncation=side)
    text = toy_tokenizer.decode(rows.rows[0]["input_ids"])
    assert all(letter in text for letter in kept)
    assert trained_text(toy_tokenizer, rows.rows[0]).endswith("I am fine.</s>")
    counts = {
        key: rows.counts[key] for key in ("truncated", "truncated_with_indicator", "truncated_responses")
    }
    assert counts == {"truncated": 1, "truncated_with_indicator": 1, "truncated_responses": 0}
    with pytest.raises(InputError, match='truncation must be "left" or "right" or "middle"'):
        make_train_config({"truncation": "top"})


def test_a_window_shorter_than_any_response(toy_tokenizer):
    long = talk("a", "Hello", "I am fine. " * 20)
    with pytest.raises(
        InputError,
        match=r"window of 30 tokens has room for no response .*shortest response has \d+ tokens\); raise max",
    ):
        build_rows(toy_tokenizer, [long], max_tokens=30)
    with pytest.raises(InputError, match="window of 3 tokens has room for no response"):
        build_rows(toy_tokenizer, [talk("a", "Hello", "fine")], max_tokens=3)
    both = build_rows(toy_tokenizer, [long, talk("b", "Hello", "fine")], max_tokens=30)
    assert both.counts["truncated_responses"] == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be above 0, got -1\.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be above 0"),
        ({"max_length": 1}, "max_length must be at least 2 tokens"),
        ({"max_length": 9}, "window of 9 tokens has room for no response"),
        ({"assistant_only_loss": True}, "assistant_only_loss has no effect here.*use loss_on"),
        ({"truncation_mode": "keep_end"}, "use truncation"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "TRL refuses these arguments"),
        ({"optim": "adamm"}, "training arguments do not fit together"),
    ],
)
def test_values_that_cannot_train_leave_nothing_behind(tmp_path, arguments, complaint):
    tokenizer = build_toy_tokenizer()
    with pytest.raises(InputError, match=complaint) as caught:
        train(
            DATA, out=tmp_path / "r", model=tiny(tokenizer), tokenizer=tokenizer, args=ARGUMENTS | arguments
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_unknown_keys_of_the_python_call(tmp_path):
    tokenizer = build_toy_tokenizer()
    common = {"out": tmp_path / "r", "model": tiny(tokenizer), "tokenizer": tokenizer}
    with pytest.raises(InputError, match="train has unknown keys: indicater; did you mean indicator"):
        train(DATA, indicater="[IND]", **common)


def test_overwriting_sets_the_old_run_aside(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    words = ["--config", str(recipe), "--indicator", "null"]
    assert main(words) == 0
    first = (tmp_path / "out" / "train.json").read_text()
    with pytest.raises(RunExistsError, match="already holds another run"):
        train_from_config(recipe, {"indicator": "null", "learning_rate": 1e-3})
    folder = train_from_config(recipe, {"indicator": "null", "learning_rate": 1e-3, "overwrite": True})
    assert (tmp_path / "out.old" / "train.json").read_text() == first
    assert json.loads((folder / "train.json").read_text())["recipe"]["arguments"]["learning_rate"] == 1e-3
    card = (folder / "README.md").read_text()
    assert f"ctxlens train --config {recipe} indicator=null learning_rate=0.001 overwrite=True" in card
    assert str(tmp_path / "data.jsonl") in card


def test_recipe_without_a_folder_goes_to_runs(tmp_path):
    recipe = write_recipe(tmp_path)
    text = "".join(line for line in recipe.read_text().splitlines(True) if "output_dir" not in line)
    recipe.write_text(text)
    assert read_config(recipe)[1].output_dir == "runs/train"
    assert read_config(recipe, {"model_name_or_path": "other/name"})[0].model == "other/name"


def test_words_with_equal_signs(tmp_path):
    recipe = write_recipe(tmp_path)
    assert main([f"--config={recipe}", "--learning_rate=-3"]) == 2


def test_packed_rows_are_trained_on(tmp_path):
    tokenizer = build_toy_tokenizer()
    arguments = ARGUMENTS | {"packing": True, "max_length": 64, "max_steps": 2, "logging_steps": 1}
    folder = train(DATA, out=tmp_path / "r", model=tiny(tokenizer), tokenizer=tokenizer, args=arguments)
    assert len(json.loads((folder / "train.json").read_text())["log"]) == 2


def test_packing_without_borders_needs_a_confirmation(tmp_path):
    tokenizer = build_toy_tokenizer()
    arguments = ARGUMENTS | {"packing": True, "max_length": 64, "packing_strategy": "wrapped", "max_steps": 1}
    options = {"out": tmp_path / "r", "tokenizer": tokenizer, "args": arguments, "loss_on": "all"}
    with pytest.raises(
        InputError, match=r"wrapped joins conversations .*bfd.*allow_cross_sample_attention: true"
    ):
        train(DATA, model=tiny(tokenizer), **options)
    assert not (tmp_path / "r").exists()
    folder = train(DATA, model=tiny(tokenizer), allow_cross_sample_attention=True, **options)
    assert (folder / "train.json").is_file()


@pytest.mark.parametrize("more", [{"packing": True, "max_length": 64}, {"padding_free": True}])
def test_a_model_that_sees_into_other_packed_rows_is_refused(tmp_path, more):
    """The model is one that drops the positions, from which the mask between rows is made."""
    tokenizer = build_toy_tokenizer()
    model = tiny(tokenizer)
    read = model.model.forward
    model.model.forward = lambda *words, position_ids=None, **options: read(*words, **options)
    options = {"out": tmp_path / "r", "tokenizer": tokenizer, "args": ARGUMENTS | {"max_steps": 1} | more}
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM\) does not separate the conversations of a packed"
    ):
        train(DATA, model=model, **options)
    assert (train(DATA, model=model, allow_cross_sample_attention=True, **options) / "train.json").is_file()
    separate = {**options, "out": tmp_path / "s"}
    assert (train(DATA, model=tiny(tokenizer), **separate) / "train.json").is_file()


def test_packing_that_cuts_conversations_apart_is_an_error(tmp_path):
    tokenizer = build_toy_tokenizer()
    arguments = ARGUMENTS | {"packing": True, "max_length": 10, "packing_strategy": "wrapped"}
    rows = [{"input_ids": [5] * 30, "labels": [5] * 15 + [-100] * 15}]
    with pytest.raises(InputError, match=r"1 packed rows \(the first is row 2\).*use packing_strategy: bfd"):
        make_trainer(tiny(tokenizer), tokenizer, rows, make_sft_config(tmp_path, arguments))


def test_plain_text_and_existing_tokens_as_indicator(tmp_path):
    tokenizer = build_toy_tokenizer()
    size = len(tokenizer)
    options = {"selection": {("c1", 1)}, "args": ARGUMENTS | {"max_steps": 1}}
    model = tiny(tokenizer)
    folder = train(
        DATA, out=tmp_path / "text", model=model, tokenizer=tokenizer, indicator="use the text",
        indicator_as="text", **options,
    )  # fmt: skip
    assert (len(tokenizer), model.get_input_embeddings().weight.shape[0]) == (size, size)
    loaded = load_model(folder, backend="native")
    assert loaded.indicator == "use the text"
    chat = loaded.render([{"role": "user", "content": "Hello", "indicator": True}])
    assert "use the text" in tokenizer.decode(chat.tokens[chat.mask(Role.INDICATOR)])
    with pytest.raises(
        InputError, match="no token 'zz' to be the indicator; this checkpoint was trained with"
    ):
        load_model(folder, indicator="zz")

    tokenizer.add_special_tokens({"extra_special_tokens": ["<ctx>"]})
    model = tiny(tokenizer)
    folder = train(DATA, out=tmp_path / "old", model=model, tokenizer=tokenizer, indicator="<ctx>", **options)
    assert len(tokenizer) == size + 1
    assert load_model(folder, backend="native").indicator == "<ctx>"


def test_template_that_drops_the_indicator_is_named(tmp_path):
    tokenizer = build_toy_tokenizer()
    start = tmp_path / "start"
    tiny(tokenizer).save_pretrained(start)
    template = "{% for m in messages %}{{ m.content.replace('[IND]', '') }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(start)
    for how in ("token", "text"):
        with pytest.raises(InputError, match=r"chat template .*the indicator '\[IND\]'"):
            train(
                DATA, out=tmp_path / "r", model=start, selection={("c1", 1)}, indicator="[IND]",
                indicator_as=how, args=ARGUMENTS,
            )  # fmt: skip
    assert not (tmp_path / "r").exists()


def test_hub_upload_is_what_was_delivered(tmp_path, monkeypatch):
    tokenizer = build_toy_tokenizer()
    import huggingface_hub

    seen = {}

    def upload(self, **given):
        folder = given["folder_path"]
        seen.update(given, files=sorted(p.name for p in Path(folder).iterdir()))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: huggingface_hub.RepoUrl("a/b"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_, **__: None)
    arguments = ARGUMENTS | {"push_to_hub": True, "hub_model_id": "a/b", "max_steps": 1}
    train(DATA, out=tmp_path / "r", model=tiny(tokenizer), tokenizer=tokenizer, args=arguments)
    assert seen["repo_id"] == "a/b"
    assert {"README.md", "model.safetensors", "train.json"} <= set(seen["files"])


@pytest.mark.parametrize(("side", "cut"), [("left", 3), ("right", 3), ("middle", 6)])
def test_nothing_is_trained_of_an_earlier_response_that_is_cut(toy_tokenizer, side, cut):
    """What is left of it begins, or ends, within a sentence."""
    one = talk("a", "Hello", "I am fine. Thank you, I am fine. Thank you.", "why?", "I am fine.")
    chat = render(toy_tokenizer, one.messages)
    if side == "left":
        cut += int((chat.turn == 0).sum())
    window = chat.n_tokens - cut
    whole = build_rows(toy_tokenizer, [one])
    assert trained_text(toy_tokenizer, whole.rows[0]).count("</s>") == 2
    rows = build_rows(toy_tokenizer, [one], max_tokens=window, truncation=side)
    assert trained_text(toy_tokenizer, rows.rows[0]) == "I am fine.</s>"
    assert (whole.counts["responses_left_out"], rows.counts["responses_left_out"]) == (0, 1)
    everything = build_rows(toy_tokenizer, [one], max_tokens=window, truncation=side, loss_on="all")
    assert everything.rows[0]["labels"] == everything.rows[0]["input_ids"]
    assert everything.counts["responses_left_out"] == 0
