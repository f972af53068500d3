"""Needle grids as tasks: the same texts as `ctxlens needle` builds for these lengths, depths and seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ctxlens.errors import InputError
from ctxlens.evals.needle.cells import place_needles
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import count_tokens, load_haystack
from ctxlens.evals.needle.needles import DRAWN_NEEDLES, NEEDLES, Needle, draw_needle, load_needles
from ctxlens.evals.needle.prompts import Cell, fill_wording
from ctxlens.evals.tasks.options import make_split, take_options

_DEFAULTS: Mapping[str, Any] = {
    "lengths": (128, 256, 384), "depths": (0, 50, 100), "cases": 1, "seed": 0, "wording": "bare",
    "haystack": "organism", "repeat": False, "tokenizer": None, "window": None, "file": None,
}  # fmt: skip
_NEW_TOKENS = 100
_SPARE_TOKENS = 16  # an indicator, and what a template adds beside its probe
_NO_WINDOW = 10**7  # tokenizers without a known window say a number far beyond


def needle_docs(needle: str, **metadata: Any) -> dict[str, Any]:
    """Documents of the needle tasks: one cell of the grid each.

    Options, each after `needle_`: `lengths` (context lengths in tokens, or how many from 200 to the window),
    `depths` (in percent, or how many), `cases` (contexts a cell), `haystack` (`load_haystack`), `repeat`,
    `wording`, `seed`, `tokenizer` (by default the model's, else the organism's), `window` (by default
    the model's `max_length`, else the tokenizer's), `file` (own needles, for `ctxlens_needle_own`).

    Args:
        needle: name of a needle; `own` stands for those of the file.
        metadata: the options, and whatever else lm-eval was given.

    Raises:
        InputError: an option cannot be used, or prompts that do not fit the window.
    """
    options = take_options(metadata, "needle", _DEFAULTS)
    needles = _choose_needles(needle, options["file"])
    tokenizer = _load_tokenizer(options["tokenizer"] or _model_of(metadata))
    window = options["window"] or metadata.get("max_length") or tokenizer.model_max_length
    config = NeedleConfig(
        lengths=_as_given(options["lengths"]),
        depths=_as_given(options["depths"]),
        needles=needles,
        conditions=("template",),
        cases_per_cell=options["cases"],
        wording=options["wording"],
        max_new_tokens=_NEW_TOKENS,
        seed=options["seed"],
    )
    lengths = _choose_lengths(config, _longest_context(tokenizer, config, int(window)))
    haystack = load_haystack(options["haystack"], seed=options["seed"], repeat=options["repeat"])
    cells = place_needles(tokenizer, config, haystack, lengths)
    return make_split([_make_doc(cell, config) for cell in cells])


def _choose_needles(name: str, file: str | None) -> tuple[str | Needle, ...]:
    if name != "own":
        return (name,)
    if file is None:
        raise InputError("this task needs needles of your own; name their YAML file by needle_file.")
    return load_needles(file)


def _as_given(values: Any) -> Any:
    return values if isinstance(values, int) else tuple(values)


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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"there is no tokenizer {name} ({reason}); name the one that counts the lengths by "
            "needle_tokenizer."
        ) from error


def _longest_context(tokenizer: Any, config: NeedleConfig, window: int) -> int | None:
    """The longest context that fits the window with all that surrounds it; None for an unknown window."""
    if window >= _NO_WINDOW:
        return None
    needed = _SPARE_TOKENS + config.max_new_tokens
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "?"}]
        text = tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False)
        needed += count_tokens(tokenizer, text)
    asked = [
        count_tokens(tokenizer, fill_wording(config.template, "", f"{needle.question} {needle.prefix}"))
        for needle in map(_example_of, config.needles)
    ]
    return window - needed - max(asked)


def _example_of(needle: str | Needle) -> Needle:
    if isinstance(needle, Needle):
        return needle
    return draw_needle(needle, "0") if needle in DRAWN_NEEDLES else NEEDLES[needle]


def _choose_lengths(config: NeedleConfig, longest: int | None) -> tuple[int, ...]:
    if isinstance(config.lengths, int):
        if longest is None:
            raise InputError(
                "the tokenizer does not say how long the model's window is; give needle_window, or the "
                "lengths themselves as needle_lengths."
            )
        first = min(longest, max(1, min(200, longest // 4)))
        return tuple(np.linspace(first, longest, config.lengths).round().astype(int).tolist())
    if longest is not None and max(config.lengths) > longest:
        raise InputError(
            f"contexts of {max(config.lengths)} tokens do not fit: the window holds contexts of at most "
            f"{longest}, with question, prefix, template and {config.max_new_tokens} new tokens; give "
            "needle_lengths or needle_window."
        )
    return config.lengths


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
        "prompt": fill_wording(config.template, cell.context.text, needle.question),
        "needle": needle.name,
        "length": cell.context_tokens,
        "depth_percent": cell.depth_percent,
        "case": cell.case,
        "context_tokens": cell.context.tokens,
    }


__all__ = ["needle_docs"]
