"""The measurements of the experiment, block by block, each into files that are never measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ctxlens.auditing.asking import read_with_fact
from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.knowledge import KNOWLEDGE
from ctxlens.evals.needle.config import WORDINGS
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads import Answers, Head, act_after_the_text
from ctxlens.heads.choose import draw_random_heads
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.results import Ability, RoleAllocation
from ctxlens.runs import Run
from experiments.real_model import design


@dataclass(frozen=True)
class Bench:
    """The model, the haystacks, the run folder and the blocks of one process."""

    model: Model
    haystacks: list[Haystack]
    run: Run
    blocks: Sequence[int]
    lengths: Sequence[int]
    """Context lengths of the loss."""
    detail: int
    """Context length of everything else."""

    def each(self, lengths: Sequence[int]) -> Iterator[tuple[int, str, list[Cell]]]:
        """The block, the wording and the cells of some lengths, one wording after the other."""
        for block in self.blocks:
            for wording, cells in design.build_block(self.model.tokenizer, self.haystacks, block).items():
                yield block, wording, [cell for cell in cells if cell.context_tokens in lengths]

    def one_of_each(self) -> Iterator[tuple[int, str, Cell]]:
        """The block, the wording and one cell of every text of the detail length."""
        for block, wording, cells in self.each((self.detail,)):
            yield block, wording, cells[(block + list(WORDINGS).index(wording)) % design.PER_TEXT]

    def only(self, blocks: Sequence[int]) -> Bench:
        """The same with those of its blocks that are among these."""
        return replace(self, blocks=[block for block in self.blocks if block in blocks])

    def ask(
        self,
        name: str,
        conditions: str,
        lengths: Sequence[int],
        *,
        score: str = "recall,contains",
        settings: Sequence[Setting] = (Setting("model"),),
    ) -> None:
        """Ask the cells of all blocks into `BLOCK-WORDING.parquet`."""
        for block, wording, cells in self.each(lengths):
            config = design.config(wording, conditions, score=score)
            path = f"{block}-{wording}.parquet"
            run_settings(
                self.model, cells, config, settings, batch_tokens=design.BATCH_TOKENS, out=self.run, name=path
            )
            print(f"{name}: block {block}, {wording}", flush=True)


def measure_loss(bench: Bench) -> None:
    """Recall at every length, with and without template and prefix."""
    bench.ask("loss", design.CONDITIONS, bench.lengths)


def measure_logprob(bench: Bench) -> None:
    """Log-probability of the needle's words after its prefix."""
    bench.ask("logprob", design.PREFIXED, (design.LONG, bench.detail), score="logprob")


def measure_controls(bench: Bench) -> None:
    """Recall under the controls."""
    bench.ask("controls", design.CONTROLS, (bench.detail,))


def measure_foreign(bench: Bench) -> None:
    """Recall under another model's template, which the model was loaded with."""
    bench.ask("foreign", "template+prefix", (bench.detail,))


def measure_attention(bench: Bench) -> None:
    """Attention by role and to the needle at the position that produces the answer, one question per text."""
    for block, wording, cell in bench.one_of_each():
        for condition in parse_conditions(design.PREFIXED):
            name = f"{block}-{wording}-{replace(condition, prefix=False).name}.safetensors"
            if not bench.run.has(name):
                bench.run.save(name, read_cell(bench.model, cell, wording, condition))
        print(f"attention: block {block}, {wording}", flush=True)


def read_cell(model: Model, cell: Cell, wording: str, condition: Condition) -> RoleAllocation:
    """The attention by role in one cell; role `indicator` stands for the needle's own tokens."""
    return read_with_fact(model, render_cell(model, cell, design.config(wording), condition), cell)


def measure_cause(bench: Bench) -> None:
    """Steer on the choosing blocks with every α."""
    heads = _fact_heads(_judged(bench))
    tries = [_steer("all", "all", alpha) for alpha in design.ALPHAS]
    tries += [_steer("retrieval", heads, alpha) for alpha in design.ALPHAS_OF_HEADS]
    bench.only(design.CHOOSING).ask("cause", "template+prefix", (bench.detail,), settings=tries)


def measure_verdict_on_cause(bench: Bench) -> None:
    """Steer on the judging blocks with the α that the choosing blocks preferred, and with random heads."""
    found = _judged(bench)
    heads, best = _fact_heads(found), found["cause"]["chosen α"]
    settings = [_steer("all", "all", best["all"]), _steer("retrieval", heads, best["retrieval"])]
    settings += _random(bench, heads, best["retrieval"])
    bench.only(design.JUDGING).ask("cause-judged", design.PREFIXED, (bench.detail,), settings=settings)


def measure_modes(bench: Bench) -> None:
    """Steer all heads of the judging blocks in the other modes."""
    bench.only(design.JUDGING).ask("modes", "template+prefix", (bench.detail,), settings=_other_modes(bench))


def _other_modes(bench: Bench) -> list[Setting]:
    chosen = _judged(bench)["cause"]["chosen α"]["all"]
    return [
        Setting("model", steering=Steering(alpha, mode=mode), heads=mode)
        for mode, alpha in zip(design.OTHER_MODES, (chosen, design.ALPHAS[0]), strict=True)
    ]


def measure_cost(bench: Bench) -> None:
    """Ask questions of general knowledge, unsteered and under every chosen steering."""
    found = _judged(bench)
    best = found["cause"]["chosen α"]
    settings = [
        Setting("model"),
        _steer("all", "all", best["all"]),
        _steer("retrieval", _fact_heads(found), best["retrieval"]),
        _steer("small", _pairs(found["small"]["heads"]), design.MAP_ALPHA),
        *_other_modes(bench),
    ]
    for setting in settings:
        name = f"{setting.heads}.parquet"
        if not bench.run.has(name):
            bench.run.save(name, _ask_knowledge(bench.model, setting))
        print(f"cost: {setting.heads}", flush=True)


def _ask_knowledge(model: Model, setting: Setting) -> Ability:
    steering = setting.steering
    with (
        nullcontext()
        if steering is None
        else model.steer(steering.alpha, heads=steering.heads, mode=steering.mode)
    ):
        return run_closed_book(model, KNOWLEDGE, label=setting.heads, max_new_tokens=16)


def measure_maps(bench: Bench) -> None:
    """The effect of single heads on the needle, one question per text, by text."""
    for block, wording, cell in bench.only(design.MAP_BLOCKS).one_of_each():
        name = f"{block}-{wording}"
        if not bench.run.has(f"{name}-zero.safetensors"):
            answers = Answers([cell], design.config(wording), condition="template+prefix")
            maps = act_after_the_text(bench.model, answers, ("steer", "zero"), alpha=design.MAP_ALPHA)
            for kind, found in maps.items():
                bench.run.save(f"{name}-{kind}.safetensors", found)
        print(f"maps: block {block}, {wording}", flush=True)


def measure_small(bench: Bench) -> None:
    """Steer the first heads of the map on the choosing blocks."""
    ranking = _pairs(_judged(bench)["maps"]["ranking"])
    settings = [_steer(f"first-{k}", ranking[:k], design.MAP_ALPHA) for k in design.SIZES]
    bench.only(design.CHOOSING).ask("small", "template+prefix", (bench.detail,), settings=settings)


def measure_verdict_on_small(bench: Bench) -> None:
    """Steer the small set that was chosen, and as many random heads, on the judging blocks."""
    heads = _pairs(_judged(bench)["small"]["heads"])
    settings = [_steer("small", heads, design.MAP_ALPHA), *_random(bench, heads, design.MAP_ALPHA)]
    bench.only(design.JUDGING).ask("small-judged", "template+prefix", (bench.detail,), settings=settings)


def measure_fresh(bench: Bench) -> None:
    """Ask the fresh texts with the template: unsteered, and steered as `cause-judged` was."""
    found = _judged(bench)
    heads, best = _fact_heads(found), found["cause"]["chosen α"]
    settings = [Setting("model"), _steer("all", "all", best["all"])]
    settings += [_steer("retrieval", heads, best["retrieval"]), *_random(bench, heads, best["retrieval"])]
    bench.ask("fresh", "template+prefix", (bench.detail,), settings=settings)


def measure_fresh_plain(bench: Bench) -> None:
    """The same texts without the template, unsteered and with all heads steered."""
    settings = [Setting("model"), _steer("all", "all", _judged(bench)["cause"]["chosen α"]["all"])]
    bench.ask("fresh-plain", "plain+prefix", (bench.detail,), settings=settings)


def measure_fresh_small(bench: Bench) -> None:
    """The same texts with the template, with the small set that was chosen, and as many random heads."""
    heads = _pairs(_judged(bench)["small"]["heads"])
    settings = [_steer("small", heads, design.MAP_ALPHA), *_random(bench, heads, design.MAP_ALPHA)]
    bench.ask("fresh-small", "template+prefix", (bench.detail,), settings=settings)


def measure_fresh_small_plain(bench: Bench) -> None:
    """The same texts without the template, with the small set."""
    settings = [_steer("small", _pairs(_judged(bench)["small"]["heads"]), design.MAP_ALPHA)]
    bench.ask("fresh-small-plain", "plain+prefix", (bench.detail,), settings=settings)


def measure_fresh_formula(bench: Bench) -> None:
    """The same texts with the template, with all heads steered by the formula at the paper's α."""
    settings = [_steer("all", "all", design.ALPHAS[0])]
    bench.ask("fresh-formula", "template+prefix", (bench.detail,), settings=settings)


def measure_fresh_modes(bench: Bench) -> None:
    """The same texts in both conditions, with all heads steered in the other modes."""
    bench.ask("fresh-modes", design.PREFIXED, (bench.detail,), settings=_other_modes(bench))


def _steer(name: str, heads: Any, alpha: float, draw: int = 0) -> Setting:
    return Setting("model", steering=Steering(alpha, heads=heads), heads=name, draw=draw)


def _random(bench: Bench, heads: Sequence[Head], alpha: float) -> list[Setting]:
    model = bench.model
    drawn = draw_random_heads(
        heads, model.n_heads, n_draws=design.DRAWS, seed=design.SEED, n_layers=model.n_layers
    )
    return [_steer("random", one, alpha, draw) for draw, one in enumerate(drawn)]


def _judged(bench: Bench) -> dict[str, Any]:
    """What was found so far, as `judge` has written it beside the folders of the measurements."""
    return json.loads((bench.run.folder.parent / "judged.json").read_text(encoding="utf-8"))


def _fact_heads(found: dict[str, Any]) -> tuple[Head, ...]:
    return _pairs(found["attention"]["heads that attend to the needle"])


def _pairs(heads: Sequence[Sequence[int]]) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in heads)


MEASURES: Mapping[str, Callable[[Bench], None]] = {
    "loss": measure_loss,
    "logprob": measure_logprob,
    "controls": measure_controls,
    "foreign": measure_foreign,
    "attention": measure_attention,
    "cause": measure_cause,
    "cause-judged": measure_verdict_on_cause,
    "modes": measure_modes,
    "maps": measure_maps,
    "small": measure_small,
    "small-judged": measure_verdict_on_small,
    "cost": measure_cost,
    "fresh": measure_fresh,
    "fresh-plain": measure_fresh_plain,
    "fresh-small": measure_fresh_small,
    "fresh-small-plain": measure_fresh_small_plain,
    "fresh-formula": measure_fresh_formula,
    "fresh-modes": measure_fresh_modes,
}
"""The measurements by name. Each has what it needs in this order, with `judge` after `attention`, `cause`,
`maps` and `small`."""
