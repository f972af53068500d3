"""Needle grids as tasks, with the cells that `ctxlens needle` builds for these lengths, depths and seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError, first_line
from ctxlens.evals.needle import (
    Cell,
    Needle,
    NeedleConfig,
    Window,
    build_cells,
    load_haystack,
    load_needles,
)
from ctxlens.evals.needle.prompts import word_question
from ctxlens.evals.tasks.options import make_split, take_options

_DEFAULTS: Mapping[str, Any] = {
    "lengths": (128, 256, 384), "depths": (0, 50, 100), "cases": 1, "seed": 0, "wording": "bare",
    "haystack": "organism", "repeat": False, "tokenizer": None, "window": None, "file": None,
}  # fmt: skip
_NEW_TOKENS = 100
_NO_WINDOW = 10**7  # tokenizers without a known window state a far larger number


def needle_docs(needle: str, **metadata: Any) -> dict[str, Any]:
    """Documents of the needle tasks, one per cell of the grid.

    All options begin with `needle_`: `lengths` (context lengths in tokens, or how many to spread from 200 to
    the window), `depths` (in percent, or how many), `cases` (contexts per length and depth), `haystack`
    (see `load_haystack`), `repeat`, `wording`, `seed`, `tokenizer` (by default the model's, or else the
    organism's), `window` (by default the model's `max_length`, or else the tokenizer's), `file` (your own
    needles, for `ctxlens_needle_own`).

    Args:
        needle: name of a needle; `own` stands for the needles of the file.
        metadata: the options, and everything else that lm-eval was given.

    Raises:
        InputError: an option cannot be used, or the prompts do not fit the window.
    """
    options = take_options(metadata, "needle", _DEFAULTS)
    needles = _choose_needles(needle, options["file"])
    name = options["tokenizer"] or _model_of(metadata)
    tokenizer = _load_tokenizer(name)
    n_ctx = int(options["window"] or metadata.get("max_length") or tokenizer.model_max_length)
    if isinstance(options["lengths"], int) and n_ctx >= _NO_WINDOW:
        raise InputError(
            "the tokenizer does not state the length of the model's window; give needle_window, or the "
            "lengths themselves as needle_lengths."
        )
    config = NeedleConfig(
        lengths=options["lengths"],
        depths=options["depths"],
        needles=needles,
        conditions=_conditions(bool(tokenizer.chat_template), needles),
        cases_per_cell=options["cases"],
        wording=options["wording"],
        max_new_tokens=_NEW_TOKENS,
        seed=options["seed"],
    )
    haystack = load_haystack(options["haystack"], seed=options["seed"], repeat=options["repeat"])
    cells = build_cells(Window(name, tokenizer, n_ctx), config, haystack)
    return make_split([_make_doc(cell, config) for cell in cells])


def _conditions(template: bool, needles: tuple[str | Needle, ...]) -> tuple[Condition, ...]:
    """The conditions that the documents must fit, because a task may be run with or without its prefix."""
    prefixed = all(needle.prefix for needle in needles if isinstance(needle, Needle))
    return tuple(Condition(template, prefix) for prefix in ((False, True) if prefixed else (False,)))


def _choose_needles(name: str, file: str | None) -> tuple[str | Needle, ...]:
    if name != "own":
        return (name,)
    if file is None:
        raise InputError("this task needs your own needles; give their YAML file as needle_file.")
    return load_needles(file)


def _model_of(metadata: Mapping[str, Any]) -> str:
    named = [metadata.get(key) for key in ("tokenizer", "pretrained", "model")]
    return next((name for name in named if isinstance(name, str) and name), "organism")


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from ctxlens.organism import BASE, CHAT

    source = {"organism": BASE, "organism-chat": CHAT}.get(name, name)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"there is no tokenizer {name} ({first_line(error)}); give the one that counts the lengths as "
            "needle_tokenizer."
        ) from error


def _make_doc(cell: Cell, config: NeedleConfig) -> dict[str, Any]:
    needle = cell.needle
    return {
        "id": f"{needle.name}-{cell.context_tokens}-{cell.depth_percent:g}-{cell.case}",
        "context": cell.context.text,
        "question": needle.question,
        "answers": [needle.answer],
        "keywords": list(needle.keywords),
        "memory_keywords": list(needle.memory_keywords),
        "prefix": needle.prefix,
        "prompt": word_question(cell, config),
        "needle": needle.name,
        "length": cell.context_tokens,
        "depth_percent": cell.depth_percent,
        "case": cell.case,
        "context_tokens": cell.context.tokens,
    }


__all__ = ["needle_docs"]
