"""Every result goes to its file and back unchanged, and says what is wrong with other files."""

import json
from dataclasses import replace

import factories
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.results import (
    VIEWS,
    Ability,
    NeedleGrid,
    RoleAllocation,
    Scores,
    Selection,
    TokenView,
    Verdicts,
    load_result,
)

TABLES = {
    NeedleGrid: factories.needle_grid,
    Ability: factories.ability,
    Scores: factories.scores,
    Selection: lambda: factories.selection(factories.scores()),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_come_back_with_rows_and_meta(kind, tmp_path):
    table = TABLES[kind]()
    table = kind(table.frame, {**table.meta, "models": {"a": [1, 2]}, "text": "</script> α"})
    table.save(tmp_path / "t.parquet")
    for again in (kind.load(tmp_path / "t.parquet"), load_result(tmp_path / "t.parquet")):
        assert type(again) is kind
        pd.testing.assert_frame_equal(again.frame, table.frame)
        assert again.meta == table.meta


def test_an_empty_table_keeps_its_columns(tmp_path):
    NeedleGrid.from_rows([]).save(tmp_path / "t.parquet")
    again = NeedleGrid.load(tmp_path / "t.parquet")
    assert len(again) == 0
    assert set(NeedleGrid.COLUMNS) <= set(again.frame.columns)


def test_allocation_comes_back(tmp_path):
    one = factories.allocation("vanilla", "template")
    one.save(tmp_path / "a.safetensors")
    again = load_result(tmp_path / "a.safetensors")
    assert isinstance(again, RoleAllocation)
    np.testing.assert_array_equal(again.shares, one.shares)
    np.testing.assert_array_equal(again.key_counts, one.key_counts)
    assert (again.layers, again.query_labels, again.queries, again.meta) == (
        one.layers,
        one.query_labels,
        one.queries,
        one.meta,
    )


def test_token_view_comes_back_with_any_text(tmp_path):
    one = factories.token_view([("<s>", "bos"), ("</script>\n", "user"), ("猫 🙂", "user"), ("", "template")])
    one.save(tmp_path / "v.safetensors")
    again = TokenView.load(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(again.pattern, one.pattern)
    np.testing.assert_array_equal(again.token_roles, one.token_roles)
    assert again.tokens == one.tokens
    assert (again.layers, again.query_positions, again.meta) == (one.layers, one.query_positions, one.meta)


def test_verdicts_come_back(tmp_path):
    one = factories.verdicts()
    one.save(tmp_path / "v.json")
    assert Verdicts.load(tmp_path / "v.json") == one
    assert load_result(tmp_path / "v.json") == one


def test_missing_columns_are_named():
    with pytest.raises(InputError, match="recall missing among model, indicator, question, response"):
        Ability(pd.DataFrame({"model": [], "indicator": [], "question": [], "response": []}))


def test_a_file_of_another_type_is_refused(tmp_path):
    factories.ability().save(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="not a ctxlens result of type NeedleGrid, but one of type Ability"):
        NeedleGrid.load(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["x.parquet", "x.safetensors", "x.json"])
def test_files_that_are_no_results_are_refused(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(InputError, match="does not exist"):
        load_result(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"x\.\w+"):
        load_result(path)


def test_other_peoples_files_are_no_results(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "x.parquet")
    save_file({"w": np.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text(json.dumps(["type"]))
    for name in ("x.parquet", "x.safetensors", "x.json"):
        with pytest.raises(InputError, match="is not a ctxlens result"):
            load_result(tmp_path / name)


def allocation(shares, counts):
    """One layer, one head; shares and counts by role label, a row a query."""

    def by_role(rows):
        table = np.zeros((len(rows), len(Role)), dtype=np.float32)
        for row, values in zip(table, rows, strict=True):
            for role, value in values.items():
                row[Role.parse(role)] = value
        return table

    return RoleAllocation(
        by_role(shares)[None, None], by_role(counts), (0,), tuple("ab"[: len(shares)]), "first_answer"
    )


def test_renormalised_shares_by_hand():
    one = allocation(
        [{"user": 0.2, "assistant": 0.1, "bos": 0.1, "template": 0.6}, {"template": 1.0}],
        [{"user": 6, "assistant": 2, "bos": 1, "template": 3}] * 2,
    )
    assert one.share("user")[0, 0, 0] == pytest.approx(0.2)
    assert one.share("user", renormalised=True)[0, 0, 0] == pytest.approx(0.5)  # 0.2 of 0.4
    assert one.share(Role.TEMPLATE, renormalised=True)[0, 0, 0] == 0
    assert np.isnan(one.share("user", renormalised=True)[0, 0, 1])  # nothing is left
    assert one.uniform()[0, Role.USER] == pytest.approx(0.5)  # 6 of 12
    assert one.renormalised().uniform()[0, Role.USER] == pytest.approx(6 / 9)


def test_shares_without_sinks_by_hand(tmp_path):
    one = allocation(
        [{"user": 0.5, "bos": 0.1, "template": 0.3, "sink": 0.1}, {"user": 0.4, "template": 0.6}],
        [{"user": 6, "bos": 1, "template": 3}] * 2,
    )
    resting = np.zeros_like(one.shares)
    resting[0, 0, 0, [Role.USER, Role.TEMPLATE]] = 0.3, 0.2  # the user keeps 0.2, BOS 0.1, the template 0.1
    resting[0, 0, 1] = one.shares[0, 0, 1]  # every token is a sink
    measured = replace(one, resting=resting)
    without = measured.without_sinks()
    assert without.shares[0, 0, 0, [Role.USER, Role.BOS, Role.TEMPLATE]] == pytest.approx([0.5, 0.25, 0.25])
    assert without.shares[0, 0, 0, Role.SINK] == 0
    assert np.isnan(without.shares[0, 0, 1]).all()
    both = without.renormalised().shares[0, 0, 0, [Role.USER, Role.BOS]]
    assert both == pytest.approx([2 / 3, 1 / 3])
    assert measured.renormalised().without_sinks().shares[0, 0, 0, Role.USER] == pytest.approx(2 / 3)
    assert (measured.shares == one.shares).all()  # the raw shares stay
    views = {"raw": 0.5, "renormalised": 5 / 6, "without sinks": 0.5, "renormalised without sinks": 2 / 3}
    assert {view: measured.share("user", view=view)[0, 0, 0] for view in VIEWS} == pytest.approx(views)
    apart = measured.with_sinks_apart().shares[0, 0, 0, [Role.USER, Role.BOS, Role.TEMPLATE, Role.SINK]]
    assert apart == pytest.approx([0.2, 0.1, 0.1, 0.6])
    assert measured.with_sinks_apart().shares[0, 0, 1, Role.SINK] == pytest.approx(1)
    assert RoleAllocation.concat([measured, measured]).resting.shape[2] == 4
    assert RoleAllocation.concat([measured, one]).resting is None
    measured.save(tmp_path / "measured.safetensors")
    np.testing.assert_array_equal(RoleAllocation.load(tmp_path / "measured.safetensors").resting, resting)
    assert measured.to_frame().loc[2, "resting"] == pytest.approx(0.3)


def test_a_head_that_rests_on_the_users_first_token_is_no_retrieval_head():
    shares = np.zeros((1, 2, 1, 9), dtype=np.float32)
    shares[0, :, 0, Role.USER], shares[0, :, 0, Role.TEMPLATE] = (0.9, 0.4), (0.1, 0.6)
    one = RoleAllocation(shares, np.ones((1, 9), dtype=np.float32), (0,), ("a",), "first_answer")
    resting = np.zeros_like(shares)
    resting[0, 0, 0, Role.USER] = 0.8
    assert one.retrieval_heads().tolist() == [0]
    assert replace(one, resting=resting).retrieval_heads().tolist() == [1]


def test_files_without_sinks_say_that_they_were_not_measured(tmp_path):
    factories.allocation("base", "plain").save(tmp_path / "old.safetensors")
    loaded = RoleAllocation.load(tmp_path / "old.safetensors")
    assert loaded.resting is None
    assert "resting" not in loaded.to_frame()
    assert loaded.retrieval_heads().shape == (len(loaded.layers),)
    for view in ("without sinks", "renormalised without sinks"):
        with pytest.raises(InputError, match="sinks were not measured"):
            loaded.share("user", view=view)
    with pytest.raises(InputError, match="sinks were not measured"):
        loaded.with_sinks_apart()
    with pytest.raises(InputError, match="unknown view 'rosy'; choose from raw, renormalised"):
        loaded.in_view("rosy")
    with pytest.raises(InputError, match=r"because attention sinks were not measured.*read the model again"):
        loaded.without_sinks()


def test_retrieval_heads_are_those_with_most_user_attention():
    one = factories.allocation("base", "plain")
    expected = one.shares[..., Role.USER].mean(-1).argmax(-1)
    np.testing.assert_array_equal(one.retrieval_heads(), expected)


def test_allocation_as_table():
    one = factories.allocation("base", "plain", n_queries=2)
    frame = one.to_frame()
    row = frame[
        (frame.layer == 2) & (frame["head"] == 1) & (frame["query"] == "chat 1") & (frame.role == "bos")
    ]
    assert row["share"].item() == one.shares[2, 1, 1, Role.BOS]


def test_concat_joins_queries_and_refuses_other_shapes():
    one, two = factories.allocation("base", "plain", n_queries=2), factories.allocation("base", "plain")
    both = RoleAllocation.concat([one, two])
    assert both.shares.shape[2] == len(both.query_labels) == both.key_counts.shape[0] == 14
    other = RoleAllocation(two.shares[:2], two.key_counts, (0, 1), two.query_labels, two.queries)
    with pytest.raises(InputError, match="same layers"):
        RoleAllocation.concat([one, other])


def test_recall_is_averaged_by_cell_among_the_wanted_rows():
    rows = factories.needle_rows("base", "plain+prefix", False)[:2]
    rows = [{**rows[0], "recall": 0.5}, {**rows[0], "recall": 1.0}, {**rows[1], "recall": 0.0}]
    rows.append({**rows[0], "model": "other", "recall": 0.0})
    recall = NeedleGrid.from_rows(rows).recall(model="base")
    assert recall.to_dict() == {0: 0.75, 1: 0.0}


def test_scores_of_a_layer_and_of_none():
    scores = factories.scores(10)
    assert len(scores.layer(1)) == 10
    with pytest.raises(InputError, match="layer 9 is not among the scored layers"):
        scores.layer(9)
    with pytest.raises(InputError, match="unknown reduction"):
        scores.layer(1, "median")


def test_selected_turns():
    chosen = factories.selection(factories.scores(50))
    expected = {
        (row.conversation, row.turn)
        for row in chosen.frame.itertuples()
        if row.score > chosen.meta["threshold"]
    }
    assert chosen.turns == expected
    assert expected
