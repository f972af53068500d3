"""Options and inputs that several verbs share, and the checks before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.errors import InputError, Problems
from ctxlens.parsing import parse_heads

if TYPE_CHECKING:
    from ctxlens.chat.roles import RenderedChat
    from ctxlens.models import Model
    from ctxlens.models.attention.steering import Heads

Messages = Sequence[Mapping[str, Any]]

HeadsOption = Annotated[
    str,
    typer.Option(
        help="Heads to steer: all, retrieval (one per layer), or layer.head pairs such as 1.2,3.0.",
        metavar="HEADS",
    ),
]
PrefixOption = Annotated[
    str | None, typer.Option(help="Words with which the model's answer starts.", metavar="TEXT")
]
NewTokensOption = Annotated[
    int, typer.Option(min=1, help="Upper bound on the answer, in tokens.", metavar="N")
]
BatchOption = Annotated[
    int, typer.Option(min=1, help="Upper bound on the tokens of one batch, prompts and answers.", metavar="N")
]


def describe_file(path: Path) -> dict[str, str]:
    """Name and fingerprint of an input file, for the manifest of a run."""
    return {"messages": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def open_questions(
    conversations: Sequence[Messages], prefix: str | None = None, *, indicator: bool = False
) -> list[list[dict[str, Any]]]:
    """The conversations without their final answer, which the model is to write.

    Args:
        conversations: the conversations.
        prefix: the beginning of the answer, if any.
        indicator: whether to mark the last user message with the indicator.

    Raises:
        InputError: there is no user message that could carry the indicator.
    """
    from ctxlens.chat.data.annotate import mark_last_question

    asked = []
    for messages in conversations:
        opened = [dict(message) for message in messages]
        while opened[-1]["role"] == "assistant" and len(opened) > 1:
            opened.pop()
        if indicator:
            opened = mark_last_question(opened)
        asked.append(opened + ([{"role": "assistant", "content": prefix}] if prefix else []))
    return asked


def render_all(
    model: Model, conversations: Sequence[Messages], *, plain: bool = False, **options: Any
) -> list[RenderedChat]:
    """Render every conversation; one that ends with a user turn is left open for the answer.

    Raises:
        InputError: a conversation is malformed, too long, or refused by the template; the message says which.
    """
    from ctxlens.models.asking import render_each

    return render_each(model.render_plain if plain else model.render, conversations, **options)


def read_tools(path: Path) -> list[Any]:
    """The tool schemas of a JSON file.

    Raises:
        InputError: the file does not hold a JSON list of mappings.
    """
    try:
        tools = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--tools {path} cannot be read as JSON ({error}).") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"--tools {path} must hold a JSON list of tool schemas.")
    return tools


def render_questions(
    model: Model,
    questions: Sequence[Messages],
    *,
    max_new_tokens: int,
    plain: bool = False,
    **options: Any,
) -> list[RenderedChat]:
    """Render questions (see `open_questions`) and leave room for the answers in the window."""
    prefixed = questions[0][-1]["role"] == "assistant"
    if max_new_tokens >= model.n_ctx:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a question in the window of {model.n_ctx} "
            "tokens; give a smaller number."
        )
    return render_all(
        model,
        questions,
        plain=plain,
        add_generation_prompt=not prefixed,
        continue_final_message=prefixed,
        max_tokens=model.n_ctx - max_new_tokens,
        **options,
    )


class Mode(StrEnum):
    """Which keys the steering of --alpha weakens; see `ctxlens.models.attention.steering.Steering`."""

    PAPER = "paper"
    PROMPT_ONLY = "prompt-only"
    COMPOUNDING = "compounding"


ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        help="What --alpha weakens: paper (every other token), prompt-only (not what the model writes), or "
        "compounding (the paper's released code: stronger from layer to layer).",
        metavar="MODE",
    ),
]


def choose_mode(mode: Mode, target_share: float | None) -> str | None:
    """The steering mode of --mode; None where --target-share names the strength.

    Raises:
        InputError: both are given.
    """
    if target_share is None:
        return mode.value
    if mode is not Mode.PAPER:
        raise InputError(
            f"--mode {mode.value} is for --alpha; leave it out, or give --alpha instead of --target-share."
        )
    return None


def check_steering(
    alpha: float | None, heads: str, target_share: float | None = None, mode: Mode = Mode.PAPER
) -> None:
    """Raise `InputError`, before a model is loaded, if strength, mode or heads are wrong for every model."""
    from ctxlens.chat.condition import check_strength

    check_strength(alpha, target_share)
    choose_mode(mode, target_share)
    if alpha == 1 and mode is not Mode.PAPER:
        raise InputError(f"--mode {mode.value} has no effect without steering; give an --alpha below 1.")
    parse_heads(heads)


def resolve_heads(model: Model, text: str, plain: Sequence[RenderedChat]) -> Heads:
    """The heads of --heads; retrieval heads are read from the conversations without template (paper B.3)."""
    heads = parse_heads(text)
    if heads != "retrieval":
        return heads
    from ctxlens.heads import find_retrieval_heads
    from ctxlens.results import RoleAllocation

    return find_retrieval_heads(RoleAllocation.concat(model.read_roles(plain)))


def parse_pairs(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """Keys and values of an option that is given as `key=value`; values are read as YAML.

    Raises:
        InputError: a word is not such a pair.
    """
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"{option} got {pair!r}; expected KEY=VALUE, such as quac_turns=all.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = value
    return found


def parse_template_args(pairs: Sequence[str] | None) -> dict[str, Any]:
    """The values of --template-arg: JSON where a value is JSON, otherwise text.

    Raises:
        InputError: a word is not KEY=VALUE, or its key cannot be a variable.
    """
    found = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise InputError(
                f"--template-arg got {pair!r}; expected KEY=VALUE, such as enable_thinking=false."
            )
        try:
            found[key] = json.loads(value, parse_constant=str)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def parse_overrides(words: Sequence[str], problems: Problems) -> tuple[str | None, dict[str, Any]]:
    """The model, if the first word is no override, and the values of KEY=VALUE words.

    Args:
        words: the words as they were given.
        problems: takes note of the words that are neither.
    """
    from ctxlens.sft.keys import TrainConfig
    from ctxlens.sft.keys.trl import read_trl_keys

    model, given = None, {}
    for number, word in enumerate(words):
        key, equals, value = word.partition("=")
        if equals and not Path(word).exists():
            given[key] = value
        elif number or word in {*TrainConfig.model_fields, *read_trl_keys()}:
            problems.add(
                InputError(f"{word!r} is not an override; give KEY=VALUE, such as learning_rate=1e-4.")
            )
        else:
            model = word
    return model, given


def parse_threshold(text: str) -> float | str:
    """A threshold as a number; any other word is returned as it is, as the name of a rule."""
    try:
        return float(text)
    except ValueError:
        return text
