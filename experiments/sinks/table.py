"""The user's share of attention with and without template, in four views, by text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.chat.roles import Role
from ctxlens.models import load_model
from ctxlens.models.model import Model
from ctxlens.results import RoleAllocation
from ctxlens.stats import bootstrap_mean
from experiments.role_bias.texts import count_first_as_bos

N_ESSAYS, N_CONVERSATIONS = 6, 26
QUESTION = "\n\nWhat is the main point of this text?"
CONDITIONS = ("template", "plain")
VIEWS = ("raw", "renormalised", "without sinks", "renormalised without sinks")
_RESAMPLES = 10_000


def measure(name: str, data: Path) -> dict[str, Any]:
    """The user's share of every text, condition and view, the differences, and the verdict."""
    model = load_model(name, backend="native", dtype="float32", device="cpu")
    texts = essays(model, data / "paul_graham") + conversations(model, data / "instruct")
    rows = []
    for number, (kind, messages) in enumerate(texts, start=1):
        rendered = {
            "template": count_first_as_bos(model, model.render(messages, add_generation_prompt=True)),
            "plain": model.render_plain(messages, add_generation_prompt=True, bos=False),
        }
        shares = {
            condition: user_share(model.read_roles(chat, sinks=True)) for condition, chat in rendered.items()
        }
        rows.append({"kind": kind, "tokens": rendered["template"].n_tokens, "share": shares})
        print(f"text {number} of {len(texts)}: {rows[-1]['tokens']} tokens", file=sys.stderr, flush=True)
    return {"model": Path(name).name, "texts": len(rows), "rows": rows, **conclude(rows)}


def essays(model: Model, folder: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """The beginnings of essays, 500 to 800 tokens long in equal steps, each followed by a question."""
    files = sorted(folder.glob("*.txt"), key=lambda file: file.name)
    found = []
    for file in files:
        tokens = model.tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        length = 500 + 300 * len(found) // (N_ESSAYS - 1)
        if len(tokens) >= length and "LICENSE" not in file.name:
            text = model.tokenizer.decode(tokens[:length]) + QUESTION
            found.append(("essay", [{"role": "user", "content": text}]))
        if len(found) == N_ESSAYS:
            break
    return found


def conversations(model: Model, folder: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """Conversations of 30 to 150 tokens, up to the last user turn."""
    found = []
    for row in json.loads((folder / "kto_en_demo.json").read_text(encoding="utf-8")):
        messages = [{"role": one["role"], "content": one["content"]} for one in row["messages"]]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if messages and 30 <= model.render_plain(messages).n_tokens <= 150:
            found.append(("conversation", messages))
        if len(found) == N_CONVERSATIONS:
            break
    return found


def user_share(allocation: RoleAllocation) -> dict[str, float]:
    """The user's share in every view, mean over layers and heads."""
    views = (
        allocation,
        allocation.renormalised(),
        allocation.without_sinks(),
        allocation.without_sinks().renormalised(),
    )
    return {
        view: round(float(np.nanmean(of.share(Role.USER))), 5) for view, of in zip(VIEWS, views, strict=True)
    }


def conclude(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences with intervals over texts, and the verdict by the rule written beforehand."""
    found: dict[str, Any] = {"means": {}, "differences": {}, "part": {}}
    for condition in CONDITIONS:
        found["means"][condition] = {
            view: bootstrap_mean([row["share"][condition][view] for row in rows]).as_dict() for view in VIEWS
        }
    for plain in CONDITIONS[1:]:
        by_view = {
            view: np.array([row["share"]["template"][view] - row["share"][plain][view] for row in rows])
            for view in VIEWS
        }
        found["differences"][plain] = {
            view: bootstrap_mean(values).as_dict() for view, values in by_view.items()
        }
        found["part"][plain] = ratio(by_view["renormalised without sinks"], by_view["renormalised"])
    found["verdict"] = decide(found["differences"]["plain"]["renormalised"], found["part"]["plain"])
    return found


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """The ratio of two means over the same texts, with a 95 % bootstrap interval over texts."""
    drawn = np.random.default_rng(0).integers(0, len(above), (_RESAMPLES, len(above)))
    low, high = np.percentile(above[drawn].mean(1) / below[drawn].mean(1), (2.5, 97.5))
    return {"estimate": float(above.mean() / below.mean()), "low": float(low), "high": float(high)}


def decide(fall: Mapping[str, float], part: Mapping[str, float]) -> str:
    """The verdict on the hypothesis that more than half of the fall is sinks."""
    falls = fall["low"] > 0 or fall["high"] < 0
    if falls and part["low"] > -0.5 and part["high"] < 0.5:
        return "supported"
    return "refuted" if part["low"] > 0.5 else "undecided"


def show(found: Mapping[str, Any]) -> str:
    """The table in Markdown."""

    def cell(interval: Mapping[str, float]) -> str:
        return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"

    rows = [(name, found["means"][name]) for name in CONDITIONS]
    rows += [(f"template minus {name}", found["differences"][name]) for name in CONDITIONS[1:]]
    lines = [f"| user share | {' | '.join(VIEWS)} |", "|---" * (len(VIEWS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(of[view]) for view in VIEWS)} |" for name, of in rows]
    parts = "; ".join(f"{name}: {cell(part)}" for name, part in found["part"].items())
    return "\n".join([*lines, "", f"q: {parts}; verdict: {found['verdict']}"])


__all__ = ["measure", "show"]
