"""The verbs on the embedded model: what they write, what they print, and that they do not say more."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

from ctxlens.chat.roles import Role
from ctxlens.cli import _screen, app
from ctxlens.results import NeedleGrid, RoleAllocation, Scores, Selection, TokenView

ROOT = Path(__file__).parents[1]
GROUP = typer.main.get_command(app)
VERBS = [
    "allocate", "roles", "drift", "needle", "heads", "steer", "generate", "score", "select", "train",
    "cure", "eval", "mt-bench", "report", "demo",
]  # fmt: skip
CHAT = [
    {"role": "user", "content": "The best thing to do in Oakford is to paint wooden boats.\nWhat is it?"},
    {"role": "assistant", "content": "It is to paint wooden boats."},
]


def call(*words, code=0):
    """The result of a command, which must end with the given code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def messages(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]]))
    return path


@pytest.fixture
def dataset(tmp_path):
    rows = [{"id": f"c{i}", "messages": CHAT} for i in range(3)]
    rows += [{"id": "long", "messages": [{**CHAT[0], "content": CHAT[0]["content"] * 60}, CHAT[1]]}]
    rows += [{"id": "mute", "messages": CHAT[:1]}, {"id": "bad", "messages": [{"role": "user"}]}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documented_commands():
    """Every `ctxlens …` command of the help texts, the README and the documentation."""
    for verb in VERBS:
        for line in GROUP.commands[verb].epilog.split("\n\n"):
            if "$ ctxlens" in line:
                yield line.split("$ ")[1].removesuffix("[/cyan]")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in page.read_text(encoding="utf-8").split("```bash")[1:]:
            lines = block.split("```")[0].splitlines()
            yield from (line for line in lines if line.startswith("ctxlens "))


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_by_example(verb):
    text = call(verb, "--help").output
    assert "Examples" in text
    assert f"$ ctxlens {verb}" in text


@pytest.mark.parametrize("command", sorted(set(documented_commands())))
def test_documented_commands_are_understood(command):
    words = shlex.split(command.split(">")[0].split("&&")[0], comments=True)[1:]
    words = [word.replace("RUN…", "RUN") for word in words]
    if "--help" not in words:
        GROUP.commands[words[0]].make_context(words[0], words[1:])


def test_version():
    assert call("--version").stdout == "0.1.0\n"


@pytest.mark.parametrize("backend", ["lens", "native"])
def test_allocate_writes_shares_of_both_conditions(messages, tmp_path, backend):
    out = tmp_path / "run"
    result = call("allocate", "--messages", messages, "--out", out, "--backend", backend)
    plain, template = (
        RoleAllocation.load(out / f"allocation-{c}.safetensors") for c in ("plain", "template")
    )
    assert plain.shares.shape == template.shares.shape
    assert plain.shares.shape[2] == 2
    markers = [one.key_counts[:, Role.TEMPLATE] for one in (plain, template)]
    assert (markers[0] < markers[1]).all()
    assert template.share("system")[..., 0].max() == 0 < template.share("system")[..., 1].min()
    view = TokenView.load(out / "tokens.safetensors")
    assert "".join(view.tokens).endswith(CHAT[1]["content"] + "</s>\n")
    assert f"ctxlens report {out}" in result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = lines[2 : 2 + len(plain.layers)]
    for layer, row in enumerate(rows):
        views = [(view, one) for view in ("without sinks", "renormalised") for one in (plain, template)]
        shares = [np.nanmean(one.share("user", view=view)[layer]) for view, one in views]
        assert row[:5] == [str(layer), *(f"{share:.3f}" for share in shares)]
    at = next(i for i, line in enumerate(lines) if "bos" in line)
    assert lines[at][-1] == "sink"
    for row in lines[at + 1 : at + 1 + len(plain.layers)]:
        assert sum(map(float, row[1:])) == pytest.approx(1, abs=0.004)


def test_allocate_goes_on_where_it_was_stopped(messages, tmp_path, monkeypatch):
    from ctxlens.models import Model

    words = ("allocate", "--messages", messages, "--out", tmp_path / "run", "--backend", "native", "--quiet")
    read = Model.read_roles
    seen = []

    def stop_at_second(self, chats, **options):
        seen.append(chats[0].templated)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return read(self, chats, **options)

    monkeypatch.setattr(Model, "read_roles", stop_at_second)
    stopped = call(*words, code=130)
    assert _screen.STOPPED in stopped.stderr
    first = (tmp_path / "run" / "allocation-plain.safetensors").read_bytes()
    call(*words)
    assert seen == [False, True, True]
    assert (tmp_path / "run" / "allocation-plain.safetensors").read_bytes() == first


def test_response_mean_is_another_query(messages, tmp_path):
    words = ("allocate", "--messages", messages, "--backend", "native", "--limit", 1)
    call(*words, "--out", tmp_path / "first")
    call(*words, "--out", tmp_path / "mean", "--queries", "response_mean")
    first, mean = (
        RoleAllocation.load(tmp_path / name / "allocation-template.safetensors") for name in ("first", "mean")
    )
    assert (first.queries, mean.queries) == ("first_answer", "response_mean")
    assert (first.shares != mean.shares).any()


def test_generate_prints_what_the_model_says_and_nothing_else(messages):
    import ctxlens

    model = ctxlens.load_model("organism", backend="native")
    chat = model.render(CHAT[:1], add_generation_prompt=True)
    wanted = model.generate(chat, max_new_tokens=8)
    words = ["generate", "--messages", messages, "--limit", 1, "--max-new-tokens", 8, "--backend", "native"]
    assert call(*words).stdout == wanted + "\n"
    with model.steer(0.01):
        steered = model.generate(chat, max_new_tokens=8)
    assert call(*words, "--alpha", 0.01).stdout == steered + "\n"
    assert len(call(*words, "--alpha", 0.01, "--heads", "retrieval").stdout) > 1


def test_command_line_is_quiet(messages):
    words = ["generate", "--messages", str(messages), "--limit", "1", "--max-new-tokens", "3"]
    chosen = ["--backend", "native", "--dtype", "float32", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "ctxlens", *words, *chosen], capture_output=True, text=True
    )
    assert result.returncode == 0
    *told, plan = result.stderr.splitlines()
    assert told == [
        f"{messages}: 2 rows (layout messages); row 0 is used",
        "organism: native backend, float32, cpu",
    ]
    assert plan.startswith("plan: 1 conversation, ")
    assert result.stdout.count("\n") >= 1


def test_steer_shows_both_answers_and_keeps_the_shares(messages, tmp_path):
    out = tmp_path / "run"
    words = ("steer", "--messages", messages, "--alpha", 0.05, "--out", out, "--max-new-tokens", 6)
    words += ("--backend", "native", "--prefix", "The best")
    result = call(*words)
    record = json.loads((out / "steer.json").read_text())
    assert record["meta"]["steering"]["alpha"] == 0.05
    assert len(record["answers"]) == 2
    assert record["answers"][0]["messages"][-1] == {"role": "assistant", "content": "The best"}
    before, after = (
        RoleAllocation.load(out / f"allocation-{x}.safetensors") for x in ("unsteered", "steered")
    )
    assert after.share("user").mean() > before.share("user").mean()
    assert "steered, α = 0.05" in result.stdout
    assert call(*words).stdout == result.stdout


def test_steer_to_a_share_says_the_share(messages, tmp_path):
    words = ("steer", "--messages", messages, "--target-share", 0.6, "--out", tmp_path / "run")
    result = call(*words, "--max-new-tokens", 2, "--backend", "native")
    assert "steered, user's share = 0.6" in " ".join(result.stdout.split())
    assert "α" not in result.stdout


def test_the_mode_of_steering_reaches_the_model(messages, tmp_path):
    shares = {}
    for mode in ("paper", "compounding"):
        call("steer", "--messages", messages, "--alpha", 0.8, "--mode", mode, "--out", tmp_path / mode,
             "--max-new-tokens", 2)  # fmt: skip
        shares[mode] = RoleAllocation.load(tmp_path / mode / "allocation-steered.safetensors").shares
        assert json.loads((tmp_path / mode / "steer.json").read_text())["meta"]["steering"]["mode"] == mode
    by_layer = np.abs(shares["paper"] - shares["compounding"]).reshape(4, -1).max(axis=1)
    assert by_layer[0] == 0  # α to the power of 1 in the first layer
    assert (by_layer[1:] > 0.001).all()


def test_needle_reports_recall_by_condition(tmp_path):
    out = tmp_path / "run"
    words = (
        "needle",
        "--lengths",
        "60,120",
        "--depths",
        "0,100",
        "--max-new-tokens",
        4,
        "--backend",
        "native",
    )
    prompt = call(*words, "--dry-run", "--out", out).stdout
    assert "cell 0, plain+prefix" in prompt
    assert "<|user|>" in prompt
    assert not out.exists()
    result = call(*words, "--out", out)
    grid = NeedleGrid.load(out / "needle.parquet")
    assert len(grid) == 8
    mean = grid.recall(condition="template+prefix").mean()
    assert f"{mean:.2f} (2 texts)" in result.stdout
    assert "difference: minus plain+prefix, paired by cell" in result.stderr
    assert "difference" in result.stdout


def test_needle_scores_probability_in_a_text_that_starts_over(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("The sun was low. Nobody spoke for a while.", encoding="utf-8")
    words = ("needle", "--backend", "native", "--lengths", "120", "--depths", "0,100", "--haystack", text)
    out = tmp_path / "run"
    result = call(*words, "--needle", "sf,pizza-short", "--repeat", "--score", "logprob", "--out", out)
    grid = NeedleGrid.load(out / "needle.parquet")
    assert grid.frame["needle_logprob"].lt(0).all()
    assert grid.frame["response"].isna().all()
    assert "log-probability of the needle, nats per token: 4 cells" in result.stdout
    assert "4 of 4 contexts are longer than the haystack, which is repeated in them" in result.stderr


def test_score_select_and_train(dataset, tmp_path):
    scores, chosen = tmp_path / "scores", tmp_path / "selected"
    result = call("score", "--dataset", dataset, "--out", scores, "--backend", "native")
    table = Scores.load(scores / "scores.parquet")
    assert set(table.frame["conversation"]) == {"c0", "c1", "c2", "long"}
    skipped = {
        entry["conversation"]: entry["reason"] for entry in json.loads((scores / "skipped.json").read_text())
    }
    assert set(skipped) == {"mute", "bad"}
    assert "1 conversations truncated" in result.stderr
    assert "1 skipped: no user turn with an answer" in result.stderr

    call("score", "--dataset", dataset, "--out", scores, "--backend", "native", "--lp-gap")
    added = Scores.load(scores / "scores.parquet").frame
    assert added[list(table.frame)].equals(table.frame)
    assert added["lp_gap"].notna().all()

    words = ("select", "--scores", scores, "--dataset", dataset, "--out", chosen, "--layer", 1)
    result = call(*words, "--top-share", 0.5)
    selection = Selection.load(chosen / "selection.parquet")
    assert len(selection.turns) == 2
    assert "2 of 4 (50.0%)" in result.stdout
    rows = [json.loads(line) for line in (chosen / "selected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["c0", "c1", "c2", "long", "mute", "bad"]
    marked = {(row["id"], 1) for row in rows if row["messages"][0].get("content", "").endswith(" [IND]")}
    assert marked == selection.turns
    card = json.loads((chosen / "card.json").read_text())
    assert (card["turns"], card["selected"], card["layout"]) == (4, 2, "messages")
    assert "2 of 4 turns" in (chosen / "card.md").read_text().replace("\\", "")
    config = json.loads((chosen / "manifest.json").read_text())["config"]
    assert (config["split"], config["layout"], len(config["content"])) == ("train", "messages", 32)
    result = call("select", "--undo", chosen / "selected.jsonl", "--out", tmp_path / "undone")
    assert "removed 2 indicators from 2 of 6 rows" in result.stdout
    again = [json.loads(line) for line in (tmp_path / "undone" / "original.jsonl").read_text().splitlines()]
    assert again == [json.loads(line) for line in dataset.read_text().splitlines()]
    for threshold, warning in ((1, "nothing was selected"), (0, "everything was selected")):
        out = tmp_path / f"at-{threshold}"
        result = call("select", "--scores", scores, "--out", out, "--threshold", threshold)
        assert f"warning: {warning}" in result.stderr

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: organism\ndataset: {dataset}\nselection: {chosen}\nindicator: '[IND]'\n"
        f"max_steps: 1\nper_device_train_batch_size: 2\noutput_dir: {tmp_path / 'sft'}\n"
    )
    result = call("train", "--config", recipe, "--device", "cpu", "logging_steps=1", "unusable=skip")
    assert "optimizer steps" in result.stdout
    log = json.loads((tmp_path / "sft" / "train.json").read_text())
    assert {entry["conversation"] for entry in log["skipped"]} == {"mute", "bad"}
    assert (log["counts"]["skipped"], log["counts"]["truncated"]) == (2, 1)
    one = tmp_path / "one.json"
    one.write_text(json.dumps(CHAT))
    words = ("generate", "--messages", one, "--max-new-tokens", 2, "--backend", "native")
    call(*words, "--model", tmp_path / "sft", "--indicator")


def test_report_prints_the_page(messages, tmp_path):
    out = tmp_path / "run"
    call("allocate", "--messages", messages, "--out", out, "--backend", "native", "--limit", 1)
    page = Path(call("report", out).stdout.strip())
    assert page == out / "report.html"
    assert page.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")


def test_roles_counts_tokens_and_shows_controls(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"role": "user", "content": "red \x1b[31m text"}]))
    text = call("roles", "--messages", path).stdout
    assert "\x1b" not in text
    assert "\\x1b[31m" in text
    assert "⏎" in text
    assert "user " in text
    assert "template " in text


def test_roles_shows_every_character_once(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"role": "user", "content": "Zoë 🦜 日本"}]))
    text = call("roles", "--messages", path).stdout
    assert text.count("Zoë 🦜 日本") == 1
    assert text.count("<|user|>") == 1


def test_answers_cannot_drive_the_terminal():
    assert _screen.printable("a\x1b[2Jb\x9b\tc\n") == "a\\x1b[2Jb\\x9b\tc\n"


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    from ctxlens import demo

    given = {}

    def run_demo(out, **options):
        given.update(options, out=out)
        options["progress"](next(iter(demo.STAGES)), 1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", run_demo)
    result = call("demo", "--smoke", "--threshold", "0.6", "--seed", 3, "--out", tmp_path / "demo", code=130)
    assert _screen.STOPPED in result.stderr
    assert given["smoke"] is True
    assert (given["threshold"], given["seed"], given["out"]) == (0.6, 3, tmp_path / "demo")


def test_unexpected_errors_keep_their_traceback(messages, monkeypatch):
    import ctxlens.chat.data

    def fail(path, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ctxlens.chat.data, "read_messages", fail)
    result = CliRunner().invoke(app, ["roles", "--messages", str(messages)])
    assert isinstance(result.exception, ZeroDivisionError)


def test_roles_page(tmp_path, messages):
    page = tmp_path / "new" / "roles.html"
    result = call("roles", "--messages", messages, "--html", page)
    assert "roles.html" in result.stderr
    assert result.stdout == ""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "Conversation 1" in text
    assert "http" not in text
    assert "overwrite" in call("roles", "--messages", messages, "--html", page, code=2).stderr
    assert page.read_text(encoding="utf-8") == text
    call("roles", "--messages", messages, "--html", page, "--plain", "--overwrite")
    assert "without chat template" in page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([[{"role": "user", "content": 3}]]))
    call("roles", "--messages", broken, "--html", tmp_path / "none.html", code=2)
    assert not (tmp_path / "none.html").exists()
