"""The page: what it shows, what it leaves out, and that nothing in the data can break out of it."""

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import factories
import numpy as np
import pytest
from evaluation_cases import evaluation

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.report import write_report
from ctxlens.report.attention import _pack
from ctxlens.report.blocks import bounds, embed, in_text, number
from ctxlens.report.collect import collect_runs
from ctxlens.report.evaluation import question_of
from ctxlens.report.first import Key, overview
from ctxlens.report.paths import without_paths
from ctxlens.results import (
    Ability,
    Drift,
    HeadMap,
    NeedleGrid,
    RoleAllocation,
    Scores,
    Selection,
    Verdict,
    Verdicts,
)
from ctxlens.runs import Run
from ctxlens.stats import Interval

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{7*7}}<!--"


class Page(HTMLParser):
    """The elements of a page: text by tag, all attributes, contents of scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.text = [], [], [], []
        self.stack = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] == "script":
            self.scripts.append((self.stack[-1][1].get("type"), data))
        elif self.stack and self.stack[-1][0] != "style":
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = factories.demo_run(folder / "demo")
    return write_report([run], folder / "report.html").read_text(encoding="utf-8")


def report(folder, *runs, **options):
    return Page(write_report(runs, folder / "report.html", **options).read_text(encoding="utf-8"))


def test_a_demo_shows_every_claim_with_figure_interval_rule_and_verdict(demo_page):
    page = Page(demo_page)
    for verdict in factories.verdicts().verdicts:
        assert verdict.sentence in page.words
        assert verdict.rule in page.words
        assert verdict.quantity in page.words
        assert number(verdict.figure.estimate, signed=True) in page.words
    assert "[−0.70, −0.54]" in page.words
    badges = re.findall(r'<span aria-hidden="true">(.)</span> ([a-z ]+)</span>', demo_page)
    expected = [("✓", "supported"), ("✓", "supported"), ("?", "inconclusive"), ("✓", "supported"),
                ("✗", "not supported")]  # fmt: skip
    assert badges == expected * 2  # in the table of claims, then in the sections


def test_a_demo_has_all_its_sections_in_the_order_of_the_argument(demo_page):
    page = Page(demo_page)
    ids = [a["id"] for tag, a in page.attributes if tag == "section"]
    assert ids == ["loss", "role-bias", "cause", "source", "cure", "making", "notes"]
    for text in ("Attention by layer and head", "Before and after indicator training",
                 "Closed-book ability", "threshold β 0.52", "built to show the effect", "evidence, not proof",
                 "vanilla fine-tuning without indicator 88.0 s 171.5 s"):  # fmt: skip
        assert text in page.words, text
    assert "Not in this run" not in page.words


def test_the_page_loads_nothing(demo_page):
    page = Page(demo_page)
    for tag, attributes in page.attributes:
        for name in ("src", "srcset", "data", "action", "poster"):
            assert name not in attributes, (tag, attributes)
        if "href" in attributes:
            assert attributes["href"].startswith("#") or attributes["href"] == "data:,"
    styles = "".join(re.findall(r"<style>(.*?)</style>", demo_page, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    assert not {"iframe", "object", "embed", "base"} & set(page.tags)


def test_only_the_two_scripts_of_the_page_may_run(demo_page):
    page = Page(demo_page)
    policy = next(a["content"] for tag, a in page.attributes if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    running = [text for kind, text in page.scripts if kind is None]
    assert len(running) == 2
    for script in running:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not any("plotly.js v" in script for script in running)
    assert "unsafe-eval" not in policy


def test_embedded_figures_are_the_results(demo_page):
    page = Page(demo_page)
    data = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    explorer = next(one for one in data if "models" in one)
    z = explorer["models"]["vanilla"]["template"]["renormalised"]["user"]["z"]
    expected = factories.allocation("vanilla", "template").share("user", renormalised=True).mean(-1)
    np.testing.assert_allclose(z, expected, atol=5e-5)
    tokens = next(one for one in data if "weights" in one)
    np.testing.assert_allclose(np.array(tokens["weights"]) / 1e4, factories.token_view().pattern, atol=5e-5)


def measured(model, condition):
    """An allocation in which half of the user's attention and all of BOS rest on sinks."""
    one = factories.allocation(model, condition)
    resting = np.zeros_like(one.shares)
    resting[..., Role.USER] = one.shares[..., Role.USER] / 2
    resting[..., Role.BOS] = one.shares[..., Role.BOS]
    return replace(one, resting=resting)


def explorer_of(folder, allocations):
    run = Run.open(folder / "run", study="allocate", config={})
    for name, one in allocations.items():
        run.save(f"allocation-{name}.safetensors", one)
    page = Page(write_report([run.folder], folder / "report.html").read_text(encoding="utf-8"))
    data = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    return next(one for one in data if "models" in one), page.words


def test_attention_is_shown_without_sinks_first_with_three_views(tmp_path):
    one = measured("vanilla", "template")
    data, words = explorer_of(tmp_path, {"template": one, "plain": measured("vanilla", "plain")})
    assert data["share"] == "without sinks"
    assert [name for name, _ in data["share_options"]] == ["raw", "renormalised", "without sinks"]
    for view, _ in data["share_options"]:
        z = data["models"]["vanilla"]["template"][view]["user"]["z"]
        np.testing.assert_allclose(z, one.share("user", view=view).mean(-1), atol=5e-5)
    taken = one.with_sinks_apart().share("sink").mean()
    assert f"vanilla template {taken:.2f}" in words


def test_a_page_of_results_without_sinks_says_that_the_view_is_not_available(tmp_path):
    mixed = {"template": measured("vanilla", "template"), "plain": factories.allocation("vanilla", "plain")}
    data, words = explorer_of(tmp_path, mixed)
    assert data["share"] == "raw"
    assert [name for name, _ in data["share_options"]] == ["raw", "renormalised"]
    assert "The view without sinks is not available, because attention sinks were not measured" in words


def test_the_page_of_a_demo_is_small(demo_page):
    assert len(demo_page.encode()) < 600_000


def evil_run(folder):
    """A run in which every text is an attack."""
    run = Run.open(folder, study=EVIL, config={"model": EVIL, EVIL: EVIL})
    rows = [{**row, "model": row["model"] + EVIL, "response": EVIL, "needle": EVIL} for row in
            factories.needle_grid().frame.to_dict(orient="records")]  # fmt: skip
    run.save("needle.parquet", NeedleGrid.from_rows(rows, {"title": EVIL}))
    rows = [{**row, "heads": row["heads"] + EVIL} for row in
            factories.steering_grid().frame.to_dict(orient="records")]  # fmt: skip
    run.save("steering.parquet", NeedleGrid.from_rows(rows))
    for condition in ("plain", "template"):
        one = factories.allocation("vanilla", condition)
        meta = {"model": EVIL, "condition": condition}
        evil = RoleAllocation(one.shares, one.key_counts, one.layers, one.query_labels, one.queries, meta)
        run.save(f"allocation-{condition}.safetensors", evil)
    view = factories.token_view([(EVIL, "user"), ("</script>", "assistant"), ("\u2028<b>", "template")])
    view.meta.update(title=EVIL, response=EVIL, model=EVIL)
    run.save("tokens.safetensors", view)
    scores = factories.scores()
    run.save("scores.parquet", Scores(scores.frame.assign(kind=EVIL)))
    chosen = factories.selection(scores)
    run.save("selection.parquet", Selection(chosen.frame, {**chosen.meta, "rule": EVIL}))
    ability = factories.ability()
    run.save("ability.parquet", Ability(ability.frame.assign(model=EVIL, question=EVIL)))
    run.save("evaluation.parquet", evaluation(EVIL))
    verdict = Verdict(
        EVIL, EVIL, Interval(0.0, 0.0, 0.0, 1), EVIL, EVIL, EVIL, ((EVIL, Interval(0.0, 0.0, 0.0, 1)),)
    )
    run.save("verdicts.json", Verdicts((verdict, *factories.verdicts().verdicts)))
    run.write_json("steer.json", {"answers": [
        {"messages": [{"role": "user", "content": EVIL}], "unsteered": EVIL, "steered": EVIL}]})  # fmt: skip
    run.write_json("timings.json", {EVIL: {"what": EVIL, "wall_seconds": 1, "cpu_seconds": 1}})
    run.record("data", {EVIL: {"files": {EVIL: {"size": 1, "sha256": EVIL}}}})
    run.write_json("train.json", {"counts": {EVIL: EVIL}, "log": [{"step": 1, "loss": 2.0}]})
    return folder


def test_no_text_from_data_becomes_markup(tmp_path):
    page = report(tmp_path, evil_run(tmp_path / "evil"), title=EVIL)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "img" not in page.tags
    assert len([1 for kind, _ in page.scripts if kind is None]) == 2
    assert not any(name.startswith("on") for _, attributes in page.attributes for name in attributes)
    data = [json.loads(script) for kind, script in page.scripts if kind == "application/json"]
    assert any(EVIL in one.get("models", ()) for one in data)
    assert "<script>alert" not in text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    assert html.escape("<img src=x") in text


def test_embedded_json_cannot_end_its_script():
    value = {EVIL: [EVIL, float("nan"), 1.23456789, float("inf")], "\u2028": "&"}
    text = str(embed(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {EVIL: [EVIL, None, 1.23457, None], "\u2028": "&"}


def test_missing_parts_of_a_demo_are_said_in_one_line(tmp_path):
    run = factories.demo_run(tmp_path / "demo")
    for name in (
        "steering.parquet",
        "verdicts.json",
        "tokens.safetensors",
        "timings.json",
        "ability.parquet",
    ):
        (run / name).unlink()
    page = report(tmp_path, run)
    assert "Not in this run: steering sweep." in page.words
    assert "Figure and rule" not in page.words
    assert "Attention by layer and head" in page.words


def test_a_broken_file_is_left_out_and_said(tmp_path):
    run = factories.demo_run(tmp_path / "demo")
    (run / "needle.parquet").write_bytes(b"cut off")
    page = report(tmp_path, run)
    assert "needle.parquet is left out" in page.words
    assert "Not in this run: needle grid." in page.words
    assert "Steering attention to the user" in page.words


def generic(folder, study, **results):
    run = Run.open(folder, study=study, config={"model": {"name": f"/models/{study}-model"}})
    for name, result in results.items():
        run.save(name.replace("__", "."), result)
    return folder


def test_other_runs_show_what_they_hold(tmp_path):
    allocate = generic(tmp_path / "a", "allocate", allocation__safetensors=factories.allocation("m", "plain"))
    scores = factories.scores()
    score = generic(tmp_path / "b", "score", scores__parquet=Scores(scores.frame.drop(columns="kind")))
    select = generic(tmp_path / "c", "select", selection__parquet=factories.selection(scores))
    needle = generic(tmp_path / "d", "needle", needle__parquet=NeedleGrid.from_rows(
        factories.needle_rows("base", "plain+prefix", False)))  # fmt: skip
    page = report(tmp_path, allocate, score, select, needle)
    ids = [a["id"] for tag, a in page.attributes if tag == "section"]
    assert ids == ["loss", "role-bias", "source", "making", "notes"]
    for text in ("To whose tokens does the model attend", "allocate-model", "Needles in a haystack",
                 "29 of 240", "Not in these runs: steering sweep"):  # fmt: skip
        assert text in page.words, text
    assert "built to show the effect" not in page.words


def test_a_steered_run_shows_both_answers_and_the_difference(tmp_path):
    steered = factories.allocation("m", "template", seed=1)
    steered.meta.update(steering=[{"alpha": 0.3}])
    run = generic(
        tmp_path / "s",
        "steer",
        allocation_steered__safetensors=steered,
        allocation_unsteered__safetensors=factories.allocation("m", "template"),
    )
    answers = [{"messages": [{"role": "user", "content": "why?"}], "unsteered": "no", "steered": "because"}]
    Run.read(run).write_json("steer.json", {"answers": answers})
    page = report(tmp_path, run)
    assert "because" in page.text
    data = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    assert next(one for one in data if "models" in one)["pair"] == ["template", "template+steered:0.3"]


def test_a_training_run_shows_its_loss_and_not_its_weights(tmp_path):
    run = generic(tmp_path / "t", "train")
    (run / "model.safetensors").write_bytes(b"weights")
    record = {"counts": {"trained tokens": 77}, "log": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]}
    Run.read(run).write_json("train.json", record)
    page = report(tmp_path, run)
    assert "Training loss" in page.words
    assert "77" in page.text
    assert "left out" not in page.words


def test_several_demos_stand_below_each_other(tmp_path):
    runs = [factories.demo_run(tmp_path / name / "demo", seed) for seed, name in enumerate("ab")]
    page = report(tmp_path, *runs)
    assert page.words.count("Attention by layer and head") == 2
    claims = ("loss", "role bias", "cause", "source", "cure")
    cells = [a for tag, a in page.attributes if tag == "td" and a.get("data-label") in claims]
    assert len(cells) == 10  # five claims, two runs
    groups = {a["data-explorer"] for _, a in page.attributes if "data-explorer" in a}
    assert len(groups) == 2
    assert [run.name for run in collect_runs(runs)] == ["a/demo", "b/demo"]


def test_a_smoke_run_says_that_it_means_nothing(tmp_path):
    run = Run.open(tmp_path / "smoke", study="demo", config={"smoke": True, "seed": 0})
    run.save("needle.parquet", factories.needle_grid())
    assert "smoke run" in report(tmp_path, run.folder).words


def test_a_large_pattern_is_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr("ctxlens.report.attention.MOST_WEIGHTS", 100)
    page = report(tmp_path, factories.demo_run(tmp_path / "demo"))
    data = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    tokens = next(one for one in data if "weights" in one)
    assert tokens["heads"] == ["mean over heads", "head with most attention on the user"]
    mean = factories.token_view().pattern.mean(1)
    np.testing.assert_allclose(np.array(tokens["weights"])[:, 0] / 1e4, mean, atol=1e-4)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one folder"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(InputError, match=r"holds no ctxlens run \(no manifest.json\)"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_numbers_have_a_true_minus_and_no_signed_zero():
    assert number(-0.25) == "−0.25"
    assert number(0.25, signed=True) == "+0.25"
    assert number(-0.001, signed=True) == "0.00"
    assert number(float("nan")) == "–"


def test_paths_of_the_machine_are_cut_to_their_last_part():
    assert without_paths("cannot read /home/me/models/smol-135m, sorry") == "cannot read smol-135m, sorry"
    assert without_paths("~/runs/a and C:\\Users\\me\\b.gguf") == "a and b.gguf"
    for kept in ("org/model", "./runs/a", "https://example.org/a/b", "1/2", "</s>", "and/or"):
        assert without_paths(kept) == kept


def test_no_path_of_the_machine_is_on_the_page(tmp_path):
    rows = factories.needle_rows("base", "plain+prefix", False)
    rows = [{**row, "model": f"{tmp_path}/models/smol"} for row in rows]
    run = Run.open(tmp_path / "n", study="needle", config={
        "model": {"name": f"{tmp_path}/models/smol", "path": f"{tmp_path}/models/smol",
                  "sha256": "73c0afabe4a5bb38"},
        "haystack": [f"{tmp_path}/texts/a.txt"]})  # fmt: skip
    run.save("needle.parquet", NeedleGrid.from_rows(rows))
    (run.folder / "ability.parquet").write_bytes(b"cut off")
    page = report(tmp_path, run.folder)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(tmp_path.parent) not in text
    assert "Model smol 73c0afab" in page.words
    assert "smol: plain+prefix" in page.words
    assert "a.txt" in page.words


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    folders = [tmp_path / name for name in ("a/x/demo", "b/x/demo", "b/y/demo", "other")]
    for folder in folders:
        Run.open(folder, study="needle", config={})
    names = [run.name for run in collect_runs(folders)]
    assert names == ["a/x/demo", "b/x/demo", "y/demo", "other"]


def test_the_first_screen_states_question_model_figures_and_verdicts(tmp_path):
    page = report(tmp_path, factories.demo_run(tmp_path / "demo"))
    first = page.words[: page.words.index("Does the chat template cost context?")]
    assert "can it be cured?" in first
    assert "the embedded model" in first
    shown = [one for tag, one in page.attributes if tag == "div" and one.get("class") == "key"]
    assert len(shown) == 3
    for verdict in factories.verdicts().verdicts:
        assert verdict.sentence in first
        assert verdict.rule in first


def test_many_runs_stand_in_one_table_and_are_folded(tmp_path):
    runs = [factories.demo_run(tmp_path / f"run{i}" / "demo", i) for i in range(2)]
    other = generic(tmp_path / "other", "allocate", a__safetensors=factories.allocation("m", "plain"))
    page = report(tmp_path, *runs, other)
    rows = [one for tag, one in page.attributes if tag == "td" and one.get("data-label") == "role bias"]
    assert len(rows) == 3
    assert "not in this run" in page.words
    folded = [one for tag, one in page.attributes if tag == "details" and one.get("class") == "part"]
    assert folded
    assert not any("open" in one for one in folded)


def test_a_strip_places_estimate_and_interval():
    strip = Key("loss", Interval(-0.5, -0.75, -0.25, 9), "q", signed=True).strip
    assert strip == {"zero": 50.0, "from": 12.5, "width": 25.0, "at": 25.0}
    assert Key("rating", Interval(6.0, 5.0, 7.0, 9), "q").strip is None
    alone = Key("one", Interval(0.4, float("nan"), float("nan"), 1), "q").strip
    assert alone == {"zero": 0.0, "from": 40.0, "width": 0.0, "at": 40.0}


def test_intervals_without_width_or_bounds_have_words_that_the_page_explains_once(demo_page):
    assert bounds(Interval(1.0, 1.0, 1.0, 8)) == "all alike"
    assert bounds(Interval(1.0, float("nan"), float("nan"), 1)) == "too few"
    assert in_text(Interval(1.0, 1.0, 1.0, 8)) == "1.00 (all alike)"
    assert Page(demo_page).words.count("“Too few” stands where") == 1


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("A long text. Is it?\nWhen did it begin?<|im_end|>\n<|im_start|>assistant\n", "When did it begin?"),
        ("A text.\nQuestion: who won?\nAnswer:", "Question: who won?"),
        (
            "Text.\nName the winner of the race.<end_of_turn>\n<start_of_turn>model",
            "Name the winner of the race.",
        ),
        ("", ""),
    ],
)
def test_the_question_of_a_prompt_is_found(prompt, question):
    assert question_of(prompt) == question


def test_long_rows_of_weights_are_packed():
    row = np.zeros(1000)
    row[[3, 10, 999]] = 0.25, 0.5, 0.1
    assert _pack(row) == {"steps": [3, 7, 989], "weights": [2500, 5000, 1000]}
    assert _pack(row[:12]) == [0, 0, 0, 2500, 0, 0, 0, 0, 0, 0, 5000, 0]


def test_the_first_screen_of_heads_names_the_head_that_stands_out(tmp_path):
    """Two texts, two heads: switching off head 0.1 costs .4 and .6, which is .5 [.4, .6] in the mean."""
    effects = np.array([[[0.1, -0.4]], [[0.1, -0.6]]])
    run = Run.open(tmp_path / "heads", study="heads", config={})
    run.save("zero.safetensors", HeadMap(effects, np.array([0, 1]), "zero"))
    [key] = overview(collect_runs([tmp_path / "heads"])[0]).keys
    assert key.name == "head 0.1"
    assert key.signed
    assert (key.interval.estimate, key.interval.low, key.interval.high) == pytest.approx((-0.5, -0.6, -0.4))
    assert "first of 2 heads" in key.quantity


def test_the_first_screen_of_a_drift_gives_the_change_of_the_users_share(tmp_path):
    """One layer, two heads, two texts: the user's share falls by .2 in one text and by .4 in the other."""
    roles = [role.label for role in Role]
    shares = np.zeros((2, 1, 2, 2, len(roles)), dtype=np.float32)
    user, other = roles.index("user"), roles.index("assistant")
    shares[0, ..., user], shares[1, 0, :, 0, user], shares[1, 0, :, 1, user] = 0.8, 0.6, 0.4
    shares[..., other] = 1 - shares[..., user]
    counts = np.ones((2, 2, len(roles)), dtype=np.float32)
    meta = {"sides": ("base", "tuned")}
    drift = Drift(shares, counts, np.array([0, 1]), (0,), np.array([0]), "first_answer", meta)
    run = Run.open(tmp_path / "drift", study="drift", config={})
    run.save("drift.safetensors", drift)
    [key] = overview(collect_runs([tmp_path / "drift"])[0]).keys
    assert key.interval.estimate == pytest.approx(-0.3)
    assert (key.interval.low, key.interval.high) == pytest.approx((-0.4, -0.2))
    assert "tuned minus base" in key.quantity
