"""The benchmark of scoring at its smallest size: it measures, compares scores, and writes."""

import json

import pytest

from experiments.bench_scoring.__main__ import main


def test_smoke(tmp_path, capsys, organism_tokenizer):
    organism_tokenizer.save_pretrained(tmp_path / "tokenizer")
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": roles[k % 2], "content": f"the {'lamp ' * (n + k)}."} for k in range(4)]}
        for n in range(8)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    out = tmp_path / "results.json"
    words = [str(tmp_path / "data.json"), str(tmp_path / "tokenizer"), "--out", str(out), "--smoke"]
    main([*words, "--parts", "speed", "paper"])
    results = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out)["speed"] == results["speed"]
    speed, paper = results["speed"], results["paper"]
    assert (speed["conversations"], speed["layers_read"], len(speed["rounds"])) == (6, 3, 1)
    assert speed["tokens"] <= speed["padded_tokens"]
    assert paper["scores_compared"] == 2 * 2 * 3  # conversations, turns, layers
    assert paper["largest_difference"] < 1e-4
    ratio = paper["s_per_conversation"] / speed["whole_s_per_conversation"]
    assert results["times_faster_than_paper"] == pytest.approx(ratio, abs=0.1, rel=0.01)
