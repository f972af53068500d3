"""Is the score any good? Every layer and reduction, the log-probability gap and simple baselines, ranked.

What is compared and how was written before the first run: the attention score as the paper would take it
(mean_of_best at its relative depth), the best of all layers and reductions (chosen after the fact, so
optimistic), lp_gap, and the baselines of `baselines.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from baselines import baselines
from data import FAMILIES, Labelled, family_of, organism_world, t0_world
from figure import draw
from ranking import auroc, auroc_at_equal_length, difference, rank

from ctxlens.chat.data import Conversation
from ctxlens.models import Model, load_model
from ctxlens.results import Scores
from ctxlens.runs import package_versions
from ctxlens.scoring import score_conversations
from ctxlens.scoring.lp_gap import add_lp_gap
from ctxlens.scoring.selection import choose_layer, select_turns, selection_quality

CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
ORGANISM_CONVERSATIONS = 900
T0_CONVERSATIONS = {"document": 480, "closed": 360, "options": 180}


def main() -> None:
    """Score both data sets with small models, rank the scores, write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("t0", type=Path, help="T0's training data: source, prompt, completion")
    parser.add_argument("stories", type=Path, help="a checkpoint of stories260K")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--figure", type=Path, help="write the figure there, as HTML")
    given = parser.parse_args()
    began = time.perf_counter()
    models = {
        "organism-chat": load_model("organism-chat", backend="native"),
        "stories260K": load_model(given.stories, backend="native", chat_template=CHATML),
    }
    organism = organism_world(ORGANISM_CONVERSATIONS, given.seed)
    t0 = t0_world(
        given.t0,
        lambda one: all(_fits(model, one) for model in models.values()),
        per_kind=T0_CONVERSATIONS,
        seed=given.seed,
    )
    studies = {"organism's world, organism-chat": study(models["organism-chat"], organism, given.seed)}
    for name, model in models.items():
        studies[f"T0, {name}"] = study(model, t0, given.seed)
    families = Counter(family_of(str(one.labels["source"])) for one in t0.conversations)
    results = {
        "seed": given.seed,
        "versions": package_versions(),
        "families": {name: families[name] for name in FAMILIES},
        "seconds": round(time.perf_counter() - began),
        "studies": studies,
    }
    given.out.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    if given.figure:
        draw(results["studies"]).write_html(
            given.figure, include_plotlyjs="directory", config={"displayModeBar": False}
        )


def study(model: Model, world: Labelled, seed: int) -> dict[str, Any]:
    """Every score of one model on one data set, ranked against all other answers and against each kind."""
    scores = score_conversations(model, world.conversations, layers="all", kinds=world.kinds)
    scores = add_lp_gap(model, world.conversations, scores)
    turns = scores.frame.drop_duplicates(["conversation", "turn"]).reset_index(drop=True)
    kinds = turns["kind"].to_numpy(dtype=str)
    values = all_scores(scores, world)
    positive = kinds == world.positive
    ranked = rank(values, positive, turns["conversation"].to_numpy(), seed=seed)
    length = values["prompt length"]
    table = {}
    for name, ranking in ranked.items():
        at_equal, pairs = auroc_at_equal_length(positive, values[name], length)
        table[name] = {
            **ranking.summary(),
            "auroc_at_equal_length": at_equal,
            "pairs_at_equal_length": pairs,
            "auroc_against": {
                kind: auroc(positive[keep], values[name][keep])
                for kind in sorted(set(kinds) - {world.positive})
                if (keep := positive | (kinds == kind)).any()
            },
        }
    layer = choose_layer(model.n_layers, rule="middle")
    paper = f"layer {layer}, mean_of_best"
    best = max((name for name in ranked if name.startswith("layer")), key=lambda name: ranked[name].auroc)
    rivals = [
        "lp_gap",
        "prompt length",
        "response length",
        "overlap, words",
        "overlap, pairs of words",
        "uniform",
    ]
    best_layer = int(best.split()[1].rstrip(","))
    return {
        "answers": len(turns),
        "kinds": dict(Counter(kinds.tolist())),
        "paper": paper,
        "best": best,
        "scores": table,
        "paper_minus": {name: difference(ranked[paper], ranked[name]) for name in [*rivals, best]},
        "best_minus": {name: difference(ranked[best], ranked[name]) for name in rivals},
        "selection": rules(scores, world, {paper: layer, f"layer {best_layer}, mean_of_best": best_layer}),
    }


def all_scores(scores: Scores, world: Labelled) -> dict[str, np.ndarray]:
    """Values by name, in the order of the turns."""
    turns = scores.frame.drop_duplicates(["conversation", "turn"])
    values: dict[str, np.ndarray] = {}
    for layer in sorted(scores.frame["layer"].unique().tolist()):
        for reduction in Scores.REDUCTIONS:
            values[f"layer {layer}, {reduction}"] = scores.layer(layer, reduction).to_numpy(dtype=float)
    values["lp_gap"] = turns["lp_gap"].to_numpy(dtype=float)
    values["uniform"] = turns["uniform"].to_numpy(dtype=float)
    by_id = {one.id: one for one in world.conversations}
    simple = [
        baselines(by_id[name], int(turn))
        for name, turn in zip(turns["conversation"], turns["turn"], strict=True)
    ]
    return values | {name: np.array([one[name] for one in simple]) for name in simple[0]}


def rules(scores: Scores, world: Labelled, layers: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Precision and recall of the rules of selection, at some layers and of lp_gap."""
    truth = {turn for turn, kind in world.kinds.items() if kind == world.positive}
    chosen: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        for rule in (
            {"beta": 0.6},
            {"beta": "mixture"},
            {"beta": "valley"},
            {"top_share": 0.3},
            {"per_length_quantile": 0.7},
        ):
            (kind, value), *_ = rule.items()
            chosen[f"{name}: {kind} {value}"] = {"layer": layer, **rule}
    for rule in ({"top_share": 0.3}, {"per_length_quantile": 0.7}):
        (kind, value), *_ = rule.items()
        chosen[f"lp_gap: {kind} {value}"] = {"reduction": "lp_gap", **rule}
    found = {}
    for name, rule in chosen.items():
        quality = selection_quality(select_turns(scores, **rule), truth)
        found[name] = {
            "selected": quality.selected / quality.turns,
            "precision": quality.precision,
            "recall": quality.recall,
        }
    return found


def _fits(model: Model, conversation: Conversation) -> bool:
    """Whether the window holds the whole conversation, with an answer to score."""
    chat = model.render(conversation.messages, max_tokens=100_000)
    return chat.n_tokens <= model.n_ctx and bool(chat.response_turns())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return value


if __name__ == "__main__":
    main()
