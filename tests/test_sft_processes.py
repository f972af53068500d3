"""Training that is killed and started again, and training on two processes: the same run."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from sft_cases import write_recipe
from test_sft import train_from_config

from ctxlens.sft.fit import find_checkpoint

ARGUMENTS = (
    "learning_rate: 5e-3\nmax_steps: 12\nlogging_steps: 1\nsave_strategy: steps\nsave_steps: 2\n"
    "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\n"
)
PYTHON = [sys.executable, "-m", "ctxlens.sft"]


def long_recipe(folder):
    """Twelve steps of four rows over twelve conversations: four epochs, a checkpoint every other step."""
    folder.mkdir()
    recipe = write_recipe(folder)
    replaced = ("learning_rate", "max_steps", "per_device", "indicator")
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(replaced)]
    recipe.write_text("\n".join(lines) + "\n" + ARGUMENTS)
    return recipe


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "train.json").read_text())["log"]]


def weights(folder):
    return torch.cat([value.flatten() for value in load_file(folder / "model.safetensors").values()])


def test_only_whole_checkpoints_count(tmp_path):
    assert find_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


class Killed(Exception):
    pass


LORA = pytest.param({"use_peft": True, "lora_target_modules": "all-linear"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("adapter", [{}, LORA])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path, adapter):
    """Stopped within an epoch after step 7, so from checkpoint 6: the same losses and weights to the bit."""
    unbroken = train_from_config(long_recipe(tmp_path / "a"), adapter)
    recipe = long_recipe(tmp_path / "b")

    def kill(done, total):
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        train_from_config(recipe, adapter, progress=kill)
    assert find_checkpoint(tmp_path / "b" / "out").endswith("checkpoint-6")
    started = []
    resumed = train_from_config(recipe, adapter, progress=lambda done, total: started.append(done))
    assert started[0] == 7
    assert losses(resumed) == losses(unbroken)
    assert torch.equal(weights(resumed), weights(unbroken))


KILLED_AT_STEP_7 = """
import os, signal, sys
from ctxlens.sft import train_from_config

def kill(done, total):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)

train_from_config(sys.argv[1], progress=kill)
"""
"""A training whose process kills itself, so that nothing can be cleaned up and nothing depends on timing."""


@pytest.mark.slow
def test_a_killed_process_is_taken_up_again(tmp_path):
    unbroken = train_from_config(long_recipe(tmp_path / "a"))
    recipe = long_recipe(tmp_path / "b")
    out = tmp_path / "b" / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED_AT_STEP_7, str(recipe)])
    assert process.wait(timeout=300) == -signal.SIGKILL
    assert find_checkpoint(out).endswith("checkpoint-6")
    assert not (out / "train.json").exists()
    subprocess.run([*PYTHON, "--config", str(recipe)], check=True, capture_output=True)
    assert losses(out) == pytest.approx(losses(unbroken), abs=1e-6)
    torch.testing.assert_close(weights(out), weights(unbroken), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    """Losses agree to 1e-5 and weights to 1e-4: gradients are summed in another order."""
    one = train_from_config(long_recipe(tmp_path / "one"))
    recipe = long_recipe(tmp_path / "two")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29731",
    ]
    words = ["-m", "ctxlens.sft", "--config", str(recipe), "--gradient_accumulation_steps", "1"]
    subprocess.run([*launch, *words], check=True, capture_output=True)
    two = tmp_path / "two" / "out"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    torch.testing.assert_close(weights(two), weights(one), atol=1e-4, rtol=1e-3)
