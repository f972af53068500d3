"""What the command line shows to be wrong is refused before torch or transformers is imported."""

import json
import subprocess
import sys

import pytest

_CODE = """
import sys
from ctxlens.cli import app
try:
    app(sys.argv[1:], standalone_mode=True)
except SystemExit as end:
    code = end.code
loaded = [name for name in ("torch", "transformers") if name in sys.modules]
print("exit", code, *loaded)
"""


def call(*words, folder):
    """The last line that says exit code and what was loaded, and what was printed to stderr."""
    command = [sys.executable, "-c", _CODE, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return result.stdout.splitlines()[-1], " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "runs").mkdir()
    (folder / "runs" / "manifest.json").write_text(json.dumps({"study": "other", "config": {}}))
    (folder / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi."}]}\n')
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("needle -m nowhere", "model 'nowhere' is neither"),
        ("needle --conditions nonsense", "nonsense"),
        ("needle --lengths many", "--lengths"),
        ("needle --out runs", "already holds another run"),
        ("heads -m nowhere", "model 'nowhere' is neither"),
        ("heads --alpha 7", "alpha must be"),
        ("heads --out runs", "already holds another run"),
        ("drift --against nowhere", "model 'nowhere' is neither"),
        ("drift --conditions plain", "expected two"),
        ("drift --out runs", "already holds another run"),
        ("score", "give a data set"),
        ("score --dataset data.jsonl -m nowhere", "model 'nowhere' is neither"),
        ("score --dataset data.jsonl --out runs", "already holds another run"),
        ("eval -m nowhere", "model 'nowhere' is neither"),
        ("eval --data-dir nowhere", "--data-dir nowhere does not exist"),
        ("eval --out runs", "already holds another run"),
    ],
)
def test_wrong_arguments_load_nothing(folder, words, said):
    last, error = call(*words.split(), folder=folder)
    assert last == "exit 2"
    assert said in error


def test_roles_loads_neither_torch_nor_transformers(folder):
    (folder / "chat.json").write_text('[{"role": "user", "content": "Hi."}]')
    last, _ = call("roles", "--messages", "chat.json", folder=folder)
    assert last == "exit 0"


def test_the_short_way_to_a_tokenizer_gives_what_the_long_way_gives():
    from transformers import AutoTokenizer

    from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint

    for name in ("organism", "organism-chat"):
        source = locate_checkpoint(name)
        short, long = load_tokenizer(source), AutoTokenizer.from_pretrained(source)
        assert type(short) is type(long)
        assert short.backend_tokenizer.to_str() == long.backend_tokenizer.to_str()
        assert short.chat_template == long.chat_template
        assert short.special_tokens_map == long.special_tokens_map
        assert short.padding_side == long.padding_side
