"""Every result has one line, one tidy table, one figure, and files in every format."""

import json
import shutil
import sys
import types
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import evaluation_cases
import factories
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from ctxlens.auditing import Audit
from ctxlens.auditing.plan import Plan
from ctxlens.auditing.ready import Ready
from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.errors import InputError
from ctxlens.report import figures
from ctxlens.report.plots.html import HtmlView
from ctxlens.results import (
    Ability,
    Drift,
    HeadCurves,
    HeadMap,
    NeedleGrid,
    Ratings,
    RoleAllocation,
    TokenView,
    Verdicts,
    load_result,
    shown,
)

HOSTILE = "</script><b>%{x}"


def drift():
    shares = np.zeros((2, 1, 2, 1, N_ROLES), dtype=np.float32)
    shares[0, 0, :, 0, Role.USER], shares[0, 0, :, 0, Role.BOS] = (0.5, 1.0), (0.5, 0.0)
    shares[1, 0, :, 0, Role.USER], shares[1, 0, :, 0, Role.BOS] = (0.25, 0.5), (0.75, 0.5)
    counts = np.zeros((2, 1, N_ROLES), dtype=np.float32)
    counts[..., [Role.USER, Role.BOS]] = 1
    meta = {"sides": ["m, plain", f"{HOSTILE}, template"]}
    return Drift(shares, counts, np.array([7]), (3,), np.array([1]), "first_answer", meta)


def head_map():
    return HeadMap(np.arange(8.0).reshape(2, 2, 2), np.array([0, 1]), "zero", {"quantity": HOSTILE})


def head_curves():
    rows = [
        {"ranking": ranking, "k": k, "draw": 0, "cell": cell, "context": cell, "effect": k / 10 + cell / 100}
        for ranking in ("zero", "random")
        for k in (1, 2)
        for cell in range(3)
    ]
    return HeadCurves.from_rows(rows)


def ratings():
    rows = [("a", 1, 1, 7.0), ("a", 2, 1, 5.0), ("b", 1, 1, 3.0), ("b", 2, 1, 4.0)]
    return Ratings.from_rows([
        {"model": m, "question_id": q, "category": "all", "turn": t, "score": s, "error": ""}
        for m, q, t, s in rows
    ])  # fmt: skip


def audit():
    verdicts = factories.verdicts().verdicts
    return Audit(Path("runs/a"), object.__new__(Ready), object.__new__(Plan), verdicts, "a note")


MADE = {
    "NeedleGrid": factories.needle_grid,
    "Sweep": factories.steering_grid,
    "Ability": factories.ability,
    "Scores": factories.scores,
    "Selection": lambda: factories.selection(factories.scores()),
    "Evaluation": evaluation_cases.evaluation,
    "RoleAllocation": lambda: factories.allocation("vanilla", "template"),
    "TokenView": lambda: factories.token_view([("<s>", "bos"), (HOSTILE, "user"), ("a", "assistant")]),
    "Verdicts": factories.verdicts,
    "Drift": drift,
    "HeadMap": head_map,
    "HeadCurves": head_curves,
    "Ratings": ratings,
    "Audit": audit,
}
LINES = {
    "NeedleGrid": "NeedleGrid(280 rows, model base, vanilla, indicator, condition plain+prefix, "
    "template+prefix, 4 lengths, 40 cells)",
    "Scores": "Scores(960 rows, 240 conversations, 4 layers)",
    "RoleAllocation": "RoleAllocation(4 layers × 4 heads, 12 queries, condition template)",
    "TokenView": "TokenView(4 layers × 4 heads, 2 queries, 3 tokens, condition template)",
    "Drift": "Drift(1 layer × 2 heads, 1 conversation, script><b>%{x}, template against m, plain)",
    "HeadMap": "HeadMap(2 layers × 2 heads, zero, 2 cells of 2 texts)",
    "HeadCurves": "HeadCurves(12 rows, rankings zero, random, 2 sizes)",
    "Ratings": "Ratings(4 rows, model a, b)",
}


def loaded_by(page):
    """The addresses that a page would load."""
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value for name, value in attrs if name == "src" or (tag, name) == ("link", "href"))

    Tags().feed(page)
    return found


@pytest.fixture(params=MADE)
def result(request):
    return MADE[request.param]()


@pytest.mark.parametrize("name", LINES)
def test_the_line_says_what_it_is(name):
    assert repr(MADE[name]()) == LINES[name]


def test_the_line_is_one_line(result):
    assert "\n" not in repr(result)
    assert repr(result).startswith(f"{type(result).__name__}(")


def test_csv_and_json_hold_the_table(result, tmp_path):
    frame = result.to_frame()
    assert result.save(tmp_path / "x.csv") == tmp_path / "x.csv"
    assert list(pd.read_csv(tmp_path / "x.csv").columns) == list(frame.columns)
    assert len(pd.read_csv(tmp_path / "x.csv", keep_default_na=False)) == len(frame)
    if type(result).NATIVE != ".json":
        result.save(tmp_path / "x.json")
        rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
        assert len(rows) == len(frame)
        assert list(rows[0]) == list(frame.columns)


def test_the_page_works_offline_and_escapes_texts(result, tmp_path):
    page = result.save(tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<b>%{x}" not in page
    assert loaded_by(page) == []
    assert isinstance(result, TokenView) or "Plotly.newPlot" in page


def test_the_notebook_shows_the_figure(result):
    markup = result._repr_html_()
    assert "<b>%{x}" not in markup
    assert "class=" in markup if isinstance(result, TokenView) else "Plotly.newPlot" in markup


def test_the_own_format_keeps_everything(result, tmp_path):
    suffix = type(result).NATIVE
    if not suffix:
        pytest.skip("an audit is a folder")
    path = result.save(tmp_path / f"x{suffix}")
    again = load_result(result.save(path))  # replaced without asking, as ever
    assert type(again) is type(result)
    pd.testing.assert_frame_equal(again.to_frame(), result.to_frame(), check_dtype=False)


def test_existing_files_are_kept_unless_asked(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"x\.csv exists already; .* overwrite=True"):
        head_map().save(path)
    assert path.read_text() == "mine"
    head_map().save(path, overwrite=True)
    assert path.read_text().startswith("layer,head,value,low,high\n")


@pytest.mark.parametrize(("name", "said"), [("x.pdf", "the suffix .pdf"), ("x", "no suffix")])
def test_an_unknown_suffix_is_refused(name, said, tmp_path):
    with pytest.raises(InputError) as refused:
        head_map().save(tmp_path / name)
    assert f"has {said}; a HeadMap is saved as .safetensors, .html, .png, .csv, .json." in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(HeadMap, "to_frame", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        head_map().save(tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []


def test_tables_by_hand():
    frame = drift().to_frame()
    user = frame[frame["role"] == "user"].reset_index(drop=True)
    assert list(frame.columns) == [
        "layer", "head", "conversation", "context", "role", "side", "share", "retrieval",
    ]  # fmt: skip
    assert user["side"].tolist() == ["m, plain", f"{HOSTILE}, template"] * 2
    assert user["share"].tolist() == [0.5, 0.25, 1.0, 0.5]
    assert user["retrieval"].tolist() == [False, False, True, True]
    assert set(frame["layer"]) == {3}
    assert set(frame["context"]) == {7}
    overview = drift().overview().set_index("role")
    assert overview.loc["user"].tolist() == [0.75, 0.375, -0.375]
    assert list(overview.index) == ["bos", "user"]
    view = factories.token_view([("<s>", "bos"), ("a", "user"), ("b", "assistant")])
    tokens = view.to_frame()
    assert tokens.loc[tokens["query"] == 2, ["token", "text", "role"]].head(3).values.tolist() == [
        [0, "<s>", "bos"], [1, "a", "user"], [2, "b", "assistant"],
    ]  # fmt: skip
    np.testing.assert_allclose(tokens["attention"].to_numpy(), view.pattern.reshape(-1))
    claims = factories.verdicts().to_frame()
    assert claims["claim"].tolist() == ["loss", "role bias", "cause", "source", "cure"]
    assert claims.loc[0, ["estimate", "low", "high", "n"]].tolist() == [-0.62, -0.70, -0.54, 20]


def test_overviews_by_hand():
    row = factories.needle_rows("base", "plain+prefix", False)[0]
    rows = [
        {**row, "cell": i, "context_tokens": length, "recall": recall}
        for i, (length, recall) in enumerate([(100, 0.5), (100, 1.0), (200, 0.25)])
    ]
    assert NeedleGrid.from_rows(rows).overview()[[100, 200]].values.tolist() == [[0.75, 0.25]]
    one = factories.allocation("vanilla", "template")
    expected = one.shares[2, :, :, Role.USER].mean()
    assert one.overview().loc[2, "user"] == pytest.approx(expected, abs=6e-4)
    assert "tool" not in one.overview()


def test_sides_are_named_without_folders():
    one = replace(drift(), meta={"sides": ["/models/a, plain", "org/b, plain"]})
    assert repr(one).endswith("b, plain against a, plain)")
    one = replace(drift(), meta={"sides": ["x/a, plain", "y/a, plain"]})
    assert list(one.overview().columns) == ["role", "first: a, plain", "second: a, plain", "difference"]


def test_records_have_plain_values():
    frame = pd.DataFrame({"a": [1.5, np.nan], "b": ["x", None], "c": [True, False]})
    assert shown.to_records(frame) == [
        {"a": 1.5, "b": "x", "c": True}, {"a": None, "b": None, "c": False},
    ]  # fmt: skip


def test_figures_take_options():
    one = factories.allocation("vanilla", "template")
    assert isinstance(one.figure(), go.Figure)
    assert isinstance(one.figure(role="user").data[0], go.Heatmap)
    assert isinstance(factories.token_view().figure(layer=1), HtmlView)
    assert len(drift().figure(heads=True).data[0].z) == 1
    with pytest.raises(InputError, match="unknown view"):
        one.figure(view="other")


def test_verdicts_are_drawn_with_their_intervals():
    trace = factories.verdicts().figure().data[0]
    assert trace.x[0] == -0.62
    assert round(trace.error_x.arrayminus[0], 4) == 0.08
    assert audit().figure().data[0].x == trace.x


def test_nothing_to_draw_is_said():
    with pytest.raises(InputError, match="the Ability has no rows to draw"):
        Ability.from_rows([]).figure()
    with pytest.raises(InputError, match="no verdicts to draw"):
        Verdicts(()).figure()
    assert "no verdicts to draw" in Verdicts(())._repr_html_()
    with pytest.raises(InputError, match="no figure for a int"):
        figures.draw(3)


def test_without_a_browser_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(shown, "_has_browser", lambda: False)
    one = factories.allocation("vanilla", "template")
    assert one.show() is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == repr(one)
    assert printed[1].split() == ["layer", "bos", "user", "assistant", "template"]


def test_with_a_browser_the_page_is_opened(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(shown, "_has_browser", lambda: True)
    monkeypatch.setattr(figures.webbrowser, "open", opened.append)
    head_map().show()
    assert capsys.readouterr().out == ""
    assert opened[0].endswith("HeadMap.html")


def test_in_a_notebook_the_figure_is_displayed(monkeypatch):
    displayed = []
    monkeypatch.setattr(shown, "_in_notebook", lambda: True)
    fake = types.ModuleType("IPython.display")
    fake.display = displayed.append  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    head_map().show()
    assert isinstance(displayed[0], go.Figure)


def test_a_png_without_kaleido_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(InputError, match=r"needs the package kaleido.* -e \"\.\[png\]\", or save"):
        head_map().save(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_png_without_a_browser_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", types.ModuleType("kaleido"))

    def fail(*_, **__):
        raise RuntimeError("no Chrome\nhere")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    with pytest.raises(InputError, match=r"needs Chrome or Chromium.*\(RuntimeError: no Chrome\); install"):
        head_map().save(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["HeadMap", "TokenView"])
def test_a_png_is_written(name, tmp_path):
    pytest.importorskip("kaleido")
    if not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))):
        pytest.skip("no Chrome or Chromium")
    written = MADE[name]().save(tmp_path / "x.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert int.from_bytes(written[16:20], "big") == 1800


def test_a_class_of_ones_own_can_be_drawn():
    class Mine(shown.Shown):
        def describe(self):
            return "one\nthing"

        def to_frame(self):
            return pd.DataFrame({"value": [1]})

    @figures.draw.register
    def _(result: Mine):
        return go.Figure(layout={"title": "mine"})

    assert repr(Mine()) == "Mine(one thing)"
    assert Mine().figure().layout.title.text == "mine"
    with pytest.raises(InputError, match="Mine has no file format of its own"):
        Mine().write("x")


def test_classes_agree_with_their_loaders():
    assert {RoleAllocation.NATIVE, Drift.NATIVE, HeadMap.NATIVE, TokenView.NATIVE} == {".safetensors"}
    assert {NeedleGrid.NATIVE, Ability.NATIVE, HeadCurves.NATIVE} == {".parquet"}
