"""Keys of a recipe as people write them in YAML, and when they begin to count."""

import os
import re

import pytest
import torch
from sft_cases import write_recipe
from transformers.integrations import deepspeed
from trl.trainer.sft_config import SFTConfig
from typer.testing import CliRunner

from ctxlens.cli import app
from ctxlens.errors import InputError
from ctxlens.sft import make_sft_config, read_config, train_from_config
from ctxlens.sft.training import _changed


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
        ("upsample_selected: 2.5", r"keys\.yaml: argument --upsample_selected.*: invalid int value: '2\.5'"),
        ("limit: .inf", "invalid int value: 'inf'"),
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


def test_environment_of_a_recipe_counts_before_cuda_is_looked_for(tmp_path, monkeypatch):
    """CUDA reads `CUDA_VISIBLE_DEVICES` once, when it is first asked for a device."""
    monkeypatch.delenv("CTXLENS_TEST_ENV", raising=False)
    seen = []

    def is_available():
        seen.append(os.environ.get("CTXLENS_TEST_ENV"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    try:
        read(tmp_path, "env:\n  CTXLENS_TEST_ENV: 7\nmodel: organism\n")
    finally:
        os.environ.pop("CTXLENS_TEST_ENV", None)
    assert seen
    assert set(seen) == {"7"}


def test_the_command_line_decides_about_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    class Asked(Exception):
        pass

    def default_arguments(*, use_cpu=None):
        asked.append(use_cpu)
        raise Asked

    monkeypatch.setattr("ctxlens.sft.config.default_arguments", default_arguments)
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
    with pytest.raises(InputError, match=r"resume_from_checkpoint: .* is no checkpoint's folder"):
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
    with pytest.raises(
        InputError, match=re.escape("checkpoint-1 is there to go on from; set overwrite: true")
    ):
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
        assert _changed(args)["learning_rate"] == 0.5
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
