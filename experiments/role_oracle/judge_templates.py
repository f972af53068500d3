"""On which chat templates is any character labelled wrongly?

Question: over real templates and conversations of every kind, does any label differ from what an independent
oracle finds by perturbation (`oracle.py`)?
Run:      python experiments/role_oracle/judge_templates.py DATA --out experiments/role_oracle/results.json
          (DATA holds `chat_templates/**/*.jinja` and `chat_templates_2026/*.jinja`)
Expected: no mislabel. Cost: about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from oracle import Verdict, judge

SYSTEM = {"role": "system", "content": "Be brief, 2 lines.\n"}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: Any, *, number: int = 1) -> dict[str, Any]:
    return {"id": f"abcdef12{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(name: str, content: str, *, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": f"abcdef12{number}"}


CALLED = [
    user("How warm is it in Rome?"),
    assistant("", tool_calls=[call("get_weather", {"city": "Rome", "note": 'a "b"\nc'})]),
    answer("get_weather", "31 degrees"),
    assistant("It is warm."),
]
SCHEMA = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How warm it is in a city, such as Rome.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city's name."}},
            "required": ["city"],
        },
    },
}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "turns": (
        [user("What is 2+2?"), assistant("It is 4."), user("And 3?"), assistant("Six, of course.")],
        {},
    ),
    "system": ([SYSTEM, user("What is two?"), assistant("It is four."), user("And?"), assistant("Six.")], {}),
    "prompt": ([SYSTEM, user("Hm?"), assistant("So."), user("And, er?")], {"add_generation_prompt": True}),
    "prefix": ([user("What is it?"), assistant("It is ")], {"continue_final_message": True}),
    "spaces": (
        [
            user("  What is\n two? \n"),
            assistant("\n\nIt is  four.  "),
            user("\n And?"),
            assistant("Six.\n\n"),
        ],
        {},
    ),
    "think": (
        [
            user("Hm?"),
            assistant("<think>\nfirst\n</think>\n\nIt is four.\n"),
            user("And?"),
            assistant("<think>now</think> Six.\n"),
        ],
        {},
    ),
    "half think": (
        [user("Hm?"), assistant("Aaa </think> Bbb"), user("So </think> what?"), assistant("Ccc</think>Ddd")],
        {},
    ),
    "reasoning": (
        [
            user("Hm?"),
            assistant("Four.", reasoning_content="Two and two\n"),
            user("And?"),
            assistant("\nSix.", reasoning_content="\nThree  and three"),
        ],
        {},
    ),
    "tools": (CALLED, {}),
    "calls": (
        [
            user("Rome and Oslo?"),
            assistant(
                None,
                reasoning_content="Two calls.",
                tool_calls=[
                    call("warmth", {"city": "Rome", "day": 3}),
                    call("rain", {"city": "Oslo"}, number=2),
                ],
            ),
            answer("warmth", "31\n"),
            answer("rain", "  none", number=2),
            assistant("Warm, dry."),
            user("Thanks!"),
            assistant("Any time."),
        ],
        {},
    ),
    "schemas": (CALLED, {"tools": [SCHEMA]}),
    "json text": (
        [CALLED[0], assistant("", tool_calls=[call("get_weather", '{"city": "Rome"}')]), *CALLED[2:]],
        {},
    ),
    "parts": (
        [
            user([{"type": "text", "text": "First part. "}, {"type": "text", "text": " second?"}]),
            assistant([{"type": "text", "text": "Both."}]),
        ],
        {},
    ),
    "code": (
        [user("Fix `<|x|>`:\n\n    if a < b:\n\t\tpass\n"), assistant("```py\nx = {'a': \"b\"}  # ok?\n```")],
        {},
    ),
}
"""Conversations by what they are to find out, with the options of the rendering."""

QUICK = ("turns", "spaces", "think", "half think", "tools")


def load_templates(data: Path) -> dict[str, str]:
    """Every template of the two folders by its path; texts that occur twice once."""
    paths = sorted((data / "chat_templates").rglob("*.jinja")) + sorted(
        (data / "chat_templates_2026").glob("*.jinja")
    )
    found: dict[str, str] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if text not in found.values():
            found[str(path.relative_to(data))] = text
    return found


def byte_tokenizer() -> Any:
    """A tokenizer of one token per byte; `<s>` and `</s>` are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def judge_all(templates: dict[str, str], names: Iterable[str]) -> dict[str, dict[str, Verdict]]:
    """The verdict on every template with every conversation of these names."""
    from ctxlens.chat.roles import render
    from ctxlens.errors import InputError

    tokenizer = byte_tokenizer()
    names = list(names)
    verdicts: dict[str, dict[str, Verdict]] = {}
    for path, source in templates.items():
        verdicts[path] = {}
        for name in names:
            messages, options = CONVERSATIONS[name]
            verdicts[path][name] = judge(tokenizer, source, messages, options, render, InputError)
    return verdicts


def summary(verdicts: dict[str, dict[str, Verdict]]) -> dict[str, Any]:
    """Counts of outcomes, in all and by conversation, with everything that is not exact."""
    by_conversation: dict[str, Counter[str]] = {}
    undecided: Counter[str] = Counter()
    wrong: dict[str, list[Any]] = {}
    refused: dict[str, list[str]] = {}
    for path, row in verdicts.items():
        for name, verdict in row.items():
            by_conversation.setdefault(name, Counter())[verdict.outcome] += 1
            if verdict.undecided:
                undecided[name] += verdict.undecided
            if verdict.outcome == "mislabel":
                wrong[f"{path}: {name}"] = [list(each) for each in verdict.wrong[:40]] or [verdict.reason]
            if verdict.outcome == "refused":
                refused.setdefault(verdict.reason, []).append(f"{path}: {name}")
    return {
        "templates": len(verdicts),
        "outcomes": dict(sum(by_conversation.values(), Counter())),
        "by_conversation": {name: dict(counts) for name, counts in by_conversation.items()},
        "characters": sum(v.characters for row in verdicts.values() for v in row.values()),
        "undecided_characters": dict(undecided),
        "mislabels": wrong,
        "refused": refused,
    }


def main() -> None:
    """Judge and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="", help="a part of the templates' paths")
    parser.add_argument("--conversations", nargs="*", default=list(CONVERSATIONS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    templates = {k: v for k, v in load_templates(arguments.data).items() if arguments.only in k}
    found = summary(judge_all(templates, arguments.conversations))
    arguments.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in ("templates", "outcomes", "by_conversation")}, indent=1))


if __name__ == "__main__":
    main()
