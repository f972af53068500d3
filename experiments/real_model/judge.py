"""The verdicts of the experiment, from its grids alone, by the rules in README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctxlens.auditing.asking import without_fact
from ctxlens.chat.roles import Role
from ctxlens.files import write_atomic
from ctxlens.results import HeadMap, NeedleGrid, RoleAllocation
from ctxlens.results.claims import combine, judge
from ctxlens.stats import Interval, bootstrap_mean, paired_difference
from experiments.common import rounded
from experiments.real_model import design
from experiments.real_model.answers import collect, collect_abilities, collect_maps, is_measured

LOSS_MARGIN, BIAS_MARGIN, GAIN_MARGIN = 0.10, 0.05, 0.05
Found = dict[str, Any]


def judge_all(folder: Path, out: Path, names: Iterable[str] | None = None) -> Found:
    """Judge what is there, and write it as JSON.

    Args:
        folder: the measurements: a run, or the answers that are kept in this repository.
        out: the verdicts. Those that are not judged now stay.
        names: the parts to judge, by default all.
    """
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for name in PARTS if names is None else names:
        if is_measured(folder / name):
            found[name] = PARTS[name](folder)
    write_atomic(out, json.dumps(rounded(found), indent=1) + "\n")
    return found


def choose(grid: NeedleGrid, where: pd.Series) -> NeedleGrid:
    """The rows for which a condition holds."""
    return NeedleGrid(grid.frame[where].reset_index(drop=True), grid.meta)


def average(grid: NeedleGrid, base: str, prefixes: tuple[str, ...], column: str = "recall") -> pd.Series:
    """Value by question, a mean over the prefixes."""
    return pd.concat([grid.recall(column, condition=base + one) for one in prefixes], axis=1).mean(axis=1)


def fall(grid: NeedleGrid, prefixes: tuple[str, ...] = ("", "+prefix"), column: str = "recall") -> Interval:
    """Value with the template minus without, paired by question, over texts; a mean over the prefixes."""
    plain, template = (average(grid, base, prefixes, column) for base in ("plain", "template"))
    return grid.difference(plain, template)


def level(grid: NeedleGrid, base: str, prefixes: tuple[str, ...] = ("", "+prefix")) -> Interval:
    """Recall of one condition, over texts."""
    return grid.mean(average(grid, base, prefixes))


def shown(figure: Interval, margin: float | None = None, direction: int = -1) -> Found:
    """A figure as JSON values, with its verdict where a margin is given."""
    verdict = {} if margin is None else {"verdict": judge(figure, direction=direction, margin=margin)}
    return {**figure.as_dict(), **verdict}


def judge_loss(folder: Path) -> Found:
    """Hypothesis 1: the loss over long texts, by length, prefix, haystack, kind of needle and needle."""
    grid = collect(folder / "loss")
    frame = grid.frame
    long = choose(grid, frame["context_tokens"] >= design.LONG)
    by_length = {}
    for length in design.LENGTHS:
        at = choose(grid, frame["context_tokens"] == length)
        if len(at):
            by_length[length] = {
                "fall": shown(fall(at), LOSS_MARGIN),
                "without prefix": shown(fall(at, ("",))),
                "with prefix": shown(fall(at, ("+prefix",))),
                "plain": shown(level(at, "plain")),
                "template": shown(level(at, "template")),
                "levels": {
                    f"{base}{prefix}": shown(level(at, base, (prefix,)))
                    for base in ("plain", "template")
                    for prefix in ("", "+prefix")
                },
            }
    rows = long.frame
    parts = {
        "without prefix": fall(long, ("",)),
        "with a short prefix": fall(choose(long, rows["length_of_prefix"] == "short"), ("+prefix",)),
        "with the full prefix": fall(choose(long, rows["length_of_prefix"] == "full"), ("+prefix",)),
        **_parts_of_long(long),
    }
    needles = {name: choose(long, rows["needle"] == name) for name in sorted(set(rows["needle"]))}
    return {
        "long": {
            "fall": shown(fall(long), LOSS_MARGIN),
            "plain": shown(level(long, "plain")),
            "template": shown(level(long, "template")),
            "word for word": shown(fall(long, column="contains")),
        },
        "by length": by_length,
        "begins at": _beginning({n: one["fall"]["verdict"] for n, one in by_length.items()}),
        "parts": {name: shown(one) for name, one in parts.items()},
        "parts with prefix": {name: shown(one) for name, one in _parts_of_long(long, ("+prefix",)).items()},
        "needles": {name: shown(fall(one)) for name, one in needles.items()},
        "needles with prefix": {name: shown(fall(one, ("+prefix",))) for name, one in needles.items()},
        "empty or failed answers": int(frame["response"].isna().sum()),
    }


def _parts_of_long(long: NeedleGrid, prefixes: tuple[str, ...] = ("", "+prefix")) -> dict[str, Interval]:
    """The fall on the long texts by haystack, wording, and kind of fact."""
    rows = long.frame
    papers = rows["needle"].isin(design.PAPERS)
    where = {
        **{f"haystack {name}": rows["haystack"] == name for name in ("neutral", "essays")},
        **{f"wording {name}": rows["wording"] == name for name in sorted(set(rows["wording"]))},
        "the paper's needles": papers,
        "invented needles": ~papers,
    }
    return {name: fall(choose(long, chosen), prefixes) for name, chosen in where.items()}


def _beginning(verdicts: Mapping[int, str]) -> int | None:
    """The smallest length from which on every length shows the loss."""
    supported = [length for length, verdict in verdicts.items() if verdict == "supported"]
    tails = [n for n in supported if all(verdicts[m] == "supported" for m in verdicts if m >= n)]
    return min(tails, default=None)


def judge_logprob(folder: Path) -> Found:
    """Hypothesis 1: the log-probability of the needle's words, in nats per token."""
    grid = collect(folder / "logprob")
    lengths = sorted(set(grid.frame["context_tokens"]))
    return {
        str(length): shown(
            fall(choose(grid, grid.frame["context_tokens"] == length), ("+prefix",), "needle_logprob")
        )
        for length in lengths
    }


def judge_controls(folder: Path) -> Found:
    """Hypothesis 2: recall with the template minus recall under each control."""
    template = collect(folder / "loss").where(condition="template+prefix", context_tokens=design.DETAIL)
    controls = collect(folder / "controls")
    found = {}
    for condition in design.CONTROLS.split(","):
        found[condition] = controls.recall(condition=condition)
    if is_measured(folder / "foreign"):
        found["a foreign template"] = collect(folder / "foreign").recall()
    told = template.recall()
    figures = {name: shown(template.difference(one, told), LOSS_MARGIN) for name, one in found.items()}
    return {
        "template minus control": figures,
        "recall": {name: float(one.mean()) for name, one in {"template+prefix": told, **found}.items()},
        "verdict": combine(one["verdict"] for one in figures.values()),
    }


def judge_attention(folder: Path) -> Found:
    """Hypothesis 3: the user's share without sinks, the heads that lose the needle, and recall."""
    paths = sorted((folder / "attention").glob("*-plain.safetensors"))
    pairs = [[RoleAllocation.load(p), RoleAllocation.load(Path(str(p).replace("-plain.", "-template.")))]
             for p in paths if Path(str(p).replace("-plain.", "-template.")).exists()]  # fmt: skip
    marked = [RoleAllocation.concat([pair[side] for pair in pairs]) for side in (0, 1)]
    views = {"without sinks": "renormalised without sinks", "as in the paper": "renormalised", "raw": "raw"}
    user = {
        name: [np.nanmean(without_fact(one).share(Role.USER, view=view), axis=(0, 1)) for one in marked]
        for name, view in views.items()
    }
    fact = [one.share(Role.INDICATOR) for one in marked]  # [layer, head, text]
    blocks = np.array([int(p.name[0]) for p in paths])
    chosen = _top(fact[0][..., np.isin(blocks, design.CHOOSING)].mean(-1))
    cells = [int(re.findall(r"\d+", label)[0]) for label in marked[0].query_labels]
    lost = [fact[1][layer, head] - fact[0][layer, head] for layer, head in chosen]
    return {
        "user share": {name: shown(paired_difference(*pair), BIAS_MARGIN) for name, pair in user.items()},
        "levels": {name: [float(one.mean()) for one in pair] for name, pair in user.items()},
        "share on sinks": [float(one.with_sinks_apart().share(Role.SINK).mean()) for one in marked],
        "attention to the needle": shown(paired_difference(*(one.mean((0, 1)) for one in fact))),
        "heads that attend to the needle": chosen,
        "their attention": shown(bootstrap_mean(np.mean(lost, axis=0))),
        "correlation with recall": _correlate(folder, cells, np.mean(lost, axis=0)),
        "by layer": {
            name: np.nanmean(
                without_fact(marked[1]).share(Role.USER, view=view)
                - without_fact(marked[0]).share(Role.USER, view=view), axis=(1, 2)
            ).tolist()
            for name, view in views.items()
        },
    }  # fmt: skip


def _top(attention: np.ndarray) -> list[tuple[int, int]]:
    """The tenth of the heads with the most attention to the needle."""
    n = max(1, round(0.1 * attention.size))
    best = np.argsort(-attention, axis=None, kind="stable")[:n]
    layers, heads = np.unravel_index(best, attention.shape)
    return [(int(layer), int(head)) for layer, head in zip(layers, heads, strict=True)]


def _correlate(folder: Path, cells: list[int], lost: np.ndarray, n: int = 2000) -> Found:
    """Spearman's ρ over texts between the change of attention and the change of recall of the text."""
    from scipy.stats import spearmanr

    grid = collect(folder / "loss")
    grid = grid.where(context_tokens=min(design.DETAIL, int(grid.frame["context_tokens"].max())))
    change = grid.recall(condition="template+prefix") - grid.recall(condition="plain+prefix")
    of_text = change.groupby(change.index // design.PER_TEXT).mean()
    recall = np.array([of_text[cell // design.PER_TEXT] for cell in cells])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(n):
        at = rng.integers(0, len(recall), len(recall))
        if np.ptp(recall[at]) and np.ptp(lost[at]):
            drawn.append(spearmanr(recall[at], lost[at])[0])
    if not drawn:  # one of the two does not vary
        return {"n": len(recall), "verdict": "undecided"}
    low, high = np.quantile(drawn, [0.025, 0.975])
    figure = Interval(float(np.asarray(spearmanr(recall, lost))[0]), float(low), float(high), len(recall))
    return shown(figure, 0.3, direction=1)


def judge_cause(folder: Path) -> Found:
    """Hypothesis 4: gains by steering on the judging blocks, with α chosen on the others."""
    loss, unsteered = _unsteered(folder)
    tried = collect(folder / "cause")

    def gain(of: NeedleGrid, heads: str, alpha: float, base: str = "template") -> pd.Series:
        steered = of.recall(heads=heads, alpha=alpha, condition=f"{base}+prefix")
        return _gain(steered, unsteered[base])

    doses = {
        heads: {
            float(alpha): loss.mean(gain(tried, heads, alpha))
            for alpha in sorted(set(tried.where(heads=heads).frame["alpha"]), reverse=True)
        }
        for heads in ("all", "retrieval")
    }
    best = {heads: max(of, key=lambda alpha: of[alpha].estimate) for heads, of in doses.items()}
    found = {
        "chosen α": best,
        "gains while choosing": {h: {str(a): shown(one) for a, one in of.items()} for h, of in doses.items()},
        "the paper's α of 0.95": shown(doses["all"][0.95]),
    }
    if not is_measured(folder / "cause-judged"):
        return found
    judged = collect(folder / "cause-judged")
    steered = {base: judged.where(condition=f"{base}+prefix") for base in ("plain", "template")}
    return {**found, **judge_steering(steered, unsteered, loss)}


def judge_steering(
    steered: Mapping[str, NeedleGrid], unsteered: Mapping[str, pd.Series], texts: NeedleGrid
) -> Found:
    """The rule of hypothesis 4.

    Args:
        steered: answers of steered models without (`plain`) and with the template (`template`).
        unsteered: recall by question, likewise.
        texts: a grid with these questions, for their texts.
    """

    def gain(heads: str, base: str = "template") -> pd.Series:
        return _gain(steered[base].recall(heads=heads), unsteered[base])

    everything, plain, chosen, random = gain("all"), gain("all", "plain"), gain("retrieval"), gain("random")
    figures = {
        "all heads, template": texts.mean(everything),
        "template minus no template": texts.difference(plain, everything),
        "chosen heads minus random heads": texts.difference(random, chosen),
    }
    return {
        "judged": {name: shown(one, GAIN_MARGIN, direction=1) for name, one in figures.items()},
        "verdict": combine(judge(one, direction=1, margin=GAIN_MARGIN) for one in figures.values()),
        "all heads, no template": shown(texts.mean(plain)),
        "chosen heads": shown(texts.mean(chosen)),
        "random heads": shown(texts.mean(random)),
    }


def judge_fresh(folder: Path) -> Found:
    """Hypothesis 4 and the small set again, on texts that nothing was chosen on."""
    steered = {"template": collect(folder / "fresh"), "plain": collect(folder / "fresh-plain")}
    unsteered = {base: grid.recall(heads="none") for base, grid in steered.items()}
    texts = steered["template"]
    change = unsteered["template"] - unsteered["plain"]
    found = {
        "recall": {base: shown(texts.mean(one)) for base, one in unsteered.items()},
        "fall": shown(texts.mean(change), LOSS_MARGIN),
        **judge_steering(steered, unsteered, texts),
    }
    if (small := _whole(folder / "fresh-small", texts)) is not None:
        found["small"] = judge_small_set(small, unsteered, texts)
        if (plain := _whole(folder / "fresh-small-plain", texts)) is not None:
            found["small"] |= judge_small_set_without_template(plain, small, unsteered, texts)
    if (modes := _whole(folder / "fresh-modes", texts)) is not None:
        found["modes"] = judge_fresh_modes(modes, unsteered, texts)
    if (formula := _whole(folder / "fresh-formula", texts)) is not None:
        gain = _gain(formula.recall(heads="all"), unsteered["template"])
        found["the paper's α of 0.95"] = shown(texts.mean(gain), GAIN_MARGIN, direction=1)
    return found


def _whole(folder: Path, texts: NeedleGrid) -> NeedleGrid | None:
    """A measurement, if it has all questions of the texts, as the rules need."""
    grid = collect(folder) if is_measured(folder) else None
    return grid if grid is not None and set(grid.frame["cell"]) == set(texts.frame["cell"]) else None


def judge_small_set_without_template(
    without: NeedleGrid, small: NeedleGrid, unsteered: Mapping[str, pd.Series], texts: NeedleGrid
) -> Found:
    """Whether the small set gains more with the template than without it, on the fresh texts."""
    plain = _gain(without.recall(heads="small"), unsteered["plain"])
    template = _gain(small.recall(heads="small"), unsteered["template"])
    return {
        "no template": shown(texts.mean(plain)),
        "template minus no template": shown(texts.difference(plain, template), GAIN_MARGIN, direction=1),
    }


def judge_modes(folder: Path) -> Found:
    """Gains of all heads in the other modes, on the judging blocks."""
    loss, unsteered = _unsteered(folder)
    grid = collect(folder / "modes")
    return {
        mode: shown(loss.mean(_gain(grid.recall(heads=mode), unsteered["template"])))
        for mode in design.OTHER_MODES
    }


def judge_fresh_modes(grid: NeedleGrid, unsteered: Mapping[str, pd.Series], texts: NeedleGrid) -> Found:
    """All heads in the other modes on the fresh texts; arguments as in `judge_steering`."""
    found: Found = {}
    for mode in design.OTHER_MODES:
        gains = {
            base: _gain(grid.recall(condition=f"{base}+prefix", heads=mode), unsteered[base])
            for base in ("template", "plain")
        }
        figures = {
            "template": texts.mean(gains["template"]),
            "template minus no template": texts.difference(gains["plain"], gains["template"]),
        }
        found[mode] = {
            **{name: shown(one, GAIN_MARGIN, direction=1) for name, one in figures.items()},
            "no template": shown(texts.mean(gains["plain"])),
            "verdict": combine(judge(one, direction=1, margin=GAIN_MARGIN) for one in figures.values()),
        }
    return found


def judge_maps(folder: Path) -> Found:
    """The heads whose steering or removal after the text changes the needle's log-probability most."""
    found: Found = {}
    for kind in ("steer", "zero"):
        maps = collect_maps(folder / "maps", kind)
        whole = HeadMap(np.concatenate([one.effects for one in maps]), np.arange(len(maps)), kind)
        low, high = whole.interval()
        ranking = whole.ranking(ascending=kind == "zero")
        found[kind] = {
            "texts": len(maps),
            "decided heads": int(whole.decided().sum()),
            "first ten": [
                {"head": f"{at[0]}.{at[1]}", "effect": float(whole.values[at]), "low": float(low[at]),
                 "high": float(high[at])}
                for at in ranking[:10]
            ],
            "by layer": whole.values.mean(1).tolist(),
            "values": whole.values.tolist(),
        }  # fmt: skip
        if kind == "steer":
            found["ranking"] = ranking[: max(design.SIZES)]
    return found


def judge_small(folder: Path) -> Found:
    """Choose the small set on the choosing blocks, and judge it against random heads on the others."""
    loss, unsteered = _unsteered(folder)
    tried = collect(folder / "small")
    gains = {
        k: loss.mean(_gain(tried.recall(heads=f"first-{k}"), unsteered["template"])) for k in design.SIZES
    }
    most = max(one.estimate for one in gains.values())
    chosen = min(k for k, one in gains.items() if one.estimate >= min(most, 2 / 3 * most))
    heads = judge_maps(folder)["ranking"][:chosen]
    found = {
        "gains while choosing": {str(k): shown(one) for k, one in gains.items()},
        "heads": heads,
    }
    if not is_measured(folder / "small-judged"):
        return found
    return {**found, **judge_small_set(collect(folder / "small-judged"), unsteered, loss)}


def judge_small_set(steered: NeedleGrid, unsteered: Mapping[str, pd.Series], texts: NeedleGrid) -> Found:
    """The rule of the small set; arguments as in `judge_steering`, with the template alone."""
    small, random = (_gain(steered.recall(heads=name), unsteered["template"]) for name in ("small", "random"))
    over = texts.difference(random, small)
    fall_there = (unsteered["plain"] - unsteered["template"])[small.index]
    restores = judge(over, direction=1, margin=GAIN_MARGIN)
    if restores == "supported" and small.mean() < 0.5 * fall_there.mean():
        restores = "not supported"
    return {
        "small set": shown(texts.mean(small)),
        "small set minus random heads": shown(over, GAIN_MARGIN, direction=1),
        "fall on the same questions": shown(texts.mean(fall_there)),
        "verdict": restores,
    }


def judge_cost(folder: Path) -> Found:
    """The change of recall of general knowledge under every steering."""
    tables = collect_abilities(folder / "cost")
    before = tables.pop("none").set_index("question")["recall"]
    costs = {
        name: bootstrap_mean((frame.set_index("question")["recall"] - before).to_numpy())
        for name, frame in tables.items()
    }
    return {
        "unsteered": float(before.mean()),
        **{name: shown(one, LOSS_MARGIN) for name, one in costs.items()},
    }


def _unsteered(folder: Path) -> tuple[NeedleGrid, dict[str, pd.Series]]:
    """The grid of the loss at the detail length, and its recall by question after a prefix."""
    loss = collect(folder / "loss").where(context_tokens=design.DETAIL)
    return loss, {base: loss.recall(condition=f"{base}+prefix") for base in ("plain", "template")}


def _gain(steered: pd.Series, unsteered: pd.Series) -> pd.Series:
    """Recall steered minus unsteered, by the questions that were asked under steering."""
    return (steered - unsteered).dropna()


PARTS: Mapping[str, Callable[[Path], Found]] = {
    "loss": judge_loss,
    "logprob": judge_logprob,
    "controls": judge_controls,
    "attention": judge_attention,
    "cause": judge_cause,
    "modes": judge_modes,
    "maps": judge_maps,
    "small": judge_small,
    "cost": judge_cost,
    "fresh": judge_fresh,
}
"""What is judged, by the measurement that it needs first."""
