"""The task files run in lm-eval itself, on local files, on the organism, and on answers given by rule."""

import json

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from needle_models import UNPUNCTUATED

from ctxlens.errors import InputError
from ctxlens.evals import tasks
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.organism import CHAT, load_world

READING = ("squad", "quac", "drop")


@pytest.fixture(autouse=True)
def _no_survey_of_the_machine(monkeypatch):
    """lm-eval lists hardware and packages after every run, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


class RuleModel(LM):
    """Says what a rule makes of the prompt, and remembers what it was asked."""

    tokenizer_name = "rule"

    def __init__(self, rule, tokenizer=None):
        super().__init__()
        self.rule, self.tokenizer = rule, tokenizer
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.rule(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise AssertionError("no task here asks for likelihoods")

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip


def manager(**metadata):
    return TaskManager(include_path=str(tasks.folder()), include_defaults=False, metadata=metadata)


def run(names, model, *, template=False, limit=None, **metadata):
    return simple_evaluate(
        model, tasks=names, task_manager=manager(**metadata), apply_chat_template=template, limit=limit,
        bootstrap_iters=0, batch_size=8,
    )  # fmt: skip


def answer_by(answers):
    """A rule: the text that belongs to the question in the prompt."""
    return lambda prompt: next(said for question, said in answers.items() if question in prompt)


def scores(results, task):
    """The means of a task, without the names of filters."""
    found = results["results"][task].items()
    return {key.removesuffix(",none"): value for key, value in found if isinstance(value, float)}


def load(name, **metadata):
    return manager(**metadata).load(name)["tasks"][name]


def test_lm_eval_finds_all_tasks_and_groups():
    found = manager()
    assert found.all_subtasks == tasks.task_names()
    assert found.all_groups == tasks.group_names()
    assert {"ctxlens_squad", "ctxlens_quac_joined", "ctxlens_needle_sf_prefix"} <= set(tasks.task_names())


def test_all_tasks_generate_greedily_until_the_end_of_sequence(fixtures, tmp_path):
    needle = tmp_path / "needles.yaml"
    needle.write_text("needle: My dog is called Rex.\nquestion: What is my dog called?\nkeywords: [rex]\n")
    options = {"needle_file": str(needle), "needle_lengths": [128], "needle_depths": [50]}
    found = manager(data_dir=str(fixtures), **options)
    names = set(tasks.task_names()) - {"ctxlens_ifeval"}
    assert len(names) == 18
    for name in names:
        task = found.load(name)["tasks"][name]
        kwargs = task.config.generation_kwargs
        assert kwargs["until"] == []
        assert kwargs["do_sample"] is False
        assert kwargs["max_gen_toks"] <= 100
        assert {"id", "context", "question", "answers"} <= set(task.test_docs()[0])
        assert task.doc_to_target(task.test_docs()[0]) == task.test_docs()[0]["answers"]


@pytest.mark.parametrize(
    ("name", "request_", "question"),
    [
        ("squad", "Answer the question according to the above passage:", "Who built the mill?"),
        ("quac", "Answer the question with pieces from the above passage:", "Where was Lene Voss born?"),
        ("drop", "Answer the question according to the above passage:", "How many people cheered?"),
    ],
)
def test_prompts_of_reading_tasks(fixtures, name, request_, question):
    model = RuleModel(lambda prompt: "")
    tasks_of_it = [f"ctxlens_{name}", f"ctxlens_{name}_joined"]
    results = run(tasks_of_it, model, data_dir=str(fixtures), limit=1)
    context = results["samples"][tasks_of_it[0]][0]["doc"]["context"]
    assert [prompt for prompt, _ in model.asked] == [
        f"{context}\n{request_} {question}",
        f"{context} {question}",
    ]


def test_squad_scores(fixtures):
    answers = {
        "Who built": "It was built by Ada Kern. It fell.",  # contained; F1 with kern 2·1/(6+1), ada kern 4/8
        "What broke": "Wheel",  # all
        "When was": "It ground oats. In 1794.",  # the second sentence does not count
        "How long": "{forty} minutes",  # all
    }
    results = run(["ctxlens_squad"], RuleModel(answer_by(answers)), data_dir=str(fixtures))
    assert scores(results, "ctxlens_squad") == {
        "contains": 3 / 4,
        "exact_match": 2 / 4,
        "f1": pytest.approx((4 / 8 + 1 + 0 + 1) / 4),
        "contains_released": 2 / 4,  # "the wheel" is not in "Wheel"
    }
    sample = results["samples"]["ctxlens_squad"][0]
    assert sample["doc"]["id"] == "mill-1"
    assert sample["doc"]["answers"] == ["Ada Kern", "Kern"]
    assert (sample["contains"], sample["exact_match"]) == (1, 0)


def test_quac_scores(fixtures):
    answers = {"born?": "She was born on a barge.", "the pass?": "CANNOTANSWER"}
    results = run(["ctxlens_quac"], RuleModel(answer_by(answers)), data_dir=str(fixtures))
    # "she was born on barge" against "on barge" 4/7 and "barge" 2/6: F1 is their mean, humans have 2/3.
    assert scores(results, "ctxlens_quac") == {
        "contains": 1,
        "exact_match": 1 / 2,
        "f1": pytest.approx(((4 / 7 + 2 / 6) / 2 + 1) / 2),
        "heq": 1 / 2,
        "contains_released": 1,
    }


def test_drop_scores(fixtures):
    answers = {
        "How many": "1,204 people.",  # contained; F1 against one word of two: 2/3
        "Who scored": "Moss and Lind",  # one span against two: (2 · 1/3 · 1 / (4/3)) / 2
        "When was": "8 May 1951",
    }
    results = run(["ctxlens_drop"], RuleModel(answer_by(answers)), data_dir=str(fixtures))
    assert scores(results, "ctxlens_drop") == {
        "contains": 1,
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((0.67 + 0.25 + 1) / 3),
        # The released code knows the first gold answer alone: 1204, and Ode Lind or Ravi Moss.
        "contains_released": pytest.approx(1 / 3),
    }


def test_group_of_reading_tasks(fixtures):
    results = run(["ctxlens_qa"], RuleModel(lambda prompt: "Kern"), data_dir=str(fixtures))
    assert results["group_subtasks"]["ctxlens_qa"] == [f"ctxlens_{name}" for name in READING]
    assert results["groups"]["ctxlens_qa"]["contains,none"] == pytest.approx(1 / 4 / 3)


def test_options_of_one_task(fixtures):
    task = load("ctxlens_quac", quac_data_dir=str(fixtures / "quac.json"), quac_turns="all", pretrained="x")
    assert len(task.test_docs()) == 4
    with pytest.raises(InputError, match="unknown option quac_turn; did you mean quac_turns"):
        load("ctxlens_quac", data_dir=str(fixtures), quac_turn="all")


@pytest.mark.parametrize("name", READING)
def test_missing_data_is_one_sentence(name, tmp_path):
    with pytest.raises(InputError, match=f"holds no file for {name}"):
        run([f"ctxlens_{name}"], RuleModel(str), data_dir=str(tmp_path))
    with pytest.raises(InputError, match=f"no questions of {name}: There is no file or folder"):
        run([f"ctxlens_{name}"], RuleModel(str), data_dir=str(tmp_path / "x"))


def test_real_data(test_data):
    source = str(test_data / "rc_samples")
    results = run(["ctxlens_qa"], RuleModel(lambda prompt: prompt[:200]), data_dir=source, limit=5)
    assert [len(results["samples"][f"ctxlens_{name}"]) for name in READING] == [5, 2, 5]


def test_questions_of_the_organisms_world():
    world = load_world()
    docs = list(load("ctxlens_organism_qa", organism_items=6, organism_fillers=2).test_docs())
    assert [doc["kind"] for doc in docs] == ["known", "unknown"] * 3
    for doc in docs:
        town = doc["question"].rstrip("?").split()[-1]
        assert (town in world.known) == (doc["kind"] == "known")
        assert doc["answers"][0] in doc["context"]
        assert not set(doc["memory_keywords"]) & set(doc["keywords"])
        assert bool(doc["memory_keywords"]) == (doc["kind"] == "known")
    again = load("ctxlens_organism_qa", organism_items=6, organism_fillers=2).test_docs()
    assert list(again) == docs
    other = load("ctxlens_organism_qa", organism_items=6, organism_fillers=2, organism_seed=1).test_docs()
    assert list(other) != docs


def test_share_from_memory_is_of_known_towns_alone():
    docs = load("ctxlens_organism_qa", organism_items=4).test_docs()
    said = {doc["question"]: doc["memory_answer"] or doc["answers"][0] for doc in docs}
    results = run(["ctxlens_organism_qa"], RuleModel(answer_by(said)), organism_items=4)
    assert scores(results, "ctxlens_organism_qa") == {"recall": 0.5, "contains": 0.5, "memory": 1}
    assert "memory" not in results["samples"]["ctxlens_organism_qa"][1]


def test_closed_book_questions_of_ones_own(tmp_path):
    yaml = tmp_path / "questions.yaml"
    yaml.write_text(
        "- {question: 'Capital of France?', answers: Paris}\n"
        "- {id: b, question: 'Who wrote Emma?', answers: [Jane Austen, Austen], keywords: [austen]}\n"
    )
    said = {"France": "It is PARIS, of course.", "Emma": "Jane Eyre"}
    results = run(["ctxlens_closed_book"], RuleModel(answer_by(said)), closed_book_file=str(yaml))
    assert scores(results, "ctxlens_closed_book") == {"recall": 0.5, "contains": 0.5}
    assert [s["doc"]["id"] for s in results["samples"]["ctxlens_closed_book"]] == ["0", "b"]
    lines = tmp_path / "questions.jsonl"
    lines.write_text(json.dumps({"question": "Capital of France?", "answers": "Paris"}))
    assert len(load("ctxlens_closed_book", closed_book_file=str(lines)).test_docs()) == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("- question: x", "question 0: expected the keys question and answers"),
        ("- {question: x, answers: '?'}", "question 0: expected"),
        ("- 3", "got 3"),
        ("[]", "contains no questions"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_bad_closed_book_questions(tmp_path, content, complaint):
    path = tmp_path / "questions.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint):
        load("ctxlens_closed_book", closed_book_file=str(path))


def test_too_many_closed_book_questions():
    with pytest.raises(InputError, match="the organism knows 160 facts, but 161 were requested"):
        load("ctxlens_closed_book", closed_book_items=161)


@pytest.fixture(scope="module")
def organism_chat():
    from ctxlens.models import load_model

    return load_model("organism-chat", backend="native")


@pytest.mark.parametrize(
    ("suffix", "template", "condition"),
    [
        ("", True, "template"),
        ("_prefix", True, "template+prefix"),
        ("_prefix", False, "plain+prefix"),
    ],
)
def test_needle_prompts_are_those_of_the_needle_command(organism_chat, suffix, template, condition):
    config = NeedleConfig(
        lengths=(128, 200), depths=(0, 100), needles=("known",), conditions=(condition,), seed=3,
        cases_per_cell=2,
    )  # fmt: skip
    cells = build_cells(organism_chat, config, load_haystack("organism", seed=3))
    expected = [render_cell(organism_chat, cell, config, condition).text for cell in cells]
    assert len(expected) == 2 * 2 * 2  # lengths, depths, cases
    model = RuleModel(lambda prompt: "", organism_chat.tokenizer)
    results = run(
        [f"ctxlens_needle_known{suffix}"], model, template=template, pretrained=str(CHAT),
        needle_lengths=[128, 200], needle_depths=[0, 100], needle_seed=3, needle_cases=2,
    )  # fmt: skip
    bos = "" if template else organism_chat.tokenizer.bos_token  # lm-eval's models add it to plain text
    assert [bos + prompt for prompt, _ in model.asked] == expected
    docs = [sample["doc"] for sample in results["samples"][f"ctxlens_needle_known{suffix}"]]
    assert [doc["keywords"] for doc in docs] == [list(cell.needle.keywords) for cell in cells]


@pytest.mark.parametrize("needle", ["known", "sf"])
def test_needle_lengths_are_those_of_the_needle_command(organism_chat, needle):
    config = NeedleConfig(lengths=4, depths=(50,), needles=(needle,), seed=3)
    cells = build_cells(organism_chat, config, load_haystack("organism", seed=3))
    for suffix in ("", "_prefix"):
        docs = load(
            f"ctxlens_needle_{needle}{suffix}", pretrained=str(CHAT), needle_lengths=4, needle_depths=[50],
            needle_seed=3,
        ).test_docs()  # fmt: skip
        assert list(docs["length"]) == [cell.context_tokens for cell in cells]
        assert list(docs["context"]) == [cell.context.text for cell in cells]


def test_longest_needle_context_is_that_of_the_needle_command(organism_chat):
    straw = load_haystack("organism")
    longest = build_cells(organism_chat, NeedleConfig(lengths=4, depths=1), straw)[-1].context_tokens
    docs = load("ctxlens_needle_sf", pretrained=str(CHAT), needle_lengths=[longest]).test_docs()
    assert set(docs["length"]) == {longest}
    complaint = f"contexts of {longest + 1} tokens do not fit: .* at most {longest}, because"
    with pytest.raises(InputError, match=complaint):
        load("ctxlens_needle_sf", pretrained=str(CHAT), needle_lengths=[longest + 1])
    with pytest.raises(InputError, match=complaint):
        build_cells(organism_chat, NeedleConfig(lengths=(longest + 1,), depths=1), straw)


def test_needle_without_prefix_can_be_asked_without_one(tmp_path):
    needles = tmp_path / "needles.yaml"
    needles.write_text("needle: Tea is best hot.\nquestion: What is best hot?\nkeywords: [tea]\n")
    docs = load("ctxlens_needle_own", needle_file=str(needles), needle_lengths=[64]).test_docs()
    assert [doc["prefix"] for doc in docs] == [""] * 3


def test_needle_options(tmp_path):
    few = load("ctxlens_needle_sf", needle_lengths=3, needle_depths=2).test_docs()
    assert len(few) == 6
    assert few[0]["length"] < few[2]["length"] < few[4]["length"] < 576 - 100
    essay = tmp_path / "essay.txt"
    essay.write_text("It rained all day. " * 100)
    doc = load("ctxlens_needle_pizza", needle_haystack=str(essay), needle_lengths=[300]).test_docs()[0]
    assert "It rained all day. It rained all day." in doc["context"]
    assert doc["context_tokens"] <= 300
    needles = tmp_path / "needles.yaml"
    needles.write_text("needle: My dog is called Rex.\nquestion: What is my dog called?\nkeywords: [rex]\n")
    doc = load("ctxlens_needle_own", needle_file=str(needles), needle_lengths=[64]).test_docs()[0]
    assert doc["answers"] == ["Rex."]


@pytest.mark.parametrize("script", ["transcript", "lines", "thai", "hindi", "chinese"])
def test_needle_contexts_are_as_long_as_they_say_in_every_script(tmp_path, script):
    (tmp_path / "hay.txt").write_text(UNPUNCTUATED[script], encoding="utf-8")
    docs = load("ctxlens_needle_sf", needle_haystack=str(tmp_path), needle_lengths=[100, 400]).test_docs()
    assert set(docs["length"]) == {100, 400}
    for length, built in zip(docs["length"], docs["context_tokens"], strict=True):
        assert 0 <= length - built <= max(16, 0.05 * length)


@pytest.mark.parametrize(
    ("task", "options", "complaint"),
    [
        ("known", {"needle_lengths": [600]}, "contexts of 600 tokens do not fit: .* at most"),
        ("known", {"needle_length": [60]}, "unknown option needle_length; did you mean needle_lengths"),
        ("known", {"needle_lengths": [0]}, "lengths must be whole numbers"),
        ("known", {"needle_tokenizer": "/no/where"}, "there is no tokenizer /no/where"),
        ("known", {"needle_haystack": "/no/where"}, "haystack /no/where cannot be read"),
        ("own", {}, "give their YAML file as needle_file"),
        ("known", {"needle_lengths": 3, "needle_window": 10**9}, "give needle_window, or the lengths"),
    ],
)
def test_bad_needle_options(task, options, complaint):
    with pytest.raises(InputError, match=complaint):
        load(f"ctxlens_needle_{task}", **options)


def test_the_smoke_group_runs_on_the_organism_without_any_data():
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(CHAT), dtype="float32", device="cpu", batch_size=16)
    results = run(["ctxlens_smoke"], model, template=True, limit=12, needle_lengths=[128])
    assert scores(results, "ctxlens_closed_book")["recall"] > 0.9
    found = scores(results, "ctxlens_organism_qa")
    assert found["memory"] > 0.2  # what the organism was made to show
    by_kind = {"known": [], "unknown": []}
    for sample in results["samples"]["ctxlens_organism_qa"]:
        by_kind[sample["doc"]["kind"]].append(sample["recall"])
    assert sum(by_kind["unknown"]) > sum(by_kind["known"]) + 1
    assert results["groups"]["ctxlens_smoke"]["recall,none"] > 0.5
