"""The benchmark of training at its smallest size."""

import json

from experiments.bench_training.__main__ import main


def test_both_ways_are_timed_on_the_same_conversations(tmp_path, capsys):
    result = main(["--preset", "smoke", "--rounds", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "training-smoke.json").read_text())["ratio"] == result["ratio"]
    plain, ours = result["median"]["plain"], result["median"]["indicator"]
    assert plain["tokens"] <= ours["tokens"] <= plain["tokens"] + 2 * 8  # the indicator and a space a message
    assert result["ratio"] == ours["tokens_per_second"] / plain["tokens_per_second"]
    assert "indicator over plain" in capsys.readouterr().out
