"""Needle grids: pairs over conditions, resuming, what fails, bad settings."""

import gzip
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
from needle_models import CopyingModel

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError, ModelFailureError, RunExistsError
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import WORDINGS, NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import (
    NEEDLES,
    Needle,
)
from ctxlens.evals.needle.prompts import describe_cell, render_cell
from ctxlens.evals.needle.run import Setting, plan_parts, run_needle, run_settings
from ctxlens.models.attention.steering import Steering
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run

SF = NEEDLES["sf"]


@pytest.fixture
def model(organism_tokenizer):
    return CopyingModel(organism_tokenizer)


HAYSTACK = load_haystack("organism")
CONDITIONS = ("plain+prefix", "template+prefix", "template", "assistant+prefix")
CONFIG = NeedleConfig(
    lengths=(80, 150),
    depths=(0, 50, 100),
    needles=("known", SF),
    conditions=CONDITIONS,
    cases_per_cell=2,
    max_new_tokens=20,
)


def test_conditions_are_pairs_of_the_same_texts(model):
    cells = build_cells(model, CONFIG, HAYSTACK)
    assert [cell.number for cell in cells] == list(range(24))
    assert [c.needle.name for c in cells] == ["known"] * 12 + ["sf"] * 12
    assert [c.case for c in cells[:4]] == [0, 1, 0, 1]
    assert len({c.context.text for c in cells}) == 24
    for cell in cells:
        tokens = len(model.tokenizer(cell.context.text, add_special_tokens=False)["input_ids"])
        assert cell.context_tokens - 20 < tokens == cell.context.tokens <= cell.context_tokens
        chats = {c: render_cell(model, cell, CONFIG, c) for c in CONDITIONS}
        assert all(cell.context.text in chat.text for chat in chats.values())
        for condition in ("plain+prefix", "template+prefix", "template"):
            user = chats[condition].tokens[chats[condition].mask("user")]
            assert user.tolist() == chats["plain+prefix"].tokens[chats["plain+prefix"].mask("user")].tolist()
        for condition in ("plain+prefix", "template+prefix", "assistant+prefix"):
            assert chats[condition].text.endswith(f"\n{cell.needle.prefix}")
        held = chats["assistant+prefix"].response_positions()
        assert len(held) > cell.context.tokens


def test_conditions_without_prefix_end_where_the_answer_begins(organism_tokenizer):
    model = CopyingModel(organism_tokenizer, indicator="[IND]")
    cell = build_cells(model, CONFIG, HAYSTACK)[0]
    question = cell.needle.question
    plain = render_cell(model, cell, CONFIG, "plain").text
    assert plain.endswith(f"{cell.context.text}\n{question}\n")
    assert "<|user|>" not in plain
    held = render_cell(model, cell, CONFIG, "assistant")
    assert held.text.endswith(f"{cell.context.text}\n{question}")
    assert cell.context.text not in held.text[: held.spans[held.response_positions()[0], 0]]
    marked = render_cell(model, cell, CONFIG, Condition(indicator=True, alpha=0.5)).text
    assert f"{question} [IND]" in marked
    assert "[IND]" not in render_cell(model, cell, CONFIG, Condition(alpha=0.5)).text


def test_package_needs_no_torch():
    code = "import sys, ctxlens.evals.needle as n; n.run_settings; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_same_haystack_at_every_depth_of_a_length(model):
    cells = [c for c in build_cells(model, CONFIG, HAYSTACK) if c.needle is SF and c.context_tokens == 150]
    for case in (0, 1):
        texts = {" ".join(c.context.text.replace(SF.sentence, "").split()) for c in cells if c.case == case}
        assert len(texts) == 1
    assert [round(c.context.depth_percent) for c in cells if c.case == 0][::2] == [0, 100]


def test_default_lengths_reach_from_200_to_the_window(organism_tokenizer):
    config = NeedleConfig(lengths=4, depths=1, max_new_tokens=50)
    wide = build_cells(CopyingModel(organism_tokenizer, n_ctx=2000), config, HAYSTACK)
    assert wide[0].context_tokens == 200
    assert 1800 < wide[-1].context_tokens < 1950
    longest = render_cell(CopyingModel(organism_tokenizer, n_ctx=2000), wide[-1], config, "template+prefix")
    assert 1900 < longest.n_tokens <= 1950
    narrow = build_cells(CopyingModel(organism_tokenizer, n_ctx=300), config, HAYSTACK)
    assert narrow[0].context_tokens < 60


@pytest.mark.parametrize("wording", [*WORDINGS, "Text: {context} Q: {question} {unknown}"])
def test_wordings_hold_context_and_question(model, wording):
    config = NeedleConfig(lengths=(60,), depths=(50,), wording=wording)
    braces = Needle("b", "The code of {question} is 42.", "What is the code of {context}?", ("42",))
    cell = build_cells(model, NeedleConfig(**{**vars(config), "needles": (braces,)}), HAYSTACK)[0]
    text = render_cell(model, cell, config, "template+prefix").text
    assert text.count(cell.context.text) == 1
    assert braces.question in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": ()}, "lengths must be"),
        ({"lengths": (0,)}, "lengths must be"),
        ({"lengths": 0}, "lengths must be a whole number of at least 1"),
        ({"depths": (101.0,)}, "depths must be percentages"),
        ({"conditions": ("chat",)}, "unknown word 'chat' in the condition 'chat'; conditions are plain"),
        ({"needles": ("tofu",)}, "unknown needle tofu; choose from sf"),
        ({"needles": (SF, "sf")}, "distinct names, got sf, sf"),
        ({"cases_per_cell": 0}, "cases_per_cell must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"wording": "{context}"}, "unknown wording"),
        ({"lengths": (80, 150, 80)}, "lengths contains 80 twice"),
        ({"depths": (0, 50.0, 50)}, "depths contains 50 twice"),
        ({"conditions": ("template", "template")}, "a condition is given twice: template, template"),
        ({"score": ("likes",)}, "unknown score likes; choose from recall, contains, logprob"),
        ({"score": ()}, "unknown score \\(none\\)"),
        ({"score": ("recall", "recall")}, "score contains recall twice"),
        ({"conditions": ("template+indicator",)}, r"template\+indicator of a needle grid must be without"),
        ({"conditions": ("steered:0.5",)}, r"template\+steered:0.5 of a needle grid must be without"),
        ({"conditions": ()}, "no condition is given"),
        ({"needles": 3}, "needles must be a list, got 3"),
        ({"lengths": 1.5}, "lengths must be a whole number"),
        ({"lengths": True}, "lengths must be a whole number"),
        ({"seed": "x"}, "seed has the value 'x': input should be a valid integer"),
        ({"length": 3}, "unknown key length; expected lengths, depths, needles"),
    ],
)
def test_bad_settings_are_refused_by_name(options, words):
    with pytest.raises(InputError, match=words) as caught:
        NeedleConfig(**options)
    assert str(caught.value).count("\n") == 0


def test_config_reads_spellings_lists_and_single_values():
    config = NeedleConfig(
        lengths=[80, 150], needles="known", conditions="template,plain+prefix", score="logprob"
    )
    assert config.lengths == (80, 150)
    assert config.needles == ("known",)
    assert config.conditions == (Condition(), Condition(template=False, prefix=True))
    assert config.score == ("logprob",)
    assert replace(config, conditions=Condition(prefix=True)).conditions == (Condition(prefix=True),)
    with pytest.raises(InputError, match="cases_per_cell must be"):
        replace(config, cases_per_cell=0)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


def test_config_as_json_values_is_what_manifests_have_always_held():
    config = NeedleConfig(lengths=(80,), depths=(0, 50.0), needles=("known",), conditions=("vanilla",))
    assert config.as_dict() == {
        "lengths": [80], "depths": [0, 50.0], "needles": ["known"], "conditions": ["template"],
        "cases_per_cell": 1, "wording": "bare", "max_new_tokens": 100, "seed": 0,
        "score": ["recall", "contains"],
    }  # fmt: skip
    assert NeedleConfig(**config.as_dict()) == config
    assert NeedleConfig(needles=(SF,)).as_dict()["needles"][0]["prefix"] == SF.prefix


def test_window_too_small_is_refused(organism_tokenizer):
    with pytest.raises(InputError, match="window of 60 tokens is too small for needle 'sf'"):
        build_cells(CopyingModel(organism_tokenizer, n_ctx=60), NeedleConfig(), HAYSTACK)
    config = NeedleConfig(lengths=(100, 400))
    with pytest.raises(
        InputError, match=r"contexts of 400 tokens do not fit: the window of 300 .* at most \d+"
    ):
        build_cells(CopyingModel(organism_tokenizer, n_ctx=300), config, HAYSTACK)


def test_needle_without_prefix_is_refused_where_one_is_needed(model):
    bare = Needle("bare", "Tea is best hot.", "What is best hot?", ("tea",))
    with pytest.raises(InputError, match="needle 'bare' has no prefix"):
        build_cells(model, NeedleConfig(needles=(bare,), lengths=(60,)), HAYSTACK)
    cells = build_cells(
        model, NeedleConfig(needles=(bare,), lengths=(60,), conditions=("template",)), HAYSTACK
    )
    assert len(cells) == 20


def test_copying_model_finds_every_needle(model):
    told = []
    grid = run_needle(model, CONFIG, haystack=HAYSTACK, progress=lambda *at: told.append(at))
    assert len(grid) == 24 * 4
    assert grid.frame["recall"].eq(1).all()
    assert told[-1] == (96, 96)
    known = grid.where(needle="known").frame
    assert known["memory_recall"].eq(0).all()
    assert grid.where(needle="sf").frame["memory_recall"].isna().all()
    assert (grid.frame["prompt_tokens"] > grid.frame["built_context_tokens"]).all()
    assert set(grid.frame["model"]) == {"copier"}
    assert set(grid.frame["heads"]) == {"none"}
    assert grid.recall(condition="template").index.tolist() == list(range(24))


def test_forgetting_model_is_brought_back_by_steering_and_indicator(organism_tokenizer):
    model = CopyingModel(organism_tokenizer, knows="nothing at all", indicator="[IND]")
    config = NeedleConfig(lengths=(60,), depths=(0, 100), max_new_tokens=20)

    def mean(condition, **options):
        grid = run_needle(model, config, haystack=HAYSTACK, **options)
        return grid, grid.recall(condition=condition).mean()

    assert mean("plain+prefix")[1] == 1
    assert mean("template+prefix")[1] == 0
    steered, recall = mean("template+prefix", steering=Steering(0.05), label="steered")
    assert recall == 1
    assert set(steered.frame["alpha"]) == {0.05}
    assert set(steered.frame["heads"]) == {"all"}
    assert set(steered.frame["model"]) == {"steered"}
    assert model.steered == []
    marked, recall = mean("template+prefix", indicator=True)
    assert recall == 1
    assert marked.frame["indicator"].all()
    assert " [IND]" in model.batches[-1][0]


def test_indicator_without_token_is_refused(model):
    with pytest.raises(InputError, match="copier has no indicator token"):
        run_needle(model, CONFIG, haystack=HAYSTACK, indicator=True)


def test_longest_prompts_are_asked_first(model):
    run_needle(model, CONFIG, haystack=HAYSTACK, batch_tokens=1000)
    assert sum(map(len, model.batches)) == 96
    longest = [max(map(len, batch)) for batch in model.batches]
    assert min(longest[:6]) > max(longest[6:])  # 3 ways to begin x 2 cases of 150 tokens, then of 80


def open_run(folder, **options):
    return Run.open(folder, study="needle", config=CONFIG.as_dict(), **options)


def test_stopped_run_goes_on_and_ends_the_same(organism_tokenizer, tmp_path):
    options = {"haystack": HAYSTACK, "batch_tokens": 1000}
    straight = CopyingModel(organism_tokenizer)
    run_needle(straight, CONFIG, out=open_run(tmp_path / "a"), **options)
    stopped = CopyingModel(organism_tokenizer, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_needle(stopped, CONFIG, out=open_run(tmp_path / "b"), **options)
    assert not (tmp_path / "b" / "needle.parquet").exists()
    resumed = CopyingModel(organism_tokenizer)
    grid = run_needle(resumed, CONFIG, out=open_run(tmp_path / "b"), **options)
    assert stopped.batches + resumed.batches == straight.batches
    for name in ("needle.parquet", "needle-cells.jsonl.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "manifest.json", "needle-cells.jsonl.gz", "needle.parquet",
    ]  # fmt: skip
    again = run_needle(
        CopyingModel(organism_tokenizer, stop_after=0), CONFIG, out=open_run(tmp_path / "b"), **options
    )
    assert again.frame.equals(grid.frame)
    assert NeedleGrid.load(tmp_path / "b" / "needle.parquet").frame.equals(grid.frame)


def test_saved_cells_say_what_was_built(model, tmp_path):
    grid = run_needle(model, CONFIG, haystack=HAYSTACK, out=open_run(tmp_path), name="stages/grid.parquet")
    lines = gzip.decompress((tmp_path / "stages" / "grid-cells.jsonl.gz").read_bytes()).decode().splitlines()
    cells = [json.loads(line) for line in lines]
    assert len(cells) == 24
    assert cells[0]["needle"]["sentence"] in cells[0]["context"]["text"]
    assert grid.meta["haystack"] == "organism"
    assert grid.meta["config"]["seed"] == 0


def test_parts_of_an_overwritten_run_are_not_used(organism_tokenizer, tmp_path):
    stopped = CopyingModel(organism_tokenizer, stop_after=1)
    run = open_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_needle(stopped, CONFIG, haystack=HAYSTACK, out=run, batch_tokens=1000)
    fresh = Run(tmp_path, {**run.manifest, "created": "another time"})
    model = CopyingModel(organism_tokenizer)
    run_needle(model, CONFIG, haystack=HAYSTACK, out=fresh, batch_tokens=1000)
    assert sum(map(len, model.batches)) == 96


def test_another_grid_of_the_same_name_is_refused(model, tmp_path):
    run = open_run(tmp_path)
    run_needle(model, CONFIG, haystack=HAYSTACK, out=run)
    with pytest.raises(RunExistsError, match="already holds another needle grid"):
        run_needle(model, CONFIG, haystack=HAYSTACK, out=run, steering=Steering(0.5))


def test_probability_of_the_needle_needs_no_response(model):
    config = replace(CONFIG, needles=(SF,), score=("logprob",), max_new_tokens=400)
    grid = run_needle(model, config, haystack=HAYSTACK)
    assert model.batches == []
    assert grid.scores == ("needle_logprob",)
    assert grid.frame["response"].isna().all()
    assert grid.silent.empty
    words = SF.answer.split()
    answer = len(model.tokenizer(f" {SF.answer}", add_special_tokens=False)["input_ids"])
    assert answer >= len(words)
    for condition in CONDITIONS:
        chat = render_cell(
            model, build_cells(model, config, HAYSTACK)[0], config, condition, answer=SF.sentence
        )
        tokens = len(chat.response_positions())
        mean = -(tokens - answer + 1 + tokens) / 2  # of minus the numbers of the answer's tokens
        row = grid.where(condition=condition, cell=0).frame.iloc[0]
        assert row["needle_logprob"] == pytest.approx(mean)


def test_cell_that_fails_is_recorded_and_the_others_are_answered(organism_tokenizer, tmp_path):
    poison = Needle("poison", "The gate code of Brindlemoor is 4711.", "What is the gate code?", ("4711",))
    config = replace(CONFIG, needles=(SF, poison), score=("recall", "contains", "logprob"))
    model = CopyingModel(organism_tokenizer, fails_on="Brindlemoor")
    grid = run_needle(model, config, haystack=HAYSTACK, out=open_run(tmp_path))
    assert set(grid.failed["needle"]) == {"poison"}
    assert len(grid.failed) == len(grid) / 2
    assert set(grid.failed["error"]) == {"RuntimeError: no Brindlemoor please"}
    assert grid.failed[["recall", "contains", "needle_logprob"]].isna().all(axis=None)
    assert grid.where(needle="sf").frame[["recall", "contains"]].eq(1).all(axis=None)
    assert grid.mean(grid.recall(condition="template")).estimate == 1


def test_model_that_always_fails_ends_the_run(organism_tokenizer, tmp_path):
    model = CopyingModel(organism_tokenizer, fails_on="e")
    with pytest.raises(
        ModelFailureError, match=r"failed on each of the first \d+ cells \(RuntimeError: no e"
    ):
        run_needle(model, CONFIG, haystack=HAYSTACK, out=open_run(tmp_path))
    cured = CopyingModel(organism_tokenizer)
    grid = run_needle(cured, CONFIG, haystack=HAYSTACK, out=open_run(tmp_path))
    assert grid.failed.empty


def test_model_without_a_word_has_recall_0(organism_tokenizer):
    model = CopyingModel(organism_tokenizer, knows=" ")
    grid = run_needle(model, replace(CONFIG, conditions=("template+prefix",)), haystack=HAYSTACK)
    assert len(grid.silent) == len(grid) == 24
    assert grid.frame["recall"].eq(0).all()
    assert grid.failed.empty


def test_parts_keep_what_begins_alike_together(model):
    cells = build_cells(model, CONFIG, HAYSTACK)
    jobs = [(cell, condition) for cell in cells for condition in CONFIG.conditions]
    parts = plan_parts(jobs, CONFIG, 1)
    assert sorted(index for part in parts for index in part) == list(range(96))
    keys = [
        {(c.context_tokens, c.case, o.template, o.context_in) for c, o in map(jobs.__getitem__, part)}
        for part in parts
    ]
    assert all(len(key) == 1 for key in keys)
    assert len(set.union(*keys)) == len(parts) == 12
    assert [len(part) for part in plan_parts(jobs, CONFIG, 10**6)] == [96]


def test_several_settings_measure_more_once_each(organism_tokenizer, tmp_path):
    model = CopyingModel(organism_tokenizer, knows="no", indicator="[IND]")
    config = NeedleConfig(lengths=(60,), depths=(0, 100), conditions=("template+prefix",), max_new_tokens=20)
    cells = build_cells(model, config, HAYSTACK)
    settings = [Setting("a"), Setting("a", indicator=True)]
    grid = run_settings(
        model, cells, config, settings, measure=lambda s: {"cost": 2.0 if s.indicator else 1.0},
        out=open_run(tmp_path),
    )  # fmt: skip
    assert grid.frame["cost"].tolist() == [1, 1, 2, 2]
    assert grid.frame["recall"].tolist() == [0, 0, 1, 1]


def test_dry_run_shows_the_whole_prompt(model):
    cell = build_cells(model, CONFIG, HAYSTACK)[1]
    text = describe_cell(model, cell, CONFIG, "template+prefix")
    assert cell.context.text in text
    assert "<|assistant|>" in text
    assert f"{cell.context.tokens} tokens (80 requested)" in text
    assert ", ".join(cell.needle.keywords) in text


def test_essays_and_a_real_tokenizer(test_data):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(test_data / "stories260K" / "hf")
    haystack = load_haystack(test_data / "paul_graham")
    model = CopyingModel(tokenizer)
    config = NeedleConfig(
        lengths=(200, 440),
        depths=(0, 50, 100),
        needles=("sf",),
        conditions=("plain+prefix",),
        max_new_tokens=10,
    )
    cells = build_cells(model, config, haystack)
    assert len(cells) == 2 * 3
    for cell in cells:
        assert cell.context_tokens - max(16, 0.05 * cell.context_tokens) <= cell.context.tokens
        assert cell.context.tokens <= cell.context_tokens
        assert abs(cell.context.depth_percent - cell.depth_percent) < 30  # half a long sentence
        start, end = cell.context.needle_span
        assert cell.context.text[start:end] == SF.sentence
    assert run_needle(model, config, haystack=haystack).frame["recall"].eq(1).all()
