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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.chat.roles import RenderedChat, Role, render
from ctxlens.errors import RenderError

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


@dataclass(frozen=True)
class MaskAgreement:
    """Assistant tokens against the template's own `{% generation %}` mask, in tokens.

    Attributes:
        both: in the mask, and of the role `assistant`.
        end: in the mask alone: the template's text that follows a response, up to the end of its turn.
        opening: in the mask alone: the template's text before a response that it marks too (an empty think
            block, its own role header).
        straddling: in the mask alone: tokens that also hold the end of what another speaker said.
        ours: of the role `assistant` alone.
        written: in the mask, and in `RenderedChat.mask_written`.
        written_alone: in `RenderedChat.mask_written` alone.
    """

    both: int = 0
    end: int = 0
    opening: int = 0
    straddling: int = 0
    ours: int = 0
    written: int = 0
    written_alone: int = 0

    def __add__(self, other: MaskAgreement) -> MaskAgreement:
        return MaskAgreement(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def compare_with_generation_mask(tokenizer: Any, template: str) -> MaskAgreement:
    """Compare the labels with the mask that transformers makes from the template's own blocks.

    Raises:
        AssertionError: A token in the mask alone is of no class of `MaskAgreement`, or a marked stretch
            holds no assistant token.
    """
    chat = render(tokenizer, TURNS, chat_template=template)
    encoded = tokenizer.apply_chat_template(
        TURNS, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = np.asarray(encoded["assistant_masks"], dtype=bool)
    ours, written = chat.mask("assistant"), chat.mask_written()
    stretches = np.split(np.arange(len(marked)), np.flatnonzero(np.diff(marked.astype(int))) + 1)
    classes: Counter[str] = Counter()
    for stretch in stretches:
        if not marked[stretch[0]]:
            continue
        said = stretch[ours[stretch]]
        assert len(said), "a marked stretch holds no assistant token"
        for position in stretch[~ours[stretch]].tolist():
            if chat.role[position] == Role.TEMPLATE:
                assert position < said[0] or position > said[-1], "the template's text inside a response"
                classes["end" if position > said[-1] else "opening"] += 1
            else:
                start, end = chat.spans[position].tolist()
                assert chat.text[start:end] not in TURNS[int(chat.turn[position])]["content"]
                classes["straddling"] += 1
    return MaskAgreement(
        both=int((marked & ours).sum()),
        ours=int((ours & ~marked).sum()),
        written=int((marked & written).sum()),
        written_alone=int((written & ~marked).sum()),
        **classes,
    )


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
    masks, agreements = [], []
    for name, template in generation_templates(data).items():
        try:
            found = [compare_with_generation_mask(tokenizer, template) for tokenizer in tokenizers.values()]
        except RenderError as error:
            masks.append(f"| `{name}` | refused: {error} | | | | | | |")
            continue
        agreements.append(sum(found, MaskAgreement()))
        masks.append(f"| `{name}` | {' | '.join(map(str, astuple(agreements[-1])))} |")
    if agreements:
        total = map(str, astuple(sum(agreements, MaskAgreement())))
        masks.append(f"| **all** | {' | '.join(total)} |")
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
        "Tokens over all tokenizers and four turns. Every token of the role `assistant` is in the "
        "template's own mask. What the mask alone holds is of three kinds: the template's text after a "
        "response, which is the end of its turn (`chat.stops[turn]`); in the templates with a figure in the "
        "column *before*, the template's text before a response that they mark too (an empty think block, "
        "their own role header); and, with tokenizers that do not know a template's markers, tokens that "
        "hold the end of another speaker's text too. All of it has the role `template` here, or the other "
        "speaker's. `chat.mask_written()` adds what a model has to write by itself after the generation "
        "prompt, up to the stop token; what a template marks beyond that follows the stop token or belongs "
        "to the prompt, or the tokenizer has no token that ends a turn.",
        "",
        "| template | in both | mask alone: end of turn | mask alone: before | mask alone: straddling | ours "
        "alone | written and in the mask | written alone |",
        "|---|---|---|---|---|---|---|---|",
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
