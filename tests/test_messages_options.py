"""`--messages`, `--prompt`, `--row` and `--limit`: where the conversations of a verb come from."""

import json

import pytest
from typer.testing import CliRunner

from ctxlens.cli import app

TALK = [{"role": "user", "content": "Is the harbour open?"}, {"role": "assistant", "content": "It is."}]


def call(*words, code=0, given=None):
    result = CliRunner().invoke(app, [str(word) for word in words], input=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction,input,output\nName a pier.,,Oak.\nName a bus.,,\nName a town.,,None\n")
    return path


def test_rows_of_a_data_set_are_counted_and_one_can_be_chosen(table):
    every = call("roles", "--messages", table)
    assert "Name a pier." in every.stdout
    assert "None" in every.stdout
    assert f"{table}: 3 rows (layout alpaca); all are used; --row N takes one of them" in every.stderr
    one = call("roles", "--messages", table, "--row", 2)
    assert "Name a town." in one.stdout
    assert "pier" not in one.stdout
    assert "3 rows (layout alpaca); row 2 is used" in one.stderr
    first = call("roles", "--messages", table, "--limit", 1)
    assert "3 rows (layout alpaca); row 0 is used" in first.stderr
    assert (
        "has 3 rows, 0 to 2; there is no row 3."
        in call("roles", "--messages", table, "--row", 3, code=2).stderr
    )


def test_standard_input_and_a_prompt(tmp_path):
    typed = call("roles", "--messages", "-", given=json.dumps(TALK))
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(TALK))
    assert typed.stdout == call("roles", "--messages", path).stdout
    lines = call(
        "roles", "--messages", "-", "--row", 1, given="\n".join(json.dumps({"messages": TALK}) for _ in "ab")
    )
    assert "standard input: 2 rows (layout messages); row 1 is used" in lines.stderr
    prompt = call("roles", "--prompt", TALK[0]["content"])
    path.write_text(json.dumps(TALK[:1]))
    assert prompt.stdout == call("roles", "--messages", path).stdout
    assert prompt.stderr == call("roles", "--messages", path).stderr


@pytest.mark.parametrize("verb", ["roles", "allocate", "generate", "steer"])
def test_conversations_are_named_once(verb, table, tmp_path):
    out = () if verb in ("roles", "generate") else ("--out", tmp_path / "run")
    assert "give conversations as --messages DATA (- reads standard input)" in call(verb, *out, code=2).stderr
    both = call(verb, *out, "--messages", table, "--prompt", "x", code=2)
    assert "--messages and --prompt both name conversations" in both.stderr
    assert "--row is for --messages" in call(verb, *out, "--prompt", "x", "--row", 1, code=2).stderr
    assert "--prompt is empty" in call(verb, *out, "--prompt", " ", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_used_is_skipped_with_its_reason_and_recorded(tmp_path):
    half = json.dumps([{"role": "user", "content": "HALF"}]).replace("HALF", "\\ud83d")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(TALK), half, json.dumps([TALK[1]]), json.dumps(TALK)]))
    words = ("allocate", "--backend", "native", "--messages", path, "--out", tmp_path / "run")
    said = call(*words).stderr
    assert "4 rows (layout messages); 2 of them are used" in said
    assert "row 1 skipped: Message 0 (user): content holds half a surrogate pair" in said
    assert "row 2 skipped: The conversation has no user turn" in said
    rows = json.loads((tmp_path / "run" / "manifest.json").read_text())["rows"]
    assert (rows["rows_read"], rows["rows_kept"], rows["rows_skipped"], len(rows["reasons"])) == (4, 2, 2, 2)
    assert "results are in" in call(*words).stderr, "the counts do not stand in the way of resuming"
    path.write_text(half)
    assert (
        "conversation 0: Message 0 (user): content holds half"
        in call("roles", "--messages", path, code=2).stderr
    )
