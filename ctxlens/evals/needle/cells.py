"""The cells of a needle grid: contexts of several lengths with a needle at several depths.

Every condition uses the same texts, so that conditions can be compared cell by cell. No model is run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError, RenderError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import Context, count_tokens, gather_straw, place_needle
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.needles import NEEDLES, Needle, draw_needle, draw_neutral, neutral_needles
from ctxlens.evals.needle.prompts import Cell, Renderer, render_cell

SPARE_TOKENS = 8
"""Tokens that stay free in every window: for an indicator, and for tokens that merge differently where the
parts of a prompt meet."""

_SHORTEST = 200
_Key = tuple[int, int, int]
"""Numbers of a cell's length, depth and case."""


def build_cells(model: Renderer, config: NeedleConfig, haystack: Haystack) -> list[Cell]:
    """Build the texts of a grid; no model is run.

    Every cell fits the window with its question, prefix, template, a spare indicator and `max_new_tokens`
    (with the needle instead, where only its probability is scored), under the longest of the conditions.
    Cells are numbered by needle, length, depth and case; the case varies fastest.

    Raises:
        InputError: the window is too small for the needle and question or for a requested length, the
            haystack is too short, or a needle has no prefix where a condition needs one.
    """
    needles = _resolve_needles(config)
    unprefixed = [needle.name for needle in needles.values() if not needle.prefix]
    if unprefixed and any(condition.prefix for condition in config.conditions):
        raise InputError(
            f"needle {unprefixed[0]!r} has no prefix, because it begins with a keyword; "
            "leave out the conditions with prefix, or give another needle."
        )
    lengths = _choose_lengths(model, config, dict.fromkeys(needles.values()))
    return _place_needles(model.tokenizer, config, haystack, lengths, needles)


def _place_needles(
    tokenizer: Any,
    config: NeedleConfig,
    haystack: Haystack,
    lengths: Sequence[int],
    needles: Mapping[tuple[str | Needle, _Key], Needle],
) -> list[Cell]:
    depths = _spread_depths(config.depths)
    straws = {
        (length, case): gather_straw(tokenizer, haystack, case, length)
        for length in lengths
        for case in range(config.cases_per_cell)
    }
    cells = []
    for which in config.needles:
        for key in _cell_keys(config):
            length, depth, case = lengths[key[0]], depths[key[1]], key[2]
            needle = needles[which, key]
            context = place_needle(
                tokenizer,
                straws[length, case],
                needle.sentence,
                context_tokens=length,
                depth_percent=depth,
            )
            cells.append(Cell(len(cells), needle, context, length, depth, case))
    return cells


def _resolve_needles(config: NeedleConfig) -> dict[tuple[str | Needle, _Key], Needle]:
    """The needle of every cell."""
    return {
        (which, key): _resolve_needle(which, config.seed, number, key)
        for which in config.needles
        for number, key in enumerate(_cell_keys(config))
    }


def _cell_keys(config: NeedleConfig) -> list[_Key]:
    n_lengths = config.lengths if isinstance(config.lengths, int) else len(config.lengths)
    n_depths = config.depths if isinstance(config.depths, int) else len(config.depths)
    return list(itertools.product(range(n_lengths), range(n_depths), range(config.cases_per_cell)))


def _resolve_needle(which: str | Needle, seed: int, number: int, key: _Key) -> Needle:
    """One needle of a configuration, for the cell of the given number and key."""
    if isinstance(which, Needle):
        return which
    if which in NEEDLES or which in neutral_needles():
        return (NEEDLES | dict(neutral_needles()))[which]
    if which == "neutral":
        return draw_neutral(number, seed)
    return draw_needle(which, f"{which}-{seed}-{'-'.join(map(str, key))}")


def _choose_lengths(model: Renderer, config: NeedleConfig, needles: Iterable[Needle]) -> tuple[int, ...]:
    """The context lengths of a grid, all of which fit the window."""
    sizes = {needle: count_tokens(model.tokenizer, f" {needle.sentence}") for needle in needles}
    longest = _longest_context(model, config, sizes)
    lengths = _spread_lengths(config.lengths, longest, max(sizes.values()))
    if max(lengths) > longest:
        raise InputError(
            f"contexts of {max(lengths)} tokens do not fit: the window of {model.n_ctx} tokens holds "
            f"contexts of at most {longest}, because the question, prefix, template and "
            f"{_describe_answer(config)} must fit too; give shorter lengths."
        )
    if len(set(lengths)) < len(lengths):
        raise InputError(
            f"there are no {len(lengths)} different lengths from {lengths[0]} to {lengths[-1]} tokens; ask "
            "for fewer."
        )
    return lengths


def _longest_context(model: Renderer, config: NeedleConfig, sizes: Mapping[Needle, int]) -> int:
    """The longest context, in tokens, that fits the window with every needle and condition."""
    # Render with the longest question and prefix; facts of one kind differ by a token or two.
    longest = max(sizes, key=lambda n: sizes[n] + count_tokens(model.tokenizer, f"{n.question} {n.prefix}"))
    probe = Cell(0, longest, Context(longest.sentence, sizes[longest], (0, 0), 0.0), 0, 0.0, 0)
    try:
        needed = max(_count_needed(model, config, probe, condition) for condition in config.conditions)
        left = model.n_ctx - SPARE_TOKENS - needed
    except RenderError:
        raise
    except InputError:  # longer than the window by itself
        left = -1
    if left < 0:
        raise InputError(
            f"the window of {model.n_ctx} tokens is too small for needle {longest.name!r}, its question and "
            f"{_describe_answer(config)}; lower max_new_tokens or choose a model with a larger window."
        )
    return sizes[longest] + left


def _count_needed(model: Renderer, config: NeedleConfig, cell: Cell, condition: Condition) -> int:
    """The tokens of a prompt together with those of the answer."""
    needed = 0
    if config.generates:
        needed = render_cell(model, cell, config, condition).n_tokens + config.max_new_tokens
    if "logprob" in config.score:
        said = render_cell(model, cell, config, condition, answer=cell.needle.sentence)
        needed = max(needed, said.n_tokens)
    return needed


def _describe_answer(config: NeedleConfig) -> str:
    return f"{config.max_new_tokens} new tokens" if config.generates else "the answer"


def _spread_lengths(lengths: tuple[int, ...] | int, longest: int, needle_tokens: int) -> tuple[int, ...]:
    if not isinstance(lengths, int):
        return lengths
    shortest = min(longest, max(min(_SHORTEST, longest // 4), needle_tokens))
    return tuple(np.linspace(shortest, longest, lengths).round().astype(int).tolist())


def _spread_depths(depths: tuple[float | int, ...] | int) -> tuple[float, ...]:
    if not isinstance(depths, int):
        return tuple(float(depth) for depth in depths)
    return tuple(np.linspace(0, 100, depths).round(2).tolist()) if depths > 1 else (50.0,)


__all__ = ["SPARE_TOKENS", "build_cells"]
