"""`ctxlens eval`: lm-evaluation-harness under several conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ctxlens.cli import _outcomes, _screen, _tables
from ctxlens.cli._inputs import BatchOption, parse_pairs
from ctxlens.cli._options import (
    Backend,
    BackendOption,
    LoadOptions,
    RunOptions,
    note_choice,
    record_choice,
    verb,
)
from ctxlens.cli._output import OutputOptions, count
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.chat.condition import Condition
    from ctxlens.models import Model
    from ctxlens.runs import Run

_DRAWN = ("organism_seed", "closed_book_seed", "needle_seed")
"""Seeds of the tasks that draw their examples."""


@dataclass(frozen=True)
class ModelsOptions(LoadOptions):
    """The models, and how they are run."""

    PANEL: ClassVar[str] = "Models"

    model: Annotated[
        list[str],
        typer.Option(
            "--model", "-m", help="Folder, Hub id, or [b]organism[/b]; repeat it for more models.",
            metavar="MODEL",
        ),
    ] = field(default_factory=lambda: ["organism-chat"])  # fmt: skip
    backend: BackendOption = Backend.auto

    def check(self) -> None:
        """Raise `InputError` for a model, template or variable that is not there; see `check_one`."""
        for name in self.model:
            self.check_one(name)

    def load(self, name: str) -> Model:
        """Load one of the models."""
        return self.load_one(name, self.backend.value)

    def describe(self) -> dict[str, Any]:
        """Everything about the models on which the answers depend."""
        from ctxlens.models.checkpoint import hash_checkpoint, locate_checkpoint, read_chat_template

        special = {
            "template_args": self.template_args,
            "revision": self.revision,
            "bits": 4 * self.load_in_4bit + 8 * self.load_in_8bit,
        }
        return {
            "model": ", ".join(Path(name).name or name for name in self.model),
            "models": self.model,
            "sha256": [hash_checkpoint(locate_checkpoint(name)) for name in self.model],
            "backend": "native" if self.backend is Backend.auto else self.backend.value,
            "dtype": ", ".join(dict.fromkeys(self._name_dtypes())),
            "chat_template": read_chat_template(self.chat_template),
            **{key: value for key, value in special.items() if value},
        }

    def _name_dtypes(self) -> Iterator[str]:
        """The number format of every model, as it will be loaded."""
        from ctxlens.models.checkpoint import locate_checkpoint
        from ctxlens.models.dtype_choice import choose_dtype
        from ctxlens.models.loading import resolve_device

        for name in self.model:
            dtype = choose_dtype(
                self.dtype.value,
                locate_checkpoint(name),
                resolve_device(self.device.value),
                backend=self.backend.value,
                trust_remote_code=self.trust_remote_code,
                revision=self.revision,
            )
            yield str(dtype).removeprefix("torch.")


# long: one verb with its steps in order
@verb(
    "ctxlens eval -m organism -m organism-chat --tasks ctxlens_smoke --conditions plain,template --limit 20",
    "ctxlens eval -m organism-chat --tasks ctxlens_organism_qa --conditions plain,template --num-fewshot 2",
    "ctxlens eval -m runs/sft -m runs/cured --tasks ctxlens_qa "
    "--conditions template,template+indicator,template+steered:0.95",
    "ctxlens eval -m HuggingFaceH4/zephyr-7b-beta --tasks ctxlens_squad --data-dir data/ --dry-run",
    "torchrun --nproc_per_node 2 -m ctxlens eval -m organism-chat --tasks ctxlens_smoke --device cpu",
)
def eval(
    models: ModelsOptions,
    store: RunOptions,
    output: OutputOptions,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks and groups, separated by commas: of ctxlens (ctxlens_qa, ctxlens_needle, "
            "ctxlens_smoke, …), of lm-eval, or from --include-path.",
            metavar="TASKS",
        ),
    ] = "ctxlens_smoke",
    conditions: Annotated[
        str,
        typer.Option(
            help="Conditions, separated by commas: plain (no chat template) or template, then +prefix, "
            "+indicator and +steered:ALPHA as needed, such as template+indicator+steered:0.5.",
            metavar="CONDITIONS",
        ),
    ] = "template",
    answer_prefix: Annotated[
        str,
        typer.Option(help="First words of every answer under conditions with +prefix.", metavar="TEXT"),
    ] = "Answer:",
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples with answers before each question.", metavar="N"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N examples of each task.", metavar="N")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the tasks' data. [dim]default: the Hub[/dim]", metavar="DIR"),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with more task files.", metavar="DIR")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="Setting of a task, such as quac_turns=all; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    batch_tokens: BatchOption = 8192,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the first prompts and stop.")] = False,
) -> None:
    """Evaluate models on lm-eval's tasks under several conditions and compare them example by example."""
    from ctxlens.chat.condition import parse_conditions
    from ctxlens.evals import harness
    from ctxlens.processes import Processes

    parse_conditions(conditions)
    harness.require()
    if data_dir is not None and not data_dir.exists():
        raise InputError(f"--data-dir {data_dir} does not exist; give the folder or file with the data.")
    told = {**dict.fromkeys(_DRAWN, store.seed), **parse_pairs(metadata or [], "--metadata")}
    models.check()
    told_early = {"models": models.model, "template_args": models.template_args, "limit": limit}
    if not dry_run:
        store.check("eval", told_early)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    harness.check_names(names, include_path)
    asked = harness.parse_conditions(conditions)
    settings: dict[str, Any] = {"data_dir": data_dir, "include_path": include_path, "metadata": told}
    asking = {"answer_prefix": answer_prefix, "num_fewshot": num_fewshot}
    if dry_run:
        first = _load(models, None, models.model[0])
        for task, condition, prompt in harness.first_prompts(first, names, asked, **asking, **settings):
            _screen.note(f"--- {task}, {condition}")
            _screen.say(_screen.printable(prompt))
        return
    processes = Processes.join(cpu=models.device.value == "cpu")
    config = {
        **models.describe(), **settings, "tasks": names, "limit": limit,
        "conditions": [condition.name for condition in asked], **_describe_asking(asked, asking),
    }  # fmt: skip
    run = store.open_together("eval", config, processes)
    if processes.is_first:
        _screen.note(
            f"plan: {', '.join(names)} under {count(len(asked), 'condition')} on "
            f"{count(len(models.model), 'model')}; the time left is shown after the first batch"
        )
    with _screen.stage("examples") as progress:
        evaluation = harness.run_evaluation(
            models.model,
            names,
            [condition.name for condition in asked],
            limit=limit,
            load=partial(_load, models, run if processes.is_first else None),
            batch_tokens=batch_tokens,
            out=run,
            processes=processes,
            progress=progress,
            **asking,
            **settings,
        )
    if processes.is_first:
        run.write_json("summary.json", evaluation.summary())
        output.show(
            lambda: _outcomes.records_outcome(
                "eval", evaluation.summary(), _tables.say_evaluation(evaluation),
                ", ".join(models.model), run.folder,
            ),
            lambda: _tables.show_evaluation(evaluation),
        )  # fmt: skip
        _screen.say_where(run.folder)


def _describe_asking(conditions: Sequence[Condition], asking: Mapping[str, Any]) -> dict[str, Any]:
    """The options of asking that the answers depend on; earlier runs have none of them on record."""
    prefixed = any(condition.prefix for condition in conditions)
    used = {"answer_prefix": prefixed, "num_fewshot": asking["num_fewshot"] is not None}
    return {name: asking[name] for name, matters in used.items() if matters}


def _load(models: ModelsOptions, run: Run | None, name: str) -> Model:
    """Load one of the models and record in the run how; without a run nothing is recorded."""
    from ctxlens.runs import Run

    loaded = models.load(name)
    note_choice(loaded)
    if run is not None:
        record_choice(Run.read(run.folder), loaded)
    return loaded
