"""The data card: figures by hand, examples on both sides of the threshold, text that stays text."""

import json

import pytest

from ctxlens.chat.data import load_conversations
from ctxlens.errors import InputError
from ctxlens.results import Scores
from ctxlens.results.markdown import escape_markdown
from ctxlens.scoring.card import card_facts, card_markdown, make_card, shorten
from ctxlens.scoring.selection import select_turns

NASTY = "<script>alert(1)</script> | **bold** [a](http://x) `c` # h\n- item\x1b[31m"


def scored(values, lengths=None, **columns):
    lengths = [10 * (k + 1) for k in range(len(values))] if lengths is None else lengths
    rows = [
        {
            "conversation": str(k), "turn": 1, "layer": 2, "best_of_mean": value, "mean_of_best": value,
            "mean_heads": value, "uniform": value / 2, "response_tokens": 3, "context_tokens": length,
            "truncated": k == 0, **{name: of[k] for name, of in columns.items()},
        }
        for k, (value, length) in enumerate(zip(values, lengths, strict=True))
    ]  # fmt: skip
    return Scores.from_rows(
        rows, {"model": {"name": "fake"}, "skipped": [{"conversation": "x", "reason": "r"}]}
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_conversations(path)


def test_figures_by_hand(tmp_path):
    scores = scored([0.1, 0.9, 0.8, 0.3])
    rows = [{"prompt": f"p{k}", "completion": f"c{k}", "source": "ab"[k % 2]} for k in range(4)]
    data = write(tmp_path / "d.jsonl", [*rows, {"prompt": "p", "completion": ""}])
    card = make_card(scores, select_turns(scores, beta=0.5, layer=2), data)
    assert (card["turns"], card["selected"], card["conversations"], card["truncated"]) == (4, 2, 4, 1)
    assert (card["threshold"], card["layer"], card["reduction"]) == (0.5, 2, "mean_of_best")
    assert card["layout"] == "prompt-completion"
    assert card["uniform"]["selected"] == pytest.approx((0.45 + 0.4) / 2)
    assert card["uniform"]["others"] == pytest.approx((0.05 + 0.15) / 2)
    # Ranks of the scores 1 4 3 2 against lengths 1 2 3 4: 1 - 6 * (0 + 4 + 0 + 4) / (4 * 15) = 0.2.
    assert card["length_correlation"] == pytest.approx(0.2)
    assert card["skipped"] == {"r": 1, "no user turn with an answer": 1}
    assert card["dropped"] == {"empty turn": 1, "user turn without an answer": 1}
    by_source = {one["name"]: one for one in card["shares"]["source"]}
    counts = {name: (one["turns"], one["selected"]) for name, one in by_source.items()}
    assert counts == {"a": (2, 1), "b": (2, 1)}
    assert by_source["b"]["score"] == pytest.approx(0.6)
    assert by_source["b"]["uniform"] == pytest.approx(0.3)
    assert [one["name"] for one in card["shares"]["context tokens"]] == ["10 to 40"]
    assert [one["name"] for one in card["shares"]["response tokens"]] == ["3"]
    ids = {name: [one["conversation"] for one in part] for name, part in card["examples"].items()}
    assert ids == {
        "highest": ["1", "2", "3", "0"], "just selected": ["2", "1"], "just not selected": ["3", "0"],
        "lowest": ["0", "3", "2", "1"],
    }  # fmt: skip
    assert card["examples"]["highest"][0]["user"] == "p1"
    assert card["examples"]["highest"][0]["response"] == "c1"
    assert json.loads(json.dumps(card)) == card


def test_examples_nearest_to_the_threshold_of_their_own_length():
    # Two lengths with twenty turns each and thresholds 0.18 and 0.68; margins decide, not scores.
    values = [k / 100 for k in range(20)] + [0.5 + k / 100 for k in range(20)]
    scores = scored(values, [10] * 20 + [90] * 20)
    card = make_card(scores, select_turns(scores, layer=2, per_length_quantile=0.9))
    assert {one["conversation"] for one in card["examples"]["just selected"]} == {"18", "19", "38", "39"}
    assert [one["conversation"] for one in card["examples"]["just not selected"][:2]] == ["17", "37"]
    assert [one["selected"] for one in card["bins"]] == [2, 2]
    assert "| 90 to 90 | 20 |" in card_markdown(card)


def test_without_data_and_without_a_choice():
    scores = scored([0.4, 0.4])
    card = make_card(scores, select_turns(scores, beta=1.0, layer=2))
    assert card["uniform"]["selected"] is None
    assert card["length_correlation"] is None
    assert card["examples"]["just selected"] == []
    assert "None." in card_markdown(card)
    assert "user" not in card["examples"]["highest"][0]
    assert ("selected", "0 of 2 turns (0.0%)") in card_facts(card)


def test_lp_gap_has_no_layer():
    scores = scored([0.4, 0.4], lp_gap=[1.5, -0.5])
    card = make_card(scores, select_turns(scores, reduction="lp_gap", beta=0.0))
    assert ("score", "lp_gap") in card_facts(card)
    assert card["examples"]["highest"][0]["score"] == 1.5


def test_columns_of_sources(tmp_path):
    scores = scored([0.1, 0.9])
    rows = [{"prompt": "p", "completion": "c", "task": "x", "origin": k} for k in range(2)]
    data = write(tmp_path / "d.jsonl", rows)
    selection = select_turns(scores, beta=0.5, layer=2)
    assert make_card(scores, selection, data)["source_column"] == "task"
    card = make_card(scores, selection, data, source_column="origin")
    assert [one["name"] for one in card["shares"]["source"]] == ["0", "1"]
    with pytest.raises(InputError, match="no row has a column 'where' besides its messages"):
        make_card(scores, selection, data, source_column="where")


def test_many_sources_are_cut_and_the_rest_counted(tmp_path):
    values = [k / 60 for k in range(60)]
    rows = [{"prompt": "p", "completion": "c", "source": f"s{k}"} for k in range(60)]
    scores = scored(values)
    card = make_card(scores, select_turns(scores, beta=0.5, layer=2), write(tmp_path / "d.jsonl", rows))
    groups = card["shares"]["source"]
    assert len(groups) == 41
    assert groups[-1]["name"] == "20 other sources"
    assert sum(one["turns"] for one in groups) == 60
    assert sum(one["selected"] for one in groups) == card["selected"]


def test_text_from_the_data_stays_text(tmp_path):
    scores = scored([0.9])
    rows = [{"prompt": NASTY, "completion": NASTY * 20, "source": NASTY}]
    card = make_card(scores, select_turns(scores, beta=0.5, layer=2), write(tmp_path / "d.jsonl", rows))
    text = card_markdown(card)
    assert "<script" not in text
    assert "\x1b" not in text
    assert r"item\\x1b\[31m" in text
    assert r"\*\*bold\*\* \[a\]\(http\://x\) \`c\` \# h \- item" in text
    lines = [line for line in text.splitlines() if "script" in line]
    assert all(len(line) < 800 for line in lines)


def test_shortened_texts_keep_both_ends():
    text = "begin " + "x" * 1000 + " end\x07"
    assert shorten(text).startswith("begin x")
    assert shorten(text).endswith(r"x end\x07")
    assert len(shorten(text)) < 260
    assert shorten("short\n text") == "short text"
    assert escape_markdown("a & b < c > d_e") == r"a &amp; b &lt; c \> d\_e"
