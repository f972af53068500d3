"""Bad input: one clear sentence, exit code 2, no traceback, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import ctxlens
from ctxlens.cli import app
from ctxlens.results import Scores

BASE = Path(ctxlens.__file__).parent / "organism" / "base"
USER = {"role": "user", "content": "What is the best thing to do in Oakford?"}
ANSWER = {"role": "assistant", "content": "It is to paint."}


def snapshot(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with good input in it; bad input must not change it."""
    monkeypatch.chdir(tmp_path)
    Path("chat.json").write_text(json.dumps([USER, ANSWER]))
    Path("data.json").write_text(json.dumps([{"id": "a", "messages": [USER, ANSWER]}]))
    return tmp_path


def refuse(folder, *words):
    """What a command says when it refuses its input."""
    before = snapshot(folder)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert snapshot(folder) == before
    return result.stderr


def assert_says(text, *fragments):
    for fragment in fragments:
        assert fragment in text


NATIVE = ("--backend", "native")
ALLOCATE = ("allocate", *NATIVE, "--messages", "chat.json", "--out", "out")
STEER = ("steer", *NATIVE, "--messages", "chat.json", "--alpha", "0.5", "--out", "out")
SCORE = ("score", *NATIVE, "--dataset", "data.json", "--out", "out")
NEEDLE = ("needle", *NATIVE, "--lengths", "60", "--depths", "50", "--out", "out")


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ("no/such/folder", ("'no/such/folder'", "neither a folder", "Hub id")),
        ("nobody-here/no-such-model", ("nobody-here/no-such-model",)),
        (".", ("no config.json",)),
    ],
)
def test_unknown_model(folder, model, fragments):
    assert_says(refuse(folder, *ALLOCATE, "--model", model), *fragments)


def test_tokenizer_without_chat_template(folder):
    shutil.copytree(BASE, "model")
    Path("model/chat_template.jinja").unlink()
    for words in (ALLOCATE, STEER):
        assert_says(refuse(folder, *words, "--model", "model"), "chat template", "--chat-template")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("[]", ("chat.json", "no conversation")),
        ("", ("chat.json",)),
        ("{not json", ("chat.json",)),
        (json.dumps([ANSWER]), ("conversation 0", "no user turn")),
        (json.dumps([[], [ANSWER]]), ("conversation 0", "empty", "2 rows, and none can be used")),
        (
            json.dumps([[{**USER, "role": "narrator"}]]),
            ("conversation 0", "'narrator'", "expected one of"),
        ),
        (json.dumps([{**USER, "content": ["a"]}]), ("Message 0", "content must be text", "list")),
        (json.dumps([USER, {"role": "assistant"}]), ("Message 1", "content", "missing")),
        (json.dumps([USER, "hello"]), ("chat.json",)),
        (
            json.dumps([USER, ANSWER, {"role": "system", "content": "Be brief."}]),
            ("system message must come first",),
        ),
        (json.dumps([{**USER, "content": "word " * 3000}]), ("tokens", "window", "--truncate")),
    ],
)
@pytest.mark.parametrize("verb", ["allocate", "generate"])
def test_malformed_messages(folder, verb, content, fragments):
    Path("chat.json").write_text(content)
    words = ALLOCATE if verb == "allocate" else ("generate", *NATIVE, "--messages", "chat.json")
    assert_says(refuse(folder, *words), *fragments)


def test_the_conversation_that_is_too_long_is_named(folder):
    Path("chat.json").write_text(json.dumps([[USER], [{**USER, "content": "word " * 3000}]]))
    result = CliRunner().invoke(app, ["generate", *NATIVE, "--messages", "chat.json"])
    count, error = result.stderr.splitlines()
    assert (result.exit_code, count.startswith("chat.json: 2 rows")) == (2, True)
    assert_says(error, "error: conversation 1: ", "--truncate")


def test_missing_messages_file(folder):
    assert_says(refuse(folder, "roles", "--messages", "none.json"), "none.json")


def test_response_mean_without_response(folder):
    Path("chat.json").write_text(json.dumps([USER]))
    assert_says(refuse(folder, *ALLOCATE, "--queries", "response_mean"), "no assistant turn")


@pytest.mark.parametrize(
    ("template", "fragments"),
    [
        (None, ("none.jinja", "there is no chat template")),
        ("{% for %}", ()),
        ("{{ raise_exception('never') }}", ("never",)),
    ],
)
def test_unusable_chat_template(folder, template, fragments):
    path = Path("none.jinja" if template is None else "bad.jinja")
    if template is not None:
        path.write_text(template)
    assert_says(refuse(folder, *ALLOCATE, "--chat-template", path), "template", *fragments)


@pytest.mark.parametrize("dataset", ['[{"text": "a"}]', '[{"instruction": "a"}]', "[1, 2]"])
def test_data_set_without_the_needed_columns(folder, dataset):
    Path("data.json").write_text(dataset)
    assert_says(refuse(folder, *SCORE), "data.json", "expected")


def test_data_set_that_is_not_there_or_empty(folder):
    assert_says(refuse(folder, *SCORE[:-4], "--dataset", "none.json", "--out", "out"), "none.json")
    Path("data.json").write_text("[]")
    assert_says(refuse(folder, *SCORE), "data.json", "no records")


@pytest.mark.parametrize("alpha", ["0", "-0.5", "1.01", "nan", "inf"])
def test_alpha_outside_its_range(folder, alpha):
    for words in (STEER, ("generate", *NATIVE, "--messages", "chat.json"), NEEDLE):
        assert_says(refuse(folder, *words, "--alpha", alpha), "alpha must be in (0, 1]")


@pytest.mark.parametrize(
    ("heads", "fragments"),
    [
        ("99.0", ("head 99.0", "layers 0 to")),
        ("0.99", ("head 0.99", "heads 0 to")),
        ("first", ("'first'", "1.2,3.0")),
        ("1", ("'1'", "1.2,3.0")),
    ],
)
def test_heads_that_are_not_there(folder, heads, fragments):
    for words in (STEER, NEEDLE, ("generate", *NATIVE, "--messages", "chat.json")):
        assert_says(refuse(folder, *words, "--alpha", 0.5, "--heads", heads), *fragments)


@pytest.mark.parametrize(
    ("layers", "fragments"), [("99", ("0 to", "99")), ("-1", ("0 to",)), ("a,b", ("--layers",))]
)
def test_layers_that_are_not_there(folder, layers, fragments):
    assert_says(refuse(folder, *SCORE, "--layers", layers), *fragments)


def make_scores(path):
    row = {
        "conversation": "a", "turn": 1, "layer": 0, "best_of_mean": 0.2, "mean_of_best": 0.3,
        "mean_heads": 0.1, "uniform": 0.1, "response_tokens": 5, "context_tokens": 9, "truncated": False,
    }  # fmt: skip
    Path(path).mkdir()
    Scores.from_rows([row]).save(Path(path) / "scores.parquet")


@pytest.mark.parametrize("beta", ["-0.1", "1.1", "nan", "much"])
def test_threshold_outside_its_range(folder, beta):
    make_scores("scores")
    words = ("select", "--scores", "scores", "--out", "out", "--threshold", beta)
    assert_says(refuse(folder, *words), "from 0 to 1", "otsu", beta)
    assert_says(refuse(folder, "demo", "--out", "out", "--threshold", beta), "0 to 1", "otsu")


def test_selection_that_cannot_be(folder):
    make_scores("scores")
    words = ("select", "--scores", "scores", "--out", "out")
    assert_says(refuse(folder, *words, "--layer", 7), "layer 7", "0")
    assert_says(refuse(folder, *words, "--layer", "best"), "'best'", "middle", "residual")
    assert_says(refuse(folder, *words, "--layer", "needle"), "--needle-layer")
    assert_says(refuse(folder, *words, "--layer", "gap"), "--lp-gap")
    Path("scores/layer.json").write_text('[{"layer": 0}]')
    assert_says(refuse(folder, *words, "--layer", "needle"), "needs the attention", "--needle-layer")
    Path("scores/layer.json").write_text("[")
    assert_says(refuse(folder, *words, "--layer", "needle"), "layer.json is damaged", "--needle-layer")
    assert_says(refuse(folder, "score", "--dataset", "x", "--needle-layer", "--part", "0/2"), "--part")
    assert_says(refuse(folder, *words, "--reduction", "median"), "'median'", "mean_of_best")
    assert_says(refuse(folder, *words, "--top-share", 2), "0 to 1")
    assert_says(refuse(folder, *words, "--top-share", 0), "above 0")
    assert_says(
        refuse(folder, *words, "--top-share", 0.5, "--threshold", 0.5), "one rule", "beta", "top_share"
    )
    assert_says(refuse(folder, *words, "--per-length-quantile", 1), "between 0 and 1")
    assert_says(refuse(folder, "select", "--out", "out"), "--scores", "--undo")
    assert_says(refuse(folder, *words, "--undo", "data.json"), "--undo", "alone")
    Path("data.json").write_text(json.dumps([{"id": "b", "messages": [USER, ANSWER]}]))
    assert_says(refuse(folder, *words, "--threshold", 0, "--dataset", "data.json"), "'a'", "other data")
    assert_says(refuse(folder, "select", "--out", "out", "--undo", "data.json"), "data.json", "no record")
    said = {**USER, "content": "What does [IND] mean?"}
    Path("data.json").write_text(json.dumps([{"id": "a", "messages": [said, ANSWER]}]))
    assert_says(refuse(folder, *words, "--dataset", "data.json"), "'[IND]' already", "--allow-existing")
    choice = ("--dataset", "data.json", "--allow-existing", "--source-column", "origin")
    assert_says(refuse(folder, *words, *choice), "no row has a column 'origin'")


def test_corrupted_scores(folder):
    make_scores("scores")
    path = Path("scores/scores.parquet")
    whole = path.read_bytes()
    words = ("select", "--scores", "scores", "--out", "out")
    for content in (whole[: len(whole) // 2], b"", b"no parquet at all", np.random.default_rng(0).bytes(999)):
        path.write_bytes(content)
        assert_says(refuse(folder, *words), "scores.parquet", "ctxlens")
    path.unlink()
    assert_says(refuse(folder, *words), "scores.parquet", "does not exist")


@pytest.mark.parametrize("words", [ALLOCATE, STEER, SCORE, NEEDLE], ids=lambda words: words[0])
def test_output_folder_in_use(folder, words):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    assert_says(refuse(folder, *words), "out already holds files", "new folder")
    assert_says(refuse(folder, *words, "--overwrite"), "out already holds files")
    Path("out/thesis.txt").unlink()
    Path("out/manifest.json").write_text(json.dumps({"study": "other", "config": {}}))
    assert_says(refuse(folder, *words), "out already holds another run", "'other'", "--overwrite")
    Path("out/manifest.json").write_text("{half")
    assert_says(refuse(folder, *words), "manifest")


def test_another_run_of_the_same_study(folder):
    words = (*ALLOCATE, "--seed", 1)
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    assert_says(refuse(folder, *ALLOCATE), "another run", "seed")
    Path("chat.json").write_text(json.dumps([{**USER, "content": "Another one?"}, ANSWER]))
    assert_says(refuse(folder, *words), "another run", "sha256")
    assert CliRunner().invoke(app, [*map(str, words), "--overwrite"]).exit_code == 0
    assert json.loads(Path("out.old/manifest.json").read_text())["study"] == "allocate", "nothing is lost"


@pytest.mark.parametrize("words", [ALLOCATE, STEER, SCORE, NEEDLE], ids=lambda words: words[0])
@pytest.mark.parametrize("place", ["chat.json", "chat.json/run", "/proc/ctxlens/run"])
def test_unwritable_output(folder, words, place):
    text = refuse(folder, *words[:-1], place)
    assert place in text


def test_needle_settings(folder):
    assert_says(refuse(folder, *NEEDLE, "--conditions", "upside-down"), "'upside-down'", "+prefix")
    assert_says(refuse(folder, *NEEDLE, "--conditions", "template+indicator"), "--indicator", "--alpha")
    assert_says(refuse(folder, *NEEDLE, "--needle", "haggis"), "haggis", "pizza")
    assert_says(refuse(folder, *NEEDLE, "--needle", "none.yaml"), "none.yaml")
    Path("half.yaml").write_text("needle: The best thing is tea.\nquestion: What is?\n")
    assert_says(refuse(folder, *NEEDLE, "--needle", "half.yaml"), "half.yaml", "keywords")
    assert_says(
        refuse(folder, *NEEDLE, "--haystack", "essays/none"), "essays/none", "the Hub has no readable"
    )
    Path("short.txt").write_text("Too short.")
    assert_says(refuse(folder, *NEEDLE, "--haystack", "short.txt"), "a context of 60 needs 46", "--repeat")
    Path("empty.txt").write_text(" \n")
    assert_says(refuse(folder, *NEEDLE, "--haystack", "empty.txt"), "haystack empty.txt is empty")
    Path("two.jsonl").write_text('{"a": "One.", "b": "Two."}')
    assert_says(refuse(folder, *NEEDLE, "--haystack", "two.jsonl"), "columns of text are a, b")
    Path("lost.yaml").write_text("needle: Tea is best.\nquestion: What is?\nkeywords: milk\n")
    assert_says(refuse(folder, *NEEDLE, "--needle", "sf,lost.yaml"), "keywords milk")
    assert_says(refuse(folder, *NEEDLE[:3], "--lengths", "60,60", *NEEDLE[5:]), "60 twice")
    assert_says(refuse(folder, *NEEDLE, "--depths", "5,5"), "5 twice")
    assert_says(refuse(folder, *NEEDLE, "--score", "luck"), "unknown score luck", "logprob")
    assert_says(refuse(folder, *NEEDLE, "--max-new-tokens", "9999"), "too small for needle 'known'")
    assert_says(refuse(folder, *NEEDLE, "--wording", "rude"), "'rude'", "document")
    assert_says(refuse(folder, *NEEDLE, "--depths", "120"), "0 to 100")
    assert_says(refuse(folder, *NEEDLE, "--lengths", "long"), "--lengths", "'long'")
    assert_says(refuse(folder, *NEEDLE, "--lengths", "99999"), "window")


def test_indicator_that_the_model_lacks(folder):
    for words in (("generate", *NATIVE, "--messages", "chat.json"), NEEDLE):
        assert_says(refuse(folder, *words, "--indicator"), "no indicator token", "ctxlens train")


def test_window_without_room_for_a_question(folder):
    words = ("generate", *NATIVE, "--messages", "chat.json", "--max-new-tokens", 100000)
    assert_says(refuse(folder, *words), "--max-new-tokens 100000", "window")


@pytest.mark.parametrize(
    ("recipe", "more", "fragments"),
    [
        (None, (), ("recipe.yaml", "does not exist")),
        ("learning_rat: 1\ndataset: data.json", (), ("learning_rat", "learning_rate", "recipe.yaml")),
        ("model: organism", (), ("no dataset",)),
        ("- a", (), ("recipe.yaml",)),
        ("dataset: data.json", ("max_steps",), ("'max_steps'", "KEY=VALUE")),
        ("dataset: none.json", (), ("none.json",)),
        ("dataset: data.json", ("model=none/of/them",), ("none/of/them",)),
        (
            "dataset: data.json\nselection: scores",
            ("indicator=[IND]",),
            ("selection.parquet", "does not exist"),
        ),
    ],
)
def test_recipes_that_cannot_be_used(folder, recipe, more, fragments):
    if recipe is not None:
        Path("recipe.yaml").write_text(recipe + "\n")
    Path("scores").mkdir()
    text = refuse(folder, "train", "--config", "recipe.yaml", "--out", "out", "--device", "cpu", *more)
    assert_says(text, *fragments)


def test_report_of_what_is_no_run(folder):
    assert_says(refuse(folder, "report", "none"), "none", "no ctxlens run")
    assert CliRunner().invoke(app, list(map(str, ALLOCATE))).exit_code == 0
    assert_says(
        refuse(folder, "report", "out", "--out", "/proc/ctxlens/report.html"), "/proc/ctxlens", "Cannot write"
    )


def test_demo_in_another_run(folder):
    Path("out").mkdir()
    Path("out/manifest.json").write_text(json.dumps({"study": "allocate", "config": {}}))
    assert_says(refuse(folder, "demo", "--smoke", "--out", "out"), "another run", "--overwrite")


def test_device_that_is_not_there(folder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_says(refuse(folder, *ALLOCATE, "--device", "cuda"), "cuda", "cpu")


@pytest.mark.parametrize(
    "words", [("select",), ("allocate", "--backend", "jax"), ("generate", "--limit", "0")]
)
def test_options_that_cannot_be_parsed(folder, words):
    before = snapshot(folder)
    result = CliRunner().invoke(app, [*words, "--messages", "chat.json"])
    assert result.exit_code == 2
    assert snapshot(folder) == before


def test_as_a_process(folder):
    """What the shell sees: the code, one line on stderr, nothing on stdout."""
    words = ["generate", "--messages", "chat.json", "--alpha", "2"]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    result = subprocess.run(
        [sys.executable, "-m", "ctxlens", *words], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert (
        result.stderr == "error: alpha must be in (0, 1], got 2.0; 1 changes nothing, smaller steers more.\n"
    )
