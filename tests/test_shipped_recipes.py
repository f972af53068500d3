"""Recipes that come with ctxlens, the size of a checkpoint, room on the disk, and everything said at once."""

import json
import struct
from pathlib import Path

import pytest
import yaml
from conftest import build_toy_tokenizer

from ctxlens.chat.roles import render
from ctxlens.errors import InputError, Problems, RunExistsError
from ctxlens.models.checkpoint import lacks_chat_template, locate_checkpoint, read_chat_template
from ctxlens.models.footprint import count_parameters, read_vocabulary_size
from ctxlens.organism.recipe import SFT_ARGUMENTS
from ctxlens.sft import early, room
from ctxlens.sft.early import check_training, estimate_size
from ctxlens.sft.keys import TrainConfig
from ctxlens.sft.keys.trl import read_trl_keys
from ctxlens.sft.recipe import read_recipe
from ctxlens.sft.shipped import RECIPES, choose_recipe, fit_rows, is_shipped

TALK = '{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]}\n'


def write_checkpoint(folder: Path, parameters: int, vocabulary: int, template: str | None = "{{ messages }}"):
    """A folder whose files say how large the model is; the weights themselves are not there."""
    folder.mkdir()
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [parameters // 4, 3], "data_offsets": [0, 0]},
        "b": {"dtype": "F32", "shape": [parameters // 4], "data_offsets": [0, 0]},
    }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocabulary}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(TALK)
    return path


# The size of a checkpoint.


def test_parameters_are_counted_from_the_headers(tmp_path):
    assert count_parameters(write_checkpoint(tmp_path / "m", 1000, 7)) == 250 * 3 + 250
    assert read_vocabulary_size(tmp_path / "m") == 7
    assert count_parameters("owner/name") is None
    (tmp_path / "m" / "model.safetensors").write_bytes(b"short")
    assert count_parameters(tmp_path / "m") is None


def test_parameters_of_the_organism_are_those_of_its_model():
    from safetensors import safe_open

    source = locate_checkpoint("organism")
    with safe_open(Path(source) / "model.safetensors", "pt") as file:
        counted = sum(file.get_tensor(name).numel() for name in list(file.keys()))
    assert count_parameters(source) == counted


# The recipes.


def test_the_recipe_follows_from_the_model(tmp_path):
    assert choose_recipe("organism") == choose_recipe("organism-chat") == "organism"
    assert choose_recipe(str(write_checkpoint(tmp_path / "small", 270_000_000, 1000))) == "full"
    assert choose_recipe(str(write_checkpoint(tmp_path / "large", 3_000_000_000, 1000))) == "lora"
    assert choose_recipe("owner/name") == choose_recipe("nowhere") == "lora"


def test_rows_by_hand():
    # 8 rows of 2,048 tokens and 32,000 words of 4 bytes are 2.10e9 bytes; 2 GiB are 2.15e9.
    assert fit_rows(2048, 32_000) == 8
    assert fit_rows(2048, 33_000) == 4
    assert fit_rows(512, 1000) == 16
    assert fit_rows(8192, 262_144) == 1


@pytest.mark.parametrize(
    ("name", "parameters", "rate"),
    [
        ("full", 270_000_000, 2e-5), ("full", 3_000_000_000, 1e-5), ("full", 70_000_000_000, 5e-6),
        ("lora", 270_000_000, 2e-4), ("lora", 7_000_000_000, 2e-4), ("lora", 70_000_000_000, 1e-4),
    ],
)  # fmt: skip
def test_a_recipe_fits_the_size_of_the_model(tmp_path, data, name, parameters, rate):
    model = write_checkpoint(tmp_path / "m", parameters, 32_000)
    recipe = read_recipe(name, {"model": model, "dataset": data})
    found = recipe.arguments
    assert found["learning_rate"] == rate
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (8, 4)
    assert recipe.config.model == str(model)
    given = {"model": model, "dataset": data, "per_device_train_batch_size": 2, "learning_rate": 1}
    other = read_recipe(name, given)
    assert other.given["learning_rate"] == "1"
    assert other.arguments["gradient_accumulation_steps"] == 16


def test_a_selection_gets_the_indicator(data):
    given = {"model": "organism", "dataset": data, "selection": data}
    assert read_recipe("organism", given).config.indicator == "[IND]"
    assert read_recipe("organism", {**given, "indicator": "<look>"}).config.indicator == "<look>"
    assert read_recipe("organism", {**given, "upsample_selected": 3}).config.indicator is None
    assert read_recipe("organism", {"model": "organism"}).config.indicator is None


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_known_keys_only(name):
    keys = yaml.safe_load((Path(early.__file__).parent / "recipes" / f"{name}.yaml").read_text())
    assert set(keys) <= {*TrainConfig.model_fields, *read_trl_keys()}


def test_the_recipe_of_the_organism_is_that_of_the_demo():
    found = read_recipe("organism", {"model": "organism"}).arguments
    same = {key: value for key, value in SFT_ARGUMENTS.items() if key != "warmup_steps"}
    assert {key: found[key] for key in same} == same
    assert found["warmup_steps"] == 0.1  # a tenth of all steps, as the demo's number is


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_shipped("lora")
    Path("lora").write_text("learning_rate: 1.0\n")
    assert not is_shipped("lora")
    assert read_recipe("lora").arguments == {"learning_rate": 1.0}


def test_a_shipped_recipe_trains_with_a_model_and_data_alone(tmp_path, data):
    recipe = check_training("organism", {"model": "organism", "dataset": data, "output_dir": tmp_path / "o"})
    args, model_args = recipe.build_arguments()
    assert args.learning_rate == 7e-4
    assert (args.save_strategy, args.save_steps) == ("steps", 0.25)
    assert not model_args.use_peft


# Everything that is wrong, in one message.


def test_problems_are_raised_together():
    problems = Problems()
    problems.report()
    with problems:
        raise RunExistsError("taken.")
    with pytest.raises(RunExistsError, match=r"^taken\.$"):
        problems.report()
    with problems:
        raise InputError("missing.")
    with problems:
        raise InputError("missing.")
    with pytest.raises(InputError, match=r"^2 things are wrong\. \(1\) taken\. \(2\) missing\.$"):
        problems.report()
    with pytest.raises(KeyError), problems:
        raise KeyError("a bug is no problem of the input")


def test_wrong_keys_data_and_model_are_said_at_once():
    given = {
        "model": "nowhere", "dataset": "none.jsonl", "indicator_dropout": 3, "limit": "many",
        "lerning_rate": 1, "max_steps": "x",
    }  # fmt: skip
    with pytest.raises(InputError) as found:
        check_training("lora", given)
    said = str(found.value)
    for fragment in ("limit must be a whole number", "lerning_rate", "max_steps", "none.jsonl", "'nowhere'"):
        assert fragment in said, said


def test_a_shipped_recipe_needs_model_and_data():
    with pytest.raises(InputError, match=r"no data set is named.*no model is named"):
        check_training("lora")


def test_an_adapter_without_peft_is_refused_before_anything_is_loaded(tmp_path, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = write_checkpoint(tmp_path / "m", 1000, 10)
    with pytest.raises(InputError, match=r"peft.*\.\[lora\].*--recipe full"):
        check_training("lora", {"model": model, "dataset": data})


# Room on the disk.


def test_bytes_of_a_training_by_hand():
    spare = 50 * 2**20
    # All weights: 4 bytes each are delivered; two checkpoints (the new one and the old) of 4 + 8 bytes each.
    assert room.estimate_bytes(1000) == 4000 + spare
    assert room.estimate_bytes(1000, saves=True) == 4000 + 2 * 12_000 + spare
    assert room.estimate_bytes(1000, saves=True, kept=3, dtype="bfloat16") == 2000 + 4 * 10_000 + spare
    # An adapter of 3 %: merged weights and adapter, and two checkpoints of the adapter.
    assert room.estimate_bytes(1000, saves=True, adapter=True) == 4 * 1030 + 2 * 30 * 12 + spare


def test_a_full_disk_is_refused_before_the_training(tmp_path, data, monkeypatch):
    model = write_checkpoint(tmp_path / "m", 1_000_000_000, 1000)
    given = {"model": model, "dataset": data, "output_dir": tmp_path / "new" / "run"}
    needed = estimate_size(read_recipe("full", given))
    assert needed == room.estimate_bytes(1_000_000_000, saves=True)
    monkeypatch.setattr(room, "free_bytes", lambda folder: 3 * 10**9)
    with pytest.raises(InputError, match=r"3\.0 GB free, but this training writes about 28\.1 GB"):
        check_training("full", given)
    monkeypatch.setattr(room, "free_bytes", lambda folder: needed)
    check_training("full", given)


def test_free_bytes_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert room.free_bytes(tmp_path / "a" / "b") > 0


# The chat template for base models.


def test_a_model_without_chat_template_is_refused_and_told_what_helps(tmp_path, data):
    model = write_checkpoint(tmp_path / "base", 1000, 10, template=None)
    assert lacks_chat_template(model)
    assert not lacks_chat_template(write_checkpoint(tmp_path / "chat", 1000, 10))
    assert not lacks_chat_template("owner/name")
    given = {"model": model, "dataset": data, "output_dir": tmp_path / "o"}
    with pytest.raises(InputError, match=r"has no chat template.*chatml, which comes with ctxlens"):
        check_training("full", given)
    check_training("full", {**given, "chat_template": "chatml"})


def test_chatml_ends_turns_with_the_tokenizers_own_end_token():
    tokenizer = build_toy_tokenizer()
    tokenizer.chat_template = read_chat_template("chatml")
    asked = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am fine."}]
    chat = render(tokenizer, asked)
    bos, end = tokenizer.bos_token or "", tokenizer.eos_token
    assert chat.text == (f"{bos}<|im_start|>user\nHello{end}\n<|im_start|>assistant\nI am fine.{end}\n")
    assert int(chat.tokens[chat.stops[1]]) == tokenizer.eos_token_id
    opened = render(tokenizer, asked[:1], add_generation_prompt=True)
    assert opened.text.endswith("<|im_start|>assistant\n")
