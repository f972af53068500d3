"""`ctxlens audit`: does a chat model lose its context? Five answers within a time that the user names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ctxlens.cli import _screen
from ctxlens.cli._options import ModelOptions, verb
from ctxlens.cli._output import INTERVAL, Outcome, OutputOptions, Table, interval_cells, print_json
from ctxlens.errors import InputError
from ctxlens.parsing import parse_numbers

if TYPE_CHECKING:
    from ctxlens.auditing import Audit
    from ctxlens.auditing.plan import Plan
    from ctxlens.auditing.ready import Ready

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)")
_MINUTES = {"s": 1 / 60, "m": 1.0, "min": 1.0, "": 1.0, "h": 60.0}


@dataclass(frozen=True)
class AuditOptions:
    """What is asked, and in which time."""

    PANEL: ClassVar[str] = "Audit"

    against: Annotated[
        str | None, typer.Option(help="Base model or earlier checkpoint to compare with.", metavar="MODEL")
    ] = None
    budget: Annotated[
        str, typer.Option(help="Time for each model, such as 90s, 10m or 2h.", metavar="TIME")
    ] = "10m"
    haystack: Annotated[
        str | None,
        typer.Option(
            help="Your own texts: folder, text file or data set. [dim]default: neutral texts of this "
            "project[/dim]",
            metavar="DATA",
        ),
    ] = None
    needle: Annotated[
        str | None, typer.Option(help="YAML file with your own facts, at least four.", metavar="FILE")
    ] = None
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens, such as 500,2000. [dim]default: what the budget allows[/dim]",
            metavar="LENGTHS",
        ),
    ] = None
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="Questions, separated by commas; exit code 1 if one is answered with yes: loss, template, "
            "bias, cause, cost.",
            metavar="NAMES",
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of texts and random heads.", metavar="N")] = 0

    def arguments(self) -> dict[str, Any]:
        """The options as arguments of `ctxlens.audit`.

        Raises:
            InputError: a value cannot be used.
        """
        lengths = None if self.lengths is None else parse_numbers(self.lengths, int, "--lengths")
        if lengths is not None and min(lengths) < 1:
            raise InputError(f"--lengths must be numbers of tokens of at least 1, got {self.lengths}.")
        return {
            "budget": parse_budget(self.budget),
            "haystack": self.haystack,
            "facts": () if self.needle is None else _read_facts(self.needle),
            "lengths": lengths,
            "seed": self.seed,
        }


@verb(
    "ctxlens audit organism-chat --budget 2m",
    "ctxlens audit HuggingFaceTB/SmolLM2-135M-Instruct --budget 10m",
    "ctxlens audit checkpoint-500 --against base --fail-on loss,bias",
    "ctxlens audit checkpoint-100 checkpoint-200 --lengths 2000 --plan",
)
def audit(
    loading: ModelOptions,
    asked: AuditOptions,
    output: OutputOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to audit: folders, GGUF files, Hub ids or built-in names; instead of --model.",
            metavar="[MODEL]...",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", metavar="DIR")] = Path(
        "runs/audit"
    ),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start again; an earlier run in the folder is kept as DIR.old."),
    ] = False,
) -> None:
    """Ask whether a chat model uses the user's text less because of its template, and why.

    Exit code 0 if no question of --fail-on is answered with yes, 1 if one is, 2 for wrong use.
    """
    names = check_questions(asked.fail_on)
    arguments = {**asked.arguments(), "overwrite": overwrite, "only_plan": plan}
    sources = [replace(loading, model=name) for name in models or [loading.model]]
    against = None if asked.against is None else replace(loading, model=asked.against)
    for source in filter(None, (*sources, against)):
        source.check()
    folders = choose_folders(out, [one.model for one in sources])
    found = [
        _audit_one(source, against, {**arguments, "out": folder})
        for source, folder in zip(sources, folders, strict=True)
    ]
    if output.json_out:
        described = [{**_outcome([one]).as_dict(), **describe(one)} for one in found]
        print_json(described if len(found) > 1 else described[0])
    elif output.csv_out:
        output.show(lambda: _outcome(found), lambda: None)
    elif not plan:
        _show_all(found)
    if not plan:
        _screen.note("\n".join(f"report: {one.folder / 'report.html'}" for one in found))
    from ctxlens.results.audit import failed

    if any(failed(one.verdicts, names) for one in found):
        raise typer.Exit(1)


def parse_budget(text: str) -> float:
    """Minutes of a time such as `90s`, `10m`, `2h` or `10`.

    Raises:
        InputError: it is not such a time, or zero.
    """
    match = _BUDGET.fullmatch(text.strip().lower())
    if match is None or not float(match[1]):
        raise InputError(f"--budget got {text!r}; expected a time such as 90s, 10m or 2h.")
    return float(match[1]) * _MINUTES[match[2]]


def check_questions(text: str | None) -> tuple[str, ...]:
    """The names of --fail-on.

    Raises:
        InputError: a name is unknown.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    known = ("loss", "template", "bias", "cause", "cost")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--fail-on got {', '.join(unknown)}; choose from {', '.join(known)}.")
    return names


def choose_folders(out: Path, models: Sequence[str]) -> list[Path]:
    """The run folder of each model: the folder itself, or one inside it for each of several models.

    Raises:
        InputError: a model is given twice.
    """
    if len(models) == 1:
        return [out]
    if len(set(models)) < len(models):
        raise InputError("a model is given twice; give each model once.")
    parts = [
        [re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in Path(model).parts if part != "/"]
        for model in models
    ]
    depth = next(n for n in range(1, 99) if len({tuple(one[-n:]) for one in parts}) == len(models) or n == 98)
    return [out / "-".join(one[-depth:]) for one in parts]


def _read_facts(path: str) -> tuple[Any, ...]:
    from ctxlens.evals.needle.needles import load_needles

    facts = load_needles(path)
    if len(facts) < 4:
        raise InputError(f"--needle {path} has {len(facts)} facts; an audit needs at least four.")
    return facts


def _audit_one(source: ModelOptions, against: ModelOptions | None, arguments: Mapping[str, Any]) -> Audit:
    """Load one model and audit it, with its plan and progress on stderr."""
    from ctxlens.auditing.run import STAGES, audit

    model = source.load()
    other = None if against is None else against.load()

    def tell(ready: Ready, plan: Plan) -> None:
        from ctxlens.auditing.plan import describe_plan

        for line in (*ready.describe(), *describe_plan(plan)):
            _screen.note(line)

    with _screen.stages(STAGES) as progress:
        return audit(model, against=other, tell=tell, progress=progress, **arguments)


def _show_all(found: Sequence[Audit]) -> None:
    """Print the answers for every model, and one table if there are several."""
    for one in found:
        _show(one, name=len(found) > 1)
    if len(found) > 1:
        _show_together(found)


def _show(found: Audit, *, name: bool) -> None:
    """Print the five answers."""
    from ctxlens.results.audit import QUESTIONS

    lines = [found.ready.model.split(":")[0]] if name else []
    for verdict in found.verdicts:
        lines += [
            f"{verdict.claim}: {verdict.word.upper()}. {QUESTIONS[verdict.claim]}",
            f"  {verdict.sentence} [{verdict.figure.format()}; {verdict.quantity}]",
        ]
    if note := found.note:
        lines.append(note)
    _screen.say_wrapped(lines)


def _show_together(found: Sequence[Audit]) -> None:
    """Print one table over several checkpoints."""
    rows = []
    for one in found:
        by_name = {verdict.claim: verdict for verdict in one.verdicts}
        cells = [
            f"{by_name[claim].figure.estimate:+.2f} {by_name[claim].word}" if claim in by_name else "–"
            for claim in ("loss", "bias", "cause")
        ]
        rows.append([Path(one.ready.model.split(":")[0]).name, *cells])
    _screen.show_table("change with the template", ["model", "loss", "bias", "cause"], rows)


def _outcome(found: Sequence[Audit]) -> Outcome:
    """The answers of one or several audits as a table."""
    rows = [
        [one.ready.model.split(":")[0], verdict.claim, verdict.word, *interval_cells(verdict.figure),
         verdict.quantity, verdict.sentence]
        for one in found for verdict in one.verdicts
    ]  # fmt: skip
    columns = ("model", "question", "answer", "estimate", *INTERVAL, "quantity", "sentence")
    summary = "; ".join(f"{verdict.claim}: {verdict.word}" for one in found for verdict in one.verdicts)
    models = ", ".join(one.ready.model.split(":")[0] for one in found)
    return Outcome("audit", summary, Table(columns, rows), models, found[0].folder)


def describe(found: Audit) -> dict[str, Any]:
    """An audit as JSON values."""
    return {
        "model": found.ready.model.split(":")[0],
        "folder": str(found.folder),
        "ready": found.ready.as_dict(),
        "plan": found.plan.as_dict(),
        "seconds": found.seconds,
        "answers": [
            {
                "question": verdict.claim,
                "answer": verdict.word,
                "sentence": verdict.sentence,
                "quantity": verdict.quantity,
                "rule": verdict.rule,
                **describe_interval(verdict.figure),
                "notes": [{"what": what, **describe_interval(one)} for what, one in verdict.notes],
            }
            for verdict in found.verdicts
        ],
        "note": found.note,
    }


def describe_interval(one: Any) -> dict[str, Any]:
    """An interval as JSON values; what is not a number becomes null."""
    values = {"estimate": one.estimate, "low": one.low, "high": one.high}
    return {**{name: None if value != value else value for name, value in values.items()}, "n": one.n}
