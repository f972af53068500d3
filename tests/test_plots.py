"""Figures show the numbers of the results they are drawn from."""

import json
from dataclasses import replace

import factories
import numpy as np
import pytest

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.report import plots
from ctxlens.report.plots.allocation import layer_panel, layer_shares
from ctxlens.report.plots.needle import split_by_memory
from ctxlens.report.plots.theme import colour_schemes
from ctxlens.results import VIEWS, NeedleGrid, RoleAllocation, Scores, Selection

TEMPLATE = factories.allocation("vanilla", "template")
PLAIN = factories.allocation("vanilla", "plain")


def test_role_heatmap_shows_the_mean_over_queries():
    heatmap = plots.role_heatmap(TEMPLATE, "assistant").data[0]
    np.testing.assert_allclose(heatmap.z, TEMPLATE.shares[..., Role.ASSISTANT].mean(-1), atol=5e-5)
    assert "mean over 12 queries" in heatmap.hovertemplate
    uniform = TEMPLATE.uniform()[:, Role.ASSISTANT].mean()
    assert f"{uniform:.3f}" in heatmap.hovertemplate
    assert heatmap.zmin == 0


def test_role_heatmap_of_a_difference_is_symmetric():
    heatmap = plots.role_heatmap(TEMPLATE, "user", compare=PLAIN, renormalised=True).data[0]
    expected = TEMPLATE.share("user", renormalised=True) - PLAIN.share("user", renormalised=True)
    np.testing.assert_allclose(heatmap.z, expected.mean(-1), atol=1e-4)
    assert heatmap.zmin == -heatmap.zmax
    assert "%{z:+" in heatmap.texttemplate


def test_a_query_without_kept_attention_is_left_out_of_the_mean():
    shares = np.zeros((1, 1, 2, 9), dtype=np.float32)
    shares[0, 0, 0, Role.TEMPLATE] = 1.0
    shares[0, 0, 1, [Role.USER, Role.BOS]] = 0.5
    one = RoleAllocation(shares, np.ones((2, 9), dtype=np.float32), (0,), ("a", "b"), "first_answer")
    assert np.array(plots.role_heatmap(one, "user", renormalised=True).data[0].z) == [[0.5]]


def test_figures_leave_sinks_out_by_default_and_say_where_they_cannot():
    resting = np.zeros_like(TEMPLATE.shares)
    resting[..., Role.BOS] = TEMPLATE.shares[..., Role.BOS]
    measured = replace(TEMPLATE, resting=resting)
    expected = {view: measured.share("user", view=view).mean(-1) for view in VIEWS}
    np.testing.assert_allclose(plots.role_heatmap(measured).data[0].z, expected["without sinks"], atol=5e-5)
    assert not plots.role_heatmap(measured).layout.annotations
    np.testing.assert_allclose(
        plots.role_heatmap(measured, renormalised=False).data[0].z, expected["raw"], atol=5e-5
    )
    for view in VIEWS:
        np.testing.assert_allclose(
            plots.role_heatmap(measured, view=view).data[0].z, expected[view], atol=5e-5
        )
    for old in (plots.role_heatmap(TEMPLATE), plots.role_by_layer({"a": measured, "b": TEMPLATE})):
        assert "without sinks is not available" in old.layout.annotations[-1].text
    with pytest.raises(InputError, match="not available"):
        plots.role_heatmap(TEMPLATE, view="without sinks")


def test_head_frames_lie_around_the_heads():
    shapes = plots.role_heatmap(PLAIN, mark_heads=PLAIN.retrieval_heads()).layout.shapes
    heads = [(shape.x0 + 0.5, shape.y0 + 0.5) for shape in shapes]
    assert heads == list(zip(PLAIN.retrieval_heads().tolist(), PLAIN.layers, strict=True))


def test_other_shapes_cannot_be_compared():
    other = RoleAllocation(PLAIN.shares[:2], PLAIN.key_counts, (0, 1), PLAIN.query_labels, PLAIN.queries)
    with pytest.raises(InputError, match="same layers and heads"):
        plots.role_heatmap(TEMPLATE, compare=other)
    with pytest.raises(InputError, match="two allocations"):
        plots.role_by_layer(PLAIN, difference=True)


def test_role_by_layer_sums_to_one_and_shows_the_difference():
    figure = plots.role_by_layer({"no template": PLAIN, "template": TEMPLATE}, difference=True)
    panels = {axis: [t for t in figure.data if (t.xaxis or "x") == axis] for axis in ("x", "x2", "x3")}
    np.testing.assert_allclose(sum(np.array(t.y) for t in panels["x2"]), 1, atol=1e-3)
    user = next(t for t in panels["x3"] if t.name == "user")
    expected = (TEMPLATE.shares - PLAIN.shares)[..., Role.USER].mean((1, 2))
    np.testing.assert_allclose(user.y, expected, atol=1e-4)
    assert sum(t.showlegend for t in figure.data) == len({t.name for t in figure.data})


def test_one_layer_panel_names_the_wanted_roles():
    figure = layer_panel(layer_shares(PLAIN), PLAIN.layers, legend=["template"])
    assert {t.name for t in figure.data} == {"user", "assistant", "bos", "template"}


def test_needle_panels_hold_the_cells():
    grid = factories.needle_grid()
    panels = plots.needle_panels(grid)
    assert len(panels) == 7
    panel = next(p for p in panels if p.title == "vanilla: template+prefix")
    rows = grid.where(model="vanilla", condition="template+prefix").frame
    cell = rows[(rows.context_tokens == 300) & (rows.depth_percent == 25)]
    assert panel.mean[1, 2] == pytest.approx(cell.recall.mean())
    assert panel.count[1, 2] == len(cell) == 2
    assert panels[-1].title == "indicator: template+prefix+indicator"


def test_needle_heatmap_has_one_scale_for_all_panels():
    grid = factories.needle_grid()
    figure = plots.needle_heatmap(grid)
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    np.testing.assert_allclose(figure.data[3].z, plots.needle_panels(grid)[3].mean, atol=5e-5)
    with pytest.raises(InputError, match="no rows"):
        plots.needle_heatmap(NeedleGrid.from_rows([]))


def test_cells_are_split_by_whether_memory_disagrees():
    contested, free = split_by_memory(factories.needle_grid())
    assert contested.frame["memory_recall"].notna().all()
    assert free.frame["memory_recall"].isna().all()
    assert split_by_memory(contested) == (contested, None)


def test_steering_points_start_unsteered_and_average_draws():
    grid = factories.steering_grid()
    points = {(p.heads, p.alpha): p.interval for p in plots.steering_points(grid)}
    unsteered = grid.where(alpha=1.0).frame["recall"].mean()
    for heads in ("all", "retrieval", "random"):
        assert points[heads, 1.0].estimate == pytest.approx(unsteered)
    rows = grid.where(heads="random", alpha=0.1)
    assert points["random", 0.1].estimate == pytest.approx(rows.frame["recall"].mean())
    assert points["random", 0.1].n == 40  # cells, not cells times draws


def test_steering_curves_draw_points_and_bands():
    grid = factories.steering_grid()
    ability = factories.ability()
    steered = type(ability)(ability.where(model="vanilla").frame.assign(heads="all"))
    figure = plots.steering_curves(grid, steered)
    line = next(t for t in figure.data if t.name == "all heads" and t.mode == "lines+markers")
    points = [p for p in plots.steering_points(grid) if p.heads == "all"]
    np.testing.assert_allclose(line.x, [p.alpha for p in points])
    np.testing.assert_allclose(line.y, [p.interval.estimate for p in points], atol=5e-5)
    band = next(t for t in figure.data if t.legendgroup == "all" and t.fill)
    np.testing.assert_allclose(band.y[: len(points)], [p.interval.high for p in points], atol=5e-5)
    assert figure.layout.yaxis3.title.text == "closed-book recall"
    assert figure.layout.xaxis.range[0] > figure.layout.xaxis.range[1]  # stronger to the right


def test_nothing_steered_is_said():
    with pytest.raises(InputError, match="no steered rows"):
        plots.steering_curves(factories.needle_grid())


def test_score_histogram_counts_every_turn_once():
    scores = factories.scores()
    selection = factories.selection(scores)
    figure = plots.score_histogram(scores, selection)
    assert sum(sum(bar.y) for bar in figure.data) == 240
    documents = next(bar for bar in figure.data if bar.name.startswith("answered from the document"))
    frame = scores.where(layer=1, kind="document").frame
    expected, _ = np.histogram(frame["mean_of_best"], np.linspace(0, 1, 41))
    assert list(documents.y) == expected.tolist()
    assert figure.layout.shapes[0].x0 == selection.meta["threshold"]


def test_scores_without_kinds_are_one_heap():
    scores = factories.scores()
    figure = plots.score_histogram(Scores(scores.frame.drop(columns="kind")), layer=2)
    assert len(figure.data) == 1
    assert not figure.data[0].showlegend
    with pytest.raises(InputError, match="layer 9"):
        plots.score_histogram(scores, layer=9)


def test_an_unlimited_threshold_draws_no_line():
    chosen = factories.selection(factories.scores())
    figure = plots.selection_histogram(Selection(chosen.frame, {"threshold": float("inf")}))
    assert len(figure.layout.shapes) == 0
    assert sum(figure.data[0].y) == 240


def test_selection_quality_by_hand():
    frame = factories.scores(4).frame
    frame = frame[frame["layer"] == 1].assign(kind=["document", "document", "memory", "closed"])
    scores = Scores(frame)
    chosen = frame[["conversation", "turn"]].assign(score=0.5, selected=[True, False, True, False])
    quality = plots.selection_quality(scores, Selection(chosen))
    assert (quality.precision, quality.recall, quality.n_true, quality.n_selected) == (0.5, 0.5, 2, 2)
    assert plots.selection_quality(None, Selection(chosen)) is None


def test_before_and_after_are_paired_over_the_same_cells():
    grid = factories.needle_grid()
    rows = {row.measure: row for row in plots.compare_models(grid, factories.ability())}
    row = rows["recall: template+prefix+indicator (after only)"]
    before = grid.recall(model="vanilla", condition="template+prefix")
    after = grid.recall(model="indicator", condition="template+prefix", indicator=True)
    assert row.before.estimate == pytest.approx(before.mean())
    assert row.after.estimate == pytest.approx(after.mean())
    assert row.difference.estimate == pytest.approx((after - before).mean())
    assert (
        rows["answered from memory: template+prefix"].before.n == 20
    )  # only where there is something memorised
    assert rows["closed-book questions"].before.n == 40
    html = plots.before_after_table(grid).body
    assert f"{row.difference.estimate:+.2f}" in html
    with pytest.raises(InputError, match="name the models"):
        plots.compare_models(factories.steering_grid())


def test_token_view_draws_the_chosen_head():
    view = factories.token_view()
    html = plots.token_view(view, layer=2, head=1, query=0)
    weights = view.pattern[2, 1, 0]
    assert f"attention {weights[5]:.4f}" in html.body
    assert html.body.count('class="tok ') == len(view.tokens)
    assert html.body.count("query") == 1
    assert "--w:1.000" in html.body  # the largest weight
    assert "<style>" in html._repr_html_()


@pytest.mark.parametrize("wrong", [{"layer": 9}, {"head": 9}, {"query": 9}])
def test_token_view_refuses_what_is_not_there(wrong):
    with pytest.raises(InputError, match="9"):
        plots.token_view(factories.token_view(), **wrong)


def test_text_of_tokens_is_escaped(tmp_path):
    view = factories.token_view(
        [("<script>alert(1)</script>", "user"), ('"&\n\n', "assistant"), ("", "user")]
    )
    html = plots.token_view(view)
    assert "<script" not in html.page()
    assert "&lt;script&gt;" in html.body
    assert html.body.count("↵") == 2
    assert html.save(tmp_path / "v.html").read_text(encoding="utf-8") == html.page()


def test_names_in_figures_are_no_markup():
    rows = factories.needle_rows("base", "plain+prefix", False)
    grid = NeedleGrid.from_rows([{**row, "model": "<b>%{x}</b>"} for row in rows])
    title = plots.needle_heatmap(grid).layout.annotations[0].text
    assert title.startswith("&lt;b&gt;")
    assert "%{x}" not in title


def test_every_colour_has_a_light_and_a_dark_shade():
    figures = [
        plots.role_heatmap(TEMPLATE, mark_heads=[0, 1, 2, 3]),
        plots.role_heatmap(TEMPLATE, compare=PLAIN),
        plots.role_by_layer({"a": PLAIN, "b": TEMPLATE}, difference=True),
        plots.needle_heatmap(factories.needle_grid()),
        plots.steering_curves(factories.steering_grid()),
        plots.score_histogram(factories.scores()),
        plots.loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]),
    ]
    schemes = colour_schemes()
    for figure in figures:
        text = figure.to_json()
        used = {part for part in text.split('"') if part.startswith(("#", "rgba("))}
        assert used - {"rgba(0,0,0,0)"} <= schemes.keys()
        assert json.loads(text)["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_sequential_scale_grows_steadily_in_greyscale():
    from ctxlens.report.plots.theme import SEQUENTIAL

    light = [luminance(stop.light) for stop in SEQUENTIAL]
    dark = [luminance(stop.dark) for stop in SEQUENTIAL]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)
