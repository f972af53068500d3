"""`ctxlens init`, and the README's commands, which run as written in its folder."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctxlens.chat.data import load_conversations, read_messages_file
from ctxlens.cli import app
from ctxlens.errors import InputError
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import load_needles
from ctxlens.evals.starter import starter_files, write_starter

ROOT = Path(__file__).parent.parent
PLACEHOLDERS = {
    "MODEL": "organism-chat", "BASE": "organism", "VANILLA": "organism-chat", "CURED": "runs/train",
}  # fmt: skip
"""What stands for the models that a reader puts in; the cured model is the one that the recipe trains."""


def read_commands(page: str) -> list[str]:
    """The commands of the block that begins with `ctxlens init`, after it, in the order of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    block = next(one for one in blocks if one.startswith("ctxlens init "))
    return [line for line in block.splitlines()[1:] if line.startswith("ctxlens ")]


COMMANDS = read_commands((ROOT / "README.md").read_text(encoding="utf-8"))
FOLDER_README = ROOT / "ctxlens" / "evals" / "starter" / "files" / "README.md"
FOLDER_COMMANDS = [
    line for line in FOLDER_README.read_text(encoding="utf-8").splitlines() if line.startswith("ctxlens ")
]


def call(command: str):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)[1:]]
    return CliRunner().invoke(app, words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh folder of `ctxlens init` that all commands share, because some need what others write."""
    path = tmp_path_factory.mktemp("init") / "my-folder"
    result = CliRunner().invoke(app, ["init", str(path)])
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, marks=pytest.mark.slow) if "--evaluate" in one else one for one in COMMANDS],
)
def test_the_commands_of_the_readme_run_as_written(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = call(command)
    assert result.exit_code == 0, result.output[-2000:] + repr(result.exception)


def test_the_readme_shows_every_verb_that_takes_a_file():
    verbs = {line.split()[1] for line in COMMANDS}
    assert {"roles", "allocate", "needle", "heads", "score", "select", "train", "mt-bench"} <= verbs


@pytest.mark.slow
def test_the_commands_of_the_folder_run_as_written(tmp_path, monkeypatch):
    write_starter(tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    for command in FOLDER_COMMANDS:
        result = call(command)
        assert result.exit_code == 0, (command, result.output[-2000:])


# The files.


def test_the_files_are_read_by_the_verbs_that_take_them(tmp_path):
    write_starter(tmp_path)
    (chat,) = read_messages_file(tmp_path / "chat.json")
    assert [message["role"] for message in chat] == ["user", "assistant"]
    rows = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert len(rows) == 60
    assert all(len(row["sources"]) == len(row["messages"]) // 2 >= 2 for row in rows)
    assert {source for row in rows for source in row["sources"]} == {"document", "memory"}
    assert len(load_conversations(tmp_path / "data.json")) == 60
    needles = load_needles(tmp_path / "needles.yaml")
    assert len(needles) >= 4
    assert all(one.sentence.startswith(one.prefix) for one in needles)
    straw = load_haystack(str(tmp_path / "haystack"))
    assert not [one.name for one in needles if one.sentence in " ".join(straw.sentences(0, 10**6))]


def test_the_folders_readme_names_every_file():
    files = starter_files()
    for name in files:
        shown = "haystack/" if name.startswith("haystack/") else name
        assert shown == "README.md" or f"`{shown}`" in files["README.md"]


def test_the_files_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write_starter(tmp_path / name)
    read = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    ]
    assert read[0] == read[1]
    assert len(read[0]) == 12


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "chat.json").write_text("mine")
    (tmp_path / "other.txt").write_text("mine")
    result = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{tmp_path} is not empty" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "other.txt"]
    assert CliRunner().invoke(app, ["init", str(tmp_path), "--overwrite"]).exit_code == 0
    assert (tmp_path / "chat.json.old").read_text() == "mine"
    assert (tmp_path / "other.txt").read_text() == "mine"
    write_starter(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.glob("*.old")] == ["chat.json.old"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="is a file; give a new or empty folder"):
        write_starter(tmp_path / "taken")
    with pytest.raises(InputError, match="Cannot write"):
        write_starter(tmp_path / "taken" / "inside")
