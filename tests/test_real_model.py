"""The experiment on a real instruction-tuned model, as a whole, with a small model and short texts."""

import json
import sys

import pytest

from ctxlens.results import NeedleGrid
from experiments.real_model import __main__ as command
from experiments.real_model import design, figures, judge, table

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def small(monkeypatch):
    """The design with two short lengths, one text of each wording in every block, and few tokens to write."""
    values = {"LENGTHS": (150, 300), "LONG": 200, "DETAIL": 300, "MAX_NEW_TOKENS": 4, "PER_TEXT": 2,
              "CHOOSING": (0, 2), "JUDGING": (1, 3), "MAP_BLOCKS": (0, 2), "SIZES": (1, 3), "DRAWS": 1,
              "ALPHAS": (0.95, 0.4), "ALPHAS_OF_HEADS": (0.4,)}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(design, name, value)


@pytest.mark.slow
def test_every_part_is_measured_and_judged(small, test_data, tmp_path, monkeypatch, capsys):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML, encoding="utf-8")
    model = str(test_data / "stories260K" / "hf")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["real_model", *words, "--out", str(tmp_path / "run")])
        command.main()

    options = [model, "--template", str(template), "--blocks", "0,1"]
    for part in ("loss", "logprob", "controls", "foreign", "attention", "judge", "cause", "judge",
                 "cause-judged", "modes", "maps", "judge", "small", "judge", "small-judged", "cost",
                 "fresh", "fresh-plain", "fresh-small", "fresh-small-plain", "fresh-formula", "fresh-modes",
                 "judge"):  # fmt: skip
        run(part, *([] if part == "judge" else options))
    found = json.loads((tmp_path / "run" / "judged.json").read_text(encoding="utf-8"))
    assert set(found) == {
        "loss",
        "logprob",
        "controls",
        "attention",
        "cause",
        "modes",
        "maps",
        "small",
        "cost",
        "fresh",
    }
    assert found["fresh"]["small"]["template minus no template"]["n"] == 8
    assert found["fresh"]["the paper's α of 0.95"]["n"] == 8
    assert set(found["fresh"]["modes"]) == {"prompt-only", "compounding"}
    assert found["small"]["heads"] == found["maps"]["ranking"][: len(found["small"]["heads"])]
    assert set(found["cost"]) == {"unsteered", "all", "retrieval", "small", "prompt-only", "compounding"}
    shown = "\n".join(table.tables(found))
    assert all(claim in shown for claim in ("1. loss", "2. template", "3. role bias", "4. cause", "4. cost"))
    drawn = [draw(found) for _, draw in figures.FIGURES.values()]
    assert all(figure.data for figure in drawn)
    # By hand: the fall of the loss on the long texts.
    frame = judge.collect(tmp_path / "run" / "loss").frame
    long = frame[frame["context_tokens"] == 300]
    base = long["condition"].str.partition("+")[0]
    by_text = long.groupby([long["case"], base])["recall"].mean().unstack()
    assert found["loss"]["long"]["fall"]["estimate"] == pytest.approx(
        (by_text["template"] - by_text["plain"]).mean(), abs=1e-3
    )
    assert len(frame) == 2 * 4 * 2 * 2 * 4  # blocks, wordings, lengths, facts, conditions
    before = (tmp_path / "run" / "loss" / "0-bare.parquet").stat().st_mtime_ns
    run("loss", *options)
    assert (tmp_path / "run" / "loss" / "0-bare.parquet").stat().st_mtime_ns == before
    steered = NeedleGrid.load(tmp_path / "run" / "small-judged" / "1-bare.parquet").frame
    assert set(steered["heads"]) == {"small", "random"}
    # The answers that are kept give the same verdicts.
    run("keep", "--to", str(tmp_path / "kept"))
    monkeypatch.setattr(sys, "argv", ["real_model", "judge", "--out", str(tmp_path / "kept")])
    command.main()
    again = json.loads((tmp_path / "kept" / "judged.json").read_text(encoding="utf-8"))
    found.pop("attention")
    assert json.dumps(again) == json.dumps(found)
