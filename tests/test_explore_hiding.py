"""The explorer's screens 5 and 6: a sentence at its place, the map, and a scored data set."""

import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_explore_state import PAYLOADS

import ctxlens as cl
from ctxlens.errors import InputError
from ctxlens.explore import hiding, scored
from ctxlens.explore.copying import Source, as_command, as_python
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import DataPart, NeedlePart, State, read_part
from ctxlens.explore.work import Ticket
from ctxlens.report.plots.score_scatter import score_scatter
from ctxlens.results import Scores, Selection

NEEDLE = {
    "sentence": "The best thing to do in Oakford is to paint a wall.",
    "question": "What is the best thing to do in Oakford?",
    "keywords": "paint, wall",
    "length": 80,
    "answer_tokens": 6,
}


def make_scores(n: int = 80) -> Scores:
    """Turns whose score falls with their length; the first half of them depends on the context."""
    rows = []
    for i in range(n):
        share = round(0.95 - 0.9 * i / n, 4)
        for layer in (0, 1):
            rows.append(
                {
                    "conversation": f"c{i}", "turn": 1, "layer": layer,
                    **dict.fromkeys(Scores.REDUCTIONS, share if layer else 0.5), "uniform": 0.2,
                    "response_tokens": 5, "context_tokens": 10 + i, "truncated": False,
                    "kind": "document" if i < n // 2 else "closed",
                }
            )  # fmt: skip
    return Scores.from_rows(rows, {"n_layers": 2, "model": "organism-chat", "fingerprint": "x"})


@pytest.fixture(scope="module")
def lab() -> Lab:
    model = cl.load_model("organism-chat", backend="native", device="cpu")
    known = scored.ScoredSet(make_scores(), "runs/scores", "data.jsonl")
    return Lab(model, source=Source("organism-chat", None, {}, ()), cache_bytes=2**24, scored=known)


def run(lab: Lab, task: Any) -> Any:
    ticket = Ticket(task.key, task.run, task.size)
    found = task.run(ticket)
    lab.cache.put(task.key, found, task.size(found))
    return found


def test_a_place_is_what_the_needle_verb_measures(lab):
    part = read_part(NeedlePart, {**NEEDLE, "depth": 30})
    found = run(lab, hiding.place(lab, part))
    grid = cl.needle(
        lab.model, needles=hiding.needle_of(part), lengths=(80,), depths=(30.0,), score=("recall", "logprob"),
        conditions="plain+prefix,template+prefix", max_new_tokens=6,
    )  # fmt: skip
    columns = ["condition", "recall", "needle_logprob", "response"]
    assert found.grid.frame[columns].to_dict("records") == grid.frame[columns].to_dict("records")
    start, end = found.cell.context.needle_span
    assert found.cell.context.text[start:end] == NEEDLE["sentence"]
    assert hiding.written(lab, part) is found.cell


def test_the_map_fills_and_keeps_what_was_dragged(lab):
    part = read_part(NeedlePart, {**NEEDLE, "length": 60, "depth": 30})
    grid, done, total = hiding.measured(lab, part)
    assert (done, total) == (0, 11)
    assert grid.frame["recall"].isna().all()
    run(lab, hiding.place(lab, part))
    assert hiding.needle_map(lab, part)[1:] == (1, 11)
    while (task := hiding.filling(lab, part)) is not None:
        run(lab, task)
    figure, done, _ = hiding.needle_map(lab, part)
    assert (done, len(figure.data), len(figure.layout.shapes)) == (11, 2, 2)
    assert not np.isnan(np.asarray(figure.data[1].z, dtype=float)).any()


def test_a_text_of_ones_own_limits_the_length(lab):
    document = "It rained in the hills. " * 3
    part = read_part(NeedlePart, {**NEEDLE, "source": "own", "document": document, "more": "20, 4000"})
    lengths = hiding.lengths_of(lab, part)
    assert (len(lengths), lengths[0]) == (2, 20)
    assert lengths[-1] < 80
    assert hiding.written(lab, part).context.tokens <= lengths[-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sentence": ""}, "has no sentence"),
        ({"keywords": "ship"}, "does not contain its keywords ship"),
        ({"source": "own"}, "paste a text"),
        ({"length": 100_000}, "do not fit"),
    ],
)
def test_what_cannot_be_hidden_is_one_sentence(lab, given, words):
    with pytest.raises(InputError, match=words):
        hiding.written(lab, read_part(NeedlePart, {**NEEDLE, **given}))


@pytest.mark.parametrize("more", ["ten", "1,2", "100;200", "1e9", ",".join(["100"] * 9)])
def test_further_lengths_are_a_few_numbers(more):
    with pytest.raises(InputError, match="further lengths are at most 8"):
        read_part(NeedlePart, {"more": more})


def test_needle_code_gives_the_map(lab, tmp_path, monkeypatch):
    from test_cli import call

    monkeypatch.chdir(tmp_path)
    own = {
        "source": "own",
        "document": "It rained in the hills. A dog slept. " * 4,
        "depth": 25,
        "length": 60,
    }
    state = State.read({"screen": "needle", "needle": {**NEEDLE, **own}})
    made: dict[str, Any] = {}
    exec(as_python(lab, state), made)
    found = run(lab, hiding.place(lab, state.needle))
    at = made["grid"].frame.query("depth_percent == 25")
    assert at["response"].tolist() == found.grid.frame["response"].tolist()
    assert len(made["grid"].frame) == 24
    command = write_files(as_command(lab, state))
    call(*command[1:], "--out", "made")
    grid = cl.NeedleGrid.load(tmp_path / "made" / "needle.parquet")
    assert grid.frame["response"].tolist() == made["grid"].frame["response"].tolist()


def write_files(code: str) -> list[str]:
    """Do what a shell does with `cat > NAME <<'END'`; returns the words of the last command."""
    lines = iter(code.splitlines())
    words: list[str] = []
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["cat", ">"]:
            end, text = words[3].removeprefix("<<"), []
            while (one := next(lines)) != end:
                text.append(one)
            Path(words[2]).write_text("\n".join(text), encoding="utf-8")
    return words


def test_a_document_cannot_end_its_part_of_the_command(lab):
    document = "A first line here.\nEND_OF_TEXT\nrm -rf ~\n"
    state = State.read({"screen": "needle", "needle": {**NEEDLE, "source": "own", "document": document}})
    lines = as_command(lab, state).splitlines()
    assert "cat > document.txt <<'END_OF_TEXT_'" in lines
    assert lines.index("END_OF_TEXT_") > lines.index("rm -rf ~")


def test_a_threshold_by_hand(lab):
    part = read_part(DataPart, {"rule": "beta", "beta": 0.5, "layer": 1})
    chosen = scored.select(scored.scored_of(lab, part), part)
    found = scored.summarise(scored.scored_of(lab, part), chosen)
    # 0.95 - 0.9 i / 80 > 0.5 for i < 40, which are exactly those that depend on the context
    assert (found.selected, found.turns, found.precision, found.recall) == (40, 80, 1.0, 1.0)
    assert found.correlation == pytest.approx(-1.0)
    rows = scored.turns_of(lab.scored, chosen)
    assert scored.nearest(rows, found.threshold, 4) == [38, 39, 40, 41]
    assert selection_of(scored.selection_bytes(chosen)).turns == chosen.turns


def test_the_threshold_is_at_first_that_of_the_library(lab):
    from ctxlens.scoring.selection import DEFAULT_RULE

    assert DataPart().rule == DEFAULT_RULE
    chosen = scored.select(lab.scored, DataPart())
    layer = cl.choose_layer(2, rule="middle")
    assert chosen.turns == cl.select_turns(lab.scored.table, layer=layer).turns
    assert 0 < len(chosen.turns) < 80


def selection_of(raw: bytes) -> Selection:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selection.parquet"
        path.write_bytes(raw)
        return Selection.load(path)


def test_data_code_selects_the_same(lab, tmp_path, monkeypatch):
    from test_cli import call

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "scores").mkdir(parents=True)
    lab.scored.table.write(tmp_path / "runs" / "scores" / "scores.parquet")
    state = State.read({"screen": "data", "data": {"rule": "beta", "beta": 0.4, "layer": 1}})
    chosen = scored.select(lab.scored, state.data)
    exec(as_python(lab, state), made := {})
    assert made["selection"].turns == chosen.turns
    words = shlex.split(as_command(lab, state))
    assert words[words.index("--dataset") : words.index("--dataset") + 2] == ["--dataset", "data.jsonl"]
    del words[words.index("--dataset") : words.index("--dataset") + 2]
    call(*words[1:])
    assert Selection.load(tmp_path / "runs/selected/selection.parquet").turns == chosen.turns


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def test_loaded_scores_are_kept_by_their_content(lab, tmp_path):
    table = make_scores(4)
    table.write(tmp_path / "scores.parquet")
    rows = table.frame.to_dict("records")
    for raw, name in ((as_lines(rows), "a.jsonl"), ((tmp_path / "scores.parquet").read_bytes(), "b.parquet")):
        digest = scored.keep_upload(lab, raw, name)
        found = scored.scored_of(lab, read_part(DataPart, {"upload": digest}))
        columns = list(Scores.COLUMNS)
        pd.testing.assert_frame_equal(found.table.frame[columns], table.frame[columns], check_dtype=False)
    with pytest.raises(InputError, match="not in memory any more"):
        scored.scored_of(lab, read_part(DataPart, {"upload": "0" * 64}))


def one_row(**change: Any) -> bytes:
    return as_lines([{**make_scores(1).frame.to_dict("records")[0], **change}])


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda: b"x", "scores.pkl", "is not a file of scores"),
        (lambda: b"x", "../../scores.PARQUET", "scores.PARQUET is not a Parquet file"),
        (lambda: b"PAR1" * 10, "scores.parquet", "is not a Parquet file"),
        (lambda: b"[" * 100_000, "scores.jsonl", "is not a file of JSON lines"),
        (lambda: b'{"turn": 1}', "scores.jsonl", "lacks conversation, layer"),
        (lambda: one_row(mean_of_best="<b>"), "scores.jsonl", "something else than numbers in mean_of_best"),
        (lambda: one_row(turn=math.nan), "scores.jsonl", "something else than numbers in turn"),
        (lambda: one_row() + b"\n" + one_row(), "scores.jsonl", "two rows for the same turn"),
        (lambda: b" " * (scored.MOST_UPLOAD + 1), "scores.jsonl", "has more than 5 MiB"),
    ],
)
def test_other_files_are_refused(lab: Lab, make: Callable[[], bytes], name: str, words: str):
    with pytest.raises(InputError, match=words):
        scored.keep_upload(lab, make(), name)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_texts_stay_texts(lab, payload):
    from ctxlens.explore import data, needle

    assert needle.show_text(f"a {payload} b", (2, 2 + len(payload)))[1].children == payload
    assert needle.mark_keywords(payload, ("wall",)) == [payload]
    raw = one_row(conversation=payload, kind=payload)
    digest = scored.keep_upload(lab, raw, "a.jsonl")
    found = scored.scored_of(lab, read_part(DataPart, {"upload": digest}))
    said = [{"role": "user", "content": payload}, {"role": "assistant", "content": payload}]
    known = scored.ScoredSet(found.table, payload, None, {payload: said})
    chosen = scored.select(known, read_part(DataPart, {"rule": "beta", "layer": 0, "beta": 0.1}))
    rows = scored.turns_of(known, chosen)
    texts = list(strings(data.show_turns(known, rows, [0])))
    assert texts.count(payload) == 4  # its kind, the beginning of the question, the question, the answer
    assert "<" not in "".join(str(trace.name) for trace in score_scatter(rows, chosen).data)


def strings(shown: Any) -> Iterator[str]:
    """The texts of components; nothing else may carry what came from a file."""
    if isinstance(shown, str):
        yield shown
    elif isinstance(shown, list | tuple):
        for one in shown:
            yield from strings(one)
    elif shown is not None:
        assert type(shown).__name__ in ("Div", "Span", "B", "P", "Details", "Summary")
        yield from strings(shown.children)


def test_keywords_are_marked_as_words():
    from ctxlens.explore.needle import mark_keywords

    shown = mark_keywords("Paint a wall, not wallpaper.", ("paint", "wall"))
    assert [getattr(one, "children", one) for one in shown] == ["Paint", " a ", "wall", ", not wallpaper."]
