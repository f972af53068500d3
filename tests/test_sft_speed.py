"""What makes training on a CPU faster: fast bfloat16, and logits only where the loss counts."""

import json

import pytest
import torch
from conftest import build_toy_tokenizer
from sft_cases import ARGUMENTS, make_data, tiny, write_recipe
from trl.trainer import utils as trl_utils

from ctxlens.chat.data import Conversation
from ctxlens.models import dtype_choice
from ctxlens.organism import load_world
from ctxlens.sft import build_rows, default_arguments, make_sft_config, read_config, train
from ctxlens.sft.trainer import make_trainer


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(dtype_choice, "has_fast_bfloat16", lambda: True)


def test_bfloat16_is_chosen_for_large_models_on_a_processor_that_multiplies_it(fast, monkeypatch):
    model = tiny(build_toy_tokenizer())
    assert default_arguments(use_cpu=True, model=model)["bf16"] is False  # 10,000 parameters
    monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", 1000)
    assert default_arguments(use_cpu=True, model=model)["bf16"] is True
    assert default_arguments(use_cpu=True)["bf16"] is False
    assert make_sft_config("out", {"use_cpu": True, "bf16": False}, model=model).bf16 is False
    monkeypatch.setattr(dtype_choice, "has_fast_bfloat16", lambda: False)
    assert default_arguments(use_cpu=True, model=model)["bf16"] is False


def test_a_recipe_may_name_its_format(fast, monkeypatch, tmp_path):
    monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", 1000)
    recipe = write_recipe(tmp_path)
    assert read_config(recipe)[1].bf16 is True
    assert read_config(recipe, ["--bf16", "false"])[1].bf16 is False
    recipe.write_text(recipe.read_text() + "bf16: false\n")
    assert read_config(recipe)[1].bf16 is False


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "train.json").read_text())["log"]]


def test_bfloat16_trains_like_float32(fast, monkeypatch, tmp_path):
    """Eight steps of the organism from the same start, in which the loss falls: within 2 % of one another."""
    talks = load_world().conversations(16, seed=0)
    data = [Conversation(one.id, tuple(one.messages), "organism", {}) for one in talks]
    arguments = {**ARGUMENTS, "max_steps": 8, "learning_rate": 1e-3}
    told = []

    def run(name):
        return losses(train(data, out=tmp_path / name, model="organism", args=arguments, notice=told.append))

    exact = run("float32")
    monkeypatch.setattr(dtype_choice, "MOST_IN_FLOAT32", 1000)
    rounded = run("bfloat16")
    assert exact[-1] < 0.9 * exact[0]
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    assert ["bfloat16" in line for line in told] == [False, True]


def test_logits_are_computed_only_where_trained_and_change_nothing(monkeypatch, tmp_path):
    tokenizer = build_toy_tokenizer()
    rows = build_rows(tokenizer, make_data()).rows
    trained = [sum(label != -100 for label in row["labels"][1:]) for row in rows[:4]]
    lengths = [len(row["input_ids"]) for row in rows[:4]]
    seen = []
    head = trl_utils._ChunkedLogProbFunction

    class Watched:
        @staticmethod
        def apply(hidden, *rest):
            seen.append(len(hidden))
            return head.apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Watched)

    def step(ours):
        args = make_sft_config(tmp_path, {**ARGUMENTS, "max_length": None})
        trainer = make_trainer(tiny(tokenizer), tokenizer, rows, args)
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
        compute = trainer.compute_loss if ours else super(type(trainer), trainer).compute_loss
        loss = compute(trainer.model, batch)
        loss.backward()
        return loss.detach(), [weight.grad for weight in trainer.model.parameters()]

    (plain, theirs), (found, ours) = step(ours=False), step(ours=True)
    assert seen == [4 * (max(lengths) - 1), sum(trained)]
    assert sum(trained) < 2 * (max(lengths) - 1)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert not trl_utils._use_triton(torch.device("cpu"))
