"""Copying heads, ablation and steering maps, gradients, curves: by hand, and against one another."""

import math

import numpy as np
import pytest
from tiny_models import make_chat, make_tiny, make_tokenizer

from ctxlens.errors import InputError
from ctxlens.evals.needle import Needle
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.heads import (
    Answers,
    act_on_each_head,
    answer_nats,
    copying_map,
    cumulative_curves,
    estimate_steering,
    gradient_map,
    rank_heads,
    side_effects,
    steering_sweep,
    user_share_map,
)
from ctxlens.heads.ablation import Ablation
from ctxlens.heads.copying import score_copying
from ctxlens.heads.gradient import bias_gradient
from ctxlens.models import Model, load_model
from ctxlens.organism.world import load_world
from ctxlens.runs import Run

CONFIG = NeedleConfig(
    lengths=(60, 90), depths=(20, 80), needles=("known",), conditions=("template+prefix",), max_new_tokens=16
)


@pytest.fixture(scope="module")
def model():
    return load_model("organism-chat", backend="native")


@pytest.fixture(scope="module")
def answers(model):
    return Answers(build_cells(model, CONFIG, load_haystack("organism")), CONFIG)


class PatternModel(Model):
    """A model of one layer and two heads whose patterns are given."""

    n_layers, n_heads = 1, 2

    def __init__(self, pattern):
        self.pattern = pattern

    def read_patterns(self, chat, *, layers=None, queries=None, turn=None):
        return self.pattern[:, :, list(queries)]


def test_copying_score_by_hand():
    chat = make_chat(8, 0, prompt=5)
    chat.tokens[:] = [1, 10, 11, 12, 10, 10, 11, 13]
    needle = np.array([0, 1, 1, 0, 0, 0, 0, 0], dtype=bool)  # tokens 10 and 11
    pattern = np.zeros((1, 2, 8, 8), dtype=np.float32)
    # Position 4 says token 10, position 5 token 11, position 6 token 13, which is none of the needle's.
    pattern[0, 0, 4, 1] = pattern[0, 0, 5, 2] = 1  # head 0 copies both
    pattern[0, 1, 4, 4] = 1  # head 1 looks at a 10 outside the needle
    pattern[0, 1, 5, [1, 2]] = 0.6, 0.4  # and in the needle, but most at another token
    model = PatternModel(pattern)
    assert score_copying(model, chat, needle, np.array([5, 6, 7]), 2).tolist() == [[1.0, 0.0]]
    assert score_copying(model, chat, needle, np.array([5, 6, 7]), 4).tolist() == [[0.5, 0.0]]
    assert score_copying(model, chat, needle, np.array([7]), 2).tolist() == [[0.0, 0.0]]
    assert np.isnan(score_copying(model, chat, needle, np.array([5]), 0)).all()


def test_copying_heads_of_the_organism_read_the_user(model, answers):
    copying = copying_map(model, answers)
    assert copying.effects.shape == (4, model.n_layers, model.n_heads)
    layer, head = copying.ranking()[0]
    assert copying.values[layer, head] > 0.5
    assert user_share_map(model, answers).values[layer].max() > 0.5
    own = copying_map(model, answers, own=True)
    assert own.values.max() <= 1
    assert (own.values <= copying.values + 0.5).all()


@pytest.mark.parametrize("backend", ["native", "lens"])
@pytest.mark.parametrize("family", ["llama-mqa", "gpt2"])
def test_gradient_is_the_limit_of_steering(family, backend):
    model = Model.from_hf(
        make_tiny(family, scale={"gpt2": 12.0}.get(family, 4.0)), make_tokenizer(), backend=backend
    )
    chat = make_chat(18, 1, prompt=12)
    positions = np.arange(12, 18)
    gradient = bias_gradient(model, chat, positions)

    def mean(weight, head):
        with model.steer(math.exp(-weight), heads=[head]):
            return float(model.logprobs([chat])[0].mean())

    start, step = float(model.logprobs([chat])[0].mean()), 0.05
    for head in ((0, 0), (1, 3), (2, 2)):  # one-sided, of second order
        slope = (4 * mean(step, head) - mean(2 * step, head) - 3 * start) / (2 * step)
        assert gradient[head] == pytest.approx(slope, abs=1e-4, rel=0.05)
    assert np.abs(gradient).max() > 0.004


def test_both_backends_give_the_same_gradient():
    chat = make_chat(16, 2, prompt=10)
    found = [
        bias_gradient(
            Model.from_hf(make_tiny("llama-mqa"), make_tokenizer(), backend=b), chat, np.arange(10, 16)
        )
        for b in ("native", "lens")
    ]
    np.testing.assert_allclose(*found, atol=2e-4)


def test_gradient_estimates_weak_steering_of_single_heads(model, answers):
    found = gradient_map(model, answers)
    alpha = 0.95
    truth = act_on_each_head(model, answers, "steer", alpha=alpha)
    np.testing.assert_allclose(estimate_steering(found, alpha).effects, truth.effects, atol=1e-3, rtol=0.2)
    with pytest.raises(InputError, match=r"alpha must be in \(0, 1\]"):
        estimate_steering(found, 2.0)


def test_maps_are_paired_differences(model, answers):
    measure = answers.scorer(model)
    before = measure()
    with Ablation(model).apply([(1, 2)], "zero"):
        after = measure()
    found = act_on_each_head(model, answers, "zero", heads=[(1, 2)])
    np.testing.assert_allclose(found.effects[:, 1, 2], after - before)
    assert np.isnan(found.effects).sum() == 4 * 15
    assert found.meta["untouched"] == pytest.approx(before.mean())
    with pytest.raises(InputError, match="only a map of all heads"):
        rank_heads(found)


def test_log_probability_counts_the_words_after_the_prefix(model, answers):
    cell = answers.cells[0]
    chat = answers.said(model)[0]
    words = "".join(chat.text[a:b] for a, b in chat.spans[answers.positions(chat, cell)])
    assert (cell.needle.prefix + words).split() == cell.needle.sentence.split()
    by_token = model.logprobs([chat])[0]
    counted = len(answers.positions(chat, cell))
    assert answers.scorer(model)()[0] == pytest.approx(by_token[-counted:].mean(), abs=1e-5)


def test_recall_can_be_measured_instead(model, answers):
    recall = Answers(answers.cells, CONFIG, measure="recall")
    responses = recall.generate(model)
    by_hand = [
        sum(word in text.lower() for word in cell.needle.keywords) / len(cell.needle.keywords)
        for cell, text in zip(answers.cells, responses, strict=True)
    ]
    assert recall.scorer(model)().tolist() == pytest.approx(by_hand)


def test_halves_share_no_context(answers):
    first, second = answers.split()
    assert {c.context_tokens for c in first.cells}.isdisjoint(c.context_tokens for c in second.cells)
    assert len(first.cells) + len(second.cells) == len(answers.cells)
    with pytest.raises(InputError, match="all cells share one text"):
        first.split()


def test_curves_meet_where_all_heads_are_taken(model, answers):
    orders = {"rising": [(a, b) for a in range(4) for b in range(4)]}
    orders["falling"] = orders["rising"][::-1]
    found = cumulative_curves(model, answers, orders, "blind", sizes=(2, 16), n_draws=2)
    ends = [found.points(name)[-1][1].estimate for name in ("rising", "falling", "random")]
    assert ends == pytest.approx([ends[0]] * 3)
    with Ablation(model).apply([(0, 0), (0, 1)], "blind"):
        after = answers.scorer(model)()
    rows = found.where(ranking="rising", k=2).frame
    np.testing.assert_allclose(rows["effect"], after - answers.scorer(model)(), atol=1e-6)
    assert set(found.where(ranking="random").frame["draw"]) == {0, 1}


def test_a_stopped_map_goes_on_where_it_was(model, answers, tmp_path, monkeypatch):
    run = Run.open(tmp_path / "run", study="heads", config={})
    calls = []
    true = Model.logprobs

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(self, *args, **kwargs)

    monkeypatch.setattr(Model, "logprobs", counted)
    heads = [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(KeyboardInterrupt):
        act_on_each_head(model, answers, "zero", heads=heads, out=run)
    found = act_on_each_head(model, answers, "zero", heads=heads, out=run)
    assert len(calls) == 3 + 2  # untouched and the first head were kept
    monkeypatch.undo()
    whole = act_on_each_head(model, answers, "zero", heads=heads)
    np.testing.assert_array_equal(found.effects, whole.effects)


def test_side_effects_follow_the_sweep(model, answers):
    grid = steering_sweep(
        model, answers.cells[:2], CONFIG, alphas=(0.03,), head_sets=("all", "random"), n_draws=1
    )
    questions = load_world().closed_book(4, seed=1)
    table = side_effects(model, grid, questions, max_new_tokens=16)
    assert set(zip(table.frame["alpha"], table.frame["heads"], strict=True)) == {
        (1.0, "none"), (0.03, "all"), (0.03, "random"),
    }  # fmt: skip
    untouched = table.where(alpha=1.0).frame["nats_per_token"]
    np.testing.assert_allclose(untouched, answer_nats(model, questions), atol=1e-6)
    with model.steer(0.03):
        np.testing.assert_allclose(
            table.where(heads="all").frame["nats_per_token"], answer_nats(model, questions), atol=1e-6
        )
    assert table.where(heads="all").frame["nats_per_token"].mean() > untouched.mean()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m, a: act_on_each_head(m, a, "kill"),
            "unknown ablation 'kill'; choose from zero, mean, blind",
        ),
        (lambda m, a: act_on_each_head(m, a, "steer", alpha=0.0), r"alpha must be in \(0, 1\], got 0.0"),
        (lambda m, a: act_on_each_head(m, a, "zero", heads=[(9, 0)]), "head 9.0 does not exist"),
        (lambda m, a: cumulative_curves(m, a, {}), "give at least one ranking"),
        (lambda m, a: cumulative_curves(m, a, {"x": [(0, 0)]}), "has 1 heads, too few for 16"),
        (lambda m, a: cumulative_curves(m, a, {"x": [(0, 7)]}, sizes=(1,)), "head 0.7 does not exist"),
        (lambda m, a: cumulative_curves(m, a, {"x": [(0, 0)]}, sizes=(17,)), "cannot act on 17 heads"),
        (lambda m, a: Answers([], CONFIG), "no needle cells were given"),
        (lambda m, a: Answers(a.cells, CONFIG, measure="luck"), "choose from logprob, recall"),
        (lambda m, a: Answers(a.cells, CONFIG, indicator=True).scorer(m), "has no indicator token"),
    ],
)
def test_bad_experiments_are_refused(model, answers, call, words):
    with pytest.raises(InputError, match=words):
        call(model, answers)


def test_a_needle_without_words_after_its_prefix_is_refused(model):
    needle = Needle("x", "The sky is green.", "What is the sky?", ("green",), prefix="The sky is")
    cells = build_cells(
        model, NeedleConfig(lengths=(60,), depths=(50,), needles=(needle,)), load_haystack("organism")
    )
    answers = Answers(cells, CONFIG)
    chat = answers.said(model, ["The sky is"])[0]
    with pytest.raises(InputError, match="no words after its prefix"):
        answers.positions(chat, cells[0], "The sky is")
