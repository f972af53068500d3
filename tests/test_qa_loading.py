"""SQuAD, QuAC and DROP out of every layout: the same questions, or one clear sentence."""

import gzip
import json

import pytest

from ctxlens.errors import InputError
from ctxlens.evals.qa import (
    PAPER_WORDING,
    WORDINGS,
    find_file,
    load_drop,
    load_quac,
    load_squad,
    render_question,
)

LOADERS = {"squad": load_squad, "quac": load_quac, "drop": load_drop}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def squad_rows(content):
    """The original layout as the columns of `rajpurkar/squad`."""
    return [
        {
            "id": qa["id"], "title": article["title"], "context": paragraph["context"],
            "question": qa["question"],
            "answers": {key: [a[key] for a in qa["answers"]] for key in ("text", "answer_start")},
        }
        for article in content["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]
    ]  # fmt: skip


def quac_rows(content):
    """The original layout as the columns of `allenai/quac`."""
    return [
        {
            "dialogue_id": paragraph["id"], "wikipedia_page_title": article["title"],
            "background": article["background"], "section_title": article["section_title"],
            "context": paragraph["context"], "turn_ids": [qa["id"] for qa in paragraph["qas"]],
            "questions": [qa["question"] for qa in paragraph["qas"]],
            "answers": {
                "texts": [[a["text"] for a in qa["answers"]] for qa in paragraph["qas"]],
                "answer_starts": [[a["answer_start"] for a in qa["answers"]] for qa in paragraph["qas"]],
            },
            "orig_answers": {
                "texts": [qa["orig_answer"]["text"] for qa in paragraph["qas"]],
                "answer_starts": [qa["orig_answer"]["answer_start"] for qa in paragraph["qas"]],
            },
        }
        for article in content["data"] for paragraph in article["paragraphs"]
    ]  # fmt: skip


def drop_rows(content):
    """The original layout as the columns of `EleutherAI/drop`."""
    rows = []
    for section, passage in content.items():
        for qa in passage["qa_pairs"]:
            found = qa.get("validated_answers", [])
            columns = {key: [answer[key] for answer in found] for key in ("number", "date", "spans")}
            rows.append(
                {
                    "section_id": section, "passage": passage["passage"], "question": qa["question"],
                    "query_id": qa["query_id"], "answer": qa["answer"], "validated_answers": columns,
                }
            )  # fmt: skip
    return rows


ROWS = {"squad": squad_rows, "quac": quac_rows, "drop": drop_rows}


def test_squad_as_it_stands(fixtures):
    first, *_, last = load_squad(str(fixtures / "squad.json"))
    assert (first.id, first.question, first.title) == ("mill-1", "Who built the mill?", "The_mill")
    assert first.references == (("Ada Kern",), ("Kern",))
    assert last.answers == ["{forty} minutes"]
    assert last.context.startswith("Torrow's ferry")


def test_questions_without_answer_are_left_out(fixtures):
    assert [example.id for example in load_squad(str(fixtures / "squad_v2.json"))] == ["mill-1"]


def test_quac_asks_the_first_question_of_a_dialogue(fixtures):
    first, second = load_quac(str(fixtures / "quac.json"))
    assert first.question == "Where was Lene Voss born?"
    assert first.answers == ["on a barge", "a barge", "CANNOTANSWER"]
    assert first.context.endswith("to a miller.")  # without the mark
    assert second.answers == ["CANNOTANSWER"]


def test_quac_options(fixtures):
    source = str(fixtures / "quac.json")
    every = load_quac(source, turns="all")
    assert [example.id for example in every] == ["D1_q#0", "D1_q#1", "D1_q#2", "D2_q#0"]
    answerable = load_quac(source, turns="all", unanswerable=False)
    assert [example.id for example in answerable] == ["D1_q#0", "D1_q#2"]
    # D1_q#0: humans agree to 2/3; D1_q#2: miller is one of six words, 2/7.
    agreed = load_quac(source, turns="all", min_agreement=0.4)
    assert [example.id for example in agreed] == ["D1_q#0", "D1_q#1", "D2_q#0"]
    told = load_quac(source, turns="all", history=1)[2]
    assert told.context.endswith("to a miller.\nDid she marry?\nCANNOTANSWER")
    longer = load_quac(source, turns="all", history=5)[2]
    assert longer.context.endswith("born?\non a barge\nDid she marry?\nCANNOTANSWER")
    around = load_quac(source, background=True)[0]
    assert around.context.startswith("Title: Lene Voss\nLene Voss was a cartographer. Voss was born")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"turns": "last"}, "turns must be first or all, got 'last'"),
        ({"history": -1}, "history must be a whole number of questions of at least 0, got -1"),
        ({"unanswerable": False, "min_agreement": 1.0}, "these options leave no question"),
    ],
)
def test_bad_quac_options(fixtures, options, complaint):
    with pytest.raises(InputError, match=complaint):
        load_quac(str(fixtures / "quac.json"), **options)


def test_drop_as_it_stands(fixtures):
    examples = load_drop(str(fixtures / "drop.json"))
    assert [example.id for example in examples] == ["g1", "g2", "g3"]  # g4 has no answer
    assert [example.references for example in examples] == [
        (("1204",), ("1,204",)),  # the same answer once
        (("Ode Lind", "Ravi Moss"), ("Lind", "Moss")),
        (("8 May 1951",),),
    ]
    assert examples[1].answers == ["Ode Lind, Ravi Moss", "Lind, Moss"]


def test_drop_completions_lose_their_frame(fixtures):
    original = load_drop(str(fixtures / "drop.json"))
    completions = load_drop(str(fixtures / "drop_completions.jsonl"))
    assert [(e.context, e.question) for e in completions] == [(e.context, e.question) for e in original]
    assert completions[1].references == (("Ode Lind and Ravi Moss",), ("Lind and Moss",))  # one span each
    assert completions[2].references == (("8 May 1951",),)


def test_drop_with_spans_in_one_list(tmp_path):
    row = {
        "section_id": "s", "query_id": "q", "passage": "P.", "question": "Q?",
        "answers_spans": {"spans": ["a", "b", "a"], "types": ["span"] * 3},
    }  # fmt: skip
    (tmp_path / "drop.jsonl").write_text(json.dumps(row))
    assert load_drop(str(tmp_path))[0].references == (("a",), ("b",))


@pytest.mark.parametrize("name", LOADERS)
def test_layouts_agree(fixtures, tmp_path, name):
    from datasets import Dataset, DatasetDict

    original = LOADERS[name](str(fixtures / f"{name}.json"))
    rows = ROWS[name](read(fixtures / f"{name}.json"))
    packed = tmp_path / f"{name}-rows.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert LOADERS[name](str(packed)) == original
    data = Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "saved"))
    assert LOADERS[name](str(tmp_path / "saved")) == original
    DatasetDict({"validation": data}).save_to_disk(str(tmp_path / "all" / name))
    assert LOADERS[name](str(tmp_path / "all")) == original
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(str(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet"))
    assert LOADERS[name](str(tmp_path / "hub")) == original


def test_folders_are_searched_by_name(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "squad.json").write_text("")
    assert find_file("squad", str(tmp_path)) == tmp_path / "deep" / "squad.json"
    (tmp_path / "squad_dev_v1.1_part.json").write_text("")  # what lies nearer is taken
    assert find_file("squad", str(tmp_path)) == tmp_path / "squad_dev_v1.1_part.json"
    (tmp_path / "dev-v1.1.json").write_text("")  # and the data set's own name first
    assert find_file("squad", str(tmp_path)) == tmp_path / "dev-v1.1.json"
    (tmp_path / "quac-a.json").write_text("")
    (tmp_path / "quac-b.json").write_text("")
    with pytest.raises(InputError, match=r"several files for quac: .*quac-a.json, .*quac-b.json; name the"):
        find_file("quac", str(tmp_path))
    with pytest.raises(InputError, match=r"no file for drop; expected drop_dataset_dev.json\*"):
        find_file("drop", str(tmp_path))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "empty|not valid JSON"),
        ("{", "not valid JSON: line 1"),
        ("[]", "is empty; expected questions of"),
        ("[1, 2]", "has no known layout of"),
        ('{"rows": []}', "has no known layout of|is empty"),
    ],
)
def test_damaged_files(tmp_path, name, content, complaint):
    path = tmp_path / f"{name}.json"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as caught:
        LOADERS[name](str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("squad", {"data": [{"paragraphs": [{"qas": []}]}]}, "holds no question of SQuAD"),
        ("squad", {"data": [{"title": "x"}]}, "damaged or not SQuAD: .*KeyError: 'paragraphs'"),
        ("squad", {"data": 3}, "damaged or not SQuAD"),
        ("squad", [{"context": 1, "question": "", "answers": {"text": [""]}}], "expected a text, got 1"),
        ("quac", {"data": [{"paragraphs": [{"context": "c", "qas": [{}]}]}]}, "damaged or not QuAC"),
        ("drop", {"p": {"passage": "x"}}, "has no known layout of DROP"),
        ("drop", [{"context": "no frame", "ref_text": "a"}], "no line that begins with 'Question:'"),
        ("drop", [{"context": "c\nQuestion: q", "ref_text": " | "}], "holds no question of DROP"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, complaint):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=complaint):
        LOADERS[name](str(path))


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_not_there(name, tmp_path):
    with pytest.raises(InputError, match=rf"no questions of {name}: There is no file or folder {tmp_path}/x"):
        LOADERS[name](str(tmp_path / "x"))


def test_the_hub_is_asked_by_default(monkeypatch, fixtures):
    import datasets

    rows = datasets.Dataset.from_list(quac_rows(read(fixtures / "quac.json")))
    asked = []

    def load_dataset(name, *, split, streaming, revision=None):
        asked.append((name, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found quac.py")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_quac() == load_quac(str(fixtures / "quac.json"))
    copy = ("allenai/quac", "validation", "refs/convert/parquet")  # the Hub's own copy of a script's data
    assert asked == [("allenai/quac", "validation", None), copy]


@pytest.mark.parametrize("name", LOADERS)
def test_a_hub_that_cannot_be_reached(name, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=rf"no questions of {name}: .*no network; without network, name a"):
        LOADERS[name]()


def test_real_files(test_data):
    assert len(load_squad(str(test_data))) == 5665
    assert len(load_drop(str(test_data))) == 9536
    samples = test_data / "rc_samples"
    assert len(load_squad(str(samples))) == len(load_squad(str(samples / "squad2.json"))) == 5
    assert [len(load_quac(str(samples), turns=turns)) for turns in ("first", "all")] == [2, 12]
    assert len(load_drop(str(samples))) == 19


def test_prompts_are_the_papers():
    assert {name: WORDINGS[PAPER_WORDING[name]] for name in LOADERS} == {
        "squad": "{context}\nAnswer the question according to the above passage: {question}",
        "quac": "{context}\nAnswer the question with pieces from the above passage: {question}",
        "drop": "{context}\nAnswer the question according to the above passage: {question}",
    }
    assert render_question("A {question} {}.", "B {context}?", "joined") == "A {question} {}. B {context}?"
    with pytest.raises(InputError, match="unknown wording 'x'; choose from passage, pieces, joined"):
        render_question("", "", "x")
