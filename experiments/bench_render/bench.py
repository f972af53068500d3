"""What does labelling cost beside rendering alone?

Question: how many times as long as ``tokenizer.apply_chat_template(tokenize=True)`` does
`ctxlens.chat.roles.render` take over a data set, and does its time grow in proportion to the text's length?
Run:      python experiments/bench_render/bench.py DATA.json TOKENIZER --thinking-template FILE \\
              --out results.json
          (DATA.json: any file that `ctxlens.chat.data.load_conversations` reads; TOKENIZER: a folder; FILE:
          the Jinja text of a template that takes think blocks apart, such as that of Qwen3)
Expected: a ratio of at most 3 over the data set, and a time per character that does not grow; over long
conversations with think blocks a ratio of at most 10, and a time per exchange that does not grow.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ctxlens.chat.data import load_conversations
from ctxlens.chat.roles import render
from ctxlens.files import write_atomic

EXCHANGES = (25, 50, 100, 200, 400)
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
PLAIN = "How far is it to the old mill, and who has the key?\n"


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(
    tokenizer: Any,
    conversations: Sequence[list[dict[str, Any]]],
    rounds: int,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Both ways over all conversations, turn by turn, so that the machine's load falls on both alike."""

    def alone() -> None:
        for messages in conversations:
            tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, chat_template=chat_template
            )

    def labelled() -> None:
        for messages in conversations:
            render(tokenizer, messages, chat_template=chat_template)

    alone()
    labelled()
    pairs = [(seconds(alone), seconds(labelled)) for _ in range(rounds)]
    return {
        "conversations": len(conversations),
        "characters": sum(len(m["content"]) for messages in conversations for m in messages),
        "rounds": rounds,
        "apply_chat_template_s": round(median(a for a, _ in pairs), 4),
        "render_s": round(median(b for _, b in pairs), 4),
        "ratio_median": round(median(b / a for a, b in pairs), 3),
        "ratio_range": [round(f(b / a for a, b in pairs), 3) for f in (min, max)],
    }


def scale(tokenizer: Any, text: str, rounds: int) -> list[dict[str, Any]]:
    """Both ways on one user message of growing length, made of copies of `text`."""
    rows = []
    for length in LENGTHS:
        content = (text * (length // len(text) + 1))[:length]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
        measured = compare(tokenizer, [messages], rounds)
        row = {"characters": length, "us_per_character": round(1e6 * measured["render_s"] / length, 3)}
        rows.append(
            row | {key: measured[key] for key in ("apply_chat_template_s", "render_s", "ratio_median")}
        )
    return rows


def long_conversations(tokenizer: Any, chat_template: str | None, rounds: int) -> list[dict[str, Any]]:
    """Both ways on conversations of growing length whose answers hold think blocks."""
    rows = []
    for exchanges in EXCHANGES:
        messages: list[dict[str, Any]] = []
        for number in range(exchanges):
            thought = f"<think>\nHm {number}, the road\n</think>\n\nIt is {number} miles.\n"
            messages.append({"role": "user", "content": f"Question {number}: how far is it?\n"})
            messages.append({"role": "assistant", "content": thought})
        measured = compare(tokenizer, [messages], rounds, chat_template)
        row = {
            "exchanges": exchanges,
            "ms_per_exchange": round(1e3 * measured["render_s"] / exchanges, 3),
        }
        rows.append(
            row | {key: measured[key] for key in ("apply_chat_template_s", "render_s", "ratio_median")}
        )
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--chat-template", type=Path, help="a Jinja file; the tokenizer's own by default")
    parser.add_argument("--thinking-template", type=Path, help="a Jinja file that takes think blocks apart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    if options.chat_template:
        tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
    loaded = load_conversations(str(options.data)).conversations
    conversations = [[dict(message) for message in conversation.messages] for conversation in loaded]
    thinking = options.thinking_template
    results = {
        "data": options.data.name,
        "tokenizer": options.tokenizer.name,
        "data_set": compare(tokenizer, conversations, options.rounds),
        "words": scale(tokenizer, PLAIN, options.rounds),
        "one_character": scale(tokenizer, "x", options.rounds),
        "think_blocks": long_conversations(
            tokenizer, thinking.read_text(encoding="utf-8") if thinking else None, options.rounds
        ),
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
