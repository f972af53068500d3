"""MT-Bench: questions in, a model's answers out, in FastChat's layout, whatever happens on the way."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from judge_stub import QUESTIONS, REFERENCES, write_jsonl

import ctxlens.evals.mt_bench.answers as answers_module
from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import Role, render
from ctxlens.errors import InputError, RunExistsError
from ctxlens.evals.mt_bench import (
    Answerer,
    MTQuestion,
    answer_questions,
    answers_path,
    check_label,
    count_answers,
    load_questions,
    load_references,
    make_label,
    read_all_answers,
    read_answers,
    record_settings,
)
from ctxlens.files import append_lines, read_lines


class Speaker:
    """Says how many user messages it has read and the last one's first word; or what it is told to."""

    name = "speaker"

    def __init__(self, tokenizer, *, n_ctx=400, indicator=None, says=None, pause=0.0):
        self.tokenizer, self.n_ctx, self.indicator, self.says, self.pause = (
            tokenizer, n_ctx, indicator, says, pause,
        )  # fmt: skip
        self.asked, self.rooms = [], []

    def render(self, messages, **options):
        return render(self.tokenizer, messages, **{"indicator": self.indicator, **options})

    def generate(self, chats, *, max_new_tokens=100, batch_tokens=8192, on_cut=None):
        time.sleep(self.pause)
        self.asked += chats
        self.rooms.append(max_new_tokens)
        users = [[m["content"] for m in chat.messages if m["role"] == "user"] for chat in chats]
        return [f"{len(said)} {said[-1].split()[0]}" if self.says is None else self.says for said in users]


@pytest.fixture
def questions(tmp_path):
    return load_questions(write_jsonl(tmp_path / "question.jsonl", QUESTIONS))


def fastchat_loads(folder):
    """The published reading rule: every .jsonl file of the folder is a model, each line an answer."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text().splitlines()
        found[path.name[:-6]] = {row["question_id"]: row for row in map(json.loads, lines)}
    return found


def test_questions_in_fastchats_layout(questions):
    assert questions[1] == MTQuestion(2, "math", ("How much is 6 times 7?", "And half of that?"))
    assert [question.question_id for question in questions] == [1, 2, 3]


def test_questions_in_the_hubs_layout(tmp_path):
    row = {"prompt_id": 7, "category": "math", "prompt": ["One?", "Two?"], "reference": ["1", "2"]}
    path = write_jsonl(tmp_path / "prompts.jsonl", [row])
    assert load_questions(path) == [MTQuestion(7, "math", ("One?", "Two?"), ("1", "2"))]


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([], ("holds no questions",)),
        ([{"category": "x", "turns": ["a"]}], ("question 1", "question_id")),
        ([{"question_id": 1, "turns": []}], ("question 1", "turns")),
        ([{"question_id": 1, "turns": ["a", 3]}], ("question 1", "turns")),
        ([QUESTIONS[0], QUESTIONS[0]], ("question 2", "id 1 of another")),
        (["text"], ("question 1", "str")),
    ],
)
def test_what_is_no_question_is_named(tmp_path, rows, fragments):
    path = write_jsonl(tmp_path / "question.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load_questions(path)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_references(tmp_path):
    path = write_jsonl(tmp_path / "gpt-4.jsonl", REFERENCES)
    assert load_references(path) == {2: ("It is 42.", "It is 21.")}
    with pytest.raises(InputError, match=r"reference answer 1, .*choices"):
        load_references(write_jsonl(tmp_path / "other.jsonl", QUESTIONS))


def test_every_turn_is_asked_with_the_models_own_answers(toy_tokenizer, questions, tmp_path):
    model = Speaker(toy_tokenizer)
    assert isinstance(model, Answerer)
    rows = answer_questions(model, questions, path=tmp_path / "a.jsonl", model_id="a")
    assert [row["choices"] for row in rows] == [
        [{"index": 0, "turns": ["1 Write", "2 Now"]}],
        [{"index": 0, "turns": ["1 How", "2 And"]}],
        [{"index": 0, "turns": ["1 Which", "2 Sort"]}],
    ]
    last = model.asked[-1]
    assert [(m["role"], m["content"]) for m in last.messages] == [
        ("user", QUESTIONS[2]["turns"][0]), ("assistant", "1 Which"), ("user", QUESTIONS[2]["turns"][1]),
    ]  # fmt: skip
    assert last.open_ended


def test_layout_is_fastchats(toy_tokenizer, questions, tmp_path):
    for name in ("one", "two"):
        answer_questions(Speaker(toy_tokenizer), questions, path=answers_path(tmp_path, name), model_id=name)
    found = fastchat_loads(tmp_path / "model_answer")
    assert list(found) == ["one", "two"]
    assert list(found["one"]) == [1, 2, 3]
    row = found["one"][3]
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "truncated", "cut"}
    assert row["model_id"] == "one"
    assert len(row["answer_id"]) == 22
    assert found == read_all_answers(tmp_path)
    assert len({row["answer_id"] for of in found.values() for row in of.values()}) == 6


def test_indicator_is_on_the_message_being_answered_alone(toy_tokenizer, questions, tmp_path):
    model = Speaker(toy_tokenizer, indicator="[IND]")
    answer_questions(model, questions[:1], path=tmp_path / "a.jsonl", model_id="a", indicator=True)
    for chat, turn in zip(model.asked, (0, 2), strict=True):  # strict: there are two chats
        assert set(chat.turn[chat.role == Role.INDICATOR].tolist()) == {turn}
    with pytest.raises(InputError, match="no indicator token"):
        answer_questions(
            Speaker(toy_tokenizer), questions, path=tmp_path / "b.jsonl", model_id="b", indicator=True
        )
    assert not (tmp_path / "b.jsonl").exists()


def test_long_conversations_are_cut_and_counted_and_so_are_empty_answers(toy_tokenizer, tmp_path):
    long = MTQuestion(1, "writing", ("start " + "word " * 200 + "end", "And then?"))
    short = MTQuestion(2, "writing", ("Hello?", "And then?"))
    model = Speaker(toy_tokenizer, n_ctx=120, says="")
    rows = answer_questions(
        model, [long, short], path=tmp_path / "a.jsonl", model_id="a", max_new_tokens=1000
    )
    assert set(model.rooms) == {60}
    assert len(model.asked) == 4
    assert all(chat.n_tokens <= 60 for chat in model.asked)
    kept = "".join(model.asked[0].token_strings())
    assert "start" in kept
    assert "end" in kept
    assert [row["truncated"] for row in rows] == [[True, True], [False, False]]
    assert count_answers(rows) == {"turns": 4, "empty": 4, "truncated": 2, "cut": 0}


def test_answers_that_reach_their_longest_are_counted(toy_tokenizer, questions, tmp_path):
    class Rambler(Speaker):
        """Its answer to the second of several questions, and only that, is cut."""

        def generate(self, chats, *, on_cut=None, **options):
            if len(chats) > 1:
                on_cut(1)
            return super().generate(chats, **options)

    rows = answer_questions(Rambler(toy_tokenizer), questions, path=tmp_path / "a.jsonl", model_id="a")
    assert [row["cut"] for row in rows] == [[False, False], [True, True], [False, False]]
    assert count_answers(rows)["cut"] == 2
    assert count_answers([{"choices": [{"turns": ["a"]}]}])["cut"] is None


def test_what_is_answered_is_not_asked_again(toy_tokenizer, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "CHUNK", 1)
    path = tmp_path / "a.jsonl"
    answer_questions(Speaker(toy_tokenizer, says="kept"), questions[1:2], path=path, model_id="a")
    with path.open("a") as file:
        file.write('{"question_id": 3, "choi')  # a kill in the middle of a line
    model, seen = Speaker(toy_tokenizer), []
    rows = answer_questions(
        model, questions, path=path, model_id="a", progress=lambda done, total: seen.append((done, total))
    )
    assert [row["choices"][0]["turns"][0] for row in rows] == ["1 Write", "kept", "1 Which"]
    assert len(model.asked) == 4
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [row["question_id"] for row in read_lines(path)] == [1, 2, 3]
    again = Speaker(toy_tokenizer)
    before = path.read_bytes()
    assert answer_questions(again, questions, path=path, model_id="a") == rows
    assert not again.asked
    assert path.read_bytes() == before


def test_killed_it_goes_on(toy_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "CHUNK", 2)
    many = [MTQuestion(i, "writing", (f"Number{i} please?", "More?")) for i in range(12)]
    path = tmp_path / "a.jsonl"

    def work():
        answer_questions(Speaker(toy_tokenizer, pause=0.05), many, path=path, model_id="a")

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    until = time.monotonic() + 20
    while not read_lines(path) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    finished = len(read_lines(path))
    assert 0 < finished < 12
    model = Speaker(toy_tokenizer)
    rows = answer_questions(model, many, path=path, model_id="a")
    assert len(model.asked) == 2 * (12 - finished)
    whole = answer_questions(Speaker(toy_tokenizer), many, path=tmp_path / "b.jsonl", model_id="a")
    drop = [[{**row, "tstamp": 0} for row in some] for some in (rows, whole)]
    assert drop[0] == drop[1]


def test_lines_survive_a_torn_end_and_name_a_broken_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')  # complete but for the line break
    append_lines(path, [{"a": 3}])
    assert [row["a"] for row in read_lines(path)] == [1, 2, 3]
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_lines(path)
    assert read_lines(tmp_path / "none.jsonl") == []


def test_other_files_are_refused(toy_tokenizer, questions, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1, "choices": []}])
    with pytest.raises(InputError, match="row 1"):
        read_answers(path)
    write_jsonl(path, [{"question_id": 1, "choices": [{"turns": ["only one"]}]}])
    with pytest.raises(InputError, match="another question 1"):
        answer_questions(Speaker(toy_tokenizer), questions, path=path, model_id="a")


def test_a_template_that_refuses_is_named_with_its_question(toy_tokenizer, tmp_path):
    class Refusing(Speaker):
        def render(self, messages, **options):
            raise InputError("no such role")

    with pytest.raises(InputError, match="question 9, turn 1: no such role"):
        answer_questions(
            Refusing(toy_tokenizer), [MTQuestion(9, "x", ("Hi",))], path=tmp_path / "a.jsonl", model_id="a"
        )


def test_settings_are_recorded_once_and_others_refused(tmp_path):
    record_settings(tmp_path, "a", {"alpha": 1.0})
    record_settings(tmp_path, "a", {"alpha": 1.0})
    with pytest.raises(RunExistsError, match=r"a with other settings \(alpha\)"):
        record_settings(tmp_path, "a", {"alpha": 0.5})
    answers_path(tmp_path, "b").parent.mkdir()
    answers_path(tmp_path, "b").write_text("")
    with pytest.raises(RunExistsError, match="not written by this command"):
        record_settings(tmp_path, "b", {})


@pytest.mark.parametrize(
    ("words", "label", "earlier"),
    [
        ("template", "M-7B", None),
        ("template+indicator", "M-7B+indicator", None),
        ("template+steered:0.1:1.2/3.0", "M-7B+steered_0.1_1.2_3.0", "M-7B+alpha0.1@1.2_3.0"),
        ("template+indicator+steered:0.5", "M-7B+indicator+steered_0.5", "M-7B+indicator+alpha0.5"),
        ("template+steered:0.5:retrieval", "M-7B+steered_0.5_retrieval", "M-7B+alpha0.5@retrieval"),
        ("template+steered:share=0.6", "M-7B+steered_share=0.6", None),
    ],
)
def test_labels_name_model_and_condition(words, label, earlier, tmp_path):
    condition = Condition.parse(words)
    assert make_label("org/M-7B", condition) == check_label(label) == label
    assert make_label("org/M-7B", condition, tmp_path) == label
    if earlier is not None:  # answers of an earlier version are gone on with
        write_jsonl(tmp_path / "model_answer" / f"{earlier}.jsonl", [])
        assert make_label("org/M-7B", condition, tmp_path) == earlier
        assert make_label("org/other", condition, tmp_path) == "other" + label.removeprefix("M-7B")


def test_labels_can_be_the_names_of_files():
    assert make_label("runs/some model", Condition()) == "some_model"
    assert check_label("M-7B+x") == "M-7B+x"
    for bad in ("", "a/b", ".hidden", "a b"):
        with pytest.raises(InputError, match="label"):
            check_label(bad)


def test_the_real_questions(test_data, toy_tokenizer, tmp_path):
    folder = test_data / "mt_bench"
    found = load_questions(folder / "question.jsonl")
    assert len(found) == 80
    assert {len(question.turns) for question in found} == {2}
    references = load_references(folder / "reference_answer_gpt-4.jsonl")
    assert len(references) == 30
    # 81 to 160 are ten of each category; 101 to 130 are reasoning, math and coding.
    assert {q.category for q in found if q.question_id in references} == {"reasoning", "math", "coding"}
    rows = answer_questions(
        Speaker(toy_tokenizer), found[:4], path=tmp_path / "a.jsonl", model_id="a", max_new_tokens=50
    )
    assert [row["question_id"] for row in rows] == [81, 82, 83, 84]
