"""ctxlens mt-bench on the embedded model, with a judge on this machine."""

import json
from pathlib import Path

import pytest
from judge_stub import QUESTIONS, REFERENCES, Say, serve, write_jsonl
from typer.testing import CliRunner

from ctxlens.cli import app
from ctxlens.files import read_lines
from ctxlens.results import Ratings

QUICK = ("--backend", "native", "--max-new-tokens", "6", "--questions", "question.jsonl", "--out", "out")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "question.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "gpt-4.jsonl", REFERENCES)
    return tmp_path


def call(*words, code=0):
    result = CliRunner().invoke(app, ["mt-bench", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def judged_by(stub, *words):
    return (*words, "--judge-url", stub.url, "--judge-model", "j")


def test_answers_of_two_conditions_are_judged_and_compared(folder, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    said = call("-m", "organism-chat", *QUICK)
    assert "organism-chat" in said.stdout
    assert "rated" not in said.stdout
    with serve(lambda *_: Say("\x1b[31mfine\x1b[0m [[7]]")) as stub:
        words = judged_by(stub, *QUICK, "--references", "gpt-4.jsonl", "--judge-key-env", "JUDGE_KEY")
        said = call("-m", "organism-chat", "--alpha", "0.3", *words)
    assert len(stub.requests) == 12
    assert "rated by j" in said.stdout
    assert "organism-chat+steered_0.3" in said.stdout
    assert "7.00" in said.stdout
    assert "organism-chat+steered_0.3 minus organism-chat: 0.00" in said.stderr
    files = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())
    assert files == [
        "manifest.json", "model_answer/organism-chat+steered_0.3.jsonl", "model_answer/organism-chat.jsonl",
        "model_judgment/j_single.jsonl", "models/organism-chat+steered_0.3.json", "models/organism-chat.json",
        "question.jsonl", "ratings-j.parquet", "summary-j.json",
    ]  # fmt: skip
    assert not [p for p in Path("out").rglob("*") if p.is_file() and b"very-secret" in p.read_bytes()]
    assert (
        json.loads(Path("out/models/organism-chat+steered_0.3.json").read_text())["steering"]["alpha"] == 0.3
    )
    answers = [read_lines(path) for path in sorted(Path("out/model_answer").iterdir())]
    assert [row["choices"] for row in answers[0]] != [row["choices"] for row in answers[1]]
    assert Ratings.load(Path("out/ratings-j.parquet")).mean().estimate == 7
    summary = json.loads(Path("out/summary-j.json").read_text())
    assert summary["differences"][0]["estimate"] == 0

    with serve(lambda *_: Say("[[1]]")) as stub:  # nothing is left to be asked
        call(*judged_by(stub, *QUICK, "--judge-only", "--references", "gpt-4.jsonl"))
    assert not stub.requests
    refused = call("-m", "organism-chat", "--alpha", "0.5", "--label", "organism-chat", *QUICK, code=2)
    assert "other settings (steering)" in refused.stderr


def test_answers_under_the_label_of_an_earlier_version_are_gone_on_with(folder):
    words = ("-m", "organism-chat", "--alpha", "0.3", "--limit", "1", *QUICK)
    call(*words)
    for place, ending in (("model_answer", "jsonl"), ("models", "json")):
        now = Path("out", place, f"organism-chat+steered_0.3.{ending}")
        now.rename(now.with_name(f"organism-chat+alpha0.3.{ending}"))
    before = Path("out/model_answer/organism-chat+alpha0.3.jsonl").read_bytes()
    assert "organism-chat+alpha0.3" in call(*words).stdout
    assert [path.name for path in Path("out/model_answer").iterdir()] == ["organism-chat+alpha0.3.jsonl"]
    assert Path("out/model_answer/organism-chat+alpha0.3.jsonl").read_bytes() == before


def test_answers_of_others_are_judged_without_a_model(folder):
    rows = [
        {"question_id": q["question_id"], "model_id": "gpt", "choices": [{"index": 0, "turns": ["a", ""]}]}
        for q in QUESTIONS
    ]
    call("--limit", "1", *QUICK, "--label", "first")
    write_jsonl(Path("out/model_answer/gpt.jsonl"), rows)
    with serve(lambda asked, _: Say("[[9]]" if "turn 1." in str(asked) else "\x1b[2Jnothing")) as stub:
        said = call("--limit", "1", *judged_by(stub, *QUICK, "--judge-only"))
    assert len(stub.requests) == 4
    assert "\x1b" not in said.output
    assert "2 of 4 answers have no rating (most often: no rating in brackets)" in said.stderr
    assert "run the same command again" in said.stderr
    lines = [line.split() for line in said.stdout.splitlines()]
    of_gpt, of_first = (next(line[1:] for line in lines if line[:1] == [name]) for name in ("gpt", "first"))
    assert of_gpt[:5] == ["9.00", "–", "9.00", "(1", "question)"]
    assert of_gpt[-4:] == ["1/2", "1", "0", "–"]
    assert of_first[-4:] == ["1/2", "0", "0", "2"]  # both answers reach six tokens


def test_nothing_rated_is_a_failure(folder):
    call("--limit", "1", *QUICK)
    words = ("--limit", "1", *QUICK, "--judge-only", "--judge-max-tokens", "77")
    with serve(lambda *_: Say("<think>[[7]]")) as stub:
        said = call(*judged_by(stub, *words), code=1)
    assert {request["max_tokens"] for request in stub.requests} == {77}
    assert "no answer could be rated (most often: the reply ends inside its thinking)" in said.stderr
    with serve(lambda *_: Say("<think>[[7]]</think>[[3]]")) as stub:
        call(*judged_by(stub, *words))


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--questions", "none.jsonl"), ("none.jsonl",)),
        (("--judge-url", "http://localhost:1/v1"), ("--judge-url and --judge-model",)),
        (("--judge-model", "j"), ("--judge-url and --judge-model",)),
        (("--judge-only",), ("--judge-url",)),
        (("--references", "gpt-4.jsonl"), ("--judge-url",)),
        (("--judge-url", "localhost", "--judge-model", "j"), ("'localhost'", "http://")),
        (("--judge-url", "http://h/v1", "--judge-model", "j", "--judge-key-env", "NO_KEY_X"), ("NO_KEY_X",)),
        (("--judge-url", "http://h/v1", "--judge-model", "j", "--judge-timeout", "0"), ("timeout",)),
        (("--alpha", "2"), ("alpha",)),
        (("--label", "a/b"), ("'a/b'", "label")),
        (("--indicator", "-m", "organism"), ("no indicator",)),
        (("-m", "no/such/folder"), ("no/such/folder",)),
    ],
)
def test_wrong_arguments_give_one_sentence_and_write_nothing(folder, words, fragments):
    questions = () if "--questions" in words else ("--questions", "question.jsonl")
    said = call(*questions, "--backend", "native", "--out", "out", *words, code=2)
    assert said.stdout == ""
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1
    assert all(fragment in said.stderr for fragment in fragments), said.stderr
    assert not Path("out").exists()


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in call(*QUICK, code=2).stderr


def test_a_folder_of_other_questions_is_refused(folder):
    call("--limit", "1", *QUICK)
    assert "other settings" in call(*QUICK, code=2).stderr
