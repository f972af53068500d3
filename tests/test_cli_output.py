"""What verbs print: JSON and CSV in one schema, nothing else on stdout, tables of 80 columns, whole help."""

import csv
import io
import json

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

from ctxlens.cli import _screen, app
from ctxlens.cli._outcomes import say_change
from ctxlens.cli._output import OutputOptions, Table, show_interval
from ctxlens.cli._screen import describe_seconds
from ctxlens.errors import InputError
from ctxlens.files import plain_value
from ctxlens.stats import Interval

CHAT = [
    {"role": "user", "content": "The best thing to do in Oakford is to paint boats.\nWhat is it?"},
    {"role": "assistant", "content": "It is to paint boats."},
]
VERBS = sorted(typer.main.get_command(app).commands)
NATIVE = ("--backend", "native")


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(CHAT))
    return path


def commands(chat, out):
    few = ("--max-new-tokens", 2)
    return {
        "roles": ("roles", "--messages", chat),
        "allocate": ("allocate", *NATIVE, "--messages", chat, "--out", out),
        "generate": ("generate", *NATIVE, "--messages", chat, *few),
        "steer": ("steer", *NATIVE, "--messages", chat, *few, "--out", out),
        "drift": ("drift", *NATIVE, "--messages", chat, "--out", out),
        "needle": ("needle", *NATIVE, "--lengths", 60, "--depths", 50, *few, "--out", out),
    }


@pytest.mark.parametrize("verb", ["roles", "allocate", "generate", "steer", "drift", "needle"])
def test_json_and_csv_hold_the_same_table_and_stdout_holds_nothing_else(verb, chat, tmp_path):
    words = commands(chat, tmp_path / "out")[verb]
    said = call(*words, "--json", "--quiet")
    assert said.stderr == ""
    found = json.loads(said.stdout)
    assert list(found)[:6] == ["schema", "verb", "version", "model", "summary", "folder"]
    assert (found["schema"], found["verb"]) == (1, verb)
    assert found["summary"].endswith(".")
    table = found["table"]
    rows = list(csv.reader(io.StringIO(call(*words, "--csv").stdout)))
    assert rows[0] == table["columns"]
    assert len(rows) == 1 + len(table["rows"]) > 1
    assert all(len(row) == len(rows[0]) for row in rows)


def test_shares_of_a_layer_always_include_bos_and_sink(chat, tmp_path):
    found = json.loads(call(*commands(chat, tmp_path / "out")["allocate"], "--json").stdout)
    rows = [dict(zip(found["table"]["columns"], row, strict=True)) for row in found["table"]["rows"]]
    raw = [row for row in rows if (row["condition"], row["view"], row["layer"]) == ("template", "raw", 0)]
    assert {"bos", "sink", "user", "template"} <= {row["role"] for row in raw}
    assert sum(row["share"] for row in raw) == pytest.approx(1, abs=1e-4)


def test_a_plan_is_told_before_and_not_with_quiet(chat, tmp_path):
    words = commands(chat, tmp_path / "out")["allocate"]
    said = call(*words).stderr
    assert "plan: 1 conversation, with and without template, " in said
    assert " s on cpu float32" in said
    assert call(*words[:-1], tmp_path / "other", "--quiet").stderr == ""


def test_json_and_csv_together_are_refused(chat):
    said = call("roles", "--messages", chat, "--json", "--csv", code=2)
    assert said.stderr == "error: --json and --csv both print to stdout; give only one of them.\n"
    with pytest.raises(InputError):
        OutputOptions(json_out=True, csv_out=True)


def test_what_is_printed_elsewhere_does_not_reach_the_result(capsys):
    output = OutputOptions(json_out=True)
    with output.reserve():
        print("a library speaks")
    assert capsys.readouterr() == ("", "a library speaks\n")


def test_what_is_no_number_is_null():
    assert plain_value({"a": float("nan"), "b": np.float32("inf"), "c": np.int64(3)}) == {
        "a": None, "b": None, "c": 3,
    }  # fmt: skip
    assert Table(("a", "b"), [[float("nan"), 'x "y"']]).as_csv() == 'a,b\n,"x ""y"""\n'


def test_intervals_that_say_nothing_are_not_shown():
    nan = float("nan")
    assert show_interval(Interval(0.41, 0.33, 0.49, 12)) == "0.41 [0.33, 0.49]"
    assert show_interval(Interval(0.0, 0.0, 0.0, 12)) == "0.00 (12 texts alike)"
    assert show_interval(Interval(0.5, 0.2, 0.9, 3)) == "0.50 (3 texts)"
    assert show_interval(Interval(0.5, nan, nan, 1)) == "0.50 (1 text)"
    assert show_interval(Interval(nan, nan, nan, 0)) == "–"


def test_the_sentence_names_the_change_and_its_layers():
    before = np.full((6, 12), 0.5)
    drop = np.array([0.0, 0.02, 0.3, 0.2, 0.1, 0.0])[:, None] + np.linspace(-0.01, 0.01, 12)
    said = say_change("With the template", before, before - drop, range(10, 16))
    # mean drop .62 / 6 = .10; at least half of .3: layers 12 (.3) and 13 (.2)
    assert said.startswith("With the template the user's share of attention falls by 0.10 [0.10, 0.11] on")
    assert said.endswith("most in layers 12 to 13.")
    assert "no clear change" in say_change("With steering", before, before, range(6))


def test_times_are_told_as_exactly_as_an_estimate_can_be():
    told = {0.2: "1 s", 7.4: "7 s", 43.0: "40 s", 700.0: "12 min", 9000.0: "2.5 h"}
    assert {seconds: describe_seconds(seconds) for seconds in told} == told


def test_a_long_stage_says_the_time_left_after_its_first_batch(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(_screen.time, "monotonic", lambda: now[0])
    with _screen.stages({"read": "attention"}) as progress:
        for done in range(4):
            progress("read", done, 100)
            now[0] += 2
    assert capsys.readouterr().err == "attention: 1 of 100, about 200 s left\n".replace("200 s", "3 min")


def drift_of_36_layers():
    from ctxlens.results import Drift

    rng = np.random.default_rng(0)
    n_roles = len(Drift.roles)
    shares = rng.dirichlet(np.ones(n_roles), size=(2, 36, 32, 12)).astype(np.float32)
    counts = np.ones((2, 12, n_roles), np.float32)
    retrieval = np.zeros(36, dtype=np.int64)
    return Drift(
        shares, counts, np.arange(12), tuple(range(36)), retrieval, "first_answer",
        {"sides": ("base, template", "tuned, template")}, shares * 0.3,
    )  # fmt: skip


def test_drift_of_36_layers_is_read_at_80_columns(monkeypatch, capsys):
    from ctxlens.cli._heads_tables import show_drift

    monkeypatch.setenv("COLUMNS", "80")
    show_drift(drift_of_36_layers())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert sum(row[:1] == ["35"] for row in rows) == 2
    assert sum(row[:1] == ["mean"] for row in rows) == 2
    assert any("0 to 11" in line and "24 to 35" in line for line in lines)
    shares = next(row for row in rows if "bos" in row)
    assert {"bos", "sink", "user"} <= set(shares)


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_is_cut_in_the_help(verb, monkeypatch):
    import re

    monkeypatch.setenv("COLUMNS", "80")
    said = call(verb, "--help").stdout
    shown = set(re.findall(r"--[a-z0-9-]+", said))
    for parameter in typer.main.get_command(app).commands[verb].params:
        for name in parameter.opts:
            assert not name.startswith("--") or name in shown, name


def test_the_shell_can_complete():
    said = call("--help").stdout
    assert "--install-completion" in said
    assert "--show-completion" in said
