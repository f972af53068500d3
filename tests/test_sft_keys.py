"""Keys of a recipe as people write them in YAML, and when they begin to count."""

import os
import re
from typing import get_args

import pytest
import torch
import yaml
from pydantic import ValidationError
from sft_cases import write_recipe
from transformers.integrations import deepspeed
from trl.trainer.sft_config import SFTConfig
from typer.testing import CliRunner

from ctxlens.chat.roles.truncation import SIDES
from ctxlens.cli import app
from ctxlens.errors import InputError
from ctxlens.sft import TrainConfig, make_sft_config, read_config, train_from_config
from ctxlens.sft.arguments import changed_arguments
from ctxlens.sft.rows import LOSS_ON


def read(tmp_path, text, overrides=()):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return read_config(path, overrides)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("evaluate_lengths: 200", "evaluate_lengths", "200"),
        ("evaluate_depths: [0, 50, 100]", "evaluate_depths", "0,50,100"),
        ("evaluate_needles: [sf, known]", "evaluate_needles", "sf,known"),
        ("upsample_selected: 2", "upsample_selected", 2),
        ("indicator: 5", "indicator", "5"),
        ("overwrite: yes", "overwrite", True),
        ("evaluate_cases: '3'", "evaluate_cases", 3),
        ("replay_share: 0", "replay_share", 0.0),
        ("limit: null", "limit", None),
    ],
)
def test_values_as_yaml_gives_them(tmp_path, line, key, value):
    found = getattr(read(tmp_path, f"{line}\n")[0], key)
    assert found == value
    assert isinstance(found, type(value))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("upsample_selected: 2.5", r"keys\.yaml: upsample_selected must be a whole number, got 2\.5"),
        ("limit: .inf", "limit must be a whole number, got inf"),
        ("evaluate_cases: true", "evaluate_cases must be a whole number, got True"),
        ("indicator: yes", "indicator must be text, got True"),
        ("selection: {a: 1}", "selection must be text, got {'a': 1}"),
        ("replay_share: {}", r"keys\.yaml: replay_share must be a number, got {}"),
        ("overwrite: 2", "overwrite must be true or false, got 2"),
        ("evaluate_lengths: null", "evaluate_lengths must be text, got None"),
    ],
)
def test_values_of_another_kind_are_refused_in_a_sentence(tmp_path, line, complaint):
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, f"{line}\n")


def test_environment_of_a_recipe_is_set_where_training_starts_before_cuda_is_looked_for(
    tmp_path, monkeypatch
):
    """CUDA reads `CUDA_VISIBLE_DEVICES` once, when it is first used; reading a recipe sets nothing."""
    monkeypatch.delenv("CTXLENS_TEST_ENV", raising=False)
    seen = []

    def is_available():
        seen.append(os.environ.get("CTXLENS_TEST_ENV"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    try:
        data = tmp_path / "data.jsonl"
        data.write_text(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
        )
        read(tmp_path, f"env:\n  CTXLENS_TEST_ENV: 7\nlearning_rate: -1\ndataset: {data}\n")
        assert seen
        assert set(seen) == {None}
        seen.clear()
        with pytest.raises(InputError, match="learning_rate must be above 0"):
            train_from_config(tmp_path / "keys.yaml")
        assert os.environ["CTXLENS_TEST_ENV"] == "7"
    finally:
        os.environ.pop("CTXLENS_TEST_ENV", None)
    assert seen
    assert set(seen) == {"7"}


@pytest.mark.parametrize("env", ["[1, 2]", "CUDA_VISIBLE_DEVICES"])
def test_an_environment_that_is_not_a_mapping_is_refused(tmp_path, env):
    with pytest.raises(InputError, match=r"keys\.yaml: env must be a mapping of environment variables, got"):
        read(tmp_path, f"env: {env}\n")


def test_a_recipe_is_parsed_once(tmp_path, monkeypatch):
    parsed = []
    load = yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", lambda text: parsed.append(text) or load(text))
    assert read(tmp_path, "model: organism\nseed: 5\n")[1].seed == 5
    assert len(parsed) == 1


def test_command_line_words_are_split_between_the_keys_of_both_sides(tmp_path):
    words = [
        "--overwrite", "--learning_rate", "1e-4", "--indicator", "[IND]", "--evaluate", "false",
        "--lora_target_modules", "q_proj", "v_proj", "--upsample-selected", "2", "--use_cpu",
    ]  # fmt: skip
    config, args, model_args = read(tmp_path, "indicator: 'x'\nevaluate: true\n", words)
    assert (config.overwrite, config.indicator, config.evaluate) == (True, "[IND]", False)
    assert config.upsample_selected == 2
    assert (args.learning_rate, args.use_cpu) == (1e-4, True)
    assert model_args.lora_target_modules == ["q_proj", "v_proj"]


def test_the_configuration_is_frozen_and_names_unknown_keys():
    config = TrainConfig(indicator="[IND]", indicator_dropout=0.5)
    assert (config.indicator_dropout, config.loss_on) == (0.5, "assistant")
    with pytest.raises(ValidationError, match="frozen"):
        config.indicator = None
    with pytest.raises(
        InputError, match=r"TrainConfig has unknown keys: indicater; did you mean indicator\?$"
    ):
        TrainConfig(indicater="[IND]")
    with pytest.raises(InputError, match=r"^loss_on must be \"assistant\" or \"all\", got 'user'\.$"):
        TrainConfig(loss_on="user")
    with pytest.raises(InputError, match="has no effect without an indicator"):
        TrainConfig(indicator_dropout=0.5)


def test_choices_are_those_of_the_modules_that_use_them():
    assert get_args(TrainConfig.model_fields["truncation"].annotation) == SIDES
    assert get_args(TrainConfig.model_fields["loss_on"].annotation) == LOSS_ON


def test_every_key_is_described():
    assert all(field.description for field in TrainConfig.model_fields.values())


def test_the_command_line_decides_about_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    class Asked(Exception):
        pass

    def default_arguments(*, use_cpu=None, model=None):
        asked.append(use_cpu)
        raise Asked

    monkeypatch.setattr("ctxlens.sft.recipe.default_arguments", default_arguments)
    for words in ({}, {"use_cpu": False}, ["--use_cpu", "false"], ["--use_cpu"]):
        with pytest.raises(Asked):
            read(tmp_path, "use_cpu: true\n", words)
    assert asked == [True, None, None, True]


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["train", "--config", str(recipe), "--device", "cuda"])
    assert result.exit_code != 0
    assert "torch sees no CUDA device" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["nowhere", "data.jsonl"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path, given):
    recipe = write_recipe(tmp_path)
    with pytest.raises(InputError, match=r"resume_from_checkpoint: .* is not a checkpoint folder"):
        train_from_config(recipe, {"indicator": "null", "resume_from_checkpoint": tmp_path / given})
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_is_not_silently_taken_up_where_that_is_declined(tmp_path):
    recipe = write_recipe(tmp_path)
    options = {"indicator": "null", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_from_config(recipe, options, progress=stop)
    declined = {**options, "resume_from_checkpoint": "false"}
    with pytest.raises(InputError, match=re.escape("checkpoint-1 to resume from; set overwrite: true")):
        train_from_config(recipe, declined)
    assert (train_from_config(recipe, {**declined, "overwrite": True}) / "train.json").is_file()


class Plugin:
    """What matters here of accelerate's DeepSpeed plugin: transformers knows it by a weak reference only."""

    class Config:
        def is_zero3(self):
            return True

    def set_deepspeed_weakref(self):
        self.dschf = self.Config()
        deepspeed.set_hf_deepspeed_config(self.dschf)


def test_zero3_stays_on_while_the_arguments_are_recorded(monkeypatch):
    """Else every process would load all of the weights."""
    original = SFTConfig.__post_init__

    def with_plugin(self):
        original(self)
        self.deepspeed_plugin = Plugin()
        self.deepspeed_plugin.set_deepspeed_weakref()

    monkeypatch.setattr(SFTConfig, "__post_init__", with_plugin)
    args = make_sft_config("out", {"use_cpu": True, "learning_rate": 0.5})
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert changed_arguments(args)["learning_rate"] == 0.5
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
