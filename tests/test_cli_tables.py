"""Tables on the terminal: what fits on a line, and what becomes of what does not."""

import json
import os

import pytest
from evaluation_cases import RIGHT, evaluation
from rich.console import Console

from ctxlens.cli._tables import show_evaluation, show_evaluations
from ctxlens.results import Evaluation


def shown(capsys, monkeypatch, columns, table):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "_environ", os.environ)  # rich may have been imported in another environment
    show_evaluation(table)
    *lines, sentence = capsys.readouterr().out.splitlines()
    assert sentence.endswith(".")
    return lines


@pytest.mark.parametrize("columns", [80, 120])
def test_an_evaluation_of_models_and_conditions_is_read_at_80_columns(columns, capsys, monkeypatch):
    right = {(model, name.replace("template+steered:0.5", "plain")): x for (model, name), x in RIGHT.items()}
    lines = shown(capsys, monkeypatch, columns, evaluation(right=right))
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["mean", "difference", "reading", "McNemar"]
    # base answers 3 of 4 rightly, the tuned model none and then the other 3; two texts are too few
    assert [" ".join(line.split()) for line in lines[2:9]] == [
        "quiz: contains, 4 examples",
        "base",
        "template 0.75 (2 texts)",
        "plain 0.50 (2 texts) -0.25 (2 texts) no diff. shown 1.000",
        "tuned",
        "template 0.00 (2 texts) -0.75 (2 texts) too few to tell 0.250",
        "plain 0.75 (2 texts) 0.00 (2 texts) no diff. shown 1.000",
    ]
    assert len({line.index(")") for line in lines[2:9] if ")" in line}) == 1
    assert lines[9] == "quiz: f1, 4 examples"


def test_one_model_and_one_condition_stand_in_the_title(capsys, monkeypatch):
    right = {variant: values for variant, values in RIGHT.items() if variant[1] == "template"}
    lines = shown(capsys, monkeypatch, 80, evaluation(right=right))
    assert lines[0] == "evaluation, template"
    assert [line.split()[0] for line in lines[2:5]] == ["quiz:", "base", "tuned"]
    lines = shown(capsys, monkeypatch, 80, evaluation(right={("base", "template"): (1, 1, 1, 0)}))
    assert lines[:2] == ["evaluation, base, template", " " * 22 + "mean"]
    assert lines[3] == "  template  0.75 (2 texts)"


def test_empty_answers_and_answers_cut_off_stand_below_their_task(capsys, monkeypatch):
    found = evaluation(right={("base", "plain"): (0, 0, 0, 1), ("base", "template"): (1, 1, 1, 0)})
    plain = found.frame["condition"] == "plain"
    frame = found.frame.assign(empty=plain & (found.frame["example"] < 3), cut=~plain)
    lines = shown(capsys, monkeypatch, 80, Evaluation(frame, found.meta))
    assert lines[2:5] == [
        "quiz: contains, 4 examples", "  empty: plain 75%, template 0%", "  cut off: plain 0%, template 100%",
    ]  # fmt: skip
    assert sum("cut off" in line for line in lines) == 1
    show_evaluation(Evaluation(frame, found.meta))
    notes = capsys.readouterr().err
    assert "3 of 8 answers are empty" in notes
    assert "4 of 8 answers were cut off at their longest" in notes
    assert "(quiz: plain 75%, template 0%)" in notes
    assert "ask with examples (--num-fewshot 2)" in notes


def test_a_label_too_long_for_its_numbers_stands_above_them(capsys, monkeypatch):
    right = {
        ("base", "template"): (1, 1, 1, 0),
        ("base", "plain+steered:0.5:1.2/3.0/4.1"): (1, 0, 1, 0),
    }
    lines = shown(capsys, monkeypatch, 80, evaluation(right=right))
    place = lines.index("  plain+steered:0.5:1.2/3.0/4.1")
    assert lines[place + 1].split()[:3] == ["0.50", "(2", "texts)"]
    assert lines[place + 1].endswith("1.000")
    assert max(map(len, lines)) <= 80
    wide = shown(capsys, monkeypatch, 120, evaluation(right=right))
    assert any(line.startswith("  plain+steered:0.5:1.2/3.0/4.1  0.50") for line in wide), wide


def test_control_characters_of_names_are_made_visible(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, 80, evaluation("\x1b[31m"))
    assert "\x1b" not in "".join(lines)
    assert any(line.strip() == r"base\x1b[31m" for line in lines)


def test_a_table_never_breaks_the_name_of_a_condition(capsys, monkeypatch):
    from ctxlens.cli._screen import show_table

    name = "organism-chat, template+prefix+indicator+steered:0.95"
    monkeypatch.setenv("COLUMNS", "80")
    show_table("ratings", ["model", "turn 1", "turn 2"], [[name, "7.00 [6.50, 7.50]", "6.00 [5.50, 6.50]"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[3:]] == [name, "7.00 [6.50, 7.50]  6.00 [5.50, 6.50]"]
    show_table("ratings", ["model", "turn 1"], [[name, "7.00"]])
    assert capsys.readouterr().out.splitlines()[2].startswith(name + "  ")


def test_before_and_after_keeps_the_names_of_conditions_whole(capsys, monkeypatch, tmp_path):
    def mean(estimate, low, high):
        return {"estimate": estimate, "low": low, "high": high, "n": 12}

    def row(measure, first, second):
        return {
            "measure": measure, "first": f"base, {first}", "second": f"trained, {second}",
            "first_mean": mean(0.25, 0.1, 0.4), "second_mean": mean(0.75, 0.6, 0.9),
            "difference": mean(0.5, 0.3, 0.7), "p_value": 0.01, "pairs": 8,
        }  # fmt: skip

    long = "template+prefix+indicator"
    rows = [row("needle recall", "template+prefix", long), row("closed-book recall", "template", "template")]
    found = {"rows": rows, "treatments": [row("needle recall", long, long)]}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "80")
    show_evaluations(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "before and after, evaluation"
    numbers = "0.25 → 0.75  0.50 [0.30, 0.70]"
    assert [line.strip() for line in lines[2:]] == [
        "needle recall",
        f"base, template+prefix → trained, {long}", numbers,
        f"base, {long} → trained, {long}", numbers,
        "closed-book recall",
        "base, template → trained, template", numbers,
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "words", [("needle",), ("heads",), ("steer",), ("mt-bench",), ("select",), ("train",)]
)
def test_help_names_the_value_of_every_option(words, monkeypatch):
    """At 80 columns: no bare types as placeholders of options, no option name cut short."""
    from typer.testing import CliRunner

    from ctxlens.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    said = CliRunner().invoke(app, [*words, "--help"]).output
    options = [line for line in said.splitlines() if " --" in line[:12]]
    assert len(options) > 8
    assert not [
        line for line in options if any(f"<{kind}>" in line for kind in ("bool", "str", "float", "int"))
    ]
    assert "…" not in "".join(line.split("  ")[0] for line in options)
    assert "runs/VERB" not in said
    assert words == ("train",) or f"runs/{words[0]}" in said
