"""Head maps, curves and drift as results, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.errors import InputError
from ctxlens.results import VIEWS, Drift, HeadCurves, HeadMap, correlate_maps, load_result
from ctxlens.stats import bootstrap_mean


def head_map(effects, contexts=None, kind="zero"):
    effects = np.asarray(effects, dtype=float)
    contexts = np.arange(len(effects)) if contexts is None else np.asarray(contexts)
    return HeadMap(effects, contexts, kind, {"model": "m", "quantity": "nats"})


def test_values_leave_out_missing_cells_and_rank():
    found = head_map([[[1.0, -2.0], [np.nan, 0.0]], [[3.0, -4.0], [5.0, 0.0]]])
    np.testing.assert_array_equal(found.values, [[2.0, -3.0], [5.0, 0.0]])
    assert found.ranking() == ((1, 0), (0, 0), (1, 1), (0, 1))
    assert found.ranking(ascending=True)[0] == (0, 1)
    nothing = head_map([[[np.nan, 1.0]]])
    assert nothing.ranking() == ((0, 1), (0, 0))
    assert nothing.ranking(ascending=True) == ((0, 1), (0, 0))


def test_interval_is_the_bootstrap_over_contexts():
    rng = np.random.default_rng(0)
    contexts = np.repeat(np.arange(8), 5)
    effects = rng.normal(size=(40, 2, 2)) + rng.normal(size=8)[contexts][:, None, None]
    low, high = head_map(effects, contexts).interval()
    for layer, head in np.ndindex(2, 2):
        other = bootstrap_mean(effects[:, layer, head], clusters=contexts)
        assert (low[layer, head], high[layer, head]) == pytest.approx((other.low, other.high), abs=0.06)
    assert np.isnan(head_map(effects, np.zeros(40, dtype=int)).interval()).all()


def test_decided_where_zero_is_left_out():
    found = head_map([[[1.0, 1.0]], [[1.2, -1.0]], [[0.8, 0.5]], [[1.1, -0.5]]])
    assert found.decided().tolist() == [[True, False]]


def test_correlation_of_maps_by_hand():
    first = head_map([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    second = head_map([[[1.0, 4.0, 9.0]], [[1.0, 4.0, 9.0]]])
    assert correlate_maps(first, second, rank=True).estimate == pytest.approx(1)
    by_hand = np.corrcoef([1, 2, 3], [1, 4, 9])[0, 1]
    found = correlate_maps(first, second)
    assert found.estimate == pytest.approx(by_hand)
    assert (found.low, found.high, found.n) == pytest.approx((by_hand, by_hand, 2))
    with pytest.raises(InputError, match="same cells and heads"):
        correlate_maps(first, head_map([[[1.0, 2.0]], [[1.0, 2.0]]]))


def curves(rows):
    keys = ("ranking", "k", "draw", "cell", "context", "effect")
    return HeadCurves.from_rows([dict(zip(keys, row, strict=True)) for row in rows])


def test_curves_by_hand():
    found = curves(
        [("copying", 1, 0, 0, 0, 1.0), ("copying", 1, 0, 1, 1, 3.0)]
        + [("random", 1, draw, cell, cell, value) for draw, cell, value in
           ((0, 0, 0.0), (0, 1, 1.0), (1, 0, 0.5), (1, 1, 1.5))]
    )  # fmt: skip
    ((k, own),) = found.points("copying")
    assert (k, own.estimate, own.n) == (1, 2.0, 2)
    ((_, control),) = found.points("random")
    assert (control.estimate, control.n) == (0.75, 2)  # draws' means 0.5 and 1.0
    against = found.against_random("copying", 1)  # cells: 1 - 0.25 and 3 - 1.25
    assert (against.estimate, against.low, against.high) == pytest.approx((1.25, 0.75, 1.75))
    with pytest.raises(InputError, match=r"no copying and random curve at 2 heads; sizes are \[1\]"):
        found.against_random("copying", 2)


def drift(shares, counts, **meta):
    """Two sides, one layer, two heads, two conversations; shares of bos, user, template."""
    full = np.zeros((2, 1, 2, 2, N_ROLES), dtype=np.float32)
    full[..., [Role.BOS, Role.USER, Role.TEMPLATE]] = shares
    key_counts = np.zeros((2, 2, N_ROLES), dtype=np.float32)
    key_counts[..., [Role.BOS, Role.USER, Role.TEMPLATE]] = counts
    meta = {"sides": ["plain", "template"], **meta}
    return Drift(full, key_counts, np.array([0, 1]), (0,), np.array([1]), "first_answer", meta)


@pytest.fixture
def moved():
    plain = [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], [[0.2, 0.8, 0.0], [0.2, 0.8, 0.0]]]
    template = [[[0.5, 0.3, 0.2], [0.5, 0.1, 0.4]], [[0.0, 0.6, 0.4], [0.0, 0.8, 0.2]]]
    return drift([[plain], [template]], [[[1, 9, 0]] * 2, [[1, 9, 10]] * 2])


def test_drift_by_hand_in_every_view(moved):
    raw = moved.difference("user")
    np.testing.assert_allclose(raw.effects, [[[-0.2, -0.2]], [[-0.4, 0.0]]], atol=1e-6)
    renormalised = moved.share("user", "renormalised")
    np.testing.assert_allclose(renormalised[1, 0], [[3 / 8, 1 / 6], [1, 1]], atol=1e-6)
    np.testing.assert_allclose(moved.uniform("user"), [[0.9, 0.9], [0.45, 0.45]])
    np.testing.assert_allclose(moved.uniform("user", "renormalised"), 0.9)
    # Token counts alone explain a fall of 0.45, more than there is.
    np.testing.assert_allclose(moved.excess("user").effects, raw.effects + 0.45, atol=1e-6)


def test_drift_takes_out_what_was_measured_to_rest_on_sinks(moved, tmp_path):
    resting = np.zeros_like(moved.shares)
    resting[1, ..., Role.USER] = moved.shares[1, ..., Role.USER] / 2
    resting[0, ..., Role.BOS] = moved.shares[0, ..., Role.BOS]
    measured = replace(moved, resting=resting)
    # Side 1: of BOS .5, user .3, template .2 half of the user's share rests: .15 of .85 and of .65.
    assert measured.share("user", "without sinks")[1, 0, 0, 0] == pytest.approx(0.15 / 0.85)
    assert measured.share("user", "renormalised without sinks")[1, 0, 0, 0] == pytest.approx(0.15 / 0.65)
    assert measured.share("bos", "without sinks")[0, 0, 0, 0] == 0
    np.testing.assert_allclose(measured.share("user", "without sinks")[0], 1)
    np.testing.assert_allclose(measured.share("user"), moved.share("user"))
    assert Role.BOS not in measured.left_out("without sinks")
    with pytest.raises(InputError, match="leaves out sink"):
        measured.share("sink", "without sinks")
    assert measured.views == tuple(VIEWS)
    assert moved.views == ("raw", "renormalised")
    for view in ("without sinks", "renormalised without sinks"):
        with pytest.raises(InputError, match=r"not available, because attention sinks were not measured"):
            moved.share("user", view)
    measured.save(tmp_path / "drift.safetensors")
    np.testing.assert_array_equal(Drift.load(tmp_path / "drift.safetensors").resting, resting)
    moved.save(tmp_path / "old.safetensors")
    assert Drift.load(tmp_path / "old.safetensors").resting is None


def test_drift_by_layer_follows_one_head(moved):
    ((first, second, change),) = moved.by_layer("user")
    assert (first.estimate, second.estimate) == pytest.approx((0.65, 0.45))
    assert change.estimate == pytest.approx(-0.2)
    ((first, second, change),) = moved.by_layer("user", heads="retrieval")
    assert (first.estimate, second.estimate, change.estimate) == pytest.approx((0.8, 0.7, -0.1))
    assert moved.shown_roles() == ["bos", "user", "template"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda one: one.share("user", "rosy"), "unknown view 'rosy'; choose from raw, renormalised"),
        (lambda one: one.share("template", "renormalised"), "leaves out template"),
        (lambda one: one.by_layer("user", heads="best"), "choose from mean, retrieval"),
    ],
)
def test_drift_refuses_what_it_cannot_show(moved, call, words):
    with pytest.raises(InputError, match=words):
        call(moved)


def test_results_survive_their_files(moved, tmp_path):
    found = head_map([[[1.0, np.nan]]])
    table = curves([("copying", 1, 0, 0, 0, 1.0)])
    for name, one in (("map.safetensors", found), ("drift.safetensors", moved), ("c.parquet", table)):
        one.save(tmp_path / name)
    back = load_result(tmp_path / "map.safetensors")
    assert isinstance(back, HeadMap)
    np.testing.assert_array_equal(back.effects, found.effects)
    assert (back.kind, back.meta) == (found.kind, found.meta)
    again = load_result(tmp_path / "drift.safetensors")
    assert isinstance(again, Drift)
    np.testing.assert_array_equal(again.shares, moved.shares)
    assert (again.layers, again.sides, again.queries) == (moved.layers, moved.sides, moved.queries)
    assert isinstance(load_result(tmp_path / "c.parquet"), HeadCurves)
