"""`score` and `select` for machines: the same table as JSON and as CSV, and nothing else on stdout."""

import csv
import io
import json

from typer.testing import CliRunner

from ctxlens.cli import app

TEXTS = ("The boat is red. What colour is it?", "Bread costs two coins. What does it cost?")


def outputs(*words):
    """The JSON document and the rows of CSV of one verb; stderr is empty with --quiet."""
    said = {}
    for form in ("--json", "--csv"):
        result = CliRunner().invoke(app, [*map(str, words), form, "--quiet"])
        assert result.exit_code == 0, result.output
        assert not result.stderr
        said[form] = result.stdout
    document, rows = json.loads(said["--json"]), list(csv.reader(io.StringIO(said["--csv"])))
    assert rows[0] == document["table"]["columns"]
    assert len(rows) - 1 == len(document["table"]["rows"])
    return document, rows


def test_scores_and_selections_are_read_by_machines(tmp_path):
    data, scores = tmp_path / "data.jsonl", tmp_path / "scores"
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    document, rows = outputs("score", "--dataset", data, "--out", scores, "--backend", "native")
    assert (document["verb"], document["model"], document["folder"]) == ("score", "organism", str(scores))
    assert {row[rows[0].index("answers")] for row in rows[1:]} == {"2"}
    document, rows = outputs("select", "--scores", scores, "--threshold", "0", "--out", tmp_path / "selected")
    assert document["summary"] == "2 of 2 answers are selected."
    assert dict(zip(*rows, strict=True))["selected"] == "2"
