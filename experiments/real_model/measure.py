"""The measurements of the experiment, block by block, each into files that are never measured twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctxlens.auditing.asking import read_with_fact
from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.evals.needle.config import WORDINGS
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads.choose import draw_random_heads
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.results import RoleAllocation
from ctxlens.runs import Run
from experiments.real_model import design


@dataclass(frozen=True)
class Bench:
    """The model, the haystacks, the run folder and the blocks of one process."""

    model: Model
    haystacks: list[Haystack]
    run: Run
    blocks: Sequence[int]

    def each(self, lengths: Sequence[int] = design.LENGTHS) -> Iterator[tuple[int, str, list[Cell]]]:
        """The block, the wording and the cells of some lengths, one wording after the other."""
        for block in self.blocks:
            for wording, cells in design.build_block(self.model.tokenizer, self.haystacks, block).items():
                yield block, wording, [cell for cell in cells if cell.context_tokens in lengths]

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
            run_settings(self.model, cells, config, settings, out=self.run, name=path)
            print(f"{name}: block {block}, {wording}", flush=True)


def measure_loss(bench: Bench) -> None:
    """Recall at every length, with and without template and prefix."""
    bench.ask("loss", design.CONDITIONS, design.LENGTHS)


def measure_logprob(bench: Bench) -> None:
    """Log-probability of the needle's words after its prefix."""
    bench.ask("logprob", design.PREFIXED, (design.LONG, design.DETAIL), score="logprob")


def measure_controls(bench: Bench) -> None:
    """Recall under the controls."""
    bench.ask("controls", design.CONTROLS, (design.DETAIL,))


def measure_foreign(bench: Bench) -> None:
    """Recall under another model's template, which the model was loaded with."""
    bench.ask("foreign", "template+prefix", (design.DETAIL,))


def measure_attention(bench: Bench) -> None:
    """Attention by role and to the needle at the position that produces the answer, one question per text."""
    for block, wording, cells in bench.each((design.DETAIL,)):
        cell = cells[(block + list(WORDINGS).index(wording)) % design.PER_TEXT]
        for condition in parse_conditions(design.PREFIXED):
            name = f"{block}-{wording}-{replace(condition, prefix=False).name}.safetensors"
            if not bench.run.has(name):
                bench.run.save(name, read_cell(bench.model, cell, wording, condition))
        print(f"attention: block {block}, {wording}", flush=True)


def read_cell(model: Model, cell: Cell, wording: str, condition: Condition) -> RoleAllocation:
    """The attention by role in one cell; role `indicator` stands for the needle's own tokens."""
    return read_with_fact(model, render_cell(model, cell, design.config(wording), condition), cell)


def measure_cause(bench: Bench) -> None:
    """Steer on the choosing blocks with every α, and on the judging blocks with the chosen ones."""
    heads = [tuple(head) for head in _judged(bench)["attention"]["heads that attend to the needle"]]
    choosing = [block for block in bench.blocks if block in design.CHOOSING]
    tries = [_steer("all", "all", alpha) for alpha in design.ALPHAS]
    tries += [_steer("retrieval", heads, alpha) for alpha in design.ALPHAS_OF_HEADS]
    replace(bench, blocks=choosing).ask("cause", "template+prefix", (design.DETAIL,), settings=tries)


def measure_verdict_on_cause(bench: Bench) -> None:
    """Steer on the judging blocks with the α that the choosing blocks preferred, and with random heads."""
    found = _judged(bench)
    heads = [tuple(head) for head in found["attention"]["heads that attend to the needle"]]
    best = found["cause"]["chosen α"]
    drawn = draw_random_heads(heads, bench.model.n_heads, n_draws=design.DRAWS, seed=design.SEED)
    settings = [_steer("all", "all", best["all"]), _steer("retrieval", heads, best["retrieval"])]
    settings += [_steer("random", one, best["retrieval"], draw) for draw, one in enumerate(drawn)]
    judging = replace(bench, blocks=[block for block in bench.blocks if block in design.JUDGING])
    judging.ask("cause", design.PREFIXED, (design.DETAIL,), settings=settings)


def _steer(name: str, heads: Any, alpha: float, draw: int = 0) -> Setting:
    return Setting("model", steering=Steering(alpha, heads=heads), heads=name, draw=draw)


def _judged(bench: Bench) -> dict[str, Any]:
    """What was found so far, as `judge` has written it beside the folders of the measurements."""
    return json.loads((bench.run.folder.parent / "judged.json").read_text(encoding="utf-8"))
