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


RECIPES = {
    "fine": "",
    "unknown": "lerning_rate: 1",
    "number": "learning_rate: fast",
    "model": "model: nowhere",
    "selection": "selection: nowhere",
    "dataset": "dataset: nowhere.jsonl",
    "variable": "template_args: {think: true}",
    "mapping": "template_args: 7",
}


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
    config = {"model": {"name": "organism", "sha256": None}, "seed": 7}
    for study in ("allocate", "steer", "train"):
        (folder / study).mkdir()
        (folder / study / "manifest.json").write_text(json.dumps({"study": study, "config": config}))
    (folder / "chat.json").write_text('[{"role": "user", "content": "Hi."}]')
    (folder / "question.jsonl").write_text('{"question_id": 1, "category": "x", "turns": ["a", "b"]}\n')
    for name, line in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"dataset: data.jsonl\n{line}\n")
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
        ("needle --alpha 7", "alpha must be in (0, 1], got 7.0"),
        ("needle --heads x", "heads 'x' cannot be read"),
        ("heads --kind x", "unknown kind 'x'; choose from retrieval"),
        ("heads --heads retrieval", "the retrieval heads depend on a model"),
        ("heads --measure x", "unknown measure 'x'"),
        ("drift --queries x", "unknown queries 'x'"),
        ("score --dataset nowhere.jsonl", "There is no file or folder nowhere.jsonl"),
        ("score --dataset data.jsonl --part 3/2", "the part must be from 0/2 to 1/2, got 3/2"),
        ("score --dataset data.jsonl --precision x", "scores are stored as float32 or float16"),
        ("allocate --messages chat.json -m nowhere", "model 'nowhere' is neither"),
        ("allocate --messages chat.json --out runs", "already holds another run"),
        ("allocate --messages chat.json --out allocate", "(other settings: messages, model, queries, seed)"),
        (
            "allocate --messages chat.json --template-arg think=1",
            "no variable 'think' of its own; it uses",
        ),
        ("allocate --messages chat.json --template-arg think", "expected KEY=VALUE, such as enable_thinking"),
        ("roles --messages chat.json --template-arg think=1", "no variable 'think' of its own; it uses"),
        ("steer --messages chat.json --target-share 7", "target share must be in (0, 1), got 7.0"),
        ("steer --messages chat.json --out steer", "(other settings: max_new_tokens, messages, model,"),
        ("generate --messages chat.json -m nowhere", "model 'nowhere' is neither"),
        ("generate --messages chat.json --alpha 7", "alpha must be in (0, 1]"),
        ("mt-bench --questions question.jsonl -m nowhere", "model 'nowhere' is neither"),
        ("mt-bench --questions question.jsonl --out runs", "already holds another run"),
        ("doctor -m nowhere", "model 'nowhere' is neither"),
        ("train --config nowhere.yaml", "the recipe nowhere.yaml does not exist"),
        ("train --config unknown.yaml", "unknown keys: lerning_rate; did you mean learning_rate?"),
        ("train --config fine.yaml lerning_rate=1", "the command line has unknown keys: lerning_rate"),
        ("train --config number.yaml", "argument --learning_rate: invalid float value: 'fast'"),
        ("train --config model.yaml", "model 'nowhere' is neither"),
        ("train --config selection.yaml", "selection: there is no file or folder nowhere"),
        ("train --config dataset.yaml", "There is no file or folder nowhere.jsonl"),
        ("train --config variable.yaml", "no variable 'think' of its own; it uses none"),
        ("train --config fine.yaml --template-arg think=1", "no variable 'think' of its own; it uses none"),
        ("train --config mapping.yaml", "template_args must be keys with values, got 7"),
        ("train", "2 things are wrong. (1) no data set is named"),
        ("train organism --dataset nowhere.jsonl max_steps=x", "2 things are wrong. (1) organism: argument"),
        ("train organism --dataset data.jsonl selection", "'selection' is not an override; give KEY=VALUE"),
        ("train organism -m other --dataset data.jsonl", "two models are given, organism and --model other"),
        ("cure", "(1) no model is named; give one: ctxlens cure MODEL"),
        ("cure nowhere --dataset nowhere.jsonl --threshold 7 --budget x", "4 things are wrong. (1) --budget"),
        ("cure organism --dataset data.jsonl --method x", "the method 'x' is not known; choose from"),
        ("cure organism --dataset data.jsonl --out runs", "already holds another run"),
        ("train --config fine.yaml --out runs", "already holds another run (study 'other', not 'train')"),
        ("train --config fine.yaml --out train -m organism-chat", "(other settings: model)"),
    ],
)
def test_wrong_arguments_load_nothing(folder, words, said):
    last, error = call(*words.split(), folder=folder)
    assert last == "exit 2"
    assert said in error


def test_the_keys_read_from_trls_source_are_those_of_its_classes():
    from dataclasses import fields

    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    from ctxlens.sft.keys.trl import read_trl_keys

    assert set(read_trl_keys()) == {field.name for kind in (SFTConfig, ModelConfig) for field in fields(kind)}


def test_without_trls_source_trl_checks_the_keys(monkeypatch):
    from ctxlens.sft.keys import trl

    trl.read_trl_keys.cache_clear()
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: None)
    try:
        assert trl.read_trl_keys() == {}
    finally:
        trl.read_trl_keys.cache_clear()


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
