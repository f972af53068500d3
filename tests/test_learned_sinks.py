"""Learned sinks of gpt-oss, a score per head without a key: hand-computed shares in every view."""

import math

import numpy as np
import pytest
import torch
from tiny_models import make_chat, make_tiny, make_tokenizer

from ctxlens.chat.roles import Role
from ctxlens.models import Model
from ctxlens.models.attention.sinks import LATER

SCORES = (0.0, math.log(3), math.log(7), -20.0)
"""The learned sink of every head of layer 0."""

LENGTH = 24


def even_gpt_oss():
    """A gpt-oss whose layer 0 gives every key the score 0, so that shares follow from counts alone."""
    model = make_tiny("gpt-oss", layer_types=["full_attention"] * 3)
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.sinks.copy_(torch.tensor(SCORES))
    return model


@pytest.mark.parametrize("backend", ["native", "lens"])
def test_learned_sinks_count_as_sink_in_every_view(backend):
    """With n keys and a sink of score s, the sink gets e^s / (n + e^s) and every key 1 / (n + e^s)."""
    chat = make_chat(LENGTH, 5)
    model = Model.from_hf(even_gpt_oss(), make_tokenizer(), backend=backend)
    allocation = model.read_roles(chat, layers=[0], queries=[3, LENGTH - 1])
    for query, position in enumerate((3, LENGTH - 1)):
        n = position + 1
        counts = {role: int((chat.role[:n] == role).sum()) for role in Role}
        # The first token receives 1 / (n + e^s) from each later one, mean over positions and heads.
        received = np.mean([1 / (k + math.exp(s)) for k in range(2, LENGTH + 1) for s in SCORES])
        is_sink = received >= 0.05 and LENGTH - 1 >= LATER
        assert is_sink
        for head, score in enumerate(SCORES):
            total = n + math.exp(score)
            learned, first = math.exp(score) / total, 1 / total
            raw = allocation.shares[0, head, query]
            assert raw[Role.SINK] == pytest.approx(learned, abs=1e-5)
            assert raw[Role.USER] == pytest.approx(counts[Role.USER] / total, abs=1e-5)
            assert allocation.resting[0, head, query, Role.BOS] == pytest.approx(first, abs=1e-5)
            assert allocation.resting[0, head, query, Role.SINK] == 0
            apart = allocation.with_sinks_apart().shares[0, head, query]
            assert apart[Role.SINK] == pytest.approx(learned + first, abs=1e-5)
            assert apart.sum() == pytest.approx(1, abs=1e-5)
            paper = allocation.share("user", view="renormalised")[0, head, query]
            left = n - counts[Role.TEMPLATE]
            assert paper == pytest.approx(counts[Role.USER] / left, abs=1e-4)
            without = allocation.share("user", view="without sinks")[0, head, query]
            assert without == pytest.approx(counts[Role.USER] / (n - 1), abs=1e-4)
            for view in ("renormalised", "without sinks", "renormalised without sinks"):
                assert allocation.share("sink", view=view)[0, head, query] == 0


def test_a_head_that_rests_on_its_learned_sink_has_nothing_left():
    model = even_gpt_oss()
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(20.0)
    allocation = Model.from_hf(model, make_tokenizer()).read_roles(
        make_chat(LENGTH, 5), layers=[0], queries=[9]
    )
    assert allocation.shares[..., Role.SINK].min() > 0.999
    assert np.isnan(allocation.share("user", view="without sinks")).all()
    assert allocation.with_sinks_apart().share("sink").min() > 0.999
