"""`score` and `select` for machines: the same table as JSON and as CSV, and nothing else on stdout."""

import csv
import io
import json

from typer.testing import CliRunner

from ctxlens.cli import app
from ctxlens.results import Selection

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


def test_the_layer_is_found_by_a_rule(tmp_path):
    data, scores = tmp_path / "data.jsonl", tmp_path / "scores"
    asked = [TEXTS[k % 2] + " Say it." * (k % 8) for k in range(96)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in asked]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    outputs("score", "--dataset", data, "--out", scores, "--layers", "all", "--needle-layer")
    shares = [one["by_head"] for one in json.loads((scores / "layer.json").read_text())]
    best = max(range(len(shares)), key=lambda layer: max(shares[layer]))
    words = ("select", "--scores", scores, "--top-share", 0.25)
    _, rows = outputs(*words, "--layer", "needle", "--out", tmp_path / "selected")
    found = dict(zip(*rows, strict=True))
    assert (found["selected"], found["layer"]) == ("24", str(best))
    assert Selection.load(tmp_path / "selected" / "selection.parquet").meta["layer"] == best
    assert dict(zip(*outputs(*words, "--out", tmp_path / "b")[1], strict=True))["layer"] == "3"
