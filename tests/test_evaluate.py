"""Evaluation through lm-eval on the embedded model: rows, pairs, resume, processes, and the command."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import call

from ctxlens.errors import InputError, RunExistsError
from ctxlens.evals.harness import (
    CtxlensLM,
    check_names,
    first_prompts,
    load_tasks,
    parse_conditions,
    run_evaluation,
)
from ctxlens.evals.harness import require as require_lm_eval
from ctxlens.evals.harness.samples import says_nothing
from ctxlens.evals.harness.tasks import _read_lm_eval_names
from ctxlens.models import Model, load_model
from ctxlens.models.indicator_token import add_indicator
from ctxlens.processes import ALONE, Processes
from ctxlens.results import Evaluation
from ctxlens.runs import Run

FIXTURES = Path(__file__).parent / "fixtures" / "qa"
TASK = """
task: pets
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}\\n{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
DOCS = [
    {"context": "Tom has a cat.", "question": "What has Tom?", "choices": ["a cat", "a dog"], "label": 0},
    {"context": "Tom has a cat.", "question": "Who has a cat?", "choices": ["Ann", "Tom"], "label": 1},
    {"context": "Ann has a dog.", "question": "What has Ann?", "choices": ["a cat", "a dog"], "label": 1},
]


@pytest.fixture(scope="module")
def chat_model():
    return load_model("organism-chat", backend="native", device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A folder with a task of each kind."""
    place = tmp_path / "my tasks"
    place.mkdir()
    file = place / "pets.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    chosen = TASK.format(
        file=file, kind="multiple_choice", target="label", more='doc_to_choice: "{{choices}}"', metric="acc"
    )
    (place / "choose.yaml").write_text(chosen.replace("task: pets", "task: pets_choose"))
    written = TASK.format(
        file=file, kind="generate_until", target='"{{choices[label]}}"',
        more="generation_kwargs: {until: [], max_gen_toks: 6}", metric="exact_match",
    )  # fmt: skip
    (place / "write.yaml").write_text(written.replace("task: pets", "task: pets_write"))
    return place


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("plain", ["plain"]),
        ("plain+prefix,template+prefix", ["plain+prefix", "template+prefix"]),
        ("vanilla,indicator", ["template", "template+indicator"]),  # as earlier versions spelled them
        (["template+steered:0.95", "plain+steered:share=0.5"],
         ["template+steered:0.95", "plain+steered:share=0.5"]),
        ("template+indicator+steered:0.5:1.2/3.0", ["template+indicator+steered:0.5:1.2/3.0"]),
    ],
)  # fmt: skip
def test_conditions_are_read_from_words(words, names):
    assert [condition.name for condition in parse_conditions(words)] == names


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("vanila", "unknown word 'vanila' in the condition 'vanila'; conditions are plain"),
        ("vanilla,template", "given twice"),
        (" , ", "no condition is given"),
        ("assistant", "'assistant' is for needles only"),
        ("template+steered:0.5:retrieval", "the retrieval heads depend on a model"),
        ("template+steered:0.5:1.x", "heads '1.x' cannot be read"),
    ],
)
def test_conditions_that_tasks_cannot_be_asked_under_are_refused(words, complaint):
    with pytest.raises(InputError, match=complaint):
        parse_conditions(words)


def test_every_combination_has_its_rows(chat_model, folder):
    found = run_evaluation(
        [chat_model], ["pets_write", "pets_choose"], "plain,template+steered:0.3", include_path=folder
    )
    assert len(found) == 2 * 2 * 3
    assert found.variants == (("organism-chat", "plain"), ("organism-chat", "template+steered:0.3"))
    assert found.metrics("pets_write") == ("exact_match",)
    assert "acc" in found.metrics("pets_choose")
    first = found.where(task="pets_write", condition="plain").frame.iloc[0]
    assert first["prompt"] == "Tom has a cat.\nWhat has Tom?"
    assert first["gold"] == "a cat"
    chat = CtxlensLM(chat_model, processes=ALONE).prompts.chat(first["prompt"])
    assert first["response"] == chat_model.generate(chat, max_new_tokens=6)
    steered = found.where(task="pets_write", condition="template+steered:0.3").frame.iloc[0]
    chat = chat_model.render([{"role": "user", "content": first["prompt"]}], add_generation_prompt=True)
    assert steered["prompt"] == chat.text
    with chat_model.steer(0.3):
        assert steered["response"] == chat_model.generate(chat, max_new_tokens=6)
    chosen = found.where(task="pets_choose", condition="plain").frame
    assert set(chosen["response"]) <= {"a cat", "a dog", "Tom", "Ann"}
    assert chosen["gold"].tolist() == ["a cat", "Tom", "a dog"]
    right = chosen["response"] == chosen["gold"]
    assert len(right) == 3
    assert right.astype(float).tolist() == chosen["acc"].tolist()
    contexts = found.frame["context"]
    assert contexts[0] == contexts[1] != contexts[2]
    assert found.mean("pets_write", "exact_match", found.variants[0]).n == 2


def test_answers_begin_with_a_prefix(chat_model, folder):
    """Without template on a line of its own, with it in the assistant's turn; then the model goes on."""
    found = run_evaluation(
        [chat_model], ["pets_write", "pets_choose"], "plain+prefix,template+prefix,template",
        include_path=folder, limit=1, answer_prefix="It is",
    )  # fmt: skip
    user = [{"role": "user", "content": "Tom has a cat.\nWhat has Tom?"}]
    begun = chat_model.render([*user, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    chats = {
        "plain+prefix": CtxlensLM(chat_model, processes=ALONE).prompts.chat(user[0]["content"] + "\nIt is"),
        "template+prefix": begun,
        "template": chat_model.render(user, add_generation_prompt=True),
    }
    for condition, chat in chats.items():
        [row] = found.where(task="pets_write", condition=condition).frame.to_dict("records")
        assert row["prompt"] == chat.text
        cut = []
        assert row["response"] == chat_model.generate(chat, max_new_tokens=6, on_cut=cut.append)
        assert row["cut"] == bool(cut)
    assert begun.text.endswith("It is")
    [chosen] = found.where(task="pets_choose", condition="plain+prefix").frame.to_dict("records")
    assert chosen["prompt"].endswith("\nIt is")
    assert found.meta["answer_prefix"] == "It is"
    assert not found.frame["cut"][found.frame["task"] == "pets_choose"].any()


def test_a_prefix_without_text_is_refused(chat_model, folder):
    with pytest.raises(InputError, match="the answer prefix has no text"):
        run_evaluation([chat_model], ["pets_write"], "plain+prefix", include_path=folder, answer_prefix=" ")


def test_examples_are_the_same_under_every_condition_and_about_other_texts(chat_model, folder):
    """The last documents about other texts: for the questions about Tom, the one about Ann."""
    options = {"include_path": folder, "num_fewshot": 1, "answer_prefix": "So:"}
    conditions = "plain,template,plain+prefix"
    found = run_evaluation([chat_model], ["pets_write"], conditions, **options)
    prompts = {name: list(rows["prompt"]) for name, rows in found.frame.groupby("condition")}
    ann, tom = "Ann has a dog.\nWhat has Ann?", "Tom has a cat.\nWhat has Tom?"
    assert prompts["plain"][0] == f"{ann} a dog\n\n{tom}"
    assert prompts["plain"][2] == f"Tom has a cat.\nWho has a cat? Tom\n\n{ann}"
    assert prompts["plain+prefix"][0] == f"{ann}\nSo: a dog\n\n{tom}\nSo:"
    turns = [("user", ann), ("assistant", "a dog"), ("user", tom)]
    asked = chat_model.render(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True
    )
    assert prompts["template"][0] == asked.text
    assert found.meta["num_fewshot"] == 1
    shared = run_evaluation([chat_model], ["pets_write"], "plain", limit=1, **options)
    assert shared.frame["prompt"][0] == prompts["plain"][0]  # whatever other questions are asked


def test_too_few_texts_for_the_examples_and_tasks_without_examples_are_refused(chat_model, folder):
    with pytest.raises(InputError, match=r"only 1 other texts for 2 examples \(--num-fewshot\)"):
        run_evaluation([chat_model], ["pets_write"], "plain", include_path=folder, num_fewshot=2)
    file = folder / "write.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    with pytest.raises(InputError, match="pets_write is defined to be asked without examples"):
        load_tasks(["pets_write"], include_path=folder, num_fewshot=1)


def test_a_task_whose_answers_have_a_beginning_keeps_it(chat_model):
    options = {"metadata": {"needle_lengths": [64], "needle_depths": [0]}}
    tasks = ["ctxlens_needle_known_prefix"]
    shown = first_prompts(chat_model, tasks, "template,template+prefix", **options)
    assert shown[0][2] == shown[1][2]
    assert "Answer:" not in shown[1][2]


@pytest.mark.parametrize(
    ("response", "nothing"),
    [
        ("", True),
        (" \n", True),
        ("\nA:", True),
        ("Answer: ", True),
        ("A", False),
        ("A: x", False),
        ("0", False),
    ],
)
def test_an_answer_that_is_only_a_label_says_nothing(response, nothing):
    assert says_nothing(response) == nothing


def test_lm_evals_own_figures_are_the_means(chat_model, monkeypatch):
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # takes long

    lm = CtxlensLM(chat_model, processes=ALONE)
    tasks = load_tasks(["ctxlens_closed_book"])
    theirs = evaluator.simple_evaluate(
        lm,
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=6,
        apply_chat_template=True,
        bootstrap_iters=0,
    )["results"]["ctxlens_closed_book"]
    found = run_evaluation([chat_model], ["ctxlens_closed_book"], limit=6)
    for metric in ("recall", "contains"):
        mean = found.mean("ctxlens_closed_book", metric, found.variants[0]).estimate
        assert mean == pytest.approx(theirs[f"{metric},none"])


def test_prompts_that_do_not_fit_are_cut_and_counted(chat_model):
    found = run_evaluation([chat_model], ["ctxlens_organism_qa"], limit=2, metadata={"organism_fillers": 60})
    assert found.frame["truncated"].tolist() == [True, True]
    assert not run_evaluation([chat_model], ["ctxlens_organism_qa"], limit=2).frame["truncated"].any()


def test_models_without_indicator_are_left_out(chat_model):
    with pytest.raises(InputError, match=r"organism-chat, template\+indicator: it has no indicator token"):
        run_evaluation([chat_model], ["ctxlens_closed_book"], "indicator", limit=1)
    model = load_model("organism-chat", backend="native", device="cpu")
    add_indicator(model.backend.hf_model, model.tokenizer)
    cured = Model.from_hf(model.backend.hf_model, model.tokenizer, name="cured")
    found = run_evaluation([chat_model, cured], ["ctxlens_closed_book"], "vanilla,indicator", limit=1)
    variants = (("organism-chat", "template"), ("cured", "template"), ("cured", "template+indicator"))
    assert found.variants == variants
    left_out = [(one["model"], one["condition"]) for one in found.meta["left_out"]]
    assert left_out == [("organism-chat", "template+indicator")]
    prompts = found.frame["prompt"].tolist()
    assert prompts[0] == prompts[1]
    assert prompts[2].replace(" [IND]", "") == prompts[0] != prompts[2]
    assert first_prompts(cured, ["ctxlens_closed_book"], "indicator")[0][2] == prompts[2]


@pytest.fixture
def opened(monkeypatch):
    """How often lm-eval's index of all its tasks was asked for; it is never made, as that takes long."""
    from lm_eval.tasks import TaskManager

    open_, asked = TaskManager.__init__, []

    def opening(self, include_defaults=True, **more):
        asked.extend([1] if include_defaults else [])
        open_(self, include_defaults=False, **more)

    monkeypatch.setattr(TaskManager, "__init__", opening)
    return asked


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["ctxlens_squaad"], r"no task 'ctxlens_squaad'; did you mean ctxlens_squad"),
        (["ctxlens_qa", "mmluu"], r"no task 'mmluu'; did you mean mmlu"),
        (["zzzzqqqq"], r"no task 'zzzzqqqq'; `lm-eval ls tasks` lists"),
        ([], "no task is given"),
    ],
)
def test_unknown_tasks_are_refused_without_lm_evals_index(names, complaint, opened):
    for ask in (check_names, load_tasks):
        with pytest.raises(InputError, match=complaint):
            ask(names)
    assert not opened


def test_names_of_tasks_are_known_without_lm_evals_index(folder, opened):
    check_names(["ctxlens_qa", "ctxlens_squad", "mmlu", "hellaswag", "ifeval"])
    check_names([str(folder / "write.yaml")])
    check_names(["pets_write", "mmlu"], folder)
    with pytest.raises(InputError, match=r"no task 'pets_wriite'; did you mean pets_write"):
        check_names(["pets_wriite"], folder)
    assert not opened
    with pytest.raises(InputError, match="no task 'exact_match'"):  # stands in the files, but not as a name
        check_names(["exact_match"])
    assert opened == [1]


@pytest.mark.slow
def test_every_name_of_lm_eval_stands_in_the_text_of_its_files():
    from lm_eval.tasks import TaskManager

    names = frozenset(TaskManager(include_defaults=True).all_tasks)
    declared, _ = _read_lm_eval_names(frozenset())
    assert len(names & declared) > 0.95 * len(names)
    others = names - declared
    assert _read_lm_eval_names(others)[1] == others


def test_data_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match="squad"):
        load_tasks(["ctxlens_squad"], metadata={"data_dir": str(tmp_path)})


def test_a_missing_lm_eval_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape('pip install -c constraints.txt -e ".[eval]"')):
        require_lm_eval()


def parts_of(folder):
    """The names of all files that unfinished work has left in a run folder."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and "parts" in path.parts)


def open_run(place, **config):
    return Run.open(place, study="eval", config=config)


def test_a_run_goes_on_where_it_was_stopped(chat_model, tmp_path, monkeypatch):
    arguments = {"tasks": ["ctxlens_closed_book", "ctxlens_organism_qa"], "limit": 4, "batch_tokens": 150}
    arguments["conditions"] = "template,template+steered:0.3"
    straight = run_evaluation([chat_model], **arguments)
    asked = []
    generate = Model.generate

    def stopping(self, chats, **options):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append([chat.text for chat in chats])
        return generate(self, chats, **options)

    monkeypatch.setattr(Model, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation([chat_model], out=open_run(tmp_path / "run"), **arguments)
    before = list(asked)
    # What is finished is whole, and of the task under way there are the answers so far.
    assert parts_of(tmp_path / "run")
    monkeypatch.setattr(
        Model,
        "generate",
        lambda self, chats, **o: (asked.append([c.text for c in chats]), generate(self, chats, **o))[1],
    )
    again = run_evaluation([chat_model], out=open_run(tmp_path / "run"), **arguments)
    assert again.frame.equals(straight.frame)
    texts = [text for batch in asked for text in batch]
    assert len(texts) == 16
    assert 0 < len(before) < len(asked)
    assert parts_of(tmp_path / "run") == []
    done = len(asked)
    assert run_evaluation([chat_model], out=open_run(tmp_path / "run"), **arguments).frame.equals(again.frame)
    assert len(asked) == done
    with pytest.raises(RunExistsError, match="another evaluation"):
        run_evaluation([chat_model], out=open_run(tmp_path / "run"), **{**arguments, "limit": 3})


def test_a_finished_run_of_an_earlier_version_is_found_finished(chat_model, tmp_path, monkeypatch):
    run, arguments = open_run(tmp_path / "run"), {"tasks": ["ctxlens_closed_book"], "limit": 1}
    found = run_evaluation([chat_model], **arguments, conditions="template", out=run)
    described = [{"name": "vanilla", "template": True, "indicator": False, "steering": None}]
    meta = {**found.meta, "conditions": described, "fingerprint": "0123456789abcdef"}
    Evaluation(found.frame.assign(condition="vanilla"), meta).save(run.path("evaluation.parquet"))
    monkeypatch.setattr(Model, "generate", None)  # nothing is asked again
    again = run_evaluation([chat_model], **arguments, conditions="vanilla", out=open_run(tmp_path / "run"))
    assert again.frame.equals(found.frame)
    with pytest.raises(RunExistsError, match="another evaluation"):
        run_evaluation([chat_model], **arguments, conditions="plain", out=open_run(tmp_path / "run"))


@pytest.fixture
def squad(tmp_path):
    """A folder of data of one's own."""
    place = tmp_path / "data"
    place.mkdir()
    (place / "squad.json").write_bytes((FIXTURES / "squad.json").read_bytes())
    (place / "notes.txt").write_text("not read")
    return place


def interrupt(run, calls):
    """Do the work until the model has answered so often."""
    generate, done = Model.generate, []

    def stopping(self, chats, **options):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(len(chats))
        return generate(self, chats, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "generate", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()


def contents(place):
    return {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def test_a_run_does_not_go_on_with_other_data(chat_model, squad, tmp_path):
    def run():
        return run_evaluation(
            [chat_model], ["ctxlens_squad"], "template,plain", limit=2, batch_tokens=1, data_dir=squad,
            out=open_run(tmp_path / "run"),
        )  # fmt: skip

    interrupt(run, 3)
    file = squad / "squad.json"
    old = file.read_bytes()
    [told] = json.loads((tmp_path / "run/manifest.json").read_text())["data"].values()
    assert told["files"] == {"squad.json": {"size": len(old), "sha256": hashlib.sha256(old).hexdigest()}}
    assert list(told["documents"]) == ["ctxlens_squad"]
    before = contents(tmp_path / "run")

    new = old.replace(b"Ada Kern", b"Eve Kern")
    file.write_bytes(new)
    with pytest.raises(RunExistsError) as refused:
        run()
    sentence = str(refused.value)
    for text in (f"squad.json was {len(old):,} bytes with SHA-256 {hashlib.sha256(old).hexdigest()[:12]}",
                 hashlib.sha256(new).hexdigest()[:12], "restore the old data"):  # fmt: skip
        assert text in sentence
    file.unlink()
    with pytest.raises(RunExistsError, match=r"squad.json no longer exists"):
        run()
    file.write_bytes(old)
    (squad / "dev-v1.1.json").write_bytes(old)
    with pytest.raises(RunExistsError, match=r"it read squad.json, but dev-v1.1.json would be read now"):
        run()
    (squad / "dev-v1.1.json").unlink()
    assert contents(tmp_path / "run") == before

    (squad / "notes.txt").write_text("changed, and of no account")
    found = run()
    assert len(found) == 4
    assert found.meta["data"] == told
    file.write_bytes(new)
    with pytest.raises(RunExistsError, match="was begun with other data"):
        run()  # the finished run is not given out for one of these data, either


def test_other_documents_are_noticed_whatever_reads_them(chat_model, folder, tmp_path):
    def run():
        return run_evaluation([chat_model], ["pets_write"], include_path=folder, batch_tokens=1,
                              out=open_run(tmp_path / "run"))  # fmt: skip

    interrupt(run, 1)
    file = folder / "pets.jsonl"
    file.write_text(file.read_text().replace("Ann has a dog", "Ann had a dog"))
    with pytest.raises(RunExistsError, match="pets_write had 3 documents and now has 3 documents, not all"):
        run()
    file.write_text(file.read_text().replace("Ann had a dog", "Ann has a dog"))
    assert len(run()) == 3


def test_the_command_refuses_other_data_in_one_sentence(squad, tmp_path):
    words = ("eval", "-m", "organism-chat", "--tasks", "ctxlens_squad", "--device", "cpu", "--limit", 1,
             "--data-dir", squad, "--out", tmp_path / "run")  # fmt: skip
    call(*words)
    (squad / "squad.json").write_text((squad / "squad.json").read_text() + "\n")
    said = call(*words, code=2)
    assert said.stdout == ""
    (error,) = [line for line in said.stderr.splitlines() if not line.startswith("plan: ")]
    assert "other data: squad.json was" in error


def test_processes_without_a_folder_are_refused(chat_model):
    with pytest.raises(InputError, match="need a run folder"):
        run_evaluation([chat_model], ["ctxlens_closed_book"], processes=Processes(0, 2))


def test_the_command_prints_a_table_and_writes_the_result(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ("eval", "-m", "organism", "-m", "organism-chat", "--tasks", "ctxlens_closed_book", "--device",
             "cpu", "--conditions", "template,template+indicator", "--limit", 4,
             "--out", tmp_path / "run")  # fmt: skip
    result = call(*words)
    for text in (
        "ctxlens_closed_book: contains",
        "organism-chat",
        "McNemar",
        "left out: organism, template+indicator",
    ):
        assert text in result.output
    found = Evaluation.load(tmp_path / "run" / "evaluation.parquet")
    assert found.variants == (("organism", "template"), ("organism-chat", "template"))
    assert "another run" in call(*words[:-3], 3, *words[-2:], code=2).output
    shown = call("eval", "-m", "organism-chat", "--tasks", "ctxlens_closed_book", "--dry-run", "--seed", 1)
    assert shown.stdout.startswith("<s><|user|>\n")
    assert shown.stdout.rstrip().endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--conditions", "wild"], "unknown word 'wild' in the condition 'wild'"),
        (["--data-dir", "nowhere"], "--data-dir nowhere does not exist"),
        (["--metadata", "turns"], "expected KEY=VALUE"),
        (["--include-path", "nowhere"], "is not a folder"),
        (["-m", "nobody/at all"], "neither a folder here nor a Hub id"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complaint in call("eval", *words, code=2).output
    assert list(tmp_path.iterdir()) == []


COMMAND = (
    "eval", "-m", "organism-chat", "--device", "cpu", "--tasks", "ctxlens_organism_qa,ctxlens_closed_book",
    "--conditions", "template,template+steered:0.3", "--limit", "20", "--batch-tokens", "400", "--out",
)  # fmt: skip


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_the_model(tmp_path):
    command = [
        sys.executable, "-m", "ctxlens.evals.harness", "run", "--model", "ctxlens", "--tasks",
        "ctxlens_closed_book", "--model_args",
        "pretrained=organism-chat,template=true,alpha=0.3", "--device", "cpu", "--limit", "3",
        "--output_path", str(tmp_path), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert "ctxlens_closed_book" in done.stdout
    [path] = tmp_path.rglob("results_*.json")
    result = json.loads(path.read_text())
    assert result["results"]["ctxlens_closed_book"]["contains,none"] == 1.0
    assert result["config"]["ctxlens"]["steering"]["alpha"] == 0.3
    assert result["config"]["ctxlens"]["counts"]["requests"] == 3


@pytest.mark.slow
def test_launched_processes_end_with_the_same_answers(tmp_path):
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--nproc_per_node", "2"))):
        command = [sys.executable, *launcher, "-m", "ctxlens", *COMMAND, str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=500)
    one, two = (Evaluation.load(tmp_path / name / "evaluation.parquet") for name in ("one", "two"))
    assert one.frame.equals(two.frame)
    assert len(one) == 80


@pytest.mark.slow
def test_killed_runs_lose_at_most_a_batch(tmp_path):
    worker = Path(__file__).parent / "needle_worker.py"

    def start(name):
        log = tmp_path / f"{name}.log"
        log.touch()
        command = [sys.executable, str(worker), str(log), *COMMAND, str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), log

    straight, log = start("straight")
    assert straight.wait(500) == 0
    wanted = log.read_text().split()
    rng, kills = random.Random(0), 0
    for round_ in range(8):
        process, log = start("killed")
        seen = len(log.read_text().split())
        stop_at = seen + rng.randint(2, 20) if round_ < 3 else 10**6
        while process.poll() is None:
            if len(log.read_text().split()) >= stop_at:
                time.sleep(rng.random() * 0.1)
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        if process.wait(500) == 0:
            break
    assert kills == 3
    assert os.path.exists(tmp_path / "killed" / "evaluation.parquet")
    one, two = (Evaluation.load(tmp_path / name / "evaluation.parquet") for name in ("straight", "killed"))
    assert one.frame.equals(two.frame)
    # What lm-eval's cache has not yet put on disk when the process dies is asked again.
    assert len(log.read_text().split()) <= len(wanted) + 12 * kills
