"""Which chat templates are labelled exactly, and which are refused, with which tokenizer?

Question: does every pair of a real chat template and a real tokenizer end in one of two outcomes, the tokens
of `apply_chat_template` with roles, or a refusal with a reason? (Whether the roles are right is judged by
the independent oracle in `role_oracle`, whose results go on the same page.)
Run:      python experiments/template_matrix.py DATA --oracle experiments/role_oracle/results.json \\
              --out docs/templates.md
          (DATA holds `chat_templates/**/*.jinja` and `tokenizers/*/`)
Expected: no third outcome. Cost: about 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.chat.roles import Role, render
from ctxlens.errors import RenderError

sys.path.insert(0, str(Path(__file__).parent / "role_oracle"))

from oracle import forms

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


def judge(tokenizer: Any, template: str, probe: str) -> Outcome:
    """Render one probe with one pair and compare it with `apply_chat_template`.

    Raises:
        AssertionError: A third outcome: the tokens are those of no form of the conversation, or the
            template's own reason is not told.
    """
    messages, options = PROBES[probe]
    accepted = list(accepted_forms(tokenizer, template, messages, options))
    try:
        chat = render(tokenizer, messages, chat_template=template, **options)
    except RenderError as error:
        return Outcome(str(error), template_refuses=not accepted)
    assert chat.tokens.tolist() in [ids for _, ids in accepted], "tokens of no form of the conversation"
    return Outcome(left_out=chat.left_out_turns())


def accepted_forms(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
    """The forms of a conversation that a template accepts, with their tokens."""
    for form in forms(messages):
        try:
            ids = tokenizer.apply_chat_template(form, chat_template=template, return_dict=False, **options)
        except Exception:  # whatever a template raises
            continue
        yield form, ids


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
    form = next(
        form for form, ids in accepted_forms(tokenizer, template, TURNS, {}) if ids == chat.tokens.tolist()
    )
    encoded = tokenizer.apply_chat_template(
        form, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
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


def outcome_rows(
    tokenizers: dict[str, Any], templates: dict[str, str], probes: list[str]
) -> tuple[list[str], Counter[str], dict[str, dict[str, set[str]]]]:
    """One table row per template, counts of outcomes, and the reasons of refusal by template and probe."""
    rows: list[str] = []
    counts: Counter[str] = Counter()
    reasons: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, template in templates.items():
        cells = []
        for probe in probes:
            outcomes = [judge(tokenizer, template, probe) for tokenizer in tokenizers.values()]
            counts.update("refused" if o.refused else "exact" for o in outcomes)
            for outcome in outcomes:
                if outcome.refused:
                    reasons[outcome.refused][name].add(probe)
            left_out = any(o.left_out for o in outcomes)
            exact = sum(not o.refused for o in outcomes)
            cell = "exact" if exact == len(outcomes) else f"exact {exact}/{len(outcomes)}"
            cells.append(f"{cell if exact else 'refused'}{', a message left out' if left_out else ''}")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return rows, counts, reasons


def mask_rows(data: Path, tokenizers: dict[str, Any]) -> list[str]:
    """One table row for every template with `{% generation %}`, and their sum."""
    rows, agreements = [], []
    for name, template in generation_templates(data).items():
        try:
            found = [compare_with_generation_mask(tokenizer, template) for tokenizer in tokenizers.values()]
        except RenderError as error:
            rows.append(f"| `{name}` | refused: {error} | | | | | | |")
            continue
        agreements.append(sum(found, MaskAgreement()))
        rows.append(f"| `{name}` | {' | '.join(map(str, astuple(agreements[-1])))} |")
    if agreements:
        rows.append(f"| **all** | {' | '.join(map(str, astuple(sum(agreements, MaskAgreement()))))} |")
    return rows


def oracle_section(results: dict[str, Any]) -> list[str]:
    """The oracle's results as a section of the page."""
    by_conversation, undecided = results["by_conversation"], results["undecided_characters"]
    kinds = ("exact", "template", "refused", "mislabel")
    rows = [
        f"| {name} | {' | '.join(str(counts.get(kind, 0)) for kind in kinds)} | {undecided.get(name, 0)} |"
        for name, counts in by_conversation.items()
    ]
    total = [str(results["outcomes"].get(kind, 0)) for kind in kinds]
    return [
        "## Who said what",
        "",
        "Made by `experiments/role_oracle`, which shares no code with the labels. It changes one text of one "
        "message at a time and watches which characters of `apply_chat_template`'s rendering change with it: "
        f"{results['templates']} templates × {len(rows)} conversations with a tokenizer of one token per "
        f"byte, {results['characters']:,} characters. The oracle cannot attribute *undecided* characters, "
        "because every change of them changes the whole rendering: markers such as `</think>` that a speaker "
        "typed and that the template looks for.",
        "",
        "| conversation | exact | refused by the template | refused by ctxlens | mislabelled "
        "| undecided characters |",
        "|---|---|---|---|---|---|",
        *rows,
        f"| **all** | {' | '.join(total)} | {sum(undecided.values())} |",
        "",
        *(
            f"- Refused by ctxlens: {reason} ({', '.join(names)})"
            for reason, names in results["refused"].items()
        ),
        "",
    ]


def table(data: Path, probes: Iterable[str], oracle: dict[str, Any] | None = None) -> str:
    """The Markdown page."""
    tokenizers, templates, probes = load_tokenizers(data), load_templates(data), list(probes)
    rows, counts, reasons = outcome_rows(tokenizers, templates, probes)
    lines = [
        "# Chat templates",
        "",
        *(oracle_section(oracle) if oracle else []),
        "## Templates and tokenizers",
        "",
        "Made by `experiments/template_matrix.py`. Each real template was rendered with each of the "
        f"tokenizers {', '.join(tokenizers)} and each of {len(probes)} conversations. *Exact* means that the "
        "tokens equal those of `apply_chat_template`; *refused* means a `RenderError` with the reason below; "
        "*exact 4/6* means that two tokenizers were refused (those without a BOS token, by templates that "
        "write one). There is no third outcome. A message left out is one that the template does not write; "
        "it has no tokens.",
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
        "Tokens over all tokenizers and four turns. Every token of the role `assistant` is in the template's "
        "own mask. What only the mask holds is of three kinds. First, the template's text after a response, "
        "which ends the turn (`chat.stops[turn]`). Second, in the templates with a figure in the column "
        "*before*, the template's text before a response that they mark too (an empty think block, their own "
        "role header). Third, with tokenizers that do not know a template's markers, tokens that also hold "
        "the end of another speaker's text. All of these have the role `template` or the other speaker's. "
        "`chat.mask_written()` adds what a model has to write by itself after the generation prompt, up to "
        "the stop token. Whatever a template marks beyond that follows the stop token or belongs to the "
        "prompt, or the tokenizer has no token that ends a turn.",
        "",
        "| template | in both | mask alone: end of turn | mask alone: before | mask alone: straddling | ours "
        "alone | written and in the mask | written alone |",
        "|---|---|---|---|---|---|---|---|",
        *mask_rows(data, tokenizers),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--oracle", type=Path, help="results of experiments/role_oracle/judge_templates.py")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    oracle = json.loads(arguments.oracle.read_text(encoding="utf-8")) if arguments.oracle else None
    arguments.out.write_text(table(arguments.data, PROBES, oracle), encoding="utf-8")


if __name__ == "__main__":
    main()
