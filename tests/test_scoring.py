"""Scoring a data set: what is stored, what is left out, batches, streams, and bad input."""

import errno
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring_cases import FakeModel, many, talk

import ctxlens.scoring.whole as whole
from ctxlens.chat.data import Conversation, fingerprint_conversations, open_conversations
from ctxlens.chat.roles import Role
from ctxlens.errors import InputError, RunExistsError
from ctxlens.results import Scores
from ctxlens.runs import Run
from ctxlens.scoring import ScoreBatch, Settings, check_layers, score_conversations, score_to_run
from ctxlens.scoring.measure import uniform_share

MUTE = Conversation(id="mute", messages=({"role": "user", "content": "x"},), source="test", labels={})
BAD = Conversation(id="bad", messages=({"role": "wizard", "content": "x"},), source="test", labels={})


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", study="score", config={"dataset": "here"})


def test_scores_are_the_reductions_of_the_shares_in_the_order_of_the_data(toy_tokenizer):
    model = FakeModel(toy_tokenizer)
    data = [
        talk("long", "What is two plus two? " * 5, "It is four.", "Hello", "fine, thank you."),
        talk("short", "Hello", "I am fine."),
    ]
    scores = score_conversations(model, data)
    frame = scores.frame
    assert list(zip(frame["conversation"], frame["turn"], frame["layer"], strict=True)) == [
        ("long", 1, 0), ("long", 1, 1), ("long", 3, 0), ("long", 3, 1), ("short", 1, 0), ("short", 1, 1),
    ]  # fmt: skip
    chat = model.render(data[0].messages)
    user = model.shares(chat, 3, [0, 1])[..., Role.USER]
    row = frame[(frame["conversation"] == "long") & (frame["turn"] == 3) & (frame["layer"] == 1)].iloc[0]
    assert row["mean_of_best"] == pytest.approx(float(user[1].max(0).mean()), abs=1e-6)
    assert row["best_of_mean"] == pytest.approx(float(user[1].mean(-1).max()), abs=1e-6)
    assert row["best_head"] == user[1].mean(-1).argmax()
    assert row["mean_heads"] == pytest.approx(float(user[1].mean()), abs=1e-6)
    assert row["share_bos"] == pytest.approx(1 - float(user[1].mean()), abs=1e-6)
    assert row["share_assistant"] == 0
    assert row["response_tokens"] == len(chat.response_positions(3))
    seen = chat.mask("user")[: chat.response_positions(3)[0]]
    assert row["context_tokens"] == seen.sum()
    assert row["uniform"] == pytest.approx(uniform_share(chat.mask("user"), chat.response_positions(3)))
    assert not row["truncated"]


def tiny_llama(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_scores_of_a_real_model_agree_with_its_full_pattern(toy_tokenizer):
    from ctxlens.models import Model

    llama = tiny_llama(toy_tokenizer)
    data = [
        talk("a", "What is two plus two?", "It is four."),
        talk("b", "Hello", "fine", "Be brief", "I am."),
    ]
    for backend in ("native", "lens"):
        model = Model.from_hf(llama, toy_tokenizer, name="tiny", backend=backend)
        scores = score_conversations(model, data)
        for conversation in data:
            chat = model.render(conversation.messages)
            pattern = model.read_patterns(chat)
            for turn in chat.response_turns():
                at = chat.response_positions(turn)
                user = pattern[:, :, at][..., chat.mask("user")].sum(-1)
                rows = scores.frame[
                    (scores.frame["conversation"] == conversation.id) & (scores.frame["turn"] == turn)
                ]
                np.testing.assert_allclose(rows["best_of_mean"], user.mean(2).max(1), atol=1e-5)
                np.testing.assert_allclose(rows["mean_of_best"], user.max(1).mean(1), atol=1e-5)
                np.testing.assert_array_equal(rows["best_head"], user.mean(2).argmax(1))
                for role in ("bos", "template", "assistant"):
                    share = pattern[:, :, at][..., chat.mask(role)].sum(-1).mean((1, 2))
                    np.testing.assert_allclose(rows[f"share_{role}"], share, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "lens"])
def test_what_rests_on_sinks_is_stored_on_request_and_the_score_stays(toy_tokenizer, tmp_path, backend):
    from ctxlens.models import Model

    model = Model.from_hf(tiny_llama(toy_tokenizer), toy_tokenizer, name="tiny", backend=backend)
    data = [
        talk("a", "What is two plus two? " * 4, "It is four. " * 6),
        talk("b", "Hello", "fine", "Be brief", "I am."),
    ]
    plain = score_conversations(model, data)
    scores = score_conversations(
        model, data, sinks=True, out=Run.open(tmp_path / "run", study="score", config={})
    )
    for name in plain.frame.select_dtypes("number").columns:
        np.testing.assert_allclose(scores.frame[name], plain.frame[name], atol=1e-5)
    for conversation in data:
        chat = model.render(conversation.messages)
        for turn in chat.response_turns():
            read = model.read_roles(chat, queries="response_mean", turn=turn)
            rows = scores.frame[
                (scores.frame["conversation"] == conversation.id) & (scores.frame["turn"] == turn)
            ]
            for role in ("user", "bos", "template"):
                found = read.resting[..., Role.parse(role)].mean((1, 2))
                np.testing.assert_allclose(rows[f"resting_{role}"], found, atol=1e-5)
            apart = read.with_sinks_apart().shares.mean((1, 2))
            expected = apart[:, Role.USER] / (1 - apart[:, Role.SINK])
            np.testing.assert_allclose(scores.without_sinks()[rows.index], expected, atol=1e-4)
    assert scores.frame.filter(like="resting_").to_numpy().max() > 0.01
    with pytest.raises(InputError, match=r"made without attention sinks; score the data again with --sinks"):
        plain.without_sinks()


def test_a_run_without_sinks_keeps_its_plan_and_is_not_mixed_with_one_that_has_them(toy_tokenizer, run):
    data = [talk("a", "Hello", "fine")]
    scores = score_conversations(FakeModel(toy_tokenizer), data, out=run)
    assert "sinks" not in scores.meta
    assert not [name for name in scores.frame if name.startswith("resting_")]
    with pytest.raises(RunExistsError, match="other settings"):
        score_conversations(FakeModel(toy_tokenizer), data, out=run, sinks=True)


def test_the_file_has_a_row_a_turn_and_says_what_it_is(toy_tokenizer, run):
    data = [talk("a", "Hello", "fine", "Be brief", "I am."), talk("b", "Hello", "fine")]
    scores = score_conversations(FakeModel(toy_tokenizer), data, out=run, precision="float16")
    table = pq.read_table(run.path("scores.parquet"))
    assert table["conversation"].to_pylist() == ["a", "a", "b"]
    assert table["turn"].to_pylist() == [1, 3, 1]
    assert table.schema.field("mean_of_best").type == pa.list_(pa.float16())
    assert table.schema.field("best_head").type == pa.list_(pa.int16())
    assert table.schema.field("conversation").type == pa.string()
    assert [len(values) for values in table["share_template"].to_pylist()] == [2, 2, 2]
    meta = json.loads(table.schema.metadata[b"ctxlens"])["meta"]
    assert meta["model"] == {"name": "fake", "sha256": "0"}
    assert (meta["layers"], meta["n_layers"], meta["probe_layer"]) == ([0, 1], 2, 1)
    assert (meta["conversations"], meta["precision"], meta["config"]) == (2, "float16", {"dataset": "here"})
    assert {"ctxlens", "torch", "transformers"} <= set(meta["versions"])
    assert meta["fingerprint"] == fingerprint_conversations(data)
    exact = score_conversations(FakeModel(toy_tokenizer), data).frame
    assert list(scores.frame.columns) == list(exact.columns)
    np.testing.assert_allclose(scores.frame["mean_of_best"], exact["mean_of_best"], atol=1e-3)
    one = Scores.load(run.path("scores.parquet"), layers=[1]).frame
    assert one["mean_of_best"].tolist() == scores.layer(1).tolist()
    with pytest.raises(InputError, match="stored as float32 or float16, not 'int8'"):
        score_conversations(FakeModel(toy_tokenizer), data, precision="int8")


def test_known_kinds_stand_beside_scores(toy_tokenizer, run):
    data = [talk("a", "Hello", "fine"), talk("b", "Hello", "fine")]
    scores = score_conversations(FakeModel(toy_tokenizer), data, kinds={("a", 1): "document"}, out=run)
    assert list(scores.frame["kind"]) == ["document", "document", "", ""]


def test_layers_reach_up_to_the_papers_depth_unless_told_otherwise(toy_tokenizer):
    model = FakeModel(toy_tokenizer, n_layers=22)
    assert check_layers(model, None) == tuple(range(16))
    assert check_layers(model, "all") == tuple(range(22))
    assert check_layers(model, [15, 3, 3]) == (3, 15)
    with pytest.raises(InputError, match=r"layers must lie in 0 to 21 for fake, got \[22\]"):
        check_layers(model, [22])
    with pytest.raises(InputError, match="must be numbers or \"all\", got 'some'"):
        check_layers(model, "some")


def test_batches_stay_in_the_budget_and_progress_reaches_the_end(toy_tokenizer):
    model = FakeModel(toy_tokenizer)
    data = [talk(f"c{k}", "Hello " * (1 + k % 7), "I am fine.") for k in range(20)]
    seen = []
    score_conversations(
        model, data, layers=[1], batch_tokens=100, progress=lambda done, total: seen.append((done, total))
    )
    assert all(len(batch) * max(batch) <= 100 for batch in model.batches)
    assert model.batches == sorted(model.batches, key=lambda batch: -batch[0])
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_stream_is_scored_without_being_held(toy_tokenizer, run, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "SHARD_CONVERSATIONS", 10)
    rows = [{"id": c.id, "messages": list(c.messages)} for c in many(35)] + [{"id": "x", "messages": []}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    stream = open_conversations(path)
    seen = []
    scores = score_conversations(
        FakeModel(toy_tokenizer), stream, out=run, progress=lambda done, total: seen.append((done, total))
    )
    assert scores.frame.equals(score_conversations(FakeModel(toy_tokenizer), many(35)).frame)
    assert seen[-1] == (35, 0)
    assert scores.meta["fingerprint"] == fingerprint_conversations(stream)
    assert scores.meta["data"] == {"layout": "messages", "rows_left_out": 1, "turns_dropped": {}}
    assert run.read_json("skipped.json") == [{"conversation": "x", "reason": "no user turn with an answer"}]


def test_what_cannot_be_scored_is_counted_not_fatal(toy_tokenizer, run):
    long = talk("long", "Hello " * 300, "fine")
    data = [BAD, talk("good", "Hello", "fine"), MUTE, long]
    scores = score_conversations(FakeModel(toy_tokenizer), data, out=run)
    assert set(scores.frame["conversation"]) == {"good", "long"}
    assert scores.meta["truncated"] == 1
    assert scores.frame.set_index("conversation").loc["long", "truncated"].all()
    skipped = run.read_json("skipped.json")
    assert [entry["conversation"] for entry in skipped] == ["bad", "mute"]
    assert "unknown role 'wizard'" in skipped[0]["reason"]
    assert "no assistant turn" in skipped[1]["reason"]


def test_bad_input_is_told_in_a_sentence(toy_tokenizer, run, tmp_path):
    model = FakeModel(toy_tokenizer, spoil="poison")
    with pytest.raises(InputError, match="no conversations to score; give a data set with at least one"):
        score_conversations(model, [])
    with pytest.raises(InputError, match=r"none of 2 conversations can be scored; .* no assistant turn has"):
        score_conversations(model, [MUTE, Conversation("two", MUTE.messages, "test")], out=run)
    with pytest.raises(InputError, match="ids must be unique, but 'a' occurs twice"):
        score_conversations(model, [talk("a", "x", "y"), talk("a", "x", "y")])
    with pytest.raises(InputError, match="ids must be unique, but 'a' occurs twice"):
        score_conversations(model, iter([talk("a", "x", "y"), talk("a", "x", "y")]))
    with pytest.raises(InputError, match=r"max_tokens is 0"):
        score_conversations(model, [talk("a", "x", "y")], max_tokens=0)
    with pytest.raises(InputError, match=r"fake gives attention that is not a number in turn 1 of .*'sick'"):
        score_conversations(model, [talk("well", "x", "y"), talk("sick", "poison", "y")])
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": [{"role": "user", "content": "q"}]}]))
    with pytest.raises(
        InputError, match=r"no conversations to score \(1 rows: no user turn with an answer\)"
    ):
        score_conversations(model, open_conversations(path))


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_later(toy_tokenizer, run, monkeypatch):
    monkeypatch.setattr(whole, "SHARD_CONVERSATIONS", 10)
    write_table, written = pq.ParquetWriter.write_table, []

    def fails_later(writer, table):
        written.append(len(table))
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(writer, table)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails_later)
    with pytest.raises(
        InputError, match=r"Cannot write .*000002\.parquet: No space left on device; free some"
    ):
        score_conversations(FakeModel(toy_tokenizer), many(35), out=run)
    assert sorted(p.name for p in run.path("score-shards").iterdir()) == ["000000.parquet", "000001.parquet"]
    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_table)
    model = FakeModel(toy_tokenizer)
    scores = score_conversations(model, many(35), out=run)
    assert sum(map(len, model.batches)) == 15
    assert scores.frame.equals(score_conversations(model, many(35)).frame)


def test_finished_scores_are_read_back_and_others_are_refused(toy_tokenizer, run):
    model = FakeModel(toy_tokenizer)
    first = score_conversations(model, many(20), out=run)
    calls = len(model.batches)
    again = score_conversations(model, many(20), out=run)
    assert len(model.batches) == calls
    assert again.frame.equals(first.frame)
    assert not run.path("score-shards").exists()
    other = FakeModel(toy_tokenizer)
    other.identity = {"name": "fake", "sha256": "1"}
    for data, by, options in (
        (many(21), model, {}),
        (many(20), other, {}),
        (many(20), model, {"layers": [1]}),
    ):
        with pytest.raises(RunExistsError, match="already holds scores of other conversations"):
            score_conversations(by, data, out=run, **options)


def test_parts_of_another_data_set_are_refused(toy_tokenizer, run, monkeypatch):
    monkeypatch.setattr(whole, "SHARD_CONVERSATIONS", 10)
    model = FakeModel(toy_tokenizer)
    settings = Settings.of(model)
    assert score_to_run(model, many(35), settings, run, part=(0, 2)) is None
    with pytest.raises(RunExistsError, match="shards of other conversations"):
        score_to_run(model, many(36), settings, run, part=(1, 2))
    with pytest.raises(InputError, match="the part must be from 0/2 to 1/2, got 2/2"):
        score_to_run(model, many(35), settings, run, part=(2, 2))


def rows_of(data):
    return pa.Table.from_pylist([{"id": c.id, "messages": [dict(m) for m in c.messages]} for c in data])


def test_a_batch_in_ray_is_scored_by_the_same_work(toy_tokenizer):
    batch = ScoreBatch(FakeModel(toy_tokenizer), layout="messages")
    table = batch(rows_of([*many(5), MUTE]))
    assert table["skipped"].to_pylist() == [None] * 5 + ["no user turn with an answer"]
    assert table["turn"].to_pylist() == [1] * 5 + [-1]
    assert table["layers"].to_pylist()[0] == [0, 1]
    scores = score_conversations(FakeModel(toy_tokenizer), many(5))
    assert [value[1] for value in table["mean_of_best"].to_pylist()[:5]] == scores.layer(1).tolist()
    with pytest.raises(InputError, match="no column 'id' that identifies conversations"):
        batch(pa.table({"messages": [[]]}))


@pytest.mark.slow
def test_ray_scores_as_we_do(tmp_path):
    ray = pytest.importorskip("ray")
    read_parquet = pytest.importorskip("ray.data").read_parquet
    from ctxlens.models import load_model

    pq.write_table(rows_of(many(30)), tmp_path / "data.parquet")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        found = (
            read_parquet(str(tmp_path / "data.parquet"))
            .map_batches(
                ScoreBatch,
                fn_constructor_kwargs={"model": "organism-chat", "layout": "messages"},
                batch_format="pyarrow",
                batch_size=10,
                concurrency=1,
            )
            .to_pandas()
            .set_index("conversation")
        )
    finally:
        ray.shutdown()
    scores = score_conversations(load_model("organism-chat", backend="native"), many(30))
    ours = scores.layer(1).droplevel("turn")
    theirs = found["mean_of_best"].map(lambda values: values[1])
    np.testing.assert_allclose(theirs.loc[ours.index], ours, atol=1e-6)
