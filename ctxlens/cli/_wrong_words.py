"""What typer finds wrong with the words of a command, as one sentence: given, expected, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

_EXPECTED = {"valid number": "a number", "valid integer": "a whole number", "valid boolean": "true or false"}
"""Words of typer's messages, and what is expected."""
_MEANT = {
    "gpu": "cuda", "half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32",
    "float": "float32",
}  # fmt: skip
"""Common names of values that are called otherwise here."""
_MEANT_VERBS = {
    "attention": "allocate", "attn": "allocate", "finetune": "train", "fine-tune": "train", "sft": "train",
    "chat": "generate", "ask": "generate", "ui": "explore", "serve": "explore", "evaluate": "eval",
    "niah": "needle", "check": "doctor", "version": "--version", "help": "--help",
}  # fmt: skip
"""Common names of what verbs do."""


def explain(error: Exception, verb: str, words: Sequence[str], params: Sequence[Any]) -> str | None:
    """The sentence for an error that typer raises while it parses; None for any other exception.

    Args:
        error: the exception. Typer's classes come from click or, in newer versions, from typer itself, so
            that they are told by their names.
        verb: the verb; empty for words before it.
        words: the words after it.
        params: its options and arguments.
    """
    kind = type(error).__name__
    if kind not in _SENTENCES:
        return None
    sentence = _SENTENCES[kind](error, verb, words, params)
    return f"{sentence.rstrip('.')}; see `{_command(verb)} --help`."


def explain_verb(word: str, verbs: Sequence[str]) -> str:
    """The sentence for a verb that does not exist."""
    near = [_MEANT_VERBS[word]] if word in _MEANT_VERBS else get_close_matches(word, verbs, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"ctxlens has no verb {word!r}{meant}; see `ctxlens --help`."


def _command(verb: str) -> str:
    return f"ctxlens {verb}" if verb else "ctxlens"


def _say_unknown_option(error: Any, verb: str, words: Sequence[str], params: Sequence[Any]) -> str:
    option, verb = error.option_name, verb or "ctxlens"
    if option in ("--model", "-m") and any("MODEL" in _name(one) for one in params):
        return f"{verb} has no option {option}: the model is its first word, as in `ctxlens {verb} MODEL`"
    known = [one for one in error.possibilities or () if one != "--help"]
    near = get_close_matches(option, known, n=1, cutoff=0.0)
    return f"{verb} has no option {option}" + (f" (did you mean {near[0]}?)" if near else "")


def _say_missing(error: Any, verb: str, words: Sequence[str], params: Sequence[Any]) -> str:
    return f"{_name(error.param)} is missing" if error.param is not None else str(error.format_message())


def _say_bad_value(error: Any, verb: str, words: Sequence[str], params: Sequence[Any]) -> str:
    name = _name(error.param) if error.param is not None else "a word"
    value = _find_value(error.param, words)
    given = f"{name} got {value!r}" if value is not None else f"{name} cannot be read"
    said = str(error.message).removeprefix("Value error, ").rstrip(".")
    for part, expected in _EXPECTED.items():
        if part in said:
            return f"{given}; expected {expected}"
    if "is not one of" in said:
        choices = re.findall(r"'([^']*)'", said.split("is not one of")[1])
        meant = _MEANT.get(value or "", "")
        near = [meant] if meant in choices else get_close_matches(value or "", choices, n=1)
        expected = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
        return f"{given}; expected {expected}" + (f" (did you mean {near[0]}?)" if near else "")
    if said.startswith("Input should be "):
        return f"{given}; expected a value {said.removeprefix('Input should be ')}"
    return f"{given}: {said}"


def _say_usage(error: Any, verb: str, words: Sequence[str], params: Sequence[Any]) -> str:
    if error.message == "Missing command.":
        return "a verb is missing"
    needs = re.fullmatch(r"Option '([^']+)' requires an argument\.?", str(error.message))
    if needs is not None:
        return f"{needs.group(1)} needs a value"
    extra = re.search(r"unexpected extra arguments?(?:\(s\))? \((.+)\)", str(error.message))
    if extra is None:
        return str(error.format_message())
    word = extra.group(1).split()[0]
    sentence = f"{verb or 'ctxlens'} does not know what to do with the word {word!r}"
    takes_model = any("--model" in one.opts for one in params)
    return sentence + (f"; give a model as --model {word}" if takes_model else "")


def _name(param: Any) -> str:
    """An option by its long name, an argument by what stands for it in the help."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    return max(param.opts, key=len)


def _find_value(param: Any, words: Sequence[str]) -> str | None:
    """The word that was given for an option."""
    for place, word in enumerate(words):
        for option in getattr(param, "opts", ()):
            if word == option and place + 1 < len(words):
                return words[place + 1]
            if word.startswith(f"{option}="):
                return word.removeprefix(f"{option}=")
    return None


_SENTENCES = {
    "NoSuchOption": _say_unknown_option, "MissingParameter": _say_missing, "BadParameter": _say_bad_value,
    "BadOptionUsage": _say_usage, "BadArgumentUsage": _say_usage, "UsageError": _say_usage,
}  # fmt: skip

__all__ = ["explain", "explain_verb"]
