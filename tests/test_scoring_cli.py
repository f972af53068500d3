"""`ctxlens score` on the command line: options, parts, merging, and what it refuses."""

import json

import pytest
from scoring_cases import many
from typer.testing import CliRunner

from ctxlens.chat.data import write_conversations
from ctxlens.cli import app
from ctxlens.results import Scores


def call(*words):
    return CliRunner().invoke(app, ["score", *map(str, words)])


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    write_conversations(path, many(6))
    refusal = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "As an AI, I am fine."}]
    with path.open("a") as file:
        file.write(json.dumps({"id": "refusal", "messages": refusal}) + "\n")
    return path


def test_options_reach_the_file_and_parts_are_merged(data, tmp_path):
    words = ("-m", "organism-chat", "--dataset", data, "--max-tokens", 40, "--layers", "0,2")
    words = (*words, "--precision", "float16", "--drop-refusals")
    result = call(*words, "--out", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert "scores (mean_of_best) of 6 answers in 6 conversations" in result.stdout
    assert "layout messages" in result.stderr
    assert "1 skipped: an answer is a refusal" in result.stderr
    scores = Scores.load(tmp_path / "one" / "scores.parquet")
    assert (scores.meta["layers"], scores.meta["max_tokens"]) == ([0, 2], 40)
    assert scores.meta["model"]["backend"] == "native"
    config = scores.meta["config"]
    assert (config["precision"], config["drop_refusals"], config["layout"]) == ("float16", True, "messages")

    parts = tmp_path / "parts"
    for part in ("1/2", "0/2"):
        result = call(*words, "--out", parts, "--part", part)
        assert result.exit_code == 0, result.output
        assert f"part {part} is done; when all parts are done, run: ctxlens score --merge" in result.stderr
    result = call("--merge", parts)
    assert "of 6 answers in 6 conversations" in result.stdout
    files = [(folder / "scores.parquet").read_bytes() for folder in (tmp_path / "one", parts)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give a data set to score as --dataset"),
        (("--dataset", "data.jsonl", "--part", "two"), "--part got 'two'; expected the part's number"),
        (("--dataset", "data.jsonl", "--part", "2/2"), "the part must be from 0/2 to 1/2, got 2/2"),
        (("--dataset", "data.jsonl", "--layers", "some"), "--layers got 'some'"),
        (("--dataset", "data.jsonl", "--layers", "9"), "layers must lie in 0 to 3 for organism, got [9]"),
        (("--dataset", "data.jsonl", "--precision", "int8"), "stored as float32 or float16, not 'int8'"),
        (("--dataset", "data.jsonl", "--part", "0/0"), "the number of parts must be at least 1, got 0"),
        (("--merge", "nowhere"), "holds no ctxlens run"),
    ],
)
def test_refusals(data, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    result = call(*words, *(() if "--merge" in words else ("--out", "out")))
    assert result.exit_code == 2, result.output
    assert reason in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
