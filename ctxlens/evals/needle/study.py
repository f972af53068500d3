"""A needle study as one call: the texts, the grid's configuration, and the answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.defaults import Texts, choose_texts
from ctxlens.evals.needle.haystack import Haystack, load_haystack
from ctxlens.evals.needle.needles import Needle, parse_needles

if TYPE_CHECKING:
    from ctxlens.models import Model
    from ctxlens.models.attention.steering import Steering
    from ctxlens.results import NeedleGrid
    from ctxlens.runs import Progress, Run

SPREAD = 5
"""How many lengths and depths are spread over the window and the text by default."""


@dataclass(frozen=True)
class NeedleStudy:
    """What is asked, before a model is loaded.

    Attributes:
        config: the grid.
        source: the haystack: what `load_haystack` takes.
        texts: which texts were chosen by default.
        options: further options of `load_haystack`.
    """

    config: NeedleConfig
    source: str | Path | Iterable[str] | Haystack
    texts: Texts
    options: dict[str, Any]

    def load_haystack(self) -> Haystack:
        """Load the text around the needles."""
        return load_haystack(self.source, seed=self.config.seed, **self.options)

    def describe_source(self) -> dict[str, Any]:
        """The haystack's source and options, for manifests."""
        return {"source": self.source, **self.options}


def plan_needles(
    model: str,
    *,
    haystack: str | Path | Iterable[str] | Haystack | None = None,
    needles: str | Needle | Sequence[str | Needle] | None = None,
    split: str = "train",
    column: str | None = None,
    repeat: bool = False,
    **config: Any,
) -> NeedleStudy:
    """Choose the texts for a model and check the grid's configuration, without a model.

    Args:
        model: the model's name or folder, which decides the default texts (`choose_texts`).
        haystack: what `load_haystack` takes.
        needles: needles, names of built-in ones, or YAML files; a text may name several, separated by commas.
        split: split of a haystack that is a data set.
        column: its column of texts.
        repeat: whether a haystack that is too short may start over.
        **config: further settings of `NeedleConfig`; lengths and depths are 5 by default.

    Raises:
        InputError: a setting that cannot be used, or an unknown needle.
    """
    named = isinstance(haystack, str | Path)
    texts = choose_texts(
        model,
        str(haystack) if named else None if haystack is None else "the given texts",
        needles if isinstance(needles, str) else None if needles is None else "the given needles",
    )
    chosen: Any = parse_needles(texts.needles) if needles is None or isinstance(needles, str) else needles
    settings = {"lengths": SPREAD, "depths": SPREAD, **config}
    return NeedleStudy(
        NeedleConfig(needles=chosen, **settings),
        texts.haystack if haystack is None or named else haystack,
        texts,
        {"split": split, "column": column, "repeat": repeat},
    )


def needle(
    model: Model | str | Path,
    *,
    haystack: str | Path | Iterable[str] | Haystack | None = None,
    needles: str | Needle | Sequence[str | Needle] | None = None,
    indicator: bool = False,
    steering: Steering | None = None,
    batch_tokens: int = 8192,
    out: Run | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> NeedleGrid:
    """Hide sentences in long texts and measure how well a model recalls them, with and without template.

    ```python
    import ctxlens as cl

    grid = cl.needle("organism-chat", lengths=(60, 120), depths=(0, 100), max_new_tokens=12)
    print(grid.recall(condition="template+prefix").mean())
    ```

    Args:
        model: a model, or what `load_model` takes.
        haystack: the text around the needles: what `load_haystack` takes. By default texts of the built-in
            world for the built-in model, otherwise neutral prose.
        needles: needles, names of built-in ones, or YAML files; by default those that suit the haystack.
        indicator: whether the question carries the model's indicator.
        steering: attention steering during the answers.
        batch_tokens: upper bound on the prompt and new tokens of a batch.
        out: a run folder in which finished parts are kept (`ctxlens.runs.Run.open`).
        progress: called with the numbers of finished and of all answers.
        **settings: `lengths`, `depths` (5 each by default), `conditions`, `cases_per_cell`, `wording`,
            `max_new_tokens`, `seed` and `score`, as in `NeedleConfig`; `split`, `column` and `repeat`, as in
            `load_haystack`.

    Raises:
        InputError: a setting that cannot be used, a haystack that is too short, or no indicator.
        ModelFailureError: the model fails on all of the first cells.
    """
    from ctxlens.evals.needle.run import run_needle
    from ctxlens.models.allocate import open_model

    name = str(model) if isinstance(model, str | Path) else model.name
    study = plan_needles(name, haystack=haystack, needles=needles, **settings)  # refuses before loading
    return run_needle(
        open_model(model), study.config, haystack=study.load_haystack(), indicator=indicator,
        steering=steering, batch_tokens=batch_tokens, out=out, progress=progress,
    )  # fmt: skip


__all__ = ["NeedleStudy", "needle", "plan_needles"]
