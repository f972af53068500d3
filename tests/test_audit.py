"""The audit itself: its texts, controls, plan, stages and command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import ctxlens as cl
from ctxlens.auditing import asking, ready, run
from ctxlens.auditing.pace import Pace
from ctxlens.auditing.plan import Frame, Plan, describe_plan, make_plan, tells
from ctxlens.auditing.ready import find_controls
from ctxlens.auditing.speed import Speed, attention_share
from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import Role
from ctxlens.cli import app
from ctxlens.cli.audit import check_questions, parse_budget
from ctxlens.errors import InputError
from ctxlens.evals.material import choose_material
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import insert_sentences
from ctxlens.evals.needle.controls import put_before
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.evals.texts import build_cells
from ctxlens.heads.answers import needle_tokens
from ctxlens.models import load_model
from ctxlens.models.memory import forecast_memory
from ctxlens.results.audit import LOSS_MARGIN
from ctxlens.runs import Run

SLOW = Speed(per_token=0.01, per_square=0.0, answers=1.0, repeats=1.0, steered=1.0)
CONTROLS = (Condition(template=False, prefix=True, control="matched"),)


@pytest.fixture(scope="module")
def model():
    return load_model("organism-chat", device="cpu")


@pytest.fixture(scope="module")
def material(model):
    return choose_material(model.name)


@pytest.fixture(scope="module")
def cells(model, material):
    config = NeedleConfig(lengths=(120, 200), cases_per_cell=2, needles=material.facts, max_new_tokens=8)
    return build_cells(model, material, config, 3)


# The plan.


def test_expected_times_by_hand():
    frame = Frame(SLOW, 1e9, 4000, overhead=50, controls=CONTROLS)
    plan = frame.plan([450, 950], 20, alphas=(0.5, 0.2), draws=1)
    # A text takes .01 * 500 + 1 = 6 s with four facts, or .01 * 1000 + 2 = 12 s with eight.
    assert plan.facts == (4, 8)
    assert plan.seconds["loss"] == pytest.approx(2 * 20 * (6 + 12))
    assert plan.seconds["controls"] == pytest.approx(20 * 12)
    assert plan.seconds["bias"] == pytest.approx(2 * 12 * 1.25 * 0.01 * 1000)
    # Ten texts choose (two sets of heads, two strengths); ten judge (all, facts, one random, plain).
    assert plan.seconds["cause"] == pytest.approx(10 * 12 * (2 * 2 + 3 + 1))
    elsewhere = frame.plan([450, 950], 20, alphas=(0.5, 0.2), draws=1, detail=450)
    assert elsewhere.seconds["cause"] == pytest.approx(10 * 6 * (2 * 2 + 3 + 1))
    assert elsewhere.seconds["loss"] == plan.seconds["loss"]


def test_a_model_that_reads_the_text_for_every_question():
    again = replace(SLOW, repeats=4.0)  # measured with four questions
    assert again.text(100, 4) == pytest.approx(4 * 1 + 1)
    assert again.text(100, 8) == pytest.approx(8 * 1 + 2)


def test_attention_share_by_hand(model):
    # The heads together are as wide as the model, over 12 squares of its width.
    width = model.backend.shape.d_model
    assert attention_share(model) == pytest.approx(1 / (12 * width))


def test_controls_and_cause_go_to_a_shorter_length_before_the_loss_does():
    frame = Frame(replace(SLOW, answers=0.5), 9000.0, 8000, controls=CONTROLS)
    plan = make_plan(frame)
    assert plan.lengths[-1] > plan.detail_length >= 1000
    assert plan.detail_length in plan.lengths
    assert plan.alphas
    said = " ".join(describe_plan(plan))
    assert f"controls and steering at {plan.detail_length:,} tokens" in said


def test_twenty_texts_of_eight_facts_decide():
    assert tells(20, 8) < LOSS_MARGIN < tells(12, 4)
    assert tells(20, 8) == pytest.approx(1.96 * 0.58 / 160**0.5)


# The pace.


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def paced(tmp_path):
    """A plan of 100 s for the loss, 40 for the controls, 20 for the bias and 60 for the cause; 20 texts."""
    frame = Frame(SLOW, 1e9, 4000, controls=CONTROLS)
    plan = frame.plan([500], 20, alphas=(0.5,), draws=1)
    plan = replace(plan, seconds={"loss": 100.0, "controls": 40.0, "bias": 20.0, "cause": 60.0})
    folder = Run.open(tmp_path / "run", study="audit", config={})
    clock = Clock()
    return lambda budget: Pace(folder, plan, budget, clock), clock


def test_a_machine_as_fast_as_planned_measures_everything(paced):
    make, clock = paced
    pace = make(230.0)
    for done in range(0, 20, 4):
        assert pace.goes_on("loss", 100.0, done, 20, 12)
        clock.now += 20
        pace.measured(20.0, 20.0)
    assert not pace.skips("controls")
    assert not pace.skips("cause")
    assert pace.describe() == []


def test_a_slower_machine_measures_fewer_texts_but_never_too_few(paced):
    make, clock = paced
    pace, done = make(230.0), 0
    while pace.goes_on("loss", 100.0, done, 20, 12):
        clock.now += 60  # three times as slow
        pace.measured(60.0, 20.0)
        done += 4
    pace.finish("loss", done)
    assert done == 12
    assert pace.skips("controls")  # 180 s are gone, and the rest takes three times as long as planned
    assert pace.skips("cause")
    assert not pace.skips("bias")
    assert "only 12 of 20 texts" in pace.describe()[0]
    assert "controls" in pace.describe()[1]
    assert "steering" in pace.describe()[2]
    assert pace.most_texts("loss", 20) == 12  # the second model gets as many


def test_the_loss_gets_all_its_texts_if_they_fit_without_the_later_stages(paced):
    make, clock = paced
    pace, done = make(230.0), 0
    while pace.goes_on("loss", 100.0, done, 20, 12):
        clock.now += 30  # 1.5 times as slow
        pace.measured(30.0, 20.0)
        done += 4
    assert done == 20  # 150 s are gone; the controls and the bias need 66 s of 80, the cause another 90
    assert not pace.skips("controls")
    assert pace.goes_on("controls", 40.0, 16, 20, 12)  # the cause does not fit, so nothing is kept for it
    clock.now += 66
    assert pace.skips("cause")
    assert pace.left_out == ["cause"]


@pytest.mark.parametrize(("now", "goes_on"), [(142.0, True), (143.0, False), (150.0, False), (151.0, True)])
def test_the_controls_leave_time_for_a_cause_that_fits(paced, now, goes_on):
    make, clock = paced
    pace = make(230.0)
    clock.now = now  # a group takes 8 s, the bias 20, the cause 60, which fits until 150 s are gone
    assert pace.goes_on("controls", 40.0, 12, 20, 12) == goes_on


def test_the_first_model_leaves_time_for_as_many_texts_of_the_second(paced):
    make, clock = paced
    pace = make(110.0)  # 50 s for each model, 20 for the bias
    clock.now = 30.0
    assert pace.goes_on("loss", 50.0, 12, 20, 12)  # 10 + 40 + 20 of the 80 s that are left
    clock.now = 41.0
    assert not pace.goes_on("loss", 50.0, 12, 20, 12)
    pace.finish("loss", 12)
    assert pace.goes_on("loss", 50.0, 12, 20, 12)


def test_a_machine_that_is_idle_again_gets_the_cause(paced):
    make, clock = paced
    pace = make(230.0)
    for _ in range(3):
        pace.measured(60.0, 20.0)
    clock.now = 100.0
    assert pace.slowness > 2.5
    assert not pace.skips("controls")
    for _ in range(6):
        pace.measured(10.0, 10.0)
    clock.now = 160.0
    assert not pace.skips("cause")


def test_time_before_a_kill_counts(paced):
    make, clock = paced
    first = make(230.0)
    clock.now = 50.0
    first.measured(50.0, 25.0)
    clock.now = 1000.0  # nobody works in between
    second = make(230.0)
    assert second.spent == 50.0
    assert second.slowness == first.slowness == 1.5


@pytest.mark.parametrize("budget", [600.0, 3600.0, 36000.0])
def test_a_plan_keeps_its_budget_and_reaches_as_far_as_it_can(budget):
    frame = Frame(replace(SLOW, per_token=0.001), budget, 8000, controls=CONTROLS)
    plan = make_plan(frame)
    assert plan.total_seconds <= budget
    longer = [length for length in (250, 500, 1000, 2000, 4000, 8000) if length > plan.lengths[-1]]
    for length in longer:
        shortest = frame.plan([1000, length], 20, alphas=plan.alphas, draws=plan.draws, detail=1000)
        assert not frame.fits(shortest)


def test_time_that_is_left_goes_into_more_texts():
    few = make_plan(Frame(SLOW, 4000.0, 500), [500])
    many = make_plan(Frame(SLOW, 16000.0, 500), [500])
    assert few.lengths == many.lengths == (500,)
    assert few.n_texts < many.n_texts


def test_what_the_budget_leaves_out_is_said():
    plan = make_plan(Frame(SLOW, 330.0, 4000, controls=CONTROLS), [250])
    assert plan.alphas == ()
    assert any("steering" in line and "left out" in line for line in describe_plan(plan))


def test_a_budget_that_is_too_small_says_how_much_is_needed():
    with pytest.raises(InputError, match=r"budget of 1 minutes is too small.*about \d+ minutes"):
        make_plan(Frame(SLOW, 60.0, 4000))


def test_lengths_beyond_the_window_are_refused():
    with pytest.raises(InputError, match=r"hold.* at most 4000"):
        make_plan(Frame(SLOW, 1e9, 4000), [8000])


def test_a_plan_survives_its_file():
    plan = make_plan(Frame(SLOW, 1e5, 4000, controls=CONTROLS))
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


# The texts.


def test_a_text_holds_all_its_facts_where_they_are_said_to_be(cells):
    for cell in cells:
        start, end = cell.context.needle_span
        assert cell.context.text[start:end] == cell.needle.sentence
        assert cell.context.text.count(cell.needle.sentence) == 1


def test_questions_about_a_text_share_it(cells):
    for length in (120, 200):
        for text in range(2):
            of_text = [cell for cell in cells if (cell.context_tokens, cell.case) == (length, text)]
            assert len(of_text) == 3
            assert len({cell.context.text for cell in of_text}) == 1
            depths = [cell.context.depth_percent for cell in of_text]
            assert depths == sorted(depths)
            assert all(length - 16 <= cell.context.tokens <= length for cell in of_text)


def test_cells_are_the_same_every_time(model, material, cells):
    config = NeedleConfig(lengths=(120, 200), cases_per_cell=2, needles=material.facts, max_new_tokens=8)
    assert build_cells(model, material, config, 3) == cells


@given(
    words=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8),
    numbers=st.lists(st.integers(0, 8), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_inserting_facts_changes_nothing_else(words, numbers):
    """Facts are inserted after some of the words; the place of a word's end is known by hand."""
    numbers = sorted(min(number, len(words)) for number in numbers)
    facts = [f"Fact {i}." for i in range(len(numbers))]
    places = [len(" ".join(words[:number])) for number in numbers]
    text, spans = insert_sentences(" ".join(words), facts, places)
    assert [text[start:end] for start, end in spans] == facts
    expected: list[str] = []
    for number in range(len(words) + 1):
        expected += [fact for fact, after in zip(facts, numbers, strict=True) if after == number]
        expected += words[number : number + 1]
    assert text == " ".join(expected)


# The controls.


def test_neutral_text_has_as_many_tokens_as_the_template(model, cells):
    config = NeedleConfig(lengths=(120,), max_new_tokens=8)
    matched, template, plain = (
        render_cell(model, cells[0], config, name)
        for name in ("plain+matched+prefix", "template+prefix", "plain+prefix")
    )
    assert matched.n_tokens == template.n_tokens > plain.n_tokens
    assert not matched.templated
    bos = int(plain.role[0] == Role.BOS)
    n = matched.n_tokens - plain.n_tokens
    assert matched.tokens[bos + n :].tolist() == plain.tokens[bos:].tolist()
    assert matched.role[bos + n :].tolist() == plain.role[bos:].tolist()
    assert set(matched.role[bos : bos + n].tolist()) == {int(Role.TEMPLATE)}
    user = matched.role == Role.USER
    said = "".join(np.array(matched.token_strings())[user])
    assert said == "".join(np.array(plain.token_strings())[plain.role == Role.USER])


def test_any_number_of_neutral_tokens_can_be_put_before(model):
    chat = model.render_plain([{"role": "user", "content": "Who is there?"}], add_generation_prompt=True)
    for n in (0, 1, 7, 400):
        longer = put_before(chat, model.tokenizer, n)
        assert longer.n_tokens == chat.n_tokens + n
        assert longer.text.endswith("Who is there?\n")
        assert (np.diff(longer.spans[:, 0]) >= 0).all()


@pytest.mark.parametrize("words", ["template+matched", "plain+nosystem", "plain+bos+nobos", "template+bos"])
def test_controls_that_make_no_sense_are_refused(words):
    with pytest.raises(InputError):
        Condition.parse(words)


def test_controls_are_spelt_once():
    for words in ("plain+matched+prefix", "plain+bos", "template+nosystem+prefix"):
        assert Condition.parse(words).name == words


def test_the_organism_has_a_bos_and_no_default_system_prompt(model):
    assert [one.name for one in find_controls(model)] == ["plain+matched+prefix", "plain+nobos+prefix"]


# Reading.


def test_the_fact_is_read_in_the_same_pass(model, cells):
    """One pass agrees with the two read-outs that it replaces."""
    config = NeedleConfig(lengths=(120,), max_new_tokens=8)
    chat = render_cell(model, cells[1], config, "template+prefix")
    marked = asking.read_with_fact(model, chat, cells[1])
    mask = needle_tokens(chat, cells[1])
    fact = model.read_attention_to([chat], [mask], queries="first_answer")[0]
    np.testing.assert_allclose(marked.share(Role.INDICATOR), fact, atol=1e-6)
    plain = model.read_roles(chat, sinks=True)
    merged = asking.without_fact(marked)
    np.testing.assert_allclose(merged.shares, plain.shares, atol=1e-6)
    np.testing.assert_allclose(merged.resting, plain.resting, atol=1e-6)
    np.testing.assert_array_equal(merged.key_counts, plain.key_counts)


# The whole audit, on four short texts.


@pytest.fixture
def small(monkeypatch):
    """An audit of a few seconds, whatever the budget."""

    def plan(frame, lengths=None):
        made = frame.plan([140], 4, alphas=(0.5, 0.2), draws=1)
        return replace(made, role_texts=4)

    monkeypatch.setattr(run, "make_plan", plan)


def test_an_audit_answers_all_questions_and_goes_on_where_it_stopped(model, small, tmp_path: Path):
    whole = cl.audit(model, budget=1, out=tmp_path / "whole")
    assert [one.claim for one in whole.verdicts] == ["loss", "template", "bias", "cause", "cost"]
    assert {one.verdict for one in whole.verdicts[:4]} == {"inconclusive"}  # four texts decide nothing
    assert "<html" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")[:200]

    class Stop(Exception):
        pass

    def stop_at(limit):
        seen = 0

        def progress(stage, done, total):
            nonlocal seen
            seen += 1
            if seen > limit:
                raise Stop

        return progress

    for limit in (3, 8, 13, 21):
        try:
            cl.audit(model, budget=1, out=tmp_path / "stopped", progress=stop_at(limit))
        except Stop:
            continue
    resumed = cl.audit(model, budget=1, out=tmp_path / "stopped")
    assert resumed.verdicts == whole.verdicts


def test_a_condition_that_is_read_is_not_read_again(model, small, tmp_path, monkeypatch):
    calls, read = [], asking.read_with_fact

    def stopping(*args):
        calls.append(args[2].number)
        if len(calls) == 6:  # the second text of the second condition
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(asking, "read_with_fact", stopping)
    with pytest.raises(KeyboardInterrupt):
        cl.audit(model, budget=1, out=tmp_path / "run")
    cl.audit(model, budget=1, out=tmp_path / "run")
    assert len(calls) == 2 * 4 + 1  # four texts under two conditions, and the one that was stopped


def test_a_model_without_chat_template_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match=r"no chat template.*--chat-template"):
        cl.audit(model, out=tmp_path / "none")


def test_a_refused_audit_leaves_its_folder_free(model, tmp_path):
    with pytest.raises(InputError, match="do not fit"):
        cl.audit(model, out=tmp_path / "run", lengths=[9000])
    assert not (tmp_path / "run").exists()


# The command.


@pytest.mark.parametrize(
    ("text", "minutes"), [("10m", 10), ("90s", 1.5), ("2h", 120), ("5", 5), ("1.5 min", 1.5)]
)
def test_budgets(text, minutes):
    assert parse_budget(text) == pytest.approx(minutes)


@pytest.mark.parametrize("text", ["", "0", "0m", "ten", "-3m", "10d"])
def test_bad_budgets(text):
    with pytest.raises(InputError, match="--budget got"):
        parse_budget(text)


def test_unknown_questions_are_refused():
    assert check_questions("loss, bias") == ("loss", "bias")
    with pytest.raises(InputError, match="--fail-on got gain"):
        check_questions("gain")


def test_the_command_prints_answers_and_json_and_its_exit_code_says_what_failed(small, tmp_path, monkeypatch):
    yes = cl.Verdict(
        "loss", "It does.", cl.stats.Interval(-0.3, -0.4, -0.2, 12), "change", "Yes if it does.", "supported"
    )
    monkeypatch.setattr(run, "answer_loss", lambda *args, **options: yes)
    monkeypatch.setattr(run, "write_report", lambda *args, **options: None)
    command = ["audit", "organism-chat", "--budget", "1m", "-o", str(tmp_path / "run")]
    text = CliRunner().invoke(app, [*command, "--fail-on", "bias"])
    assert text.exit_code == 0, text.output
    assert "loss: YES." in text.stdout
    assert "cause: UNDECIDED." in text.stdout
    assert "report: " in text.stderr
    json_text = CliRunner().invoke(app, [*command, "--json", "--quiet", "--fail-on", "loss"])
    assert json_text.exit_code == 1
    found = json.loads(json_text.stdout)
    assert [one["question"] for one in found["answers"]] == ["loss", "template", "bias", "cause", "cost"]
    assert found["plan"]["lengths"] == [140]
    assert CliRunner().invoke(app, [*command, "--fail-on", "nothing"]).exit_code == 2


def test_the_longest_context_leaves_room_for_the_prefix_that_questions_share(monkeypatch):
    model = load_model("organism-chat", backend="native")
    one = forecast_memory(model, length=250, what="generate")
    for free, longest in ((one.run + one.cache, 250), (one.run + one.cache - 1, 200), (0, 0)):
        monkeypatch.setattr(ready, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(ready, "LADDER", (200, 250, 500))
        assert ready.longest_in_memory(model, 300) == longest
