"""The data card of a selection: what was selected, by which rule, from which sources, with examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxlens.chat.data import Conversation, ConversationSet, load_conversations
from ctxlens.chat.data.given_rows import Source
from ctxlens.errors import InputError
from ctxlens.results import Scores, Selection
from ctxlens.scoring.lengths import length_bins
from ctxlens.scoring.selection import score_rows

if TYPE_CHECKING:
    import pandas as pd
from ctxlens.results.markdown import escape_markdown, one_line

SOURCE_COLUMNS = ("source", "data_source", "dataset", "subset", "task", "task_name", "category", "domain")
"""Columns in which data sets record the source of a row, in the order in which they are tried."""

_EXAMPLES = 5

_MOST_SOURCES = 40

_HEAD, _TAIL = 160, 80


def make_card(
    scores: Scores,
    selection: Selection,
    data: ConversationSet | Source | None = None,
    *,
    source_column: str | None = None,
) -> dict[str, Any]:
    """The card of a selection, as JSON values.

    Args:
        scores: the scores that the selection was made from.
        selection: the selection.
        data: the data set, or what `load_conversations` takes, for sources, texts and what was dropped on
            reading; without it the card lacks these.
        source_column: the column with the source of a row; by default the first of `SOURCE_COLUMNS` that
            exists.

    Returns:
        `rule`, `threshold`, `layer`, `reduction`, `model`; `turns`, `selected`, `conversations`,
        `truncated`; `uniform` (mean user share under uniform attention, of the selected and of the other
        turns); `length_correlation` (Spearman's, of score and context tokens); `bins` (thresholds by
        length, if the rule has them); `dropped` and `skipped` (counts by reason); `left_out` (what the
        template does not show) and `noted` (what was read in another way than the data have it, and answers
        that the data exclude from training); `shares` (groups by source, context and response length, each
        with turns, selected, mean score and mean uniform share); `examples` (highest, lowest, and nearest the
        threshold on both sides).

    Raises:
        InputError: the source column does not exist.
    """
    rows = _turns(scores, selection)
    chosen = rows["selected"].to_numpy(dtype=bool)
    meta = selection.meta
    skipped = Counter(entry["reason"] for entry in scores.meta.get("skipped", ()))
    card = {
        **{key: meta.get(key) for key in ("rule", "threshold", "layer", "reduction", "model", "bins")},
        "turns": len(rows),
        "selected": int(chosen.sum()),
        "conversations": int(rows["conversation"].nunique()),
        "truncated": int(rows["truncated"].sum()),
        "uniform": {
            "selected": _mean(rows["uniform"][chosen]),
            "others": _mean(rows["uniform"][~chosen]),
        },
        "length_correlation": rank_correlation(rows["score"], rows["context_tokens"]),
        "shares": {},
        "dropped": {},
        "left_out": scores.meta.get("left_out", {}),
        "noted": scores.meta.get("data", {}).get("noted", {}),
    }
    texts: Mapping[str, Conversation] = {}
    if data is not None:
        data = data if isinstance(data, ConversationSet) else load_conversations(data)
        texts = {conversation.id: conversation for conversation in data}
        skipped.update(reason for _, reason in data.skipped)
        card |= {"layout": data.layout, "dropped": dict(data.dropped), "noted": dict(data.noted)}
        column = _source_column(data, source_column)
        if column is not None:
            sources = rows["conversation"].map(lambda name: _source(texts.get(str(name)), column))
            card |= {"source_column": column}
            card["shares"]["source"] = _by_name(rows, sources)
    for name, of in (("context tokens", "context_tokens"), ("response tokens", "response_tokens")):
        card["shares"][name] = _by_length(rows, rows[of].to_numpy())
    card["skipped"] = dict(skipped.most_common())
    card["examples"] = {
        name: [_example(row, texts) for _, row in part.iterrows()]
        for name, part in _chosen_examples(rows).items()
    }
    return card


def _turns(scores: Scores, selection: Selection) -> pd.DataFrame:
    rows = score_rows(scores, selection.meta.get("layer"), selection.meta["reduction"])
    rows["conversation"] = rows["conversation"].astype(str)
    place = ["conversation", "turn"]
    rows = rows.merge(selection.frame[[*place, "selected"]], on=place, validate="one_to_one")
    rows["selected"] = rows["selected"].astype(bool)
    bins = selection.meta.get("bins")
    if bins:
        edges = [one["to"] for one in bins]
        at = np.searchsorted(edges[:-1], rows["context_tokens"].to_numpy())
        limit = np.array([one["threshold"] for one in bins])[at]
    else:
        limit = selection.meta["threshold"]
    rows["margin"] = rows["score"].astype(float) - limit
    return rows


def _mean(values: pd.Series) -> float | None:
    return float(values.astype(float).mean()) if len(values) else None


def rank_correlation(score: pd.Series, lengths: pd.Series) -> float | None:
    """Spearman's correlation of scores and lengths; None where one of them does not vary."""
    if score.nunique() < 2 or lengths.nunique() < 2:
        return None
    from scipy.stats import spearmanr

    value = float(np.asarray(spearmanr(score, lengths))[0])
    return value if math.isfinite(value) else None


def _source_column(data: ConversationSet, wanted: str | None) -> str | None:
    columns = dict.fromkeys(key for conversation in data for key in conversation.labels)
    if wanted is not None and wanted not in columns:
        found = ", ".join(columns) or "none"
        raise InputError(f"no row has a column {wanted!r} besides its messages; the columns are {found}.")
    return wanted or next((name for name in SOURCE_COLUMNS if name in columns), None)


def _source(conversation: Conversation | None, column: str) -> str:
    value = None if conversation is None else conversation.labels.get(column)
    return "not given" if value is None else str(value)


def _group(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    return {
        "name": name,
        "turns": len(rows),
        "selected": int(rows["selected"].sum()),
        "score": _mean(rows["score"]),
        "uniform": _mean(rows["uniform"]),
    }


def _by_name(rows: pd.DataFrame, names: pd.Series) -> list[dict[str, Any]]:
    """Groups by name, the largest first; all groups beyond `_MOST_SOURCES` are merged into one."""
    ranked = list(names.value_counts().index)
    groups = [_group(str(name), rows[names == name]) for name in ranked[:_MOST_SOURCES]]
    rest = ranked[_MOST_SOURCES:]
    if rest:
        groups.append(_group(f"{len(rest)} other sources", rows[names.isin(rest)]))
    return groups


def _by_length(rows: pd.DataFrame, lengths: np.ndarray) -> list[dict[str, Any]]:
    numbers = length_bins(lengths)
    groups = []
    for number in range(numbers.max() + 1):
        inside = numbers == number
        low, high = int(lengths[inside].min()), int(lengths[inside].max())
        groups.append(_group(str(low) if low == high else f"{low} to {high}", rows[inside]))
    return groups


def _chosen_examples(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    ranked = rows.sort_values("margin", ascending=False, kind="stable")
    return {
        "highest": rows.sort_values("score", ascending=False, kind="stable").head(_EXAMPLES),
        "just selected": ranked[ranked["selected"]].tail(_EXAMPLES)[::-1],
        "just not selected": ranked[~ranked["selected"]].head(_EXAMPLES),
        "lowest": rows.sort_values("score", kind="stable").head(_EXAMPLES),
    }


def _example(row: pd.Series, texts: Mapping[str, Conversation]) -> dict[str, Any]:
    name, turn = str(row["conversation"]), int(row["turn"])
    example = {
        "conversation": name, "turn": turn, "score": float(row["score"]), "uniform": float(row["uniform"]),
        "selected": bool(row["selected"]), "context_tokens": int(row["context_tokens"]),
    }  # fmt: skip
    conversation = texts.get(name)
    if conversation is not None and turn < len(conversation.messages):
        asked = [message for message in conversation.messages[:turn] if message["role"] == "user"]
        example["user"] = shorten(asked[-1]["content"]) if asked else ""
        example["response"] = shorten(conversation.messages[turn]["content"])
    return example


def shorten(text: str) -> str:
    """A text on one line, with the middle of a long text elided and control characters made visible."""
    line = one_line(text)
    if len(line) > _HEAD + _TAIL + 3:
        line = f"{line[:_HEAD].rstrip()} … {line[-_TAIL:].lstrip()}"
    return line


def card_markdown(card: Mapping[str, Any]) -> str:
    """The card as Markdown; text from the data is escaped, so that none of it is read as markup."""
    parts = ["# Selection card", "", *_facts(card)]
    for name, groups in card["shares"].items():
        parts += ["", f"## Share selected by {name}", "", *_group_table(name, groups)]
    if card.get("bins"):
        parts += ["", "## Thresholds by context length", ""]
        parts += _table(
            ["context tokens", "turns", "threshold", "selected"],
            [
                [f"{one['from']} to {one['to']}", one["turns"], f"{one['threshold']:.3f}", one["selected"]]
                for one in card["bins"]
            ],
        )
    parts += ["", "## Examples"]
    for name, examples in card["examples"].items():
        parts += ["", f"### {name.capitalize()}", ""]
        parts += [_example_line(one) for one in examples] or ["None."]
    return "\n".join(parts) + "\n"


def card_facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The card's individual figures as pairs of name and plain text."""
    model = card.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    layer = card.get("layer")
    turns, selected = card["turns"], card["selected"]
    facts = [("model", str(name))] if name else []
    facts += [("score", card["reduction"] + (f", layer {layer}" if layer is not None else ""))]
    facts += [("rule", str(card["rule"]))]
    if card.get("threshold") is not None:
        facts.append(("threshold", f"{card['threshold']:.3f}"))
    facts.append(("selected", f"{selected} of {turns} turns ({selected / max(turns, 1):.1%})"))
    facts.append(("conversations", f"{card['conversations']}, {card['truncated']} of the turns truncated"))
    uniform = {key: "–" if value is None else f"{value:.2f}" for key, value in card["uniform"].items()}
    facts.append(
        (
            "user share if attention were uniform",
            f"{uniform['selected']} for selected turns, {uniform['others']} for others",
        )
    )
    if card.get("length_correlation") is not None:
        facts.append(("rank correlation of score and context length", f"{card['length_correlation']:+.2f}"))
    if card.get("layout"):
        facts.append(("layout", card["layout"]))
    facts += [
        ("left out by the chat template", f"{n}: {what}") for what, n in card.get("left_out", {}).items()
    ]
    for kind in ("dropped", "skipped", "noted"):
        facts += [(kind, f"{count}: {reason}") for reason, count in card.get(kind, {}).items()]
    return facts


def _facts(card: Mapping[str, Any]) -> list[str]:
    return _table(
        ["", ""], [[escape_markdown(name), escape_markdown(text)] for name, text in card_facts(card)]
    )


def _group_table(name: str, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            escape_markdown(one["name"]), one["turns"], one["selected"],
            f"{one['selected'] / max(one['turns'], 1):.1%}", f"{one['score']:.3f}", f"{one['uniform']:.3f}",
        ]
        for one in groups
    ]  # fmt: skip
    return _table([name, "turns", "selected", "share", "mean score", "if uniform"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _example_line(example: Mapping[str, Any]) -> str:
    place = f"{escape_markdown(example['conversation'])}, turn {example['turn']}"
    line = f"- **{example['score']:.3f}** ({place}; if uniform {example['uniform']:.3f})"
    if "user" in example:
        line += f"  \n  user: {escape_markdown(example['user'])}"
        line += f"  \n  answer: {escape_markdown(example['response'])}"
    return line


__all__ = ["SOURCE_COLUMNS", "card_facts", "card_markdown", "make_card", "rank_correlation", "shorten"]
