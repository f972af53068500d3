"""The verdicts as Markdown, from the committed results: `python -m experiments.real_model.table [FILE]`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.common import markdown

Found = Mapping[str, Any]
NAMES = {
    "plain+matched+prefix": "as much neutral text",
    "plain+bos+prefix": "the token `<\\|im_start\\|>` first",
    "template+nosystem+prefix": "the template without its system prompt",
    "a foreign template": "Llama 3's template",
}

COSTS = {
    "all": "all heads", "retrieval": "heads that attend to the fact", "small": "the small set",
    "prompt-only": "all heads, mode `prompt-only`", "compounding": "all heads, mode `compounding`",
}  # fmt: skip


def main() -> None:
    """Print the tables of a file of results, by default that of SmolLM2."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results-smollm2.json"
    print("\n\n".join(tables(json.loads(path.read_text(encoding="utf-8")))))


def tables(found: Found) -> Iterator[str]:
    """Every table whose part was measured."""
    yield markdown(["claim", "measure", "figure", "verdict"], claims(found))
    if "loss" in found:
        yield markdown(
            ["tokens", "no prefix: plain", "template", "prefix: plain", "template", "both", "with prefix"],
            by_length(found["loss"]),
        )
        for kind, title in (("parts", "part of the long texts"), ("needles", "fact")):
            rows = parts(found["loss"][kind], found["loss"][f"{kind} with prefix"])
            yield markdown([title, "both", "with prefix"], rows)
    if "cause" in found:
        yield markdown(["steered", "α", "gain while choosing"], doses(found["cause"]))


def claims(found: Found) -> Iterator[list[str]]:
    """One row for every figure that a rule judges."""
    if "loss" in found:
        long = found["loss"]["long"]
        levels = f"recall {_number(long['plain'])} without and {_number(long['template'])} with the template"
        yield ["1. loss", f"{levels}, 2,000 tokens and more", *_judged(long["fall"])]
        yield ["", "begins at", str(found["loss"]["begins at"] or "no length"), ""]
    for length, one in found.get("logprob", {}).items():
        yield ["", f"log-probability of the fact at {int(length):,} tokens, nats per token", *_judged(one)]
    for name, one in found.get("controls", {}).get("template minus control", {}).items():
        yield ["2. template or text", f"template minus {NAMES[name]}", *_judged(one)]
    if "attention" in found:
        yield from _bias(found["attention"])
    if "fresh" in found:
        yield from _cause(found["fresh"], "twelve fresh texts")
    if "judged" in found.get("cause", {}):
        yield from _cause(found["cause"], "the first eight texts")
    for mode, one in found.get("modes", {}).items():
        yield ["", f"gain by steering, the first eight texts: all heads, mode `{mode}`", *_judged(one)]
    for mode, one in found.get("fresh", {}).get("modes", {}).items():
        for name in ("template", "template minus no template", "no template"):
            yield [
                "4. other modes",
                f"gain by steering, twelve fresh texts: {mode}, {name}",
                *_judged(one[name]),
            ]
    if "the paper's α of 0.95" in found.get("fresh", {}):
        figure = found["fresh"]["the paper's α of 0.95"]
        yield ["4. cause", "gain by steering, twelve fresh texts: α .95 by the formula", *_judged(figure)]
    for where in ("fresh", "small"):
        one = found.get("small", {}) if where == "small" else found.get(where, {}).get("small", {})
        if "small set" in one:
            size = len(found["small"]["heads"])
            there = _number(one["fall on the same questions"])
            yield [
                "4. a small set",
                f"gain of {size} heads (loss there {there})",
                interval(one["small set"]),
                one["verdict"],
            ]
            yield ["", "… minus as many random heads", *_judged(one["small set minus random heads"])]
            for name in ("template minus no template", "no template"):
                if name in one:
                    row = _judged(one[name])
                    yield ["4. a small set" if row[1] else "", f"gain of {size} heads: {name}", *row]
    for name, one in found.get("cost", {}).items():
        if name != "unsteered":
            yield ["4. cost", f"general knowledge, steered: {COSTS[name]}", *_judged(one)]


def _cause(found: Found, texts: str) -> Iterator[list[str]]:
    """The rule of hypothesis 4 on some texts."""
    if "fall" in found:
        levels = " and ".join(_number(one) for one in found["recall"].values())
        yield [
            "4. cause",
            f"recall with the template and without it, {texts}: {levels}",
            *_judged(found["fall"]),
        ]
    for name, one in found["judged"].items():
        yield ["4. cause", f"gain by steering, {texts}: {name}", *_judged(one)]
    for name in ("all heads, no template", "chosen heads", "random heads"):
        yield ["", f"gain by steering, {texts}: {name}", interval(found[name]), ""]


def _bias(found: Found) -> Iterator[list[str]]:
    for view, one in found["user share"].items():
        levels = " and ".join(f"{value:.3f}" for value in found["levels"][view])
        verdict = one["verdict"] if view == "without sinks" else ""
        yield ["3. role bias", f"user's share, {view}: {levels}", interval(one, 3), verdict]
    first, second = found["share on sinks"]
    yield ["", f"share on sinks: {first:.2f} without and {second:.2f} with the template", "", ""]
    yield ["", "attention to the fact, all heads", *_judged(found["attention to the needle"], 4)]
    yield ["", "… the tenth of the heads that attend to it most", *_judged(found["their attention"], 3)]
    yield [
        "",
        "correlation of both falls over texts (Spearman's ρ)",
        *_judged(found["correlation with recall"]),
    ]


def by_length(loss: Found) -> Iterator[list[str]]:
    """Recall at every length."""
    for length, one in loss["by length"].items():
        levels = one["levels"]
        yield [
            f"{int(length):,}",
            *(_number(levels[name]) for name in ("plain", "template", "plain+prefix", "template+prefix")),
            f"{interval(one['fall'])}, {one['fall']['verdict']}",
            interval(one["with prefix"]),
        ]


def parts(found: Found, with_prefix: Found) -> Iterator[list[str]]:
    """The change by part, a mean over prefixes, and with the prefix alone."""
    for name, one in found.items():
        yield [name, interval(one), interval(with_prefix.get(name, {}))]


def doses(cause: Found) -> Iterator[list[str]]:
    """The gains with every strength that was tried."""
    for heads, gains in cause["gains while choosing"].items():
        name = "all heads" if heads == "all" else "heads that attend to the fact"
        for alpha, one in gains.items():
            yield [name, alpha, interval(one)]


def interval(one: Found, digits: int = 2) -> str:
    """A difference with its interval."""
    if "estimate" not in one:
        return "–"
    return _short(f"{one['estimate']:+.{digits}f} [{one['low']:+.{digits}f}, {one['high']:+.{digits}f}]")


def _number(one: Found) -> str:
    return _short(f"{one['estimate']:.2f}")


def _short(text: str) -> str:
    """Numbers without a leading zero, and with a true minus sign."""
    return re.sub(r"(?<!\d)0\.", ".", text).replace("-", "−")


def _judged(one: Found, digits: int = 2) -> list[str]:
    return [interval(one, digits), one.get("verdict", "")]


if __name__ == "__main__":
    main()
