"""The benchmark of training at its smallest size."""

import json

import pytest

from experiments.bench_training import answers
from experiments.bench_training.__main__ import PRESETS, main, resize


def test_both_ways_are_timed_on_the_same_conversations(tmp_path, capsys):
    result = main(["--preset", "smoke", "--rounds", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "training-smoke.json").read_text())["ratio"] == result["ratio"]
    plain, ours = result["median"]["plain"], result["median"]["indicator"]
    assert plain["tokens"] <= ours["tokens"] <= plain["tokens"] + 2 * 8  # the indicator and a space a message
    assert result["ratio"] == ours["tokens_per_second"] / plain["tokens_per_second"]
    assert result["whole_ratio"] == ours["whole_tokens_per_second"] / plain["whole_tokens_per_second"]
    assert all(way["whole_seconds"] > way["train_seconds"] for way in (plain, ours))
    assert "indicator over plain, from conversations to checkpoint" in capsys.readouterr().out


def test_sizes_of_a_preset_can_be_changed():
    small = resize(PRESETS["gpu"], ["n_layers=1", "d_model=32"])
    assert (small.n_layers, small.d_model, small.packing) == (1, 32, True)
    with pytest.raises(SystemExit, match="unknown keys: layers"):
        resize(PRESETS["gpu"], ["layers=1"])


def test_four_ways_of_training_on_answers_are_timed(tmp_path, capsys):
    words = ["--rows", "4", "--batch", "2", "--accumulation", "1", "--rounds", "1", "--out", str(tmp_path)]
    result = answers.main(words)
    assert json.loads((tmp_path / "answers.json").read_text())["to_plain"] == result["to_plain"]
    plain, before, after, rounded = (result["median"][way] for way in answers.WAYS)
    assert before["tokens"] == after["tokens"]
    assert abs(plain["tokens"] - after["tokens"]) <= 4  # TRL's completion may end with one more token
    assert abs(plain["trained"] - after["trained"]) <= 4
    assert after["trained"] < after["tokens"] / 2
    assert result["to_plain"] == [after["tokens_per_second"] / plain["tokens_per_second"]]
    assert 0 < after["share_of_peak"] < 1
    assert rounded["trained"] == after["trained"]
    assert result["bfloat16"] == [rounded["tokens_per_second"] / after["tokens_per_second"]]
    assert "ctxlens over all logits" in capsys.readouterr().out
