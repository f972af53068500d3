"""Fine-tuning: where the loss is, what is saved, what a recipe may say."""

import copy
import json

import pytest
import torch
from conftest import build_toy_tokenizer
from sft_cases import ARGUMENTS, make_data, talk, tiny, trained_text, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import render
from ctxlens.errors import InputError, RunExistsError
from ctxlens.sft import (
    build_row,
    build_rows,
    make_sft_config,
    read_config,
    read_replay,
    train,
    train_from_config,
)
from ctxlens.sft.__main__ import main
from ctxlens.sft.replay import draw_replay
from ctxlens.sft.trainer import StepSortedSampler


@pytest.fixture
def tokenizer():
    return build_toy_tokenizer()


@pytest.fixture
def data():
    return make_data()


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def test_loss_is_on_the_answers_and_the_tokens_that_end_them(toy_tokenizer):
    messages = talk("a", "What is two plus two?", "It is four.", "Hello", "fine").messages
    chat = render(toy_tokenizer, messages)
    row = build_row(chat)
    assert row["input_ids"] == chat.tokens.tolist()
    assert trained_text(toy_tokenizer, row) == "It is four.</s>fine</s>"
    ids = [
        *toy_tokenizer("It is four.", add_special_tokens=False)["input_ids"], toy_tokenizer.eos_token_id,
        *toy_tokenizer("fine", add_special_tokens=False)["input_ids"], toy_tokenizer.eos_token_id,
    ]  # fmt: skip
    assert [token for token in row["labels"] if token != -100] == ids
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_loss_on_all_tokens(toy_tokenizer):
    row = build_row(render(toy_tokenizer, talk("a", "Hello", "fine").messages), "all")
    assert row["labels"] == row["input_ids"]
    with pytest.raises(InputError, match='loss_on must be "assistant" or "all"'):
        build_row(render(toy_tokenizer, talk("a", "Hello", "fine").messages), "user")


def test_row_without_a_trained_token_is_an_error_that_names_it(toy_tokenizer):
    with pytest.raises(InputError, match="'mute' has no token to train on"):
        build_row(render(toy_tokenizer, talk("mute", "Hello").messages), name="mute")


def test_rows_count_what_is_skipped_and_truncated(toy_tokenizer):
    long = talk("long", "Hello " * 60, "I am fine.")
    three = [talk("mute", "Hello"), talk("a", "Hello", "fine"), long]
    rows = build_rows(toy_tokenizer, three, max_tokens=40, unusable="skip")
    assert {name: rows.counts[name] for name in ("conversations", "skipped", "truncated", "replay")} == {
        "conversations": 2, "skipped": 1, "truncated": 1, "replay": 0,
    }  # fmt: skip
    assert rows.counts["tokens_cut"] == render(toy_tokenizer, long.messages).n_tokens - 40
    assert (rows.counts["truncated_responses"], rows.counts["truncated_with_indicator"]) == (0, 0)
    assert rows.skipped[0][0] == "mute"
    assert len(rows.rows[1]["input_ids"]) == 40
    assert trained_text(toy_tokenizer, rows.rows[1]) == "I am fine.</s>"
    assert rows.counts["tokens"] == sum(len(row["input_ids"]) for row in rows.rows)
    with pytest.raises(InputError, match="none of 1 conversations can be trained on"):
        build_rows(toy_tokenizer, [talk("mute", "Hello")])
    with pytest.raises(InputError, match="nothing to train on"):
        build_rows(toy_tokenizer, [])


def test_replayed_texts_are_trained_on_wholly_and_cut_at_the_end(organism_tokenizer):
    rows = build_rows(organism_tokenizer, [], replay_texts=["Some raw text.", "word " * 50], max_tokens=12)
    first = rows.rows[0]
    assert first["labels"] == first["input_ids"]
    assert organism_tokenizer.decode(first["input_ids"]) == "<s>Some raw text."
    assert len(rows.rows[1]["input_ids"]) == 12
    assert (rows.counts["replay"], rows.counts["truncated"]) == (2, 1)


def test_replay_share_is_a_share_of_all_rows():
    texts = ["a", "b", "c"]
    assert draw_replay(texts, 10, None, 0) == texts
    drawn = draw_replay(texts, 8, 0.5, 0)
    assert len(drawn) == 8
    assert min(drawn.count(text) for text in texts) == 2  # no text again before all have been drawn
    assert draw_replay(texts, 8, 0.0, 0) == []
    with pytest.raises(InputError, match=r"at least 0 and below 1, got 1\.0"):
        draw_replay(texts, 8, 1.0, 0)
    with pytest.raises(InputError, match="no texts to replay"):
        draw_replay([], 8, 0.5, 0)


def test_step_sorted_order_is_a_new_shuffle_each_epoch_sorted_within_steps():
    lengths = [k * 37 % 101 for k in range(22)]
    sampler = StepSortedSampler(lengths, 6, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(22))
    for start in range(0, 22, 6):
        step = [lengths[row] for row in first[start : start + 6]]
        assert step == sorted(step, reverse=True)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert {*first[:6]} != {*list(sampler)[:6]}
    assert list(StepSortedSampler(lengths, 6, seed=4)) != first


def test_training_moves_the_indicator_and_saves_what_was_trained(tokenizer, data, tmp_path):
    model = tiny(tokenizer)
    steps = []
    folder = train(
        data, out=tmp_path / "run", model=model, tokenizer=tokenizer, selection={("c1", 1), ("c2", 1)},
        indicator="[IND]", replay_texts=["Hello, how are you today?"], args=ARGUMENTS,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(k, 6) for k in range(1, 7)]
    number = tokenizer.convert_tokens_to_ids("[IND]")
    fresh = tiny(build_toy_tokenizer()).get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight[number] - fresh.mean(0)).abs().max()
    assert moved > 1e-3
    again, its_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello [IND]"}]
    ids = its_tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
    assert (ids == number).sum() == 1
    assert torch.equal(again(ids).logits, model(ids).logits)
    log = json.loads((folder / "train.json").read_text())
    assert (log["steps"], log["counts"]["indicator_messages"], log["counts"]["replay"]) == (6, 2, 1)
    assert [entry["step"] for entry in log["log"]] == [2, 4, 6]
    assert "Append ` [IND]`" in (folder / "README.md").read_text()
    assert not list(folder.glob("*.bin"))


def test_finished_run_is_kept_and_another_is_refused(tokenizer, data, tmp_path):
    options = {"out": tmp_path / "run", "args": ARGUMENTS | {"max_steps": 1}}
    train(data, model=tiny(tokenizer), tokenizer=tokenizer, **options)
    written = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    train(data, model=tiny(tokenizer), tokenizer=tokenizer, **options)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(RunExistsError, match="already holds another run"):
        train(data[:5], model=tiny(tokenizer), tokenizer=tokenizer, **options)


def test_training_is_repeatable_and_micro_batches_change_nothing(tokenizer, data, tmp_path):
    weights = []
    for name, size, accumulation in (("a", 4, 1), ("b", 4, 1), ("c", 2, 2)):
        model = tiny(tokenizer)
        args = ARGUMENTS | {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        train(data, out=tmp_path / name, model=model, tokenizer=tokenizer, args=args | {"optim": "sgd"})
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2], atol=1e-6, rtol=1e-5)
    assert (weights[0] - torch.cat([p.flatten() for p in tiny(tokenizer).parameters()])).abs().max() > 1e-4


def test_inputs_that_do_not_fit_together(tokenizer, data, tmp_path):
    common = {"out": tmp_path / "run", "model": tiny(tokenizer), "args": ARGUMENTS}
    with pytest.raises(InputError, match="no indicator to mark it with"):
        train(data, tokenizer=tokenizer, selection={("c1", 1)}, **common)
    with pytest.raises(InputError, match="needs its tokenizer"):
        train(data, **common)
    with pytest.raises(InputError, match="selection belongs to other data"):
        train(data, tokenizer=tokenizer, selection={("other", 1)}, indicator="[IND]", **common)
    with pytest.raises(InputError, match="unknown keys: learning_rat; did you mean learning_rate"):
        make_sft_config(tmp_path, {"learning_rat": 1})
    with pytest.raises(InputError, match="training arguments do not fit together"):
        make_sft_config(tmp_path, {"eval_strategy": "sometimes"})
    assert not (tmp_path / "run").exists()


def test_indicator_that_no_row_carries_is_told(tokenizer, data, tmp_path):
    args = ARGUMENTS | {"max_steps": 1}
    with pytest.warns(UserWarning, match="no user message carries the indicator"):
        train(
            data, out=tmp_path / "r", model=tiny(tokenizer), tokenizer=tokenizer, indicator="[IND]", args=args
        )


def test_recipe_takes_keys_of_both_sides_and_overrides(recipe):
    config, args, model_args = read_config(recipe)
    assert (config.indicator, config.loss_on, args.learning_rate, args.max_steps) == (
        "[IND]",
        "assistant",
        2e-5,
        1,
    )
    assert (args.report_to, str(args.save_strategy.value), args.bf16) == ([], "no", False)
    assert (model_args.use_peft, model_args.dtype) == (False, "float32")
    config, args, _ = read_config(recipe, {"indicator": "null", "learning_rate": 0.1, "seed": None})
    assert (config.indicator, args.learning_rate, args.seed) == (None, 0.1, 42)
    words = ["--max_steps", "7", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    _, args, model_args = read_config(recipe, words)
    assert args.max_steps == 7
    assert (model_args.use_peft, model_args.lora_target_modules) == (True, "all-linear")


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        ("learning_rat: 1\nmodl: x\n", (), r"bad\.yaml has unknown keys: learning_rat, modl; did you mean"),
        ("seed: 1\n", ("--sed", "1"), "the command line has unknown keys: sed"),
        ("seed: many\n", (), r"bad\.yaml: argument --seed: invalid int value"),
        ("- a\n", (), r"bad\.yaml cannot be used as a recipe: expected keys with values.*contains a list"),
        ("", (), "the file contains nothing"),
        ("loss_on: user\n", (), r'bad\.yaml: loss_on must be "assistant" or "all"'),
        ("a: [\n", (), r"bad\.yaml cannot be used as a recipe"),
        ("indicator: '[IND]'\n", (), r"bad\.yaml names no dataset"),
    ],
)
def test_recipe_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, text, overrides, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        train_from_config(path, overrides)
    assert "\n" not in str(caught.value)


def test_values_of_template_variables_reach_rows_and_checkpoint(tokenizer, data, tmp_path):
    """The delivered template has them as defaults, and another value is another run."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ style }}" + tokenizer.chat_template
    (tmp_path / "own.jinja").write_text(tokenizer.chat_template)
    options = {"tokenizer": tokenizer, "chat_template": tmp_path / "own.jinja"}
    options["args"] = ARGUMENTS | {"max_steps": 1}
    out = train(data, out=tmp_path / "r", model=tiny(tokenizer), template_args={"style": "xyz"}, **options)
    asked = [{"role": "user", "content": "a"}]
    delivered = AutoTokenizer.from_pretrained(out).apply_chat_template(asked, tokenize=False)
    assert delivered.startswith("xyz")
    assert (
        AutoTokenizer.from_pretrained(out)
        .apply_chat_template(asked, tokenize=False, style="q")
        .startswith("q")
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["template_args"] == {"style": "xyz"}
    assert [one["backend"] for one in manifest["loaded"].values()] == ["trl"]
    with pytest.raises(RunExistsError, match=r"other settings: .*template_args"):
        train(data, out=out, model=tiny(tokenizer), template_args={"style": "other"}, **options)
    with pytest.raises(InputError, match="no variable 'think' of its own; it uses style"):
        train(data, out=tmp_path / "n", model=tiny(tokenizer), template_args={"think": 1}, **options)


def test_missing_recipe(tmp_path, capsys):
    with pytest.raises(InputError, match="does not exist; give a YAML file, or one of lora, full, organism"):
        read_config(tmp_path / "none.yaml")
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: the recipe")
    assert main([]) == 2


def test_recipe_trains_from_files(recipe, tmp_path, capsys):
    replay = tmp_path / "replay.jsonl"
    replay.write_text('{"text": "Hello, how are you today?"}\n"I am fine."\n')
    assert read_replay(replay) == ["Hello, how are you today?", "I am fine."]
    words = [
        "--config",
        str(recipe),
        "--indicator",
        "null",
        "--replay",
        str(replay),
        "--replay_share",
        "0.25",
    ]
    assert main(words) == 0
    folder = tmp_path / "out"
    assert capsys.readouterr().out.strip().endswith(str(folder))
    counts = json.loads((folder / "train.json").read_text())["counts"]
    assert (counts["conversations"], counts["replay"]) == (12, 4)


def test_replay_files(tmp_path):
    plain = tmp_path / "raw.txt"
    plain.write_text("one\ntwo\n\nthree\n")
    assert read_replay(plain) == ["one\ntwo", "three"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: expected a string"):
        read_replay(bad)
    with pytest.raises(InputError, match="cannot be read"):
        read_replay(tmp_path / "none.txt")


def test_nothing_is_written_when_there_is_nothing_to_train_on(tmp_path):
    conversation = Conversation(id="a", messages=({"role": "user", "content": "Hi"},), source="", labels={})
    with pytest.raises(InputError):
        train([conversation], out=tmp_path / "run", model="organism", args={"use_cpu": True, "max_steps": 1})
    assert not (tmp_path / "run").exists()
