"""The log-probability gap: by hand on a model that only copies, and against one plain pass a turn."""

import numpy as np
import pytest
import torch
from tiny_models import make_tiny, make_tokenizer

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import Role, render
from ctxlens.errors import InputError
from ctxlens.models import Model
from ctxlens.results import Scores
from ctxlens.scoring.lp_gap import COLUMNS, add_lp_gap, without_user


def talk(name, *contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(contents)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return Conversation(name, (*first, *messages), "test", {})


def scored(*turns, layers=(0, 1), **meta):
    rows = [
        {
            "conversation": name, "turn": turn, "layer": layer, "best_of_mean": 0.2, "mean_of_best": 0.3,
            "mean_heads": 0.1, "uniform": 0.1, "response_tokens": 5, "context_tokens": 9, "truncated": False,
        }
        for name, turn in turns
        for layer in layers
    ]  # fmt: skip
    return Scores.from_rows(rows, meta)


class Copier:
    """A token that occurred before has log-probability -1, any other -3."""

    name = "copier"
    n_ctx = 60

    def __init__(self, spoil=None):
        self.tokenizer, self.calls, self.spoil = make_tokenizer(), [], spoil

    def render(self, messages, **options):
        return render(self.tokenizer, messages, **options)

    def logprobs(self, chats, *, turn=None, batch_tokens=8192):
        self.calls.append(len(chats))
        positions = [chat.response_positions(turn) for chat in chats]
        if self.spoil is not None:
            return [np.full(len(at), self.spoil) for at in positions]
        return [
            np.array([-1.0 if chat.tokens[k] in chat.tokens[:k] else -3.0 for k in at])
            for chat, at in zip(chats, positions, strict=True)
        ]


def test_gap_by_hand():
    # Turn 1 of a: w5 is copied from the user, -1 or -3; w7 is new, -3 both ways. Turn 3: w6 stands in the
    # user's first message, -1 or -3; w7 in the first answer, which stays, -1. In b, the system said w9.
    model = Copier()
    data = [
        talk("a", "w5 w6", "w5 w7", "w8", "w6 w7"),
        talk("b", "w5", "w9", system="w9"),
        talk("c", "w5", "w6"),
    ]
    frame = add_lp_gap(model, data, scored(("a", 1), ("a", 3), ("b", 2), ("gone", 1))).frame
    by_hand = np.array([[-2, -3, 1], [-1, -2, 1], [-1, -1, 0], [np.nan] * 3])
    for layer in (0, 1):
        np.testing.assert_array_equal(frame.loc[frame["layer"] == layer, list(COLUMNS)], by_hand)
    assert model.calls == [2, 2], "two passes, and only over what was scored"


def test_other_columns_stay_and_the_file_keeps_the_gap(tmp_path):
    scores = scored(("a", 1), max_tokens=30)
    seen = []
    added = add_lp_gap(
        Copier(), [talk("a", "w5", "w5")], scores, progress=lambda done, total: seen.append((done, total))
    )
    assert added.frame[list(scores.frame)].equals(scores.frame)
    assert added.meta["max_tokens"] == 30
    assert added.meta["lp_gap"] == {"model": "copier", "unit": "nats"}
    assert seen == [(1, 1)]
    added.save(tmp_path / "scores.parquet")
    assert Scores.load(tmp_path / "scores.parquet").frame["lp_gap"].tolist() == [2, 2]


def test_long_conversations_are_cut_as_they_were_for_the_scores():
    data = [talk("a", "w5 " + "w6 " * 40, "w5")]
    whole = add_lp_gap(Copier(), data, scored(("a", 1)))
    cut = add_lp_gap(Copier(), data, scored(("a", 1), max_tokens=20))
    assert (whole.frame["lp_gap"][0], cut.frame["lp_gap"][0]) == (2, 0)


def test_what_is_taken_away_is_what_the_user_said():
    chat = render(make_tokenizer(), talk("a", "w5 w6", "w7", "w8", "w9", system="w9").messages)
    bare = without_user(chat)
    assert bare.tokens.tolist() == [t for t, r in zip(chat.tokens, chat.role, strict=True) if r != Role.USER]
    assert not bare.mask(Role.USER).any()
    assert bare.mask(Role.TEMPLATE).sum() == chat.mask(Role.TEMPLATE).sum()


def test_nothing_before_the_answer_is_no_number():
    model = Copier()
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    frame = add_lp_gap(
        model, [talk("a", "w5", "w5"), talk("b", "w5", "w6")], scored(("a", 1), ("b", 1))
    ).frame
    assert frame["logprob"].tolist() == [-1, -1, -3, -3]
    assert frame["lp_gap"].isna().all()


def test_logprobs_that_are_no_numbers_name_the_turn():
    for value in (np.nan, -np.inf):
        with pytest.raises(InputError, match="copier gives log-probabilities that are not numbers in turn 1"):
            add_lp_gap(Copier(spoil=value), [talk("a", "w5", "w5")], scored(("a", 1)))


@pytest.mark.parametrize("backend", ["native", "lens"])
def test_all_turns_in_two_passes_equal_one_plain_pass_a_turn(backend):
    hf_model = make_tiny("llama")
    model = Model.from_hf(hf_model, make_tokenizer(), backend=backend, name="tiny")
    data = [
        talk("a", "w5 w6 w7", "w8 w9", "w10", "w11 w12 w13", "w14 w15", "w16"),
        talk("b", "w20", "w21 w22", system="w23"),
    ]
    turns = [("a", 1), ("a", 3), ("a", 5), ("b", 2)]
    frame = add_lp_gap(model, data, scored(*turns, layers=(0,)), batch_tokens=40).frame
    plain = make_tiny("llama")
    for row, (name, turn) in enumerate(turns):
        conversation = next(one for one in data if one.id == name)
        chat = model.render(conversation.messages[: turn + 1])
        answer = chat.response_positions(turn)
        for column, keep in (
            ("logprob", np.ones(chat.n_tokens, dtype=bool)),
            ("logprob_without_user", chat.role != Role.USER),
        ):
            at = np.flatnonzero(np.isin(np.flatnonzero(keep), answer))
            tokens = torch.from_numpy(chat.tokens[keep])
            with torch.no_grad():
                logprobs = plain(tokens[None]).logits[0].log_softmax(-1)
            expected = logprobs[at - 1].gather(1, tokens[at][:, None]).mean()
            assert frame[column][row] == pytest.approx(float(expected), abs=1e-5)
        first, second, gap = (frame[column][row] for column in COLUMNS)
        assert gap == pytest.approx(first - second)
