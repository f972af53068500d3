"""What the shell offers at the Tab key."""

import os
import subprocess
import sys
from typing import get_args

import pytest

from ctxlens.cli._completion import complete_condition, find_completer

CONTROLS = ["plain+matched", "plain+bos", "plain+nobos", "plain+prefix", "plain+indicator", "plain+steered:"]


def press_tab(*words):
    """The offers of bash after `ctxlens WORDS`, the last of which is unfinished."""
    asked = {
        "_CTXLENS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("ctxlens", *words)),
        "COMP_CWORD": str(len(words)),
    }  # fmt: skip
    command = [sys.executable, "-c", "from ctxlens.cli import app; app(prog_name='ctxlens')"]
    said = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert not said.stderr
    return said.stdout.splitlines()


def test_the_shell_offers_built_in_models_and_the_values_of_an_option():
    assert press_tab("needle", "--model", "org") == ["organism", "organism-chat"]
    assert press_tab("needle", "--dtype", "b") == ["bfloat16"]
    assert press_tab("audit", "organism-") == ["organism-chat"]


@pytest.mark.parametrize(
    ("verb", "option", "text", "offered"),
    [
        ("drift", "against", "organism-", ["organism-chat"]),
        ("heads", "haystack", "n", ["neutral"]),
        ("needle", "needle", "known,p", ["known,pizza", "known,pizza-short"]),
        ("needle", "needle", "pizza,pizza", ["pizza,pizza-short"]),
        ("needle", "conditions", "plain,template+pre", ["plain,template+prefix"]),
        ("heads", "condition", "assis", ["assistant"]),
        ("eval", "tasks", "ctxlens_smo", ["ctxlens_smoke"]),
        ("eval", "tasks", "ctxlens_smoke,ctxlens_clo", ["ctxlens_smoke,ctxlens_closed_book"]),
        ("needle", "haystack", "essays/", []),
        ("cure", "words", "organism-", ["organism-chat"]),
    ],
)
def test_values_continue_what_is_typed(verb, option, text, offered):
    assert find_completer(verb, option)(text) == offered


def test_only_words_that_make_a_condition_are_offered():
    assert complete_condition("plain+") == CONTROLS
    assert complete_condition("template+prefix+") == ["template+prefix+indicator", "template+prefix+steered:"]
    assert complete_condition("nonsense+") == []


def test_options_that_take_only_files_offer_no_names():
    assert find_completer("audit", "needle") is None
    assert find_completer("audit", "haystack") is None


def test_every_completer_belongs_to_an_option_of_a_verb():
    import typer.main

    from ctxlens.cli import app
    from ctxlens.cli._completion import _COMPLETERS, _NO_NAMES

    verbs = typer.main.get_command(app).commands
    there = {(verb, one.name) for verb, command in verbs.items() for one in command.params}
    assert set(_COMPLETERS) <= {name for _, name in there}
    assert there >= _NO_NAMES


def test_the_names_are_those_of_their_owners():
    from ctxlens.chat.data.layouts import LAYOUTS
    from ctxlens.cli.heads import _EVERYTHING
    from ctxlens.curing.request import METHODS
    from ctxlens.evals.needle.config import SCORES, WORDINGS
    from ctxlens.evals.needle.needles import DRAWN_NEEDLES, NEEDLES
    from ctxlens.models.checkpoint import PACKAGED
    from ctxlens.results import Scores
    from ctxlens.results.scores import Precision
    from ctxlens.scoring.selection import LP_GAP

    owners = {
        ("needle", "model"): PACKAGED,
        ("needle", "needle"): [*DRAWN_NEEDLES, *NEEDLES],
        ("needle", "wording"): WORDINGS,
        ("needle", "score"): SCORES,
        ("heads", "kind"): _EVERYTHING.split(","),
        ("score", "layout"): LAYOUTS,
        ("score", "precision"): get_args(Precision),
        ("select", "reduction"): [*Scores.REDUCTIONS, LP_GAP],
        ("cure", "method"): METHODS,
    }
    for option, names in owners.items():
        assert set(find_completer(*option)("")) == set(names), option
    for name in find_completer("audit", "fail_on")(""):
        from ctxlens.cli.audit import check_questions

        assert check_questions(name) == (name,)


def test_the_flags_of_completion_show_no_placeholder():
    from typer.testing import CliRunner

    from ctxlens.cli import app

    said = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in said
    assert "<bool>" not in said
