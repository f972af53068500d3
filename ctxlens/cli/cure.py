"""`ctxlens cure`: score, select, train and audit before and after, in one command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ctxlens.cli import _screen
from ctxlens.cli._audits import (
    BudgetOption,
    FactsOption,
    LengthsOption,
    TextsOption,
    check_questions,
    describe,
    parse_budget,
)
from ctxlens.cli._checkpoints import show_tables
from ctxlens.cli._inputs import parse_overrides, parse_threshold
from ctxlens.cli._options import Device, LayoutOption, verb
from ctxlens.cli._output import Outcome, OutputOptions, show_interval
from ctxlens.errors import InputError, Problems
from ctxlens.parsing import parse_numbers

if TYPE_CHECKING:
    from ctxlens.curing.plan import Plan
    from ctxlens.curing.request import Request
    from ctxlens.curing.run import Cure


@dataclass(frozen=True)
class SelectingOptions:
    """Which turns are selected."""

    PANEL: ClassVar[str] = "Scores and selection"

    seed_model: Annotated[
        str | None,
        typer.Option(
            help="Model that scores the data, fine-tuned without the indicator. [dim]default: MODEL[/dim]",
            metavar="MODEL",
        ),
    ] = None
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Finished scores of these data (ctxlens score), instead of scoring.", metavar="DIR"
        ),
    ] = None
    threshold: Annotated[
        str, typer.Option(help="β, 0 to 1 (paper: 0.6), or mixture, valley or otsu.", metavar="BETA")
    ] = "mixture"
    top_share: Annotated[
        float | None, typer.Option(help="Select this share of the turns instead, 0 to 1.", metavar="SHARE")
    ] = None
    layer: Annotated[
        str,
        typer.Option(
            help="Layer whose scores decide: its number, middle (depth 15 of 22) or residual.",
            metavar="LAYER",
        ),
    ] = "middle"


@dataclass(frozen=True)
class AuditingOptions:
    """The audits before and after."""

    PANEL: ClassVar[str] = "Audits"

    budget: BudgetOption = "10m"
    lengths: LengthsOption = None
    haystack: TextsOption = None
    needle: FactsOption = None
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="Questions, separated by commas; exit code 1 if one is answered with yes for the trained "
            "model: loss, template, bias, cause, cost.",
            metavar="NAMES",
        ),
    ] = None


@verb(
    "ctxlens cure organism --dataset data.json --budget 1m --out runs/cure",
    "ctxlens cure Qwen/Qwen3-0.6B-Base --dataset data.jsonl --chat-template chatml --plan",
    "ctxlens cure MODEL --dataset data.jsonl --recipe lora max_steps=200 --seed-model runs/vanilla/train",
    "ctxlens cure MODEL --dataset data.jsonl --method random --scores runs/cure --out runs/random",
)
def cure(
    selecting: SelectingOptions,
    auditing: AuditingOptions,
    output: OutputOptions,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="The model to train, and values that override the recipe.",
            metavar="MODEL|KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Conversations: file, folder or Hub id.", metavar="DATA")] = "",
    method: Annotated[
        str,
        typer.Option(
            help="indicator, upsample (selected conversations three times), random (as many random turns "
            "with the indicator) or vanilla (no selection).",
            metavar="NAME",
        ),
    ] = "indicator",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="lora, full, organism, or a YAML file. [dim]default: what suits the model's size[/dim]",
            metavar="FILE|NAME",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Chat template for a model without one: a file, or chatml, which comes with ctxlens.",
            metavar="FILE",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a folder or Hub data set.", metavar="NAME")] = "train",
    layout: LayoutOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.", metavar="N")] = None,
    device: Annotated[
        Device, typer.Option(help="auto, cpu or cuda; auto uses CUDA if it is available.", metavar="DEVICE")
    ] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and texts.", metavar="N")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", metavar="DIR")] = Path(
        "runs/cure"
    ),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start again; an earlier run in the folder is kept as DIR.old."),
    ] = False,
) -> None:
    """Score a data set, train on it with the selected turns marked, and audit the model before and after.

    A stopped cure goes on with the same command. Exit code 0 if no question of --fail-on is answered with
    yes, 1 if one is, 2 for wrong use.
    """
    from ctxlens.curing.request import Request, check_request

    problems = Problems()
    names: tuple[str, ...] = ()
    with problems:
        names = check_questions(auditing.fail_on)
    model, overrides = parse_overrides(words or (), problems)
    if model is None:
        problems.add(InputError("no model is named; give one: ctxlens cure MODEL --dataset DATA."))
    audits: dict[str, Any] = {}
    with problems:
        audits["budget"] = parse_budget(auditing.budget)
    with problems:
        given = auditing.lengths
        audits["lengths"] = None if given is None else tuple(parse_numbers(given, int, "--lengths"))
    request = Request(
        model=model or "organism", dataset=dataset, out=out, method=method, recipe=recipe,
        overrides=overrides, seed_model=selecting.seed_model, scores=selecting.scores,
        threshold=parse_threshold(selecting.threshold), top_share=selecting.top_share,
        layer=int(layer) if (layer := selecting.layer).isdecimal() else layer,
        **audits, haystack=auditing.haystack, needle=auditing.needle,
        chat_template=None if chat_template is None else str(chat_template), split=split, layout=layout,
        limit=limit, device=device.value, seed=seed,
    )  # fmt: skip
    check_request(request, problems, overwrite=overwrite)
    found = _run(request, overwrite=overwrite, only_plan=plan)
    _show(found, request, output, planned=plan)
    from ctxlens.results.audit import failed

    if not plan and failed(found.audits[request.asked()[-1]].verdicts, names):
        raise typer.Exit(1)


def _run(request: Request, *, overwrite: bool, only_plan: bool) -> Cure:
    """Run the cure, with its plan and progress on stderr."""
    import warnings

    from ctxlens.curing.run import STAGES, run_request
    from ctxlens.sft import IndicatorWarning

    def tell(plan: Plan) -> None:
        for line in plan.describe():
            _screen.note(line)

    with _screen.stages(STAGES) as progress, warnings.catch_warnings():
        warnings.simplefilter("always", IndicatorWarning)
        warnings.showwarning = lambda message, *_, **__: _screen.note(f"warning: {message}")
        return run_request(
            request, overwrite=overwrite, only_plan=only_plan, tell=tell, progress=progress,
            notice=_screen.note,
        )  # fmt: skip


def _show(found: Cure, request: Request, output: OutputOptions, *, planned: bool) -> None:
    """Print the result as it was asked for."""
    if output.for_machines or not planned:
        output.show(lambda: outcome_of(found, request), lambda: show_cure(found))
    if not planned:
        _screen.note(f"report: {found.folder / 'report.html'}")
        _screen.note(f"model: {found.folder / 'train'}")


def show_cure(found: Cure) -> None:
    """Print how the selection was made, the audited models side by side, and what changed."""
    assert found.comparison is not None
    if found.selection:
        meta = found.selection
        _screen.say(f"selected {meta['selected']:,} of {meta['turns']:,} answers: {meta['rule']}")
    show_tables(found.comparison)
    _screen.say("")
    _screen.say_wrapped([summarise(found)])


def summarise(found: Cure) -> str:
    """What the cure changed, in one sentence."""
    if found.comparison is None:
        return f"Planned: about {found.plan.total_seconds / 60:.0f} minutes."
    change, reading = found.comparison.changes("recall with template")[-1]
    asked = "asked with the indicator" if "after-indicator" in found.audits else "after the training"
    shown = show_interval(change, signed=True)
    return f"Recall with the template, {asked}, differs from before by {shown}: {reading}."


def outcome_of(found: Cure, request: Request) -> Outcome:
    """The cure as one table: a row for each audited model and quantity; changes are from `before`."""
    from ctxlens.cli._outcomes import table_of
    from ctxlens.cli._output import Table

    table = Table((), []) if found.comparison is None else table_of(found.to_frame())
    more = {
        "method": request.method,
        "plan": found.plan.as_dict(),
        "selection": {key: value for key, value in found.selection.items() if key != "fingerprint"},
        "seconds": dict(found.seconds),
        "audits": {name: describe(one) for name, one in found.audits.items()},
    }
    return Outcome("cure", summarise(found), table, request.model, found.folder, more=more)
