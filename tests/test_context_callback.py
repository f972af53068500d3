"""Readings of context use during a training: their budget, their rules, their record, and the training."""

import gc
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import build_toy_tokenizer
from datasets import Dataset
from sft_cases import tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

from ctxlens.errors import InputError
from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint
from ctxlens.models.loading import load_causal_lm
from ctxlens.organism import load_world
from ctxlens.report import plots
from ctxlens.runs import Run
from ctxlens.sft import ContextCallback, ContextWarning
from ctxlens.sft.context.budget import Budget
from ctxlens.sft.context.record import Record
from ctxlens.sft.context.rules import has_fallen, is_best
from ctxlens.sft.context.trainee import left_as_it_was


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_reading_waits_until_the_time_pays_for_it():
    """At 5 %, a reading of 2 s (expected 2.2) after one of 2 s is paid for by 4.2 / 0.05 = 84 s in all."""
    clock = Clock()
    budget = Budget(0.05, clock=clock)
    budget.start()
    with budget.spending():
        clock.now += 2
    assert (budget.spent, budget.elapsed) == (2, 2)
    clock.now = 81.7  # 83.9 s with the reading
    assert not budget.allows(2)
    clock.now = 81.9  # 84.1 s
    assert budget.allows(2)


def test_the_first_reading_takes_at_most_an_eighth_of_what_the_plan_allows():
    """1,000 planned seconds allow 50 s at 5 %, and the first reading 6.25 s."""
    budget = Budget(0.05)
    assert budget.affordable(1.0, 1000, most=8) == 6
    assert budget.affordable(0.5, 1000, most=8) == 8
    assert budget.affordable(20.0, 1000, most=8) == 1  # one text is always asked, if all are allowed one
    assert budget.allows_first(49, 1000)
    assert not budget.allows_first(51, 1000)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_share_is_never_exceeded_at_the_end(share):
    """Steps of 1 s and a reading of 1 s per text, due after every step, whatever the number of steps."""
    for steps in (30, 100, 400):
        clock = Clock()
        budget = Budget(share, clock=clock)
        budget.start()
        clock.now += 1
        taken = []
        if budget.allows_first(1, steps):
            texts = budget.affordable(1, steps, most=8)
            with budget.spending():
                clock.now += texts
            taken.append(0)
            for step in range(1, steps + 1):
                if budget.allows(texts):
                    with budget.spending():
                        clock.now += texts
                    taken.append(step)
                clock.now += step < steps
        assert budget.spent <= share * budget.elapsed
        assert len(taken) >= (2 if share * steps >= 8 else 0)


def test_a_resumed_training_keeps_its_times():
    budget = Budget(0.1, spent=1, clock=Clock())
    budget.resume(elapsed=100, spent=4)
    budget.start()
    assert (budget.elapsed, budget.spent) == (100, 5)
    assert budget.allows(5)
    assert not budget.allows(6)


def test_recall_has_fallen_when_two_readings_in_a_row_say_so():
    def fallen(*values):
        return has_fallen([{"recall_template": value} for value in values], 0.2)

    assert not fallen(0.9, 0.6)  # one reading
    assert not fallen(0.9, 0.6, 0.8)
    assert not fallen(0.9, 0.8, 0.6)
    assert fallen(0.9, 0.6, 0.65)
    assert fallen(0.9, 0.6, None, 0.65)  # a reading that failed says nothing
    assert not fallen(0.1, 0.0, 0.0)


def test_the_best_reading_is_higher_than_all_others():
    assert is_best(0.5, [0.4, None, math.nan])
    assert not is_best(0.5, [0.5])
    assert not is_best(math.nan, [])
    assert not is_best(None, [])


def test_a_record_goes_on_with_the_readings_up_to_its_checkpoint(tmp_path):
    folder = tmp_path / "context"
    record = Record(folder, {"seed": 0}, writes=True)
    record.open(0)
    for step in (0, 5, 10):
        record.add({"step": step, "recall_plain": math.nan, "elapsed_seconds": step, "spent_seconds": 1})
    again = Record(folder, {"seed": 0}, writes=True)
    again.open(7)
    assert [line["step"] for line in again.lines] == [0, 5]
    assert again.times == (5, 1)
    assert again.at(5)["recall_plain"] is None  # JSON has no NaN
    again.add({"step": 10})
    lines = (folder / "readings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 5, 10]
    with pytest.raises(InputError, match="other settings: seed"):
        Record(folder, {"seed": 1}, writes=True).open(7)
    anew = Record(folder, {"seed": 1}, writes=True)
    anew.open(0)
    assert anew.lines == []
    assert (tmp_path / "context.old" / "readings.jsonl").is_file()
    assert Run.read(folder).manifest["study"] == "context"


def test_curves_leave_out_what_was_not_measured():
    text = {"recall_plain": 1.0, "recall_template": 0.5, "closed_book": None}
    readings = [
        {"step": 0, "recall_plain": 1.0, "recall_template": 0.5, "by_text": [text, text]},
        {"step": 4, "error": "out of memory", "by_text": []},
        {"step": 8, "recall_plain": 0.5, "recall_template": None, "by_text": [{"recall_plain": 0.5}]},
    ]
    curves = {curve.name: curve for curve in plots.context_curves(readings).data}
    assert set(curves) == {"without template", "with template"}
    assert list(curves["without template"].x) == [0, 8]
    assert list(curves["with template"].x) == [0]
    with pytest.raises(InputError, match="no readings"):
        plots.context_curves(readings[1:2])


def test_the_model_is_left_as_it_was():
    model = tiny(build_toy_tokenizer())
    model.train()
    model.model.layers[0].eval()
    model.forward = model.forward  # an attribute of the object, as accelerate and TRL set it
    patched = model.forward
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with left_as_it_was(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        assert "forward" not in model.__dict__
        random.random(), np.random.rand(), torch.rand(1)
    assert model.training
    assert not model.model.layers[0].training
    assert torch.is_grad_enabled()
    assert model.forward is patched
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


class Rows(torch.utils.data.Dataset):
    """Sixteen short rows of the organism's tokens."""

    def __len__(self):
        return 16

    def __getitem__(self, number):
        ids = torch.arange(20) + 20 * number + 50
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def organism():
    source = locate_checkpoint("organism-chat")
    tokenizer = load_tokenizer(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return load_causal_lm(source, device=None, dtype=torch.float32), tokenizer


def make_trainer(folder, *, model=None, tokenizer=None, **arguments):
    if model is None:
        model, tokenizer = organism()
    plain = {
        "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**plain, **arguments})
    rows = Rows()
    return Trainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


SMALL = {"share": 1.0, "texts": 1, "lengths": (60,)}


@pytest.fixture
def affordable(monkeypatch):
    """The steps of these trainings are so short that no budget would pay for a reading."""
    monkeypatch.setattr(Budget, "allows", lambda self, seconds: True)
    monkeypatch.setattr(Budget, "allows_first", lambda self, seconds, planned: True)


needs_no_time = pytest.mark.usefixtures("affordable")


def log_of(trainer, key):
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


def watch(trainer, **options):
    callback = ContextCallback(trainer, **{**SMALL, **options})
    trainer.add_callback(callback)
    return callback


class Logger(TrainerCallback):
    """What a tracker that `report_to` names gets."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


@needs_no_time
def test_a_training_is_the_same_with_readings_and_without(tmp_path):
    """Losses and weights to the bit, and the configuration as before."""
    alone = make_trainer(tmp_path / "alone")
    alone.train()
    trainer = make_trainer(tmp_path / "watched")
    before = trainer.model.config.to_dict()
    trainer.add_callback(logger := Logger())
    callback = watch(trainer, every=2)
    trainer.train()
    assert log_of(trainer, "loss") == log_of(alone, "loss")
    told = [
        (step, logs["context/recall_template"]) for step, logs in logger.logged if "context/seconds" in logs
    ]
    assert told == log_of(trainer, "context/recall_template")
    for ours, theirs in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.model.config.to_dict() == before
    assert [line["step"] for line in callback.readings] == [0, 2, 4, 6]
    logged = log_of(trainer, "context/recall_template")
    assert logged == [(line["step"], line["recall_template"]) for line in callback.readings]
    first, last = callback.readings[0], callback.readings[-1]
    assert first["recall_plain"] > 0.5
    assert 0 < first["user_share_template"] < first["user_share_plain"] < 1
    assert first["closed_book"] > 0.5
    assert first["texts"] == 1
    assert not first["error"]
    assert last["spent_seconds"] >= sum(line["seconds"] for line in callback.readings)
    assert len(callback.figure().data) == 5


def test_a_reading_keeps_no_tensors(tmp_path):
    """A model that keeps nothing has as many tensors after a reading as before it."""
    asking = watch(make_trainer(tmp_path))._asking

    def count():
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    asking.read()  # what is made once stays
    before = count()
    assert not asking.read().error
    assert count() == before


@needs_no_time
def test_the_first_reading_sees_the_weights_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=10.0)
    callback = watch(trainer, every=1)
    trainer.train()
    before, after = callback.readings
    assert before["step"] == 0
    assert before["recall_plain"] > 0.5
    assert after["step"] == 1
    assert after["recall_plain"] == 0


@needs_no_time
def test_a_resumed_training_takes_no_reading_twice(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    watch(trainer, every=1)
    trainer.train()
    again = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    callback = watch(again, every=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = (tmp_path / "context" / "readings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert log_of(again, "context/recall_plain") == log_of(trainer, "context/recall_plain")
    assert len(callback.readings) == 5
    assert [step for step, _ in log_of(again, "context/recall_plain")] == [0, 1, 2, 3, 4]


@needs_no_time
def test_the_trainer_chooses_its_best_checkpoint_by_recall(tmp_path, monkeypatch):
    values = itertools.chain([0.1, 0.5, 0.9, 0.7], itertools.repeat(0.0))
    monkeypatch.setattr(
        "ctxlens.sft.context.asking.ask", lambda *_: {"recall_template": next(values), "recall_plain": 1.0}
    )
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        metric_for_best_model="context/recall_template", load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    callback = watch(trainer)
    trainer.train()
    assert [line["step"] for line in callback.readings] == [0, 2, 4, 6]
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


@needs_no_time
def test_the_callback_keeps_the_best_model_itself(tmp_path, monkeypatch):
    """The highest value after the start is that of step 4; the start itself is no checkpoint."""
    values = iter([0.9, 0.4, 0.6, 0.5])
    monkeypatch.setattr("ctxlens.sft.context.asking.ask", lambda *_: {"recall_template": next(values)})
    trainer = make_trainer(tmp_path)
    watch(trainer, every=2, keep_best="context/recall_template")
    trainer.train()
    best = tmp_path / "context" / "best"
    assert json.loads((best / "reading.json").read_text())["step"] == 4
    assert (best / "model.safetensors").is_file()
    assert not (tmp_path / "context" / ".best").exists()


@needs_no_time
def test_a_training_that_loses_its_context_stops(tmp_path, monkeypatch):
    values = iter([0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr("ctxlens.sft.context.asking.ask", lambda *_: {"recall_template": next(values)})
    trainer = make_trainer(tmp_path)
    callback = watch(trainer, every=1, stop_below=0.2)
    with pytest.warns(ContextWarning, match=r"stops at step 3: recall .* from 0\.90 to 0\.50"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert callback.stopped


@needs_no_time
def test_a_reading_that_fails_does_not_stop_the_training(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("ctxlens.sft.context.asking.ask", fail)
    trainer = make_trainer(tmp_path, max_steps=2)
    callback = watch(trainer, every=2)
    with pytest.warns(ContextWarning, match="out of memory"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert callback.readings[0]["error"] == "RuntimeError: out of memory"
    assert not log_of(trainer, "context/seconds")


def test_a_training_too_short_for_a_reading_says_so_once(tmp_path):
    trainer = make_trainer(tmp_path)
    callback = watch(trainer, every=1, share=0.001)
    with pytest.warns(ContextWarning, match="too short for a reading") as told:
        trainer.train()
    assert len([one for one in told if one.category is ContextWarning]) == 1
    assert [line["step"] for line in callback.readings] == [0]


@needs_no_time
def test_mixed_precision_and_gradient_checkpointing_are_as_before(tmp_path):
    """The same losses to the bit in bfloat16 with checkpointing; the reading itself uses neither."""
    mixed = {"bf16": True, "gradient_checkpointing": True, "max_steps": 3}
    alone = make_trainer(tmp_path / "alone", **mixed)
    alone.train()
    trainer = make_trainer(tmp_path / "watched", **mixed)
    callback = watch(trainer, every=1)
    trainer.train()
    assert log_of(trainer, "loss") == log_of(alone, "loss")
    assert all(not line["error"] for line in callback.readings)
    assert callback.readings[0]["recall_plain"] > 0.5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 0}, "every must be at least 1 step"),
        ({"share": 0.0}, "share must be above 0"),
        ({"share": 1.5}, "share must be above 0 and at most 1"),
        ({"texts": 0}, "texts must be at least 1"),
        ({"lengths": ()}, "lengths must be numbers of tokens"),
        ({"stop_below": 1.0}, "stop_below must be above 0 and below 1"),
        ({"keep_best": "loss"}, "keep_best names 'loss', which is not measured"),
        ({"lengths": (100_000,)}, "texts of 100000 tokens do not fit the model's window"),
    ],
)
def test_values_that_cannot_be_used_are_refused_at_once(tmp_path, options, complaint):
    with pytest.raises(InputError, match=complaint):
        ContextCallback(make_trainer(tmp_path), **{**SMALL, **options})


def test_trainers_that_cannot_be_watched_are_refused_at_once(tmp_path):
    model, tokenizer = organism()
    with pytest.raises(InputError, match="no tokenizer"):
        ContextCallback(make_trainer(tmp_path, model=model, tokenizer=None), **SMALL)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ContextCallback(make_trainer(tmp_path, model=model, tokenizer=tokenizer), **SMALL)
    trainer = make_trainer(tmp_path, metric_for_best_model="context/memory")
    with pytest.raises(InputError, match="metric_for_best_model names 'memory'"):
        ContextCallback(trainer, **SMALL)


def sft_with_lora(folder, model, tokenizer, talks, common):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(folder), **common)
    data = Dataset.from_list([{"messages": list(talk.messages[:2])} for talk in talks])
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def dpo(folder, model, tokenizer, talks, common):
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": list(talk.messages[:1]), "chosen": list(talk.messages[1:2]),
         "rejected": [{"role": "assistant", "content": "No."}]}
        for talk in talks
    ]  # fmt: skip
    args = DPOConfig(str(folder), **common)
    return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def grpo(folder, model, tokenizer, talks, common):
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(str(folder), num_generations=2, max_completion_length=8, **common)
    data = Dataset.from_list([{"prompt": list(talk.messages[:1])} for talk in talks])
    return GRPOTrainer(
        model, args=args, train_dataset=data, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(one[0]["content"])) for one in completions],
    )  # fmt: skip


@pytest.mark.slow
@needs_no_time
@pytest.mark.parametrize("build", [sft_with_lora, dpo, grpo])
def test_trainers_of_trl_are_watched_without_a_change(build, tmp_path):
    """All entries of the log but the times are the same to the bit, TRL's own collected metrics included."""
    common = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 2,
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    talks = load_world().conversations(8, seed=0)
    logs = []
    for watched in (False, True):
        torch.manual_seed(0)
        trainer = build(tmp_path / str(watched), *organism(), talks, common)
        callback = watch(trainer, every=1) if watched else None
        trainer.train()
        entries = [one for one in trainer.state.log_history if "loss" in one]
        logs.append([{key: one[key] for key in one if "time" not in key} for one in entries])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2
    assert [line["step"] for line in callback.readings] == [0, 1, 2, 3, 4]
    assert not any(line["error"] for line in callback.readings)
    if build is not grpo:  # both of its completions get the same reward, so that nothing is learned
        assert len({line["user_share_template"] for line in callback.readings}) > 1
