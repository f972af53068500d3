"""Which chat templates are labelled exactly, and which are refused, with which tokenizer?

Question: does every pair of a real chat template and a real tokenizer end in one of two outcomes, exact
roles or a refusal with a reason?
Run:      python experiments/template_matrix.py DATA --out docs/templates.md
          (DATA holds `chat_templates/**/*.jinja` and `tokenizers/*/`)
Expected: no third outcome. Cost: about 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.errors import RenderError
from ctxlens.roles import RenderedChat, Role, render

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Six, of course."},
]
SPACED = [
    {"role": "user", "content": "  What is\n two? \n"},
    {"role": "assistant", "content": "\n\nIt is four.  "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Six.\n"},
]
THINKING = [
    {"role": "user", "content": "Hm?"},
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nIt is four."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "<think>\nnow\n</think>\n\nSix."},
]
TOOLS = [
    {"role": "user", "content": "How warm is it in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdef123",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Rome"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": "31 degrees"},
    {"role": "assistant", "content": "It is warm."},
]
PROBES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "turns": (TURNS, {}),
    "system": ([SYSTEM, *TURNS], {}),
    "prompt": ([SYSTEM, *TURNS[:3]], {"add_generation_prompt": True}),
    "prefix": ([*TURNS[:3], {"role": "assistant", "content": "It is "}], {"continue_final_message": True}),
    "spaces": (SPACED, {}),
    "thinking": (THINKING, {}),
    "tools": (TOOLS, {}),
}


@dataclass(frozen=True)
class Outcome:
    """What a rendering came to: `refused` is the reason, `None` if it was exact."""

    refused: str | None = None
    template_refuses: bool = False
    left_out: tuple[int, ...] = ()


def characters_of(chat: RenderedChat, turn: int) -> str:
    """The characters held by the tokens of a turn, each once."""
    held = sorted({c for a, b in chat.spans[chat.turn == turn].tolist() for c in range(a, b)})
    return "".join(chat.text[c] for c in held)


def judge(tokenizer: Any, template: str, probe: str) -> Outcome:
    """Render one probe with one pair and check what can be checked without knowing the template.

    Raises:
        AssertionError: A third outcome: tokens differ, or what was said is not in its turn's tokens.
    """
    messages, options = PROBES[probe]
    reason = ""
    try:
        ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **options)
    except Exception as error:  # whatever a template raises
        ids = None
        reason = " ".join(str(error).split())
    try:
        chat = render(tokenizer, messages, chat_template=template, **options)
    except RenderError as error:
        told = str(error)
        if ids is None and reason[:60] not in told:
            raise AssertionError(f"the template's reason {reason!r} is not told: {told!r}") from error
        return Outcome(told, ids is None)
    assert chat.tokens.tolist() == ids
    for turn, message in enumerate(messages):
        said = message["content"].split("</think>")[-1].strip()
        if turn not in chat.left_out_turns():
            assert said in characters_of(chat, turn), (turn, said, characters_of(chat, turn))
        else:
            assert said not in chat.text, f"message {turn} is in the text but has no tokens"
    return Outcome(left_out=chat.left_out_turns())


def compare_with_generation_mask(tokenizer: Any, template: str) -> tuple[int, int, int]:
    """Assistant tokens against the template's own `{% generation %}` mask.

    Returns:
        Tokens in both, tokens in the mask alone, tokens in ours alone.

    Raises:
        AssertionError: A token in the mask alone is neither the template's nor partly another speaker's,
            or a marked stretch holds no assistant token.
    """
    chat = render(tokenizer, TURNS, chat_template=template)
    encoded = tokenizer.apply_chat_template(
        TURNS, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = np.asarray(encoded["assistant_masks"], dtype=bool)
    ours = chat.mask("assistant")
    for position in np.flatnonzero(marked & ~ours).tolist():
        start, end = chat.spans[position].tolist()
        beside = chat.text[start:end] not in TURNS[int(chat.turn[position])]["content"]
        assert chat.role[position] == Role.TEMPLATE or beside
    stretches = np.split(np.arange(len(marked)), np.flatnonzero(np.diff(marked.astype(int))) + 1)
    assert all(ours[stretch].any() for stretch in stretches if marked[stretch[0]])
    return int((marked & ours).sum()), int((marked & ~ours).sum()), int((ours & ~marked).sum())


def load_tokenizers(data: Path) -> dict[str, Any]:
    """The six real tokenizers; two need the class that reads their file as it stands."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain = {"llama2", "phi-3-mini"}
    return {
        folder.name: (PreTrainedTokenizerFast if folder.name in plain else AutoTokenizer).from_pretrained(
            folder
        )
        for folder in sorted((data / "tokenizers").iterdir())
        if folder.is_dir()
    }


def load_templates(data: Path) -> dict[str, str]:
    """Every template by its path, texts that occur twice once."""
    seen: dict[str, str] = {}
    for path in sorted((data / "chat_templates").rglob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        if text not in seen.values():
            seen[str(path.relative_to(data / "chat_templates"))] = text
    return seen


def generation_templates(data: Path) -> dict[str, str]:
    """The templates that mark assistant text with `{% generation %}`."""
    index = json.loads((data / "chat_templates" / "index.json").read_text(encoding="utf-8"))
    names = [entry["path"] for entry in index if entry["has_generation_block"]]
    return {name: (data / "chat_templates" / name).read_text(encoding="utf-8") for name in names}


def table(data: Path, probes: Iterable[str]) -> str:
    """The Markdown page."""
    tokenizers, templates, probes = load_tokenizers(data), load_templates(data), list(probes)
    counts: Counter[str] = Counter()
    reasons: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    rows = []
    for name, template in templates.items():
        cells = []
        for probe in probes:
            outcomes = [judge(tokenizer, template, probe) for tokenizer in tokenizers.values()]
            counts.update("refused" if o.refused else "exact" for o in outcomes)
            refused = sorted({o.refused for o in outcomes if o.refused})
            for reason in refused:
                reasons[reason][name].add(probe)
            left_out = any(o.left_out for o in outcomes)
            exact = sum(not o.refused for o in outcomes)
            cell = "exact" if exact == len(outcomes) else f"exact {exact}/{len(outcomes)}"
            cells.append(f"{cell if exact else 'refused'}{', a message left out' if left_out else ''}")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    masks = []
    for name, template in generation_templates(data).items():
        try:
            results = [compare_with_generation_mask(tokenizer, template) for tokenizer in tokenizers.values()]
        except RenderError as error:
            masks.append(f"| `{name}` | refused: {error} | | |")
            continue
        both, theirs, ours = (sum(column) for column in zip(*results, strict=True))
        masks.append(f"| `{name}` | {both} | {theirs} | {ours} |")
    lines = [
        "# Chat templates",
        "",
        "Made by `experiments/template_matrix.py`. Each real template was rendered with each of the "
        f"tokenizers {', '.join(tokenizers)} and each of {len(probes)} conversations: *exact* means that the "
        "tokens equal those of `apply_chat_template` and that what was said lies in its speaker's tokens; "
        "*refused* means a `RenderError` with the reason below; *exact 4/6* that two tokenizers were refused "
        "(those without a BOS token, by templates that write one). There is no third outcome. A message left "
        "out is one that the template itself does not write; it has no tokens.",
        "",
        f"{len(templates)} distinct templates × {len(tokenizers)} tokenizers × {len(probes)} conversations: "
        f"{counts['exact']} exact, {counts['refused']} refused.",
        "",
        f"| template | {' | '.join(probes)} |",
        f"|---|{'---|' * len(probes)}",
        *rows,
        "",
        "## Reasons of refusal",
        "",
        *(
            f"- {reason}\n    - "
            + ", ".join(
                f"`{name}`" + ("" if len(where) == len(probes) else f" ({', '.join(sorted(where))})")
                for name, where in sorted(names.items())
            )
            for reason, names in sorted(reasons.items())
        ),
        "",
        "## Agreement with `{% generation %}`",
        "",
        "Tokens over all tokenizers. In the mask alone are end-of-turn tokens, empty reasoning blocks and "
        "other text of the template inside the generated stretch, which here have the role `template` (the "
        "end-of-turn token is `chat.stops[turn]`); with a tokenizer that does not know a template's markers, "
        "also tokens that hold the end of another speaker's text.",
        "",
        "| template | in both | in the mask alone | in ours alone |",
        "|---|---|---|---|",
        *masks,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.write_text(table(arguments.data, PROBES), encoding="utf-8")


if __name__ == "__main__":
    main()
