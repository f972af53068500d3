"""How much of the role bias of a pretrained model is attention sinks?

Question: the user's share of attention falls under the chat template; how much of that fall is left without
          attention sinks, or if both conditions begin with the same token?
Run:      the commands in README.md, section "On pretrained models"
Expected: written beforehand in README.md, with the rule of the verdict.
Cost:     30 minutes on one idle core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.chat.roles import Role
from ctxlens.files import write_atomic
from ctxlens.models import load_model
from ctxlens.models.model import Model
from ctxlens.results import RoleAllocation
from ctxlens.runs import Parts, Run, package_versions
from experiments.role_bias.conclusions import conclude, tables
from experiments.role_bias.texts import Text, chats, conditions, essays

HERE = Path(__file__).parent
MARKERS = (Role.TEMPLATE, Role.INDICATOR, Role.PAD, Role.SINK)
SHORT, LONG = 500, 2000
FEWER = 3
"""Conditions of chats and long essays: without the one that leaves out the system prompt."""


def user_shares(allocation: RoleAllocation, marks_turns: bool) -> dict[str, list[float]]:
    """The user's share in every view, mean over heads, by layer.

    Args:
        allocation: shares in which a BOS token at the start counts as BOS.
        marks_turns: whether that token is a role marker; then *renormalised* and the views without sinks
            count it as template.
    """
    dropped = (*MARKERS, Role.BOS) if marks_turns else MARKERS
    quiet = allocation.without_sinks()
    views = {
        "raw": allocation,
        "renormalised, first token as BOS": allocation.renormalised(MARKERS),
        "renormalised": allocation.renormalised(dropped),
        "without sinks": quiet,
        "renormalised without sinks": quiet.renormalised(dropped),
    }
    return {view: _by_layer(found.share(Role.USER)) for view, found in views.items()}


def _by_layer(share: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in np.nanmean(share, axis=(1, 2))]


def read(model: Model, text: Text, names: Iterable[str]) -> dict[str, Any]:
    """The user's share of one text under each of the named conditions."""
    asked = conditions(model)
    marks_turns = model.tokenizer.bos_token_id is not None and _marks_turns(model)
    found: dict[str, Any] = {"text": text.name, "tokens": {}, "share": {}}
    for name in names:
        chat = asked[name](text)
        found["tokens"][name] = chat.n_tokens
        found["share"][name] = user_shares(model.read_roles(chat, sinks=True), marks_turns)
    return found


def over_layers(row: dict[str, Any]) -> dict[str, Any]:
    """The shares of one text as means over layers; the parts hold every layer."""
    share = {
        name: {view: round(float(np.nanmean(layers)), 5) for view, layers in views.items()}
        for name, views in row["share"].items()
    }
    return {**row, "share": share}


def _marks_turns(model: Model) -> bool:
    """Whether the model's BOS token is a role marker."""
    if not model.tokenizer.chat_template:
        return False
    chat = model.render([{"role": "user", "content": "a"}])
    return chat.tokens[0] == model.tokenizer.bos_token_id and chat.role[0] == Role.TEMPLATE


def read_group(
    model: Model, parts: Parts, group: str, texts: Iterable[Text], names: Sequence[str]
) -> list[dict[str, Any]]:
    """All texts of a group, each kept as a finished part."""
    rows = []
    for number, text in enumerate(texts):
        part, start = f"{group}-{number:02d}", time.monotonic()
        rows.append(parts.get(part, partial(read, model, text, names)))
        seconds = time.monotonic() - start
        print(f"{part} {text.name} {rows[-1]['tokens']}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Read all texts of all groups; finished ones are taken from the folder of parts."""
    model = load_model(options.model, backend="native", dtype="float32", device="cpu")
    names = list(conditions(model))
    config = {"model": Path(options.model).name}
    parts = Parts(Run.open(options.out / options.name, study="role bias", config=config), "shares", config)
    groups: dict[str, list[dict[str, Any]]] = {}
    if options.short:
        texts = essays(model, options.essays, SHORT, options.short)
        groups[f"essays, {SHORT} tokens"] = read_group(model, parts, "short", texts, names)
    if options.chats:
        texts = chats(model, options.conversations, options.chats)
        groups["chats"] = read_group(model, parts, "chats", texts, names[:FEWER])
    if options.long:
        texts = essays(model, options.essays, LONG, options.long)
        groups[f"essays, {LONG:,} tokens"] = read_group(model, parts, "long", texts, names[:FEWER])
    return {
        "command": f"python -m experiments.role_bias.pretrained --name {options.name}",
        "model": config["model"],
        "versions": package_versions(),
        "groups": groups,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, conclude, and write `pretrained-NAME.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.role_bias.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a transformers checkpoint")
    parser.add_argument("--name", required=True, help="the model's name in the results")
    parser.add_argument("--essays", type=Path, required=True, help="folder of .txt files, one essay each")
    parser.add_argument("--conversations", type=Path, help="JSON list of rows with `messages`")
    parser.add_argument("--short", type=int, default=32, help=f"essays of {SHORT} tokens")
    parser.add_argument("--chats", type=int, default=32, help="conversations with several speakers")
    parser.add_argument("--long", type=int, default=12, help=f"essays of {LONG:,} tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/role_bias"), help="folder of finished parts")
    parser.add_argument(
        "--no-results", action="store_true", help="only read; several processes may share --out"
    )
    options = parser.parse_args(argv)
    needed = [options.essays, *([options.conversations] if options.chats else [])]
    missing = [path for path in needed if path is None or not path.exists()]
    if missing:
        print(f"skipped: {missing[0]} does not exist; give a folder of essays and a file of conversations.")
        return
    found = measure(options)
    if options.no_results:
        return
    found["conclusions"] = {group: conclude(rows) for group, rows in found["groups"].items()}
    found["groups"] = {group: [over_layers(row) for row in rows] for group, rows in found["groups"].items()}
    write_atomic(HERE / f"pretrained-{options.name}.json", json.dumps(found) + "\n")
    print(tables(found["conclusions"]))


if __name__ == "__main__":
    main()
