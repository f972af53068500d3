"""The experiment on natural language: nothing asked was trained on, packing, resume, figures by hand."""

import gzip
import json
import lzma
import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from ctxlens.evals.qa import load_drop, load_squad
from experiments.natural_model import sources as split
from experiments.natural_model.asking import Arm, other_passages
from experiments.natural_model.comparing import BY_TUNING, PAIRS, summarise, tables
from experiments.natural_model.corpus import (
    Documents,
    build_corpus,
    encode_document,
    ignored_tokens,
    pack,
    restated_text,
    train_tokenizer,
)
from experiments.natural_model.figure import loss_curves
from experiments.natural_model.presets import PRESETS
from experiments.natural_model.pretrain import VALIDATION_ROWS, Pretraining
from experiments.natural_model.sources import Question, load_sources
from experiments.natural_model.standard import write_questions

WORDS = ("river", "stone", "garden", "window", "paper", "night", "small", "bright", "quiet", "runs", "falls")
PRESET = replace(PRESETS["smoke"], vocab_size=320, n_ctx=64, corpus_tokens=12_000, row_tokens=256)


def sentence(rng, n=16):
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(n)).capitalize() + "."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the layout of the real data, with texts of invented words."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name in ("instruct", "drop", "paul_graham", "ifeval"):
        (folder / name).mkdir()
    articles = []
    for number in range(9):
        passage = " ".join(sentence(rng) for _ in range(3))
        answer = passage.split()[4]
        asked = {"id": f"q{number}", "question": "Which?", "answers": [{"text": answer, "answer_start": 0}]}
        articles.append({"title": f"article {number}", "paragraphs": [{"context": passage, "qas": [asked]}]})
    (folder / split.SQUAD).write_text(json.dumps({"version": "1.1", "data": articles}))
    rows = [
        {
            "context": f"Passage: {p}\nQuestion: How many {n}?\nAnswer:",
            "completion": f" {n}",
            "ref_text": f"{n}|{n}",
        }
        for p in [" ".join(sentence(rng) for _ in range(3)) for _ in range(8)]
        for n in range(2)
    ]
    with gzip.open(folder / split.DROP, "wt") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    for number in range(9):
        text = "\n\n".join(sentence(rng) for _ in range(6))
        (folder / split.ESSAYS / f"essay{number}.txt").write_text(text)
    held = [a["paragraphs"][0]["context"] for a in articles if split.is_held_article(a["title"])]
    tasks = [("quoref_What_Is_The_Answer", held[0]), ("ag_news_classify", sentence(rng, 30))]
    tasks += [("kilt_tasks_hotpotqa_final_exam", sentence(rng, 8)) for _ in range(40)]
    tasks += [("wiki_hop_original_explain_relation", sentence(rng, 30))]
    with lzma.open(folder / split.T0, "wt") as file:
        file.writelines(
            json.dumps({"source": s, "prompt": p, "completion": sentence(rng, 3)}) + "\n" for s, p in tasks
        )
    for path in (split.ALPACA, split.LIMA):
        given = [
            {"instruction": sentence(rng, 6), "input": "", "output": sentence(rng, 9)} for _ in range(20)
        ]
        (folder / path).write_text(json.dumps(given))
    prompt = {"key": 1, "prompt": sentence(rng), "instruction_id_list": [], "kwargs": []}
    (folder / split.IFEVAL).write_text(json.dumps(prompt) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(data):
    return load_sources(data)


@pytest.fixture(scope="module")
def tokenizer(made):
    return train_tokenizer(made, PRESET, seed=0)


def trained_texts(made):
    texts = [text for kind in made.texts.values() for text in kind] + [
        passage for passage, _ in made.passages
    ]
    return texts + ["\n".join(m["content"] for m in one.messages) for one in made.conversations]


def test_nothing_held_out_is_trained_on(made, data):
    held = {one for text in split.held_out_texts(made, data) for one in split.shingles(text)}
    trained = {one for text in trained_texts(made) for one in split.shingles(text)}
    assert held
    assert trained
    assert not held & trained
    asked = {one.messages[0]["content"] for one in made.closed_book}
    assert asked
    assert asked.isdisjoint(one.messages[0]["content"] for one in made.conversations)


def test_a_text_that_quotes_a_held_out_passage_is_dropped(made):
    assert made.dropped == 1
    assert made.texts["reading"] == []
    assert len(made.texts["tasks"]) == 1  # the other task; wiki_hop is too long and left out


def test_both_sides_of_every_split_are_there(made):
    held, trained = (made.squad["data"], made.drop, made.essays), made.passages
    assert all(held)
    assert all((trained, made.texts["essays"], made.texts["instructions"]))
    assert {one.labels["kind"] for one in made.conversations} == {"closed", "instruction"}


@pytest.mark.slow
def test_the_real_data_do_not_overlap(test_data):
    made = load_sources(test_data)
    held = {one for text in split.held_out_texts(made, test_data) for one in split.shingles(text)}
    assert all(held.isdisjoint(split.shingles(text)) for text in trained_texts(made))


def test_shingles_by_hand():
    assert list(split.shingles("one two three")) == []
    words = [f"w{n}" for n in range(14)]
    assert len(list(split.shingles(" ".join(words)))) == 2
    assert list(split.shingles(" ".join(words[:13]))) == list(split.shingles(", ".join(words[:13]).upper()))


def test_packing_keeps_documents_whole():
    packed = pack([[1, 2, 3], [4, 5, 6, 7], [8, 9], [10]], n_ctx=5, pad_id=0)
    assert packed.tolist() == [[1, 2, 3, 8, 9], [4, 5, 6, 7, 10]]


def test_restated_sentence_stands_twice():
    text = restated_text(["One.", "Two."], "Here is it.", random.Random(1))
    passage, last = text.split("\n")
    assert last == "Here is it."
    assert text.count(last) == 2
    assert passage.replace(" Here is it.", "").replace("Here is it. ", "") == "One. Two."


def test_markup_changes_no_text_and_has_no_label(tokenizer):
    text = "\n".join(sentence(random.Random(n)) for n in range(8))
    tokens = encode_document(tokenizer, text, random.Random(0))
    ignored = ignored_tokens(tokenizer)
    markers = [token for token in tokens if ignored[token]]
    assert markers
    assert tokenizer.pad_token_id not in tokens
    rest = tokenizer.decode([t for t in tokens if not ignored[t] and t != tokenizer.eos_token_id])
    assert [line for line in rest.split("\n") if line] == text.split("\n")
    assert not ignored[encode_document(tokenizer, text, None)].any()


def test_long_documents_keep_their_end(made, tokenizer):
    documents = Documents(made, tokenizer, 32, seed=0).stream("questions")
    for document in (next(documents) for _ in range(20)):
        assert len(document) <= 32
        assert (document[0], document[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def pretraining(tokenizer, corpus, folder, lines):
    run = Pretraining(PRESET, tokenizer, corpus, folder, minutes=1, log=lines.append)
    if run.state["phase"] == "copy":
        run.state |= {"phase": "text", "step": 0, "steps": 4}
    return run


def test_a_killed_run_ends_like_an_unbroken_one(made, tokenizer, tmp_path):
    made = replace(made, texts={**made.texts, "reading": made.texts["tasks"]})
    corpus = build_corpus(made, tokenizer, PRESET, seed=0)
    assert len(corpus) > VALIDATION_ROWS + 4
    whole = pretraining(tokenizer, corpus, tmp_path / "whole", [])
    whole.run()
    broken = pretraining(tokenizer, corpus, tmp_path / "broken", [])
    update, calls = broken._update, []

    def stop_after_two(loss, lr):
        calls.append(update(loss, lr))
        if len(calls) == 2:
            broken.save()
            raise KeyboardInterrupt
        return calls[-1]

    broken._update = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    lines = []
    resumed = pretraining(tokenizer, corpus, tmp_path / "broken", lines)
    resumed.run()
    assert lines[0] == "goes on at step 2 of phase text"
    for (name, one), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert one.equal(other), name


def test_copying_loss_is_of_uniform_guesses_at_first(made, tokenizer, tmp_path):
    made = replace(made, texts={**made.texts, "reading": made.texts["tasks"]})
    run = Pretraining(PRESET, tokenizer, build_corpus(made, tokenizer, PRESET, 0), tmp_path, minutes=1)
    assert run.copy_nats() == pytest.approx(np.log(len(run.copy_vocab)), abs=0.1)
    assert not set(run.copy_vocab.tolist()) & set(np.flatnonzero(ignored_tokens(tokenizer)))


def test_held_out_questions_are_read_back(tmp_path):
    asked = [Question("a", "It rained in May 1902.", "When?", ("May 1902", "1902")),
             Question("b", "Ten boats left.", "How many?", ("10",))]  # fmt: skip
    for part, load in (("squad", load_squad), ("drop", load_drop)):
        write_questions(part, asked, tmp_path / part)
        read = load(str(tmp_path / part))
        assert [(one.context, one.question, tuple(one.answers)) for one in read] == [
            (one.passage, one.question, one.answers) for one in asked
        ]


def test_another_passage_is_never_the_own():
    asked = [Question(str(n), "x" * n, "?", ("x",)) for n in (5, 3, 9, 3)]
    assert other_passages(asked) == ["xxx", "xxxxx", "xxxxx", "xxxxx"]


def test_paired_differences_by_hand():
    def items(values):
        return [
            {"unit": n, "cluster": n, "contains": v, "log-probability": v - 1} for n, v in enumerate(values)
        ]

    arms = {
        Arm("vanilla", True).name: items([0, 0, 1, 0, 0, 0, 0, 0]),
        Arm("indicator", True, True).name: items([1, 1, 1, 1, 1, 1, 1, 1]),
    }
    found = summarise({"closed book": arms})["closed book"]
    change = found["differences"]["cure: indicator given, minus vanilla, template"]["contains"]
    assert change["difference"][0] == pytest.approx(7 / 8)
    assert change["reading"] == "higher"
    assert found["means"]["vanilla, template"]["log-probability"][0] == pytest.approx(1 / 8 - 1)
    assert set(found["differences"]) < set(PAIRS)
    assert "+0.875" in tables({"closed book": found})
    assert set(found["means"]) == set(arms)


def test_loss_by_tuning_is_a_difference_of_differences():
    def items(value):
        row = {"contains": value, "log-probability": -value, "response": "x"}
        return [{"unit": n, "cluster": n, **row} for n in range(6)]

    arms = {
        "base, plain": items(0.5), "base, template": items(0.25),
        "vanilla, plain": items(1.0), "vanilla, template": items(0.25),
    }  # fmt: skip
    found = summarise({"closed book": arms})["closed book"]["differences"][BY_TUNING]
    assert found["contains"]["difference"][0] == pytest.approx(-0.75 + 0.25)
    assert found["log-probability"]["difference"][0] == pytest.approx(0.75 - 0.25)


def test_loss_curves_are_an_svg():
    log = [{"phase": "copy", "step": 25, "loss": 5.0, "second_half": 4.0}]
    log += [{"phase": "text", "step": n, "loss": 5.0 / n, "validation": 5.0 / n} for n in (1, 2)]
    drawn = loss_curves(
        {"log": log}, {"vanilla": {"log": [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 2.0}]}}
    )
    root = ElementTree.fromstring(drawn)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 5
