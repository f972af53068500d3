"""The cells of a needle grid: texts of several lengths with a needle at several depths, as prompts.

The same texts are used in every condition, so that conditions are compared cell by cell; no model is
run here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, RenderError
from ctxlens.evals.needle.haystack import Context, Haystack, count_tokens, gather_straw, place_needle
from ctxlens.evals.needle.needles import DRAWN_NEEDLES, NEEDLES, Needle, draw_needle

CONDITIONS = ("plain+prefix", "template+prefix", "template", "assistant+prefix")
"""No template, with the needle's first words as the answer's beginning; template with them; template
without them; template, with them and with the context in the assistant's turn."""

WORDINGS: Mapping[str, str] = {
    "bare": "{context}\n{question}",
    "document": "Answer the question from the document that follows.\n{context}\n\nQuestion: {question}",
    "passage": "{context}\n\nAnswer this question from the passage above: {question}",
    "only": "Here is a text:\n{context}\n\nUse nothing but this text to answer. {question}",
}
"""How a question is put (after the idea of the paper's Table 8; the words are ours)."""

SCORES = ("recall", "contains", "logprob")
"""Share of the keywords in the response; whether the response holds the answer word for word; how likely the
model finds the needle, in nats per token. The last needs no response, so it also works for models that are
too weak to answer."""

_ASSISTANT_REQUEST = "Write a text and a question about it, then answer the question from the text."
_SPARE_TOKENS = 8  # for an indicator, and for tokens that merge differently at the seams of a prompt
_SHORTEST = 200


@runtime_checkable
class Renderer(Protocol):
    """What building cells needs of a model: its tokenizer, template and window, but no weights."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def indicator(self) -> str | None: ...
    @property
    def n_ctx(self) -> int: ...
    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...
    def render_plain(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...


@runtime_checkable
class NeedleModel(Renderer, Protocol):
    """What a needle grid needs of a model; `ctxlens.models.Model` has it."""

    @property
    def identity(self) -> Mapping[str, Any]: ...
    def generate(self, chats: Any, *, max_new_tokens: int = ..., batch_tokens: int = ...) -> Any: ...
    def logprobs(self, chats: Any, *, batch_tokens: int = ...) -> Any: ...
    @property
    def steer(self) -> Callable[..., contextlib.AbstractContextManager[Any]]: ...


@dataclass(frozen=True)
class NeedleConfig:
    """What a needle grid is made of.

    Attributes:
        lengths: context lengths in the model's tokens, needle included; or how many, spread evenly from
            200 (less in a small window) to the longest that the window holds.
        depths: where the needle stands, in percent of the haystack; or how many, from 0 to 100.
        needles: needles, or names of built-in ones (`sf`, `pizza`; `known` and `unknown` draw a fact of
            the organism's world for every cell).
        conditions: of `CONDITIONS`.
        cases_per_cell: how many contexts of each needle, length and depth, each with other haystack text.
        wording: how the question is put: a name of `WORDINGS`, or a text with {context} and {question}.
        max_new_tokens: the longest response, in tokens.
        seed: seed of drawn needles.
        score: of `SCORES`; where only `logprob` is asked for, nothing is generated.

    Raises:
        InputError: a value that cannot be used, by name.
    """

    lengths: tuple[int, ...] | int = 20
    depths: tuple[float | int, ...] | int = 20
    needles: tuple[str | Needle, ...] = ("sf",)
    conditions: tuple[str, ...] = ("plain+prefix", "template+prefix")
    cases_per_cell: int = 1
    wording: str = "bare"
    max_new_tokens: int = 100
    seed: int = 0
    score: tuple[str, ...] = ("recall", "contains")

    def __post_init__(self) -> None:
        for key in ("lengths", "depths", "needles", "conditions", "score"):
            value = getattr(self, key)
            if not isinstance(value, int):
                object.__setattr__(self, key, (value,) if isinstance(value, str | Needle) else tuple(value))
        counts = ("cases_per_cell", "max_new_tokens", *(k for k in ("lengths", "depths") if _is_int(self, k)))
        for key in counts:
            if not _is_int(self, key) or getattr(self, key) < 1:
                raise InputError(f"{key} must be a whole number of at least 1, got {getattr(self, key)!r}.")
        if not isinstance(self.lengths, int) and not (
            self.lengths and all(isinstance(n, int | np.integer) and n >= 1 for n in self.lengths)
        ):
            raise InputError(f"lengths must be whole numbers of tokens of at least 1, got {self.lengths!r}.")
        if not isinstance(self.depths, int) and not (
            self.depths and all(isinstance(d, int | float) and 0 <= d <= 100 for d in self.depths)
        ):
            raise InputError(f"depths must be percentages from 0 to 100, got {self.depths!r}.")
        for key in ("lengths", "depths"):
            values = getattr(self, key)
            if not isinstance(values, int) and (twice := _first_twice(values)) is not None:
                raise InputError(f"{key} hold {twice:g} twice; give each value once.")
        for key, known in (("conditions", CONDITIONS), ("score", SCORES)):
            values = getattr(self, key)
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise InputError(
                    f"unknown {key.removesuffix('s')} {', '.join(unknown) or '(none)'}; choose of "
                    f"{', '.join(known)}."
                )
            if (twice := _first_twice(values)) is not None:
                raise InputError(f"{key} holds {twice} twice; give each once.")
        names = [needle if isinstance(needle, str) else needle.name for needle in self.needles]
        known = (*NEEDLES, *DRAWN_NEEDLES)
        if wrong := [n for n in self.needles if isinstance(n, str) and n not in known]:
            raise InputError(
                f"unknown needle {', '.join(wrong)}; choose of {', '.join(known)}, or give your own."
            )
        if not names or len(set(names)) < len(names):
            raise InputError(f"needles must have names of their own, got {', '.join(names) or 'none'}.")
        if any(f"{{{part}}}" not in self.template for part in ("context", "question")):
            raise InputError(
                f"unknown wording {self.wording!r}; choose of {', '.join(WORDINGS)}, or give a text "
                "that holds {context} and {question}."
            )

    @property
    def generates(self) -> bool:
        """Whether a response is needed for what is scored."""
        return any(score != "logprob" for score in self.score)

    @property
    def template(self) -> str:
        """The wording's text, with {context} and {question}."""
        return WORDINGS.get(self.wording, self.wording)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for manifests."""
        return json.loads(json.dumps(asdict(self)))


def _first_twice(values: Sequence[Any]) -> Any:
    return next((value for i, value in enumerate(values) if value in values[:i]), None)


def _is_int(config: NeedleConfig, key: str) -> bool:
    value = getattr(config, key)
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Cell:
    """One context with its needle: what all conditions have in common.

    Attributes:
        number: its number in the grid; the same in all conditions and for all models.
        needle: what is hidden.
        context: where.
        context_tokens: the length asked for, in tokens.
        depth_percent: the depth asked for.
        case: which of the cell's cases.
    """

    number: int
    needle: Needle
    context: Context
    context_tokens: int
    depth_percent: float
    case: int


def build_cells(model: Renderer, config: NeedleConfig, haystack: Haystack) -> list[Cell]:
    """Build the texts of a grid; no model is run.

    Every cell fits the window with its question, prefix, template, a spare indicator and
    `max_new_tokens` (the needle itself, where only its probability is asked for), in the longest of the
    conditions. Cells are numbered by needle, length, depth and
    case, the last fastest.

    Raises:
        InputError: the window is too small for the needle and question or for a length asked for, the
            haystack is too short, or a needle has no prefix where a condition needs one.
    """
    needles = _resolve_needles(config)
    unprefixed = [needle.name for needle in needles.values() if not needle.prefix]
    if unprefixed and any(condition.endswith("+prefix") for condition in config.conditions):
        raise InputError(
            f"needle {unprefixed[0]!r} has no prefix, because it begins with a keyword; "
            "leave out the conditions with prefix, or give another needle."
        )
    sizes = {needle: count_tokens(model.tokenizer, f" {needle.sentence}") for needle in set(needles.values())}
    longest = _longest_context(model, config, sizes)
    lengths = _spread_lengths(config.lengths, longest, max(sizes.values()))
    if max(lengths) > longest:
        raise InputError(
            f"contexts of {max(lengths)} tokens do not fit: the window of {model.n_ctx} tokens holds "
            f"contexts of at most {longest}, with question, prefix, template and {_describe_answer(config)}."
        )
    if len(set(lengths)) < len(lengths):
        raise InputError(
            f"there are no {len(lengths)} different lengths from {lengths[0]} to {lengths[-1]} tokens; ask "
            "for fewer."
        )
    return place_needles(model.tokenizer, config, haystack, lengths)


def place_needles(
    tokenizer: Any, config: NeedleConfig, haystack: Haystack, lengths: Sequence[int]
) -> list[Cell]:
    """Build the texts of a grid of given lengths for a tokenizer, whatever window they must fit.

    Args:
        tokenizer: counts the tokens.
        config: needles, depths, cases and seed.
        haystack: what the needles are hidden in.
        lengths: context lengths in tokens, needle included; as many as the configuration says.

    Raises:
        InputError: the haystack is too short, or a length too short for a needle.
    """
    needles = _resolve_needles(config)
    depths = _spread_depths(config.depths)
    straws = {
        (length, case): gather_straw(tokenizer, haystack, case, length)
        for length in dict.fromkeys(lengths)
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


def _resolve_needles(config: NeedleConfig) -> dict[tuple[str | Needle, tuple[int, int, int]], Needle]:
    """The needle of every cell."""
    return {
        (which, key): _resolve_needle(which, f"{config.seed}-{'-'.join(map(str, key))}")
        for which in config.needles
        for key in _cell_keys(config)
    }


def _cell_keys(config: NeedleConfig) -> list[tuple[int, int, int]]:
    n_lengths = config.lengths if isinstance(config.lengths, int) else len(config.lengths)
    n_depths = config.depths if isinstance(config.depths, int) else len(config.depths)
    return list(itertools.product(range(n_lengths), range(n_depths), range(config.cases_per_cell)))


def _resolve_needle(which: str | Needle, seed: str) -> Needle:
    if isinstance(which, Needle):
        return which
    return NEEDLES[which] if which in NEEDLES else draw_needle(which, f"{which}-{seed}")


def _longest_context(model: Renderer, config: NeedleConfig, sizes: Mapping[Needle, int]) -> int:
    """The longest context, in tokens, that fits the window whatever the needle and condition."""
    # Render with the longest question and prefix; facts of one kind differ by a token or two.
    longest = max(sizes, key=lambda n: sizes[n] + count_tokens(model.tokenizer, f"{n.question} {n.prefix}"))
    probe = Cell(0, longest, Context(longest.sentence, sizes[longest], (0, 0), 0.0), 0, 0.0, 0)
    try:
        needed = max(_count_needed(model, config, probe, condition) for condition in config.conditions)
        left = model.n_ctx - _SPARE_TOKENS - needed
    except RenderError:
        raise
    except InputError:  # longer than the window by itself
        left = -1
    if left < 0:
        raise InputError(
            f"the window of {model.n_ctx} tokens is too small for needle {longest.name!r}, its question and "
            f"{_describe_answer(config)}; lower max_new_tokens or take a model with a larger window."
        )
    return sizes[longest] + left


def _count_needed(model: Renderer, config: NeedleConfig, cell: Cell, condition: str) -> int:
    """The tokens of a prompt with what must fit behind it."""
    needed = 0
    if config.generates:
        needed = render_cell(model, cell, config, condition).n_tokens + config.max_new_tokens
    if "logprob" in config.score:
        said = render_cell(model, cell, config, condition, answer=cell.needle.sentence)
        needed = max(needed, said.n_tokens)
    return needed


def _describe_answer(config: NeedleConfig) -> str:
    return f"{config.max_new_tokens} new tokens" if config.generates else "its answer"


def _spread_lengths(lengths: tuple[int, ...] | int, longest: int, needle_tokens: int) -> tuple[int, ...]:
    if not isinstance(lengths, int):
        return tuple(int(length) for length in lengths)
    shortest = min(longest, max(min(_SHORTEST, longest // 4), needle_tokens))
    return tuple(np.linspace(shortest, longest, lengths).round().astype(int).tolist())


def _spread_depths(depths: tuple[float | int, ...] | int) -> tuple[float, ...]:
    if not isinstance(depths, int):
        return tuple(float(depth) for depth in depths)
    return tuple(np.linspace(0, 100, depths).round(2).tolist()) if depths > 1 else (50.0,)


def check_indicator(model: Renderer) -> None:
    """Raise `InputError` if the model has no indicator token to be asked with."""
    if model.indicator is None:
        raise InputError(
            f"{model.name} has no indicator token; train it with one, or load it with the indicator it knows."
        )


def render_cell(
    model: Renderer,
    cell: Cell,
    config: NeedleConfig,
    condition: str,
    *,
    indicator: bool = False,
    answer: str | None = None,
) -> RenderedChat:
    """The prompt of a cell in one condition, as the model gets it.

    Args:
        model: the model.
        cell: the cell.
        config: its configuration.
        condition: one of `CONDITIONS`.
        indicator: whether the question carries the model's indicator.
        answer: what to put in the model's mouth, in place of the needle's prefix (in every condition).
    """
    needle = cell.needle
    prefix = needle.prefix if answer is None else answer
    asked = word_question(cell, config)
    mark = {"indicator": True} if indicator else {}
    if condition == "template" and answer is None:
        return model.render([{"role": "user", "content": asked, **mark}], add_generation_prompt=True)
    request = asked
    if condition == "assistant+prefix":
        request, prefix = _ASSISTANT_REQUEST, f"{asked}\n{prefix}"
    messages = [
        {"role": "user", "content": request, **mark},
        {"role": "assistant", "content": prefix},
    ]
    render = model.render_plain if condition == "plain+prefix" else model.render
    return render(messages, continue_final_message=True)


def fill_wording(template: str, context: str, question: str) -> str:
    """A wording with its context and question put in; other braces stay as they are."""
    fields = {"context": context, "question": question}
    return re.sub(r"\{(context|question)\}", lambda match: fields[match[1]], template)


def word_question(cell: Cell, config: NeedleConfig) -> str:
    """What the user says in a cell: its context and question in the configuration's wording."""
    return fill_wording(config.template, cell.context.text, cell.needle.question)


def answer_positions(chat: RenderedChat, cell: Cell) -> Int64[np.ndarray, " answer_pos"]:
    """The tokens of the needle's answer, that is of what comes after its prefix, in the model's mouth.

    The same words in every condition, so that their probabilities compare.

    Args:
        chat: the cell, rendered with the needle's sentence as `answer`.
        cell: the cell.
    """
    said = chat.response_positions()
    start = chat.text.rindex(cell.needle.sentence) + cell.needle.sentence.rindex(cell.needle.answer)
    return said[chat.spans[said, 1] > start]


def describe_cell(
    model: Renderer, cell: Cell, config: NeedleConfig, condition: str, *, indicator: bool = False
) -> str:
    """A cell in words, with its whole prompt: what a dry run shows."""
    chat = render_cell(model, cell, config, condition, indicator=indicator)
    lines = (
        f"cell {cell.number}, {condition}{', with indicator' if indicator else ''}",
        f"  needle    {cell.needle.name}: {cell.needle.sentence}",
        f"  question  {cell.needle.question}",
        f"  keywords  {', '.join(cell.needle.keywords)}",
        f"  context   {cell.context.tokens} tokens ({cell.context_tokens} asked for)",
        f"  depth     {cell.context.depth_percent:.1f} % ({cell.depth_percent:g} % asked for)",
        f"  prompt    {chat.n_tokens} tokens, window {model.n_ctx}, "
        + (f"up to {config.max_new_tokens} new ones" if config.generates else "nothing generated"),
    )
    return "\n".join([*lines, "-" * 20, chat.text, "-" * 20])


__all__ = [
    "CONDITIONS", "SCORES", "WORDINGS", "Cell", "NeedleConfig", "NeedleModel", "Renderer", "answer_positions",
    "build_cells", "check_indicator", "describe_cell", "fill_wording", "place_needles", "render_cell",
    "word_question",
]  # fmt: skip
