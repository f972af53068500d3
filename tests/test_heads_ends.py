"""Interventions at the end of a conversation: against whole passes that change only these positions."""

import numpy as np
import pytest
from tiny_models import make_chat, make_tiny, make_tokenizer

from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.heads import Answers, act_after_the_text
from ctxlens.heads.ablation import Ablation
from ctxlens.heads.ends import first_after_text
from ctxlens.models import Model, load_model
from ctxlens.models.continued import ContinuedChat
from ctxlens.runs import Run

FAMILIES = ("llama-mqa", "gpt2", "gpt-neox", "gemma")
CHAT = make_chat(18, 1, prompt=12)
START = 7


def wrap(family, backend="native"):
    return Model.from_hf(make_tiny(family), make_tokenizer(), backend=backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_intervention_the_end_is_read_as_in_a_whole_pass(family):
    model = wrap(family)
    end = ContinuedChat(model, CHAT, START)
    for _ in range(2):  # the second reading writes over the cache of the first
        got = end.logprobs(CHAT.response_positions())
        np.testing.assert_allclose(got, model.logprobs([CHAT])[0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_switched_off_at_the_end_only(family):
    model = wrap(family)
    end = ContinuedChat(model, CHAT, START)
    positions = CHAT.response_positions()
    with Ablation(model).apply([(1, 2)], "zero"):
        got = end.logprobs(positions)

    def hide(z):
        z = z.clone()
        z[:, START:, 2] = 0
        return z

    with model.backend.edit_heads({1: hide}):
        want = model.logprobs([CHAT])[0]
    with Ablation(model).apply([(1, 2)], "zero"):
        everywhere = model.logprobs([CHAT])[0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - everywhere).max() > 1e-3
    np.testing.assert_allclose(end.logprobs(positions), model.logprobs([CHAT])[0], atol=1e-4)


def test_steering_from_the_first_token_is_steering_everywhere():
    model = wrap("llama-mqa")
    end = ContinuedChat(model, CHAT, 0)
    later = ContinuedChat(model, CHAT, START)
    with model.steer(0.05, heads=[(0, 1), (2, 3)]):
        want = model.logprobs([CHAT])[0]
        np.testing.assert_allclose(end.logprobs(CHAT.response_positions()), want, atol=1e-4)
        assert np.abs(later.logprobs(CHAT.response_positions()) - want).max() > 1e-4


def test_what_cannot_be_read_again_is_refused():
    model = wrap("llama-mqa")
    with pytest.raises(InputError, match="18 tokens, so its end cannot begin at 18"):
        ContinuedChat(model, CHAT, 18)
    with pytest.raises(InputError, match="only tokens after position 7"):
        ContinuedChat(model, CHAT, START).logprobs(np.array([7, 9]))
    with model.steer(0.5), pytest.raises(InputError, match="without steering"):
        ContinuedChat(model, CHAT, START)
    with pytest.raises(UnsupportedModelError, match="lens backend cannot continue"):
        ContinuedChat(wrap("llama-mqa", "lens"), CHAT, START)


def test_a_map_of_all_heads_after_the_text(tmp_path):
    model = load_model("organism-chat", backend="native")
    config = NeedleConfig(lengths=(60,), depths=(20, 80), needles=("known",), max_new_tokens=16,
                          conditions=("template+prefix",))  # fmt: skip
    answers = Answers(build_cells(model, config, load_haystack("organism"))[:2], config)
    run = Run.open(tmp_path, study="ends", config={})
    maps = act_after_the_text(model, answers, ["steer", "zero"], alpha=0.2, out=run)
    chats, cell = answers.said(model), answers.cells[1]
    assert maps["zero"].effects.shape == (2, model.n_layers, model.n_heads)
    assert maps["zero"].meta["untouched"] == pytest.approx(answers.scorer(model)().mean(), abs=1e-4)
    start = first_after_text(chats[1], cell)
    assert chats[1].text[: chats[1].spans[start, 0]].rstrip().endswith(cell.context.text.rstrip())
    end = ContinuedChat(model, chats[1], start)
    at = answers.positions(chats[1], cell)
    with model.steer(0.2, heads=[(1, 3)]):
        steered = end.logprobs(at).mean()
    assert maps["steer"].effects[1, 1, 3] == pytest.approx(steered - end.logprobs(at).mean(), abs=1e-5)
    kept = act_after_the_text(model, answers, ["steer", "zero"], alpha=0.2, out=run)
    np.testing.assert_array_equal(kept["zero"].effects, maps["zero"].effects)
