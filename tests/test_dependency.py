"""Context-dependency scores: reductions by hand, selection, and runs that are killed."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ctxlens.data import Conversation
from ctxlens.dependency import reduce_user_shares, score_conversations, uniform_share
from ctxlens.errors import InputError, RunExistsError
from ctxlens.results import Scores
from ctxlens.roles import N_ROLES, Role, render
from ctxlens.runs import Run
from ctxlens.selection import choose_layer, select_turns, selection_quality


def talk(name, *contents):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[k % 2], "content": text} for k, text in enumerate(contents))
    return Conversation(id=name, messages=messages, source="test", labels={})


class FakeModel:
    """Shares that depend on the tokens alone: layer l, head h, response token t have fixed numbers."""

    name = "fake"
    n_layers = 2
    n_ctx = 200

    def __init__(self, tokenizer, *, spoil=None, pause=0.0):
        self.tokenizer = tokenizer
        self.identity = {"name": "fake", "sha256": "0"}
        self.spoil, self.pause = spoil, pause
        self.batches = []

    def render(self, messages, **options):
        return render(self.tokenizer, messages, **options)

    def read_response_shares(self, chats, *, layers, batch_tokens):
        time.sleep(self.pause)
        self.batches.append([chat.n_tokens for chat in chats])
        return [{turn: self.shares(chat, turn, layers) for turn in chat.response_turns()} for chat in chats]

    def shares(self, chat, turn, layers):
        token = chat.tokens[chat.response_positions(turn)]
        user = [
            [np.abs(np.sin((layer + 1) * (head + 2) * token.astype(float))) for head in range(3)]
            for layer in layers
        ]
        shares = np.zeros((len(layers), 3, len(token), N_ROLES), dtype=np.float32)
        shares[..., Role.USER] = user
        shares[..., Role.BOS] = 1 - shares[..., Role.USER]
        if self.spoil is not None and self.spoil in chat.messages[0]["content"]:
            shares[0, 0, 0, Role.USER] = np.nan
        return shares


def test_reductions_by_hand():
    # Two heads, two response tokens: means .5 and .45; best per token .8 and .7.
    user = np.array([[[0.2, 0.8], [0.7, 0.2]]])
    reduced = reduce_user_shares(user)
    assert reduced["best_of_mean"] == pytest.approx([0.5])
    assert reduced["mean_of_best"] == pytest.approx([0.75])
    assert reduced["mean_heads"] == pytest.approx([0.475])


def test_uniform_share_by_hand():
    # Tokens: bos user user template answer answer. Answers see 2 of 5 and 2 of 6.
    is_user = np.array([False, True, True, False, False, False])
    assert uniform_share(is_user, np.array([4, 5])) == pytest.approx((2 / 5 + 2 / 6) / 2)


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
    assert row["mean_heads"] == pytest.approx(float(user[1].mean()), abs=1e-6)
    assert row["response_tokens"] == len(chat.response_positions(3))
    seen = chat.mask("user")[: chat.response_positions(3)[0]]
    assert row["context_tokens"] == seen.sum()
    assert row["uniform"] == pytest.approx(uniform_share(chat.mask("user"), chat.response_positions(3)))
    assert not row["truncated"]
    assert scores.meta["conversations"] == 2
    assert scores.meta["layers"] == [0, 1]


def test_batches_stay_in_the_budget_and_progress_reaches_the_end(toy_tokenizer):
    model = FakeModel(toy_tokenizer)
    data = [talk(f"c{k}", "Hello " * (1 + k % 7), "I am fine.") for k in range(20)]
    seen = []
    score_conversations(
        model, data, layers=[1], batch_tokens=100, progress=lambda done, total: seen.append((done, total))
    )
    assert all(len(batch) * max(batch) <= 100 for batch in model.batches)
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_cannot_be_scored_is_counted_not_fatal(toy_tokenizer, tmp_path):
    model = FakeModel(toy_tokenizer)
    bad = Conversation(id="bad", messages=({"role": "wizard", "content": "x"},), source="test", labels={})
    mute = Conversation(id="mute", messages=({"role": "user", "content": "x"},), source="test", labels={})
    long = talk("long", "Hello " * 300, "fine")
    run = Run.open(tmp_path / "run", study="score", config={})
    scores = score_conversations(model, [bad, talk("good", "Hello", "fine"), mute, long], out=run)
    assert set(scores.frame["conversation"]) == {"good", "long"}
    assert scores.meta["truncated"] == 1
    assert scores.frame.set_index("conversation").loc["long", "truncated"].all()
    skipped = run.read_json("skipped.json")
    assert [entry["conversation"] for entry in skipped] == ["bad", "mute"]
    assert "unknown role 'wizard'" in skipped[0]["reason"]
    assert "no assistant turn" in skipped[1]["reason"]


def test_nothing_but_skipped_gives_an_empty_table(toy_tokenizer):
    mute = Conversation(id="mute", messages=({"role": "user", "content": "x"},), source="test", labels={})
    scores = score_conversations(FakeModel(toy_tokenizer), [mute])
    assert len(scores) == 0
    with pytest.raises(InputError, match="layer 0 is not among the scored layers"):
        select_turns(scores, layer=0)


def test_bad_input_is_told_in_a_sentence(toy_tokenizer):
    model = FakeModel(toy_tokenizer, spoil="poison")
    with pytest.raises(InputError, match="no conversations to score"):
        score_conversations(model, [])
    with pytest.raises(InputError, match="ids must be unique, but 'a' occurs 2 times"):
        score_conversations(model, [talk("a", "x", "y"), talk("a", "x", "y")])
    with pytest.raises(InputError, match=r"layer"):
        score_conversations(model, [talk("a", "x", "y")], layers=[2])
    with pytest.raises(InputError, match=r"fake gives attention that is not a number in turn 1 of .*'sick'"):
        score_conversations(model, [talk("sick", "poison", "y")])


def test_scores_of_a_real_model_agree_with_its_full_pattern(toy_tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctxlens.models import Model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(toy_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    model = Model.from_hf(LlamaForCausalLM(config), toy_tokenizer, name="tiny")
    data = [
        talk("a", "What is two plus two?", "It is four."),
        talk("b", "Hello", "fine", "Be brief", "I am."),
    ]
    scores = score_conversations(model, data)
    for conversation in data:
        chat = model.render(conversation.messages)
        pattern = model.read_patterns(chat)
        for turn in chat.response_turns():
            user = pattern[:, :, chat.response_positions(turn)][..., chat.mask("user")].sum(-1)
            rows = scores.frame[
                (scores.frame["conversation"] == conversation.id) & (scores.frame["turn"] == turn)
            ]
            for name, value in reduce_user_shares(user.astype(float)).items():
                np.testing.assert_allclose(rows[name], value, atol=1e-5)


def table(values, layer=0):
    rows = [
        {
            "conversation": f"c{k}", "turn": 1, "layer": layer, "best_of_mean": value / 2,
            "mean_of_best": value, "mean_heads": 0.0, "uniform": 0.5, "response_tokens": 3,
            "context_tokens": 9, "truncated": False,
        }
        for k, value in enumerate(values)
    ]  # fmt: skip
    return Scores.from_rows(rows, {"model": {"name": "fake"}})


def test_selection_takes_scores_above_the_threshold():
    scores = table([0.1, 0.6, 0.61, 0.9])
    chosen = select_turns(scores, beta=0.6, layer=0)
    assert chosen.turns == {("c2", 1), ("c3", 1)}
    assert chosen.meta["threshold"] == 0.6
    assert (chosen.meta["turns"], chosen.meta["selected"]) == (4, 2)
    assert select_turns(scores, beta=1.0, layer=0).turns == frozenset()
    assert len(select_turns(scores, beta=0.0, layer=0).turns) == 4
    assert select_turns(scores, beta=0.4, layer=0, reduction="best_of_mean").turns == {("c3", 1)}


def test_the_valley_lies_below_the_highest_peak_however_many_peaks_there_are():
    peaks = {0.2: 300, 0.5: 100, 0.9: 60}
    scattered = np.random.default_rng(0)
    values = [v for at, n in peaks.items() for v in scattered.normal(at, 0.03, n).clip(0, 1)]
    chosen = select_turns(table(values), layer=0)
    assert 0.6 < chosen.meta["threshold"] < 0.8
    assert chosen.meta["selected"] == 60
    assert "valley" in chosen.meta["rule"]


def test_otsu_splits_the_scores_into_two_groups_and_says_so():
    chosen = select_turns(table([0.1, 0.8, 0.12, 0.4, 0.85, 0.42]), beta="otsu", layer=0)
    assert chosen.meta["threshold"] == pytest.approx(0.61)
    assert "two groups" in chosen.meta["rule"]


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan, "high"])
def test_threshold_outside_its_range_is_refused(beta):
    with pytest.raises(InputError, match='β must be a number from 0 to 1, or "valley" or "otsu"'):
        select_turns(table([0.5]), beta=beta, layer=0)


def test_selection_needs_a_scored_layer_reduction_and_share():
    with pytest.raises(InputError, match=r"layer 7 is not among the scored layers \(0\)"):
        select_turns(table([0.5]), layer=7)
    with pytest.raises(InputError, match="unknown reduction 'median'"):
        select_turns(table([0.5]), layer=0, reduction="median")
    with pytest.raises(InputError, match="top_share is a share"):
        select_turns(table([0.5]), layer=0, top_share=1.2)


def test_quality_against_known_truth_by_hand():
    chosen = select_turns(table([0.1, 0.7, 0.8, 0.9]), beta=0.5, layer=0)
    # Selected c1 c2 c3; true c2 c3 c0 and one turn that was never scored: 2 of 3, 2 of 3.
    quality = selection_quality(chosen, {("c2", 1), ("c3", 1), ("c0", 1), ("other", 1)})
    assert (quality.both, quality.selected, quality.true, quality.turns) == (2, 3, 3, 4)
    assert quality.precision == pytest.approx(2 / 3)
    assert quality.recall == pytest.approx(2 / 3)
    nothing = selection_quality(select_turns(table([0.1]), beta=0.5, layer=0), set())
    assert math.isnan(nothing.precision)
    assert math.isnan(nothing.recall)


def test_layer_rules():
    assert choose_layer(22, rule="middle") == 15
    assert choose_layer(4, rule="middle") == 3
    assert choose_layer(1, rule="middle") == 0
    assert choose_layer(4, needle_layer=1) == 1
    with pytest.raises(InputError, match="needs needle_layer from 0 to 3"):
        choose_layer(4)
    with pytest.raises(InputError, match='"needle" or "middle"'):
        choose_layer(4, rule="last")


def many(n=300):
    return [talk(f"c{k}", "Hello " * (1 + k % 9), "I am fine. " * (1 + k % 3)) for k in range(n)]


def test_finished_scores_are_read_back_and_other_data_is_refused(toy_tokenizer, tmp_path):
    run = Run.open(tmp_path / "run", study="score", config={})
    model = FakeModel(toy_tokenizer)
    first = score_conversations(model, many(20), out=run)
    calls = len(model.batches)
    again = score_conversations(model, many(20), out=run)
    assert len(model.batches) == calls
    assert again.frame.equals(first.frame)
    assert not run.path("score-shards").exists()
    with pytest.raises(RunExistsError, match="already holds scores of other conversations"):
        score_conversations(model, many(21), out=run)


def test_damaged_shard_is_named_and_scored_again(toy_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("ctxlens.dependency._merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    run = Run.open(tmp_path / "run", study="score", config={})
    with pytest.raises(KeyboardInterrupt):
        score_conversations(FakeModel(toy_tokenizer), many(), out=run)
    monkeypatch.undo()
    run.path("score-shards/000001.parquet").write_bytes(b"half")
    model = FakeModel(toy_tokenizer)
    with pytest.warns(UserWarning, match=r"damaged shard again: .*000001\.parquet"):
        scores = score_conversations(model, many(), out=run)
    assert sum(map(len, model.batches)) == 128  # that shard alone
    assert scores.frame.equals(score_conversations(FakeModel(toy_tokenizer), many()).frame)
    with pytest.raises(RunExistsError, match="other conversations"):
        score_conversations(model, many(5), out=run)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import ctxlens.dependency as dependency
from conftest import build_toy_tokenizer
from test_dependency import FakeModel, many
from ctxlens.runs import Run
dependency.SHARD_CONVERSATIONS = 20
run = Run.open({folder!r}, study="score", config={{}})
print("ready", flush=True)
model = FakeModel(build_toy_tokenizer(), pause={pause})
dependency.score_conversations(model, many(120), out=run, batch_tokens=400)
print(sum(map(len, model.batches)), flush=True)
"""


def test_killed_scoring_goes_on_and_ends_with_the_same_file(tmp_path):
    def start(folder, pause):
        code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), pause=pause)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    killed = start(tmp_path / "killed", 0.1)
    shard = tmp_path / "killed" / "score-shards" / "000001.parquet"
    deadline = time.monotonic() + 120
    while not shard.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert shard.exists()
    assert not (tmp_path / "killed" / "scores.parquet").exists()
    finished = len(list(shard.parent.glob("[0-9]*.parquet")))
    runs = [start(tmp_path / "killed", 0.0), start(tmp_path / "whole", 0.0)]
    scored = [int(run.communicate()[0].split()[-1]) for run in runs]
    assert scored == [120 - 20 * finished, 120]
    files = [(tmp_path / name / "scores.parquet").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]


def test_known_kinds_stand_beside_scores_and_selection(toy_tokenizer):
    data = [talk("a", "Hello", "fine"), talk("b", "Hello", "fine")]
    scores = score_conversations(FakeModel(toy_tokenizer), data, kinds={("a", 1): "document"})
    assert list(scores.layer(0).index) == [("a", 1), ("b", 1)]
    chosen = select_turns(scores, beta=0.0, layer=0)
    assert list(chosen.frame["kind"]) == ["document", ""]
