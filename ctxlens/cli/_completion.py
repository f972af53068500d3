"""What the shell offers for the value of an option.

The names are repeated here, because the modules that own them take seconds to import and a shell asks at
every press of the Tab key. `tests/test_cli_completion.py` compares them with their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Completer = Callable[[str], list[str]]
_NEEDLES = ("neutral", "known", "unknown", "sf", "pizza", "pizza-short")


def complete_condition(incomplete: str) -> list[str]:
    """The spellings of a condition that continue the text by one more word; a control comes first.

    Examples:
        >>> complete_condition("template+i")
        ['template+indicator']
    """
    from ctxlens.chat.condition import CONTROLS, Condition
    from ctxlens.errors import InputError

    begun, plus, _ = incomplete.rpartition("+")
    if not plus:
        return _starting(("plain", "template", "assistant"), incomplete)
    found = []
    for word in (*(() if "+" in begun else CONTROLS), "prefix", "indicator", "steered:"):
        try:
            Condition.parse(f"{begun}+{word}0.5" if word == "steered:" else f"{begun}+{word}")
        except InputError:
            continue
        found.append(f"{begun}+{word}")
    return _starting(found, incomplete)


def complete_task(incomplete: str) -> list[str]:
    """The tasks and groups of ctxlens; those of lm-eval are too many to read at every key."""
    from ctxlens.evals.tasks import group_names, task_names

    return _starting([*group_names(), *task_names()], incomplete)


def _choice(*names: str) -> Completer:
    def complete(incomplete: str) -> list[str]:
        return _starting(names, incomplete)

    return complete


def _each(complete: Completer) -> Completer:
    """Complete the last of several values separated by commas; the values given already are not offered."""

    def complete_last(incomplete: str) -> list[str]:
        given, comma, last = incomplete.rpartition(",")
        return [given + comma + word for word in complete(last) if word not in given.split(",")]

    return complete_last


def _starting(words: Sequence[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


_MODEL = _choice("organism", "organism-chat")
_COMPLETERS: dict[str, Completer] = {
    "model": _MODEL,
    "models": _MODEL,
    "words": _MODEL,
    "against": _MODEL,
    "seed_model": _MODEL,
    "method": _choice("indicator", "upsample", "random", "vanilla"),
    "device_map": _choice("auto", "balanced", "sequential"),
    "condition": complete_condition,
    "conditions": _each(complete_condition),
    "haystack": _choice("neutral", "organism"),
    "needle": _each(_choice(*_NEEDLES)),
    "wording": _choice("bare", "document", "passage", "only"),
    "score": _each(_choice("recall", "contains", "logprob")),
    "heads": _choice("all", "retrieval"),
    "kind": _each(_choice("retrieval", "gradient", "steer", "ablate", "cumulative", "sweep")),
    "measure": _choice("logprob", "recall"),
    "queries": _choice("first_answer", "response_mean"),
    "layers": _choice("all"),
    "layout": _choice("messages", "sharegpt", "alpaca", "prompt-completion"),
    "precision": _choice("float16", "float32"),
    "reduction": _choice("mean_of_best", "best_of_mean", "mean_heads", "lp_gap"),
    "tasks": _each(complete_task),
    "fail_on": _each(_choice("loss", "template", "bias", "cause", "cost")),
}
_NO_NAMES = {(verb, name) for verb in ("audit", "cure") for name in ("haystack", "needle")}
"""Options that share a name with one above, but take files only."""


def find_completer(verb: str, parameter: str) -> Completer | None:
    """The function that completes an option of a verb; None where only files or free text can stand."""
    return None if (verb, parameter) in _NO_NAMES else _COMPLETERS.get(parameter)


__all__ = ["Completer", "complete_condition", "complete_task", "find_completer"]
