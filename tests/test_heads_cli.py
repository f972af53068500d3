"""`ctxlens heads` and `ctxlens drift`: files, tables, pages, and one sentence for bad input."""

import json

import numpy as np
import pytest
from needle_models import UNPUNCTUATED, check_lengths
from test_cli import call

from ctxlens.errors import InputError
from ctxlens.evals.needle import cells as needle_cells
from ctxlens.evals.needle import haystack as needle_haystack
from ctxlens.heads import drift as heads_drift
from ctxlens.report import write_report
from ctxlens.report.plots import drift_map, drift_slider, gradient_scatter, head_curves, head_map, trade_off
from ctxlens.results import Ability, Drift, HeadCurves, HeadMap, NeedleGrid

SMALL = (
    "heads", "-m", "organism-chat", "--backend", "native", "--lengths", "60,90", "--depths", "20,80",
    "--cases", "1", "--max-new-tokens", "8", "--alphas", "0.03", "--draws", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which every experiment has been run, in two goes."""
    out = tmp_path_factory.mktemp("runs") / "heads"
    call(*SMALL, "--out", out, "--kind", "retrieval,gradient")
    result = call(*SMALL, "--out", out)
    (out.parent / "said.txt").write_text(result.output)
    return out


def test_every_experiment_leaves_its_file(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "map-user-share.safetensors", "map-copying.safetensors", "map-gradient.safetensors",
        "map-steer.safetensors", "map-zero.safetensors", "map-mean.safetensors", "map-blind.safetensors",
        "curves-steer.parquet", "curves-blind.parquet", "steering.parquet", "steering-ability.parquet",
    }  # fmt: skip
    assert "parts" not in names
    curves = HeadCurves.load(run / "curves-blind.parquet")
    assert set(curves.frame["ranking"]) == {"user share", "copying", "gradient", "blind", "random"}
    assert curves.sizes == [1, 2, 4, 8, 16]
    # Judged on the texts that no head was ranked on.
    assert curves.frame["cell"].nunique() == 2
    said = (run.parent / "said.txt").read_text()
    for words in ("copying: share of the needle's tokens", "gradient against measured", "nats per token"):
        assert words in said


def test_a_second_run_changes_nothing(run):
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("*.*")}
    call(*SMALL, "--out", run)
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("*.*")} == before


def test_figures_hold_the_results_numbers(run):
    found = HeadMap.load(run / "map-blind.safetensors")
    (heat,) = head_map(found).data
    assert heat.z[1][2] == pytest.approx(found.values[1, 2], abs=1e-5)
    assert float(heat.text[1][2].strip("()").replace("−", "-")) == round(found.values[1, 2], 2)
    cells = HeadMap(np.array([[[-0.25, -0.0004, 0.001, 0.5]]] * 3), np.arange(3), "blind")
    assert list(head_map(cells).data[0].text[0]) == ["−0.250", "0.000", "+0.001", "+0.500"]
    low, high = found.interval()
    assert heat.customdata[1][2] == pytest.approx((low[1, 2], high[1, 2]), abs=1e-5)
    assert heat.text[1][2].startswith("(") == (low[1, 2] <= 0 <= high[1, 2])

    gradient = HeadMap.load(run / "map-gradient.safetensors")
    layer_one = gradient_scatter(gradient, found).data[1]
    assert layer_one.x[2] == pytest.approx(gradient.values[1, 2], abs=1e-5)
    assert layer_one.y[2] == pytest.approx(found.values[1, 2], abs=1e-5)

    curves = HeadCurves.load(run / "curves-steer.parquet")
    line = next(
        one for one in head_curves(curves).data if one.name == "ranked by copying score" and one.marker.size
    )
    assert line.y[2] == pytest.approx(dict(curves.points("copying"))[4].estimate, abs=1e-4)

    grid = NeedleGrid.load(run / "steering.parquet")
    ability = Ability.load(run / "steering-ability.parquet")
    picture = trade_off(grid, ability)
    line = next(one for one in picture.data if one.name == "all heads")
    assert line.y[1] == pytest.approx(grid.recall(heads="all", alpha=0.03).mean(), abs=1e-4)
    assert line.x[1] == pytest.approx(ability.where(heads="all", alpha=0.03).frame["recall"].mean(), abs=1e-4)


def test_drift_is_read_drawn_and_reported(run, tmp_path):
    out = tmp_path / "drift"
    result = call("drift", "-m", "organism-chat", "--backend", "native", "--limit", "4", "--out", out)
    assert "second minus first" in result.output
    assert "without sinks, mean over heads" in result.output
    assert "as in the paper" in result.output
    found = Drift.load(out / "drift.safetensors")
    assert found.resting is not None
    columns = next(line.split() for line in result.output.splitlines() if " bos " in line)
    assert columns[-3:] == ["sink", "on", "sinks"]
    assert found.sides == ("organism-chat, plain", "organism-chat, template")
    (heat,) = drift_map(found).data
    assert heat.z[1][3] == pytest.approx(found.difference("user", "without sinks").values[1, 3], abs=1e-4)
    slider = drift_slider(found)
    roles = list(slider.data[0].y)
    steps = slider.layout.sliders[0].steps
    assert len(steps) == 4
    shown = steps[2].args[0]["z"][1][roles.index("user")][1]
    assert shown == pytest.approx(np.nanmean(found.share("user", "without sinks")[1, 2, 1]), abs=1e-4)
    page = write_report([run, out], tmp_path / "report.html").read_text()
    for words in (
        "Attention drift",
        "Who reads and copies the needle",
        "What steering gains",
        "Role by head",
    ):
        assert words in page


def test_two_models_are_held_against_one_another(tmp_path):
    question = [{"role": "user", "content": "What is it?"}]
    (tmp_path / "chats.json").write_text(json.dumps([question, question]))
    out = tmp_path / "drift"
    result = call(
        "drift", "-m", "organism", "--against", "organism-chat", "--backend", "native", "--messages",
        tmp_path / "chats.json", "--out", out,
    )  # fmt: skip
    assert "first: organism, template; second: organism-chat, template" in result.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("heads", "--kind", "magic"), "unknown kind 'magic'; choose from retrieval, gradient"),
        (("heads", "--alpha", "1.5"), "alpha must be in (0, 1], got 1.5"),
        (("heads", "--heads", "one"), "heads 'one' cannot be read"),
        ((*SMALL, "--heads", "7.0"), "head 7.0 does not exist"),
        ((*SMALL, "--measure", "luck"), "unknown measure 'luck'"),
        ((*SMALL, "--indicator"), "has no indicator token"),
        ((*SMALL, "--condition", "bare"), "unknown word 'bare' in the condition"),
        (("drift", "--conditions", "plain"), "expected two, separated by a comma"),
        (("drift", "--conditions", "plain,bare"), "unknown word 'bare' in the condition"),
        (("drift", "--conditions", "template,indicator"), "has no indicator token"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path):
    result = call(*words, "--out", tmp_path / "run", code=2)
    assert sentence in result.output
    assert result.output.count("error:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["transcript", "thai", "hindi"])
@pytest.mark.parametrize("verb", ["needle", "heads", "drift"])
def test_contexts_are_as_long_as_they_say_in_every_script(tmp_path, monkeypatch, script, verb):
    (tmp_path / "hay.txt").write_text(UNPUNCTUATED[script], encoding="utf-8")
    built = []

    def build(*args):
        built.extend(build_cells(*args))
        raise InputError("that is enough")

    build_cells = needle_cells.build_cells
    monkeypatch.setattr(needle_cells, "build_cells", build)
    words = (verb, "-m", "organism-chat", "--backend", "native")
    if verb == "drift":  # it takes no other haystack than that of the built-in world
        own = needle_haystack.load_haystack(tmp_path)
        monkeypatch.setattr(heads_drift, "load_haystack", lambda *_, **__: own)
        monkeypatch.setattr(heads_drift, "build_cells", build)
    else:
        words += ("--haystack", tmp_path, "--needle", "known", "--lengths", "100,400", "--depths", "0,50")
    assert "that is enough" in call(*words, code=2).output
    check_lengths(built)
