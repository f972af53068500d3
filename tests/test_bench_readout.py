"""The benchmark of the read-out at its smallest size: it measures, goes on where it stopped, and draws."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import MODEL_TERMS, tolerance

from experiments.bench_readout.__main__ import main
from experiments.bench_readout.summary import draw, markdown, timing_rows

ROOT = Path(__file__).parents[1]


PARTS = ("--parts", "accuracy", "time", "decode", "profile")


def example() -> dict[str, Any]:
    """Two rounds at 100 tokens: ours takes 1.1 and 1.3 times plain; the peer died."""
    names = {"plain": "floor", "ours": "ours", "peer": "peer"}
    return {
        "config": {"n_layers": 2, "d_model": 8, "dtype": "float32", "threads": 1},
        "machine": {"cpu": "abacus"},
        "ways": {name: {"label": name, "kind": kind} for name, kind in names.items()},
        "lengths": {
            "100": {
                "goals": {"plain": None, "ours": 1.15, "peer": None},
                "forecast_bytes": {"plain": 0, "ours": 0, "peer": 800},
                "dead": {"peer": "would need 800 bytes"},
                "memory": {"plain": {"peak_bytes": 10_000_000}, "ours": {"peak_bytes": 13_000_000}},
                "rounds": [{"plain": 1.0, "ours": 1.1}, {"plain": 2.0, "ours": 2.6}],
            }
        },
        "decode": {"100": {"plain": [0.001, 0.002, 0.004], "steered": [0.002, 0.003, 0.003]}},
    }


def test_ratios_are_taken_within_a_round():
    plain, ours, peer = timing_rows(example())
    assert plain["ratio"] == [1, 1, 1]
    assert ours["seconds"] == [1.85, 1.1, 2.6]
    assert ours["ratio"] == pytest.approx([1.2, 1.1, 1.3])
    assert ours["extra_bytes"] == 3_000_000
    assert "ratio" not in peer
    assert peer["dead"] == "would need 800 bytes"


def test_the_table_says_what_died_and_what_was_the_goal():
    table = markdown(example())
    assert "| 100 | ours | 1.85 | 1.1–2.6 | 1.20 | 1.10–1.30 | ≤ 1.15 | 3 |" in table
    assert "| 100 | peer | dead: would need 800 bytes |" in table
    assert "| 100 | 2.00 | 3.00 | 1.500 | 2.000 |" in table


def test_the_figure_is_drawn_from_the_record_alone():
    traces: Any = draw(example()).data
    times = {trace.name: trace for trace in traces if trace.xaxis == "x"}
    assert list(times["ours"].y) == pytest.approx([1.2])
    assert list(times["ours"].error_y.array) == pytest.approx([0.1])
    assert not times["peer"].y


def test_a_smoke_run_measures_every_way_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--preset", "smoke", "--threads", "1", "--out", str(tmp_path)]
    first = subprocess.run(
        [sys.executable, "-m", "experiments.bench_readout", *arguments, *PARTS],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    results = tmp_path / "results.json"
    data = json.loads(results.read_text(encoding="utf-8"))
    rounds = data["lengths"]["128"]["rounds"]
    assert len(rounds) == 9
    missing = data["lengths"]["128"]["dead"]
    assert set(missing) <= {"read_nnsight", "read_inseq"}
    assert all(reason.endswith("is not installed") for reason in missing.values())
    assert set(rounds[0]) == set(data["ways"]) - set(missing)
    assert all(seconds > 0 for one in rounds for seconds in one.values())
    assert {len(steps) for steps in data["decode"]["64"].values()} == {64}
    assert data["accuracy"]["all_rows_to_read_eager"]["max"] < tolerance(torch.float32, 1.0, MODEL_TERMS)
    assert data["accuracy"]["all_rows_to_read_lens"]["max"] < tolerance(torch.float32, 1.0, MODEL_TERMS)
    assert 1e-5 < data["accuracy"]["bfloat16_to_float32_read_all"]["max"] < 0.1
    assert data["profile"]["ms"]["read_all"]["attention kernel"] > 0
    assert "plotly" in (tmp_path / "figure.html").read_text(encoding="utf-8")
    main([*arguments, "--table"])
    assert capsys.readouterr().out == first.stdout

    del data["lengths"]["128"]["rounds"][5:]
    results.write_text(json.dumps(data), encoding="utf-8")
    main([*arguments, *PARTS])
    again = json.loads(results.read_text(encoding="utf-8"))
    assert again["lengths"]["128"]["rounds"][:5] == rounds[:5]
    assert len(again["lengths"]["128"]["rounds"]) == 9
    assert again["decode"] == data["decode"]


@pytest.mark.slow
def test_peaks_grow_with_what_a_way_holds():
    from dataclasses import replace

    from experiments.bench_readout.memory import measure_peak
    from experiments.bench_readout.presets import PRESETS

    preset = replace(PRESETS["smoke"], n_layers=4)
    plain, ours, eager = (
        measure_peak(name, preset, 1024, 1, 2 * 10**9)["peak_bytes"]
        for name in ("plain", "read_answer", "read_eager")
    )
    patterns = 4 * 4 * 1024**2 * 4  # layers, heads, queries and keys, bytes
    assert eager - plain > 0.9 * patterns
    assert ours - plain < 0.2 * patterns
    assert "no memory" in measure_peak("read_eager", preset, 4096, 1, 6 * 10**8)["dead"]
