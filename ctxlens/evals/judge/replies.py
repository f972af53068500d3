"""What a judge's reply says once its thinking is removed: a rating, or the better of two answers."""

from __future__ import annotations

import re
from typing import Literal

LOWEST, HIGHEST = 1.0, 10.0
TIE = 0.1
"""Two ratings that differ by no more than this are a tie, as in FastChat."""

_NAMES = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning)"
_OPEN = re.compile(
    rf"(?<![`\"'“‘])(?:<{_NAMES}>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>|<\|channel>thought)",
    re.IGNORECASE,
)
"""Where a model begins to think. A mark behind a quotation mark or a backtick is only mentioned."""
_CLOSE = re.compile(
    rf"(?<![`\"'“‘])(?:</{_NAMES}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|end_of_thought\|>|<channel\|>)",
    re.IGNORECASE,
)
_CHANNEL = "<|channel|>"
_MESSAGE = re.compile(r"\s*(\w+).*?<\|message\|>(.*?)(?:<\|(?:end|return|call|start)\|>|\Z)", re.DOTALL)
"""The name of a channel and what stands in it, after `_CHANNEL` (gpt-oss)."""
_BARE_ANALYSIS = re.compile(r"\s*analysis(?=[A-Z])")
_BARE_FINAL = "assistantfinal"
"""The same channels where a server has removed their special tokens."""

_NUMBER = r"(-?\d+\.?\d*)"
_RATING = re.compile(rf"\[\[\s*{_NUMBER}\s*\]\]")
_RATING_ONCE = re.compile(rf"(?<![\w\]])\[\s*{_NUMBER}\s*\](?!\()")
"""A number in single brackets that is neither an index (`x[3]`) nor a link (`[3](…)`)."""
_WINNER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_PAIR = re.compile(rf"\[?\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]\]?")

_UNFINISHED = "the reply ends inside its thinking"

Winner = Literal["A", "B", "tie"]


def remove_thinking(text: str) -> str | None:
    """The reply without its thinking; None if it ends before the thinking does.

    Thinking is what stands in `<think>…</think>` and the usual variants (`<thinking>`, `[THINK]`, the
    channel `analysis` of gpt-oss, …). A closing mark without an opening one ends a thinking that the chat
    template began.
    """
    if _CHANNEL in text:
        found = [_MESSAGE.match(part) for part in text.split(_CHANNEL)[1:]]
        final = [one[2] for one in found if one and one[1].lower() == "final"]
        return "\n".join(final) if final else None
    if _BARE_ANALYSIS.match(text):
        _, mark, final = text.rpartition(_BARE_FINAL)
        return final if mark else None
    kept = ""
    while begin := _OPEN.search(text):
        end = _CLOSE.search(text, begin.end())
        if end is None:
            return None
        kept, text = kept + text[: begin.start()], text[end.end() :]
    return _CLOSE.split(kept + text)[-1]


def parse_rating(text: str) -> tuple[float | None, str]:
    """The rating in a judge's reply, or None and the reason why there is none.

    FastChat (`run_judge_single` in `fastchat/llm_judge/common.py`) takes the first number in double
    brackets, otherwise the first in single brackets, wherever it stands and however large it is. Here the
    last one counts, because a judge explains first and may quote other ratings there; thinking does not
    count; an index such as `x[3]` is not a rating; and a rating must lie between 1 and 10.
    """
    said = remove_thinking(text)
    if said is None:
        return None, _UNFINISHED
    found = _RATING.findall(said) or _RATING_ONCE.findall(said)
    if not found:
        return None, _describe_lack(text, said, "no rating in brackets")
    rating = float(found[-1])
    if not LOWEST <= rating <= HIGHEST:
        return None, f"a rating of {found[-1][:20]}, which is not from 1 to 10"
    return rating, ""


def parse_winner(text: str) -> tuple[Winner | None, str]:
    """The better of two answers in a judge's reply, or None and the reason why there is none.

    `[[A]]`, `[[B]]` and `[[C]]` (a tie) are read, otherwise a pair of ratings (`[[7, 8]]`). FastChat
    (`run_judge_pair`) looks for `[[A]]` anywhere, then for `[[B]]`, then for `[[C]]`, and takes the first
    pair; here the last one counts, and thinking does not count.
    """
    said = remove_thinking(text)
    if said is None:
        return None, _UNFINISHED
    if named := _WINNER.findall(said):
        winners: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}
        return winners[named[-1]], ""
    if not (pairs := _PAIR.findall(said)):
        return None, _describe_lack(text, said, "neither [[A]], [[B]] nor [[C]]")
    first, second = map(float, pairs[-1])
    if not all(LOWEST <= rating <= HIGHEST for rating in (first, second)):
        return None, f"ratings of {first:g} and {second:g}, which are not both from 1 to 10"
    return "tie" if abs(first - second) <= TIE else "A" if first > second else "B", ""


def _describe_lack(text: str, said: str, otherwise: str) -> str:
    if not text.strip():
        return "an empty reply"
    return otherwise if said.strip() else "nothing after the thinking"


__all__ = ["HIGHEST", "LOWEST", "Winner", "parse_rating", "parse_winner", "remove_thinking"]
