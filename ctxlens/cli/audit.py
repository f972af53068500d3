"""`ctxlens audit`: does a chat model lose its context? Five answers within a time that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    outcome_of,
    parse_budget,
)
from ctxlens.cli._checkpoints import show_several
from ctxlens.cli._options import ModelOptions, verb
from ctxlens.cli._output import OutputOptions, print_json, show_interval
from ctxlens.errors import InputError
from ctxlens.parsing import parse_numbers

if TYPE_CHECKING:
    from ctxlens.auditing import Audit, Audits
    from ctxlens.auditing.plan import Plan
    from ctxlens.auditing.ready import Ready


@dataclass(frozen=True)
class AuditOptions:
    """What is asked, and in which time."""

    PANEL: ClassVar[str] = "Audit"

    against: Annotated[
        str | None, typer.Option(help="Base model or earlier checkpoint to compare with.", metavar="MODEL")
    ] = None
    budget: BudgetOption = "10m"
    haystack: TextsOption = None
    needle: FactsOption = None
    lengths: LengthsOption = None
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
    if against is not None:
        against.check()
    if len(sources) > 1:
        together = _audit_several(sources, against, out, arguments)
        show_several(together, output, planned=plan)
        found = list(together.audits.values())
        if together.failed:
            raise typer.Exit(2)
    else:
        sources[0].check()
        found = [_audit_one(sources[0], against, {**arguments, "out": out})]
        _show_one(found[0], output, planned=plan)
    from ctxlens.results.audit import failed

    if any(failed(one.verdicts, names) for one in found):
        raise typer.Exit(1)


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


def _audit_several(
    sources: Sequence[ModelOptions], against: ModelOptions | None, out: Path, arguments: Mapping[str, Any]
) -> Audits:
    """Audit checkpoints one after another with one plan."""
    from ctxlens.auditing.several import audit_several, split_revision

    by_name = {source.model: source for source in sources}
    rest = {name: value for name, value in arguments.items() if name != "overwrite"}

    def one(name: str, folder: Path, plan: Plan | None) -> Audit:
        repository, revision = split_revision(name)
        source = replace(by_name[name], model=repository, revision=revision or by_name[name].revision)
        _screen.note(f"{name}:")
        return _audit_one(source, against, {**rest, "out": folder, "plan": plan})

    config = {
        **{name: arguments[name] for name in ("budget", "haystack", "lengths", "seed")},
        "facts": [fact.name for fact in arguments["facts"]],
        "against": None if against is None else against.model,
    }
    return audit_several(
        [source.model for source in sources], one, out=out, config=config, overwrite=arguments["overwrite"]
    )


def _show_one(found: Audit, output: OutputOptions, *, planned: bool) -> None:
    """Print the answers of one audit as they were asked for."""
    if output.json_out:
        print_json({**outcome_of([found]).as_dict(), **describe(found)})
    elif output.csv_out:
        output.show(lambda: outcome_of([found]), lambda: None)
    elif not planned:
        _show(found)
    if not planned:
        _screen.note(f"report: {found.folder / 'report.html'}")


def _show(found: Audit) -> None:
    """Print the five answers."""
    from ctxlens.results.audit import QUESTIONS

    lines: list[str] = []
    for verdict in found.verdicts:
        lines += [
            f"{verdict.claim}: {verdict.word.upper()}. {QUESTIONS[verdict.claim]}",
            f"  {verdict.sentence} [{show_interval(verdict.figure)}; {verdict.quantity}]",
        ]
    if note := found.note:
        lines.append(note)
    _screen.say_wrapped(lines)
