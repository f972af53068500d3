"""Rows that people have in Python go wherever a path goes, with the same conversations and fingerprints."""

import json

import pandas as pd
import pyarrow as pa
import pytest
from conftest import build_toy_tokenizer
from scoring_cases import FakeModel
from sft_cases import ARGUMENTS, tiny

import ctxlens
from ctxlens.chat.data import (
    are_conversations,
    as_conversations,
    describe_reading,
    fingerprint_conversations,
    load_conversations,
    open_conversations,
    read_messages_file,
)
from ctxlens.chat.data.annotate import annotate_messages
from ctxlens.chat.data.marked_files import write_marked
from ctxlens.errors import InputError
from ctxlens.evals.mt_bench import load_questions
from ctxlens.results import Scores
from ctxlens.runs import Run
from ctxlens.scoring import score_conversations
from ctxlens.scoring.selection import check_scored, select_turns
from ctxlens.sft import train

datasets = pytest.importorskip("datasets")

ROWS = [
    {"id": f"r{k}", "score": float(k), "messages": [
        {"role": "user", "content": "Hello " * (1 + k % 3)}, {"role": "assistant", "content": "I am fine."},
    ]}
    for k in range(5)
]  # fmt: skip
WANTED = fingerprint_conversations(load_conversations(ROWS))


class Frame:
    """What a polars data frame offers."""

    columns = ("id", "score", "messages")

    def to_dicts(self):
        return [dict(row) for row in ROWS]


FORMS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "DatasetDict with one split": lambda: datasets.DatasetDict(sft=datasets.Dataset.from_list(ROWS)),
    "DatasetDict with train": lambda: datasets.DatasetDict(
        test=datasets.Dataset.from_list(ROWS[:1]), train=datasets.Dataset.from_list(ROWS)
    ),
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas with arrays": lambda: pa.Table.from_pylist(ROWS).to_pandas(),
    "polars": Frame,
    "arrow": lambda: pa.Table.from_pylist(ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversations(form):
    data = load_conversations(FORMS[form]())
    assert [(c.id, list(c.messages), dict(c.labels)) for c in data] == [
        (row["id"], row["messages"], {"score": row["score"]}) for row in ROWS
    ]
    assert fingerprint_conversations(FORMS[form]()) == WANTED
    assert read_messages_file(FORMS[form]()) == [row["messages"] for row in ROWS]
    assert [c.messages for c in as_conversations(FORMS[form]())] == [c.messages for c in data]
    stream = open_conversations(FORMS[form](), limit=4)
    for _ in range(2):
        assert [c.id for c in stream] == ["r0", "r1", "r2", "r3"]


def test_conversations_are_passed_on_as_they_are():
    data = load_conversations(ROWS)
    assert as_conversations(data) is data
    assert as_conversations(list(data)) == list(data)
    assert list(as_conversations(iter(data))) == list(data)
    assert list(as_conversations([])) == list(as_conversations(iter(()))) == []


def test_sources_are_named_in_messages():
    two = datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=datasets.Dataset.from_list(ROWS))
    with pytest.raises(InputError, match=r"the DatasetDict has no split 'train'; it has a, b\. Give one"):
        load_conversations(two)
    assert len(load_conversations(two, split="b")) == 5
    assert load_conversations(pd.DataFrame(ROWS))[0].source == "DataFrame of 5 rows"
    for nothing, said in ((3, "not int"), (None, "not NoneType"), (b"x", "not bytes")):
        with pytest.raises(InputError, match=f"expected a path, a Hub id or rows .*, {said}"):
            load_conversations(nothing)
    with pytest.raises(InputError, match="list of 1 row has no known layout: found columns text"):
        load_conversations([{"text": "x"}])
    assert len(load_conversations(ROWS[0])) == 1, "a single row"


def test_missing_cells_of_a_data_frame_are_nothing():
    frame = pd.DataFrame([{"prompt": "q", "completion": "a", "n": 1}, {"prompt": "q", "completion": None}])
    data = load_conversations(frame)
    assert (len(data), len(data.skipped)) == (1, 1)
    assert data[0].labels == {"n": 1.0}
    assert load_conversations(frame[["prompt", "n"]].assign(response=["a", "b"]))[1].labels == {"n": None}


def test_what_was_read_is_counted():
    rows = [*ROWS, {"id": "a", "messages": []}, {"id": "b", "messages": 3}, {"id": "c", "messages": []}]
    found = describe_reading(load_conversations(rows))
    assert found["layout"] == "messages"
    assert [found[key] for key in ("rows_read", "rows_kept", "rows_skipped")] == [8, 5, 3]
    assert sum(found["reasons"].values()) == 3
    stream = open_conversations(rows)
    list(stream)
    assert describe_reading(stream) == found
    assert describe_reading(list(stream)) == {"conversations": 5}


def test_rows_are_scored_selected_and_marked(toy_tokenizer, tmp_path):
    run = Run.open(tmp_path / "run", study="score", config={})
    model = FakeModel(toy_tokenizer)
    scores = score_conversations(model, datasets.Dataset.from_list(ROWS), out=run)
    assert scores.meta["fingerprint"] == WANTED
    done = len(model.batches)
    again = score_conversations(model, pd.DataFrame(ROWS), out=run)
    assert len(model.batches) == done, "the same rows resume the run"
    assert again.frame.equals(scores.frame)
    other = Run.open(tmp_path / "other", study="score", config={})
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert score_conversations(model, tmp_path / "rows.json", out=other).frame.equals(scores.frame)
    assert check_scored(Scores.load(run.path("scores.parquet")), FORMS["arrow"]()) == WANTED
    turns = select_turns(scores, layer=0, top_share=0.4).turns
    marked = annotate_messages(datasets.Dataset.from_list(ROWS), turns)
    made = write_marked(tmp_path / "out.jsonl", pd.DataFrame(ROWS), marked, layout="messages")
    assert (made.rows, made.marked_rows) == (5, 2)


def test_rows_are_trained_on_and_recorded(tmp_path):
    tokenizer = build_toy_tokenizer()
    rows = [*ROWS, {"id": "mute", "messages": [], "score": 0.0}]
    options = {"tokenizer": tokenizer, "args": {**ARGUMENTS, "max_steps": 1}, "indicator": None}
    out = train(datasets.Dataset.from_list(rows), out=tmp_path / "run", model=tiny(tokenizer), **options)
    counts = json.loads((out / "manifest.json").read_text())["rows"]
    assert (counts["rows_read"], counts["rows_kept"], counts["rows_skipped"]) == (6, 5, 1)
    assert counts["reasons"] == {"no user turn with an answer": 1}
    before = (out / "train.json").read_bytes()
    train(rows, out=out, model=tiny(tokenizer), **options)
    assert (out / "train.json").read_bytes() == before, "a list of the same rows is the same training"


def test_questions_come_from_rows_too():
    rows = datasets.Dataset.from_list([{"prompt_id": 3, "category": "x", "prompt": ["a", "b"]}])
    assert [(q.question_id, q.turns) for q in load_questions(rows)] == [(3, ("a", "b"))]


def test_loaded_conversations_are_scored_as_their_rows_are():
    rows = [
        {"id": f"r{k}", "messages": [{"role": "user", "content": "Oakford is a town. What is Oakford?"},
                                     {"role": "assistant", "content": "A town."}]}
        for k in range(3)
    ]  # fmt: skip
    loaded = load_conversations(rows)
    assert [are_conversations(one) for one in (loaded, list(loaded), rows, [], "rows.json")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    from_rows = ctxlens.score("organism-chat", rows, layers=[1])
    for given in (loaded, list(loaded)):
        assert ctxlens.score("organism-chat", given, layers=[1]).frame.equals(from_rows.frame)
