"""The pipeline at its smallest size: every stage runs, is measured, and is not run again."""

import json

import pytest
import torch

from ctxlens.sft.evaluation import as_keys
from experiments.gpu_pipeline.__main__ import STAGES, main
from experiments.gpu_pipeline.presets import PRESETS


@pytest.mark.slow
def test_every_stage_runs_once_and_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ctxlens.sft.before_after.evaluate.write_report", lambda *_, **__: None)
    words = ["--preset", "smoke", "--out", str(tmp_path)]
    result = main(words)
    stages = result["stages"]
    assert tuple(stages) == tuple(STAGES)
    assert all(one["seconds"] > 0 and one["peak_memory_mib"] > 0 for one in stages.values())
    for name in ("pretrain", "vanilla", "score", "indicator", "evaluate"):
        rate = stages[name]["tokens"] / stages[name]["seconds"]
        assert stages[name]["tokens_per_second"] == pytest.approx(rate)
    assert stages["pretrain"]["tokens"] > 2 * 64 * (1152 // 64)  # copying, and documents on top
    assert (stages["pretrain"]["copy_steps"], stages["pretrain"]["document_steps"]) == (2, 2)
    assert stages["select"]["turns"] == stages["score"]["turns"]
    assert stages["select"]["true"] > 0
    assert (
        json.loads((tmp_path / "indicator" / "manifest.json").read_text())["config"]["indicator"] == "[IND]"
    )
    measures = [row["measure"] for row in stages["evaluate"]["cure"]]
    assert "known, with indicator, minus vanilla" in measures
    assert json.loads((tmp_path / "results-smoke.json").read_text())["stages"] == json.loads(
        json.dumps(stages)
    )
    assert "| pretrain |" in capsys.readouterr().out

    def fail(self):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr("experiments.gpu_pipeline.__main__.STAGES", dict.fromkeys(STAGES, fail))
    assert main(words)["stages"] == json.loads(json.dumps(stages))


def test_pretraining_ends_when_its_time_is_up(monkeypatch):
    from experiments.gpu_pipeline.pretraining import TimedPretraining
    from experiments.organism.pretrain import PretrainRecipe

    training = object.__new__(TimedPretraining)
    training.recipe = PretrainRecipe(copy_max_steps=1000, document_steps=1000)
    training.seconds, training.copy_seconds, training.started = 60.0, 20.0, 0.0
    clock, rates = [0.0], []
    monkeypatch.setattr("experiments.gpu_pipeline.pretraining.time.time", lambda: clock[0])
    monkeypatch.setattr("experiments.gpu_pipeline.pretraining.copy_loss_nats", lambda *_: 3.0)
    training.model, training.sampler, training.report = None, None, lambda text: None
    training.batches = lambda copying: iter(lambda: None, 0)
    training.probe = lambda text: None
    training.save = lambda folder: None

    def update(batch, lr):
        clock[0] += 1.0
        rates.append(lr)
        return torch.tensor(2.0)

    training.update = update
    assert training.learn_copying() == 21  # the first step after 20 s
    training.learn_documents(None)
    assert len(rates) == 61
    document = rates[21:]
    assert document[0] == training.recipe.lr
    assert document[-1] == pytest.approx(0.03 * training.recipe.lr)
    assert document == sorted(document, reverse=True)


class StubSampler:
    """Rows of a stub: as many tokens as asked for, and a vocabulary of five."""

    class tokenizer:
        pad_token_id = 0

    def vocabulary(self, rng):
        return range(5, 10)

    def row(self, rng, length):
        return [7] * length, [-100] + [7] * (length - 1)


def test_batches_hold_the_tokens_of_a_step():
    from experiments.gpu_pipeline.pretraining import Batches
    from experiments.organism.pretrain import PretrainRecipe

    recipe = PretrainRecipe(tokens_per_step=256, row_lengths={128: 1.0}, copy_length=32)
    tokens, labels = next(iter(Batches(StubSampler(), recipe, copying=True)))
    assert tokens.shape == (8, 32)
    assert torch.equal(tokens, labels)
    for row in tokens.tolist():
        assert any(row[: 32 - period] == row[period:] for period in range(6, 17))
    tokens, labels = next(iter(Batches(StubSampler(), recipe, copying=False)))
    assert tokens.shape == (2, 128)
    assert (labels[:, 0] == -100).all()


@pytest.mark.parametrize("name", ["gpu", "cpu", "smoke"])
def test_presets_have_what_the_pipeline_asks_for(name):
    preset = PRESETS[name]
    assert preset.shape["d_model"] % preset.shape["n_heads"] == 0
    assert preset.shape["n_heads"] % preset.shape["n_key_value_heads"] == 0
    assert preset.sft_rows % 2 == 0
    assert as_keys(preset.evaluation).evaluate


def test_no_preset_is_left_out():
    assert set(PRESETS) == {"gpu", "cpu", "smoke"}
