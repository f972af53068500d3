"""What a cure is asked for, and the checks that need neither torch nor a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.errors import InputError, Problems
from ctxlens.evals.needle.needles import Needle, load_needles
from ctxlens.models.checkpoint import hash_checkpoint, locate_checkpoint
from ctxlens.runs import Run
from ctxlens.sft.early import check_recipe
from ctxlens.sft.recipe import Recipe, read_recipe
from ctxlens.sft.shipped import choose_recipe

STUDY = "cure"
SCORES, SELECTION, TRAINED = "scores.parquet", "selection.parquet", "train"
"""Files and folders in the folder of a cure."""
RULES = ("mixture", "valley", "otsu")
"""Names of the rules that estimate a threshold from the scores."""
LAYERS = ("middle", "residual")
"""Names of the rules for the layer that need nothing but the scores."""
NONE = "null"
"""The word that takes a key out of a recipe."""
FEW_FACTS = 4
"""Facts that an audit needs at least."""


@dataclass(frozen=True)
class Method:
    """A way to use a selection.

    Attributes:
        meaning: what it does, in words.
        keys: the keys of the recipe that it sets.
        selects: whether it needs scores and a selection.
        marks: whether the trained model knows the indicator.
    """

    meaning: str
    keys: Mapping[str, Any]
    selects: bool = True
    marks: bool = False


METHODS: Mapping[str, Method] = MappingProxyType({
    "indicator": Method(
        "the user messages of the selected turns end with the indicator",
        {"indicator": DEFAULT_INDICATOR, "require_selected": True}, marks=True,
    ),
    "upsample": Method(
        "conversations with a selected turn occur three times, without the indicator",
        {"indicator": NONE, "upsample_selected": 3},
    ),
    "random": Method(
        "control: as many randomly drawn turns get the indicator",
        {"indicator": DEFAULT_INDICATOR, "selection_control": "random"}, marks=True,
    ),
    "vanilla": Method(
        "control: plain fine-tuning on the same conversations",
        {"indicator": NONE, "selection": NONE}, selects=False,
    ),
})  # fmt: skip
"""The methods by name."""


@dataclass(frozen=True)
class Request:
    """Everything a cure depends on.

    Attributes:
        model: the model to train: a folder, a Hub id, or a packaged model.
        dataset: the conversations: a file, a folder or a Hub id.
        out: the run folder.
        method: a name of `METHODS`.
        recipe: a recipe's name or file; None for the one that suits the model.
        overrides: keys of the recipe that are set otherwise.
        seed_model: the model that scores the data; None for the model itself.
        scores: a file or run folder of finished scores; None to score here.
        threshold: β of the selection, or the name of a rule.
        top_share: share of the turns to select instead; None for the threshold.
        layer: the layer whose scores decide, or a rule of `LAYERS` that finds it.
        budget: minutes for each audit.
        lengths: context lengths of the audits in tokens; None for what the budget allows.
        haystack: the user's own texts for the audits; None for the project's own.
        needle: YAML file with the user's own facts for the audits; None for the project's own.
        chat_template: a file or name of a chat template, for models without one.
        split, layout, limit: how the data set is read.
        device: `auto`, `cpu` or `cuda`.
        seed: seed of training and texts.
    """

    model: str
    dataset: str
    out: Path
    method: str = "indicator"
    recipe: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed_model: str | None = None
    scores: Path | None = None
    threshold: float | int | str = "mixture"
    top_share: float | int | None = None
    layer: int | str = "middle"
    budget: float | int = 10.0
    lengths: tuple[int, ...] | None = None
    haystack: str | None = None
    needle: str | None = None
    chat_template: str | None = None
    split: str = "train"
    layout: str | None = None
    limit: int | None = None
    device: str = "auto"
    seed: int = 0

    @property
    def how(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def recipe_name(self) -> str:
        """The recipe's name or file."""
        return self.recipe or choose_recipe(self.model)

    @property
    def facts(self) -> tuple[Needle, ...]:
        """The user's own facts for the audits; empty for the project's own."""
        return () if self.needle is None else load_needles(self.needle)

    @property
    def reading(self) -> dict[str, Any]:
        """How the data set is read."""
        return {"split": self.split, "layout": self.layout, "limit": self.limit}

    def training(self, *, selected: bool = True) -> dict[str, Any]:
        """The overrides of the recipe.

        Args:
            selected: whether the selection is made already, so that it can be named.
        """
        place = self.out / SELECTION if selected and self.how.selects else None
        return {
            "model": self.model, "dataset": self.dataset, "output_dir": self.out / TRAINED,
            "seed": self.seed, "chat_template": self.chat_template, "selection": place, **self.reading,
            "use_cpu": None if self.device == "auto" else self.device == "cpu",
            **self.how.keys, **self.overrides,
        }  # fmt: skip

    def read_recipe(self) -> Recipe:
        """The recipe with its overrides."""
        return read_recipe(self.recipe_name, self.training())

    def asked(self) -> list[str]:
        """The audits by name: `after-indicator` is the trained model, asked with the indicator."""
        return ["before", "after", *(["after-indicator"] if self.how.marks else [])]

    def config(self) -> dict[str, Any]:
        """What the folder of a cure is made for, as JSON values."""
        return {
            "model": {"name": self.model, "sha256": hash_checkpoint(locate_checkpoint(self.model))},
            "dataset": self.dataset, **self.reading, "method": self.method, "recipe": self.recipe_name,
            "overrides": {key: str(value) for key, value in self.overrides.items()},
            "seed_model": self.seed_model, "scores": None if self.scores is None else str(self.scores),
            "threshold": self.threshold, "top_share": self.top_share, "selecting_layer": self.layer,
            "budget": self.budget, "lengths": None if self.lengths is None else list(self.lengths),
            "haystack": self.haystack, "needle": self.needle, "chat_template": self.chat_template,
            "seed": self.seed,
        }  # fmt: skip


def check_request(request: Request, problems: Problems | None = None, *, overwrite: bool = False) -> None:
    """Refuse what is seen to be wrong at once, with everything in one message.

    Args:
        request: the request.
        problems: what is known to be wrong already.
        overwrite: whether another run in the folder is to be set aside.

    Raises:
        InputError: something that the request names is not there, a value is out of range, the model has no
            chat template, or the disk has no room for the checkpoints.
    """
    found = Problems() if problems is None else problems
    for check in (_check_values, _check_selecting, _check_seed_model):
        with found:
            check(request)
    known = request if request.method in METHODS else replace(request, method="indicator")
    training = {**known.training(selected=False), "overwrite": overwrite or None}
    with found:
        check_recipe(read_recipe(known.recipe_name, training, found), found)
    if not overwrite:
        with found:
            _check_folder(request)
    found.report()


def _check_folder(request: Request) -> None:
    """The folder is new, or holds this cure; nothing is written."""
    out = request.out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        Run.open(out, study=STUDY, config=request.config())


def _check_values(request: Request) -> None:
    problems = Problems()
    if request.method not in METHODS:
        problems.add(
            InputError(f"the method {request.method!r} is not known; choose from {', '.join(METHODS)}.")
        )
    if not request.budget > 0:
        problems.add(InputError(f"the budget must be a number of minutes above 0, got {request.budget!r}."))
    if request.lengths is not None and min(request.lengths, default=0) < 1:
        problems.add(InputError(f"the lengths must be numbers of tokens, got {request.lengths!r}."))
    with problems:
        if request.needle is not None and len(request.facts) < FEW_FACTS:
            raise InputError(
                f"{request.needle} has {len(request.facts)} facts; an audit needs at least four."
            )
    problems.report()


def _check_selecting(request: Request) -> None:
    problems = Problems()
    beta = request.threshold
    is_number = isinstance(beta, int | float) and 0 <= beta <= 1
    if beta not in RULES and not is_number:
        problems.add(
            InputError(f"the threshold must be a number from 0 to 1, or {', '.join(RULES)}; got {beta!r}.")
        )
    if request.top_share is not None and not 0 < request.top_share <= 1:
        problems.add(InputError(f"the top share must be above 0 and at most 1, got {request.top_share!r}."))
    if isinstance(request.layer, str) and request.layer not in LAYERS:
        problems.add(
            InputError(f"the layer must be a number or {' or '.join(LAYERS)}, got {request.layer!r}.")
        )
    if request.scores is not None:
        place = find_scores(request.scores)
        if not place.is_file():
            problems.add(InputError(f"{place} does not exist; give the run folder of ctxlens score."))
        if request.seed_model is not None:
            problems.add(InputError("a seed model has no use with finished scores; give one of the two."))
    problems.report()


def _check_seed_model(request: Request) -> None:
    if request.seed_model is not None:
        locate_checkpoint(request.seed_model)


def find_scores(given: Path) -> Path:
    """The file of scores, which may be given as the run folder that holds it."""
    return given if given.suffix else given / SCORES


__all__ = [
    "METHODS", "SCORES", "SELECTION", "TRAINED", "Method", "Request", "check_request", "find_scores",
]  # fmt: skip
