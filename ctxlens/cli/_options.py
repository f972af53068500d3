"""Groups of options that verbs share; `verb` turns every field of a group into one option."""

from __future__ import annotations

import enum
import inspect
import json
import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from ctxlens.cli._completion import find_completer
from ctxlens.cli._inputs import parse_template_args
from ctxlens.cli._output import OutputOptions
from ctxlens.cli._screen import examples, note, quieted

if TYPE_CHECKING:
    from ctxlens.models import Model
    from ctxlens.processes import Processes
    from ctxlens.runs import Run


class Backend(enum.StrEnum):
    """Which library runs the model."""

    auto = "auto"
    lens = "lens"
    native = "native"


class Dtype(enum.StrEnum):
    """Number format of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ModelDtype(enum.StrEnum):
    """Number format of a model that is loaded, or `auto`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(enum.StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Side(enum.StrEnum):
    """Where a conversation that is too long is truncated."""

    left = "left"
    right = "right"
    middle = "middle"


TemplateArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        help="Value of a variable of the chat template, such as enable_thinking=false; may be repeated.",
        metavar="KEY=VALUE",
    ),
]


@dataclass(frozen=True)
class LoadOptions:
    """How a model, or each of several, is found and loaded; the groups below say which."""

    PANEL: ClassVar[str] = "Model"

    model: Any
    device: Annotated[
        Device, typer.Option(help="auto, cpu or cuda; auto uses CUDA if it is available.", metavar="DEVICE")
    ] = Device.auto
    dtype: Annotated[
        ModelDtype,
        typer.Option(
            help="auto, float32, bfloat16 (changes shares by up to about 0.4 %) or float16; auto is the "
            "checkpoint's own on a GPU, and float32 on a CPU unless it multiplies bfloat16 fast.",
            metavar="DTYPE",
        ),
    ] = ModelDtype.auto
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file, or chatml, instead of the tokenizer's chat template.", metavar="FILE"),
    ] = None
    template_arg: TemplateArgOption = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Allow Python code from the model's repository to run."),
    ] = False
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.", metavar="NAME")
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model over devices: auto, balanced or sequential.",
            metavar="NAME",
        ),
    ] = None
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise the weights to 4 bits with bitsandbytes.")
    ] = False
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Quantise the weights to 8 bits with bitsandbytes.")
    ] = False

    @property
    def template_args(self) -> dict[str, Any]:
        """The values of --template-arg."""
        return parse_template_args(self.template_arg)

    def check_one(self, name: str) -> None:
        """Refuse what can be seen to be wrong for a model before anything heavy is imported.

        Raises:
            InputError: the model or template is not there, the template has no such variable, or options
                exclude each other.
        """
        from ctxlens.models.checkpoint import (
            find_chat_template,
            locate_checkpoint,
            pretrained_arguments,
            read_chat_template,
        )

        given, source = self.template_args, locate_checkpoint(name)
        if self.revision is not None:
            pretrained_arguments(source, self.revision)
        template = read_chat_template(self.chat_template)
        if given and (known := find_chat_template(source) if template is None else template):
            from ctxlens.chat.roles import check_arguments

            check_arguments(known, given)

    def load_one(self, name: str, backend: str) -> Model:
        """Load a model as `auto`, `lens` or `native`; `note_choice` prints how it was loaded."""
        self.check_one(name)
        from ctxlens.models import load_model

        return load_model(
            name,
            backend=backend,
            device=self.device.value,
            dtype=self.dtype.value,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
            device_map=self.device_map,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            template_args=self.template_args,
        )


BackendOption = Annotated[
    Backend,
    typer.Option(
        help="native (transformers; less memory, longer inputs), lens (TransformerLens; extra lens), or "
        "auto: native, or lens for a model that only TransformerLens can read.",
        metavar="NAME",
    ),
]


@dataclass(frozen=True)
class CheckpointOptions(LoadOptions):
    """One model, its device and its number format."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Folder, GGUF file, Hub id, [b]organism[/b] or [b]organism-chat[/b] (built in).",
            metavar="MODEL",
        ),
    ] = "organism"

    def check(self) -> None:
        """Raise `InputError` for a model, template or variable that is not there; see `check_one`."""
        self.check_one(self.model)

    @property
    def known(self) -> dict[str, Any]:
        """What is known of the model's identity before it is loaded."""
        from ctxlens.models.checkpoint import hash_checkpoint, locate_checkpoint

        dtype = {} if self.dtype is ModelDtype.auto else {"dtype": self.dtype.value}
        sha256 = hash_checkpoint(locate_checkpoint(self.model))
        return {"name": self.model, "sha256": sha256, "template_args": self.template_args, **dtype}

    def load_as(self, backend: str) -> Model:
        """Load the model that the options name, as `auto`, `lens` or `native`."""
        return self.load_one(self.model, backend)

    def load_tokenizer(self, *, renders_only: bool = False) -> Any:
        """Load only the tokenizer, with the chosen chat template and the values of its variables.

        Args:
            renders_only: whether a tokenizer that can only render is enough, which is loaded faster.
        """
        from ctxlens.chat.roles import bind_arguments
        from ctxlens.models.bare_tokenizer import read_bare_tokenizer
        from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint, read_chat_template

        template = read_chat_template(self.chat_template)
        source = locate_checkpoint(self.model)
        tokenizer = read_bare_tokenizer(source) if renders_only else None
        if tokenizer is None:
            found = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
            tokenizer = load_tokenizer(source, **found)
        if template is not None:
            tokenizer.chat_template = template
        if given := self.template_args:
            tokenizer.chat_template = bind_arguments(tokenizer.chat_template, given)
        return tokenizer


@dataclass(frozen=True)
class ModelOptions(CheckpointOptions):
    """The model, and the library that runs it."""

    backend: BackendOption = Backend.auto

    def load(self) -> Model:
        """Load the model that the options name."""
        return self.load_as(self.backend.value)


def note_choice(model: Model) -> None:
    """Print how a model was loaded, once the input is known to be good; the first process does it for all."""
    from ctxlens.models.choice import describe_choice

    if os.environ.get("RANK", "0") == "0":
        note(describe_choice(model))


def record_choice(run: Run, *models: Model) -> Run:
    """Record in a run's manifest how models were loaded; reopening the folder does not compare it."""
    from ctxlens.models.choice import choice_of

    known = dict(run.manifest.get("loaded") or {})
    loaded = {**known, **{model.name: choice_of(model) for model in models}}
    return run if loaded == known else run.record("loaded", loaded)


@dataclass(frozen=True)
class RenderOptions:
    """How conversations are turned into tokens."""

    PANEL: ClassVar[str] = "Rendering"

    system: Annotated[
        str | None, typer.Option(help="System message for conversations without one.", metavar="TEXT")
    ] = None
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Truncate conversations that are longer than the window.")
    ] = False
    truncation: Annotated[
        Side,
        typer.Option(
            help="Where --truncate removes context: left (the earliest), right or middle.", metavar="SIDE"
        ),
    ] = Side.left

    def as_dict(self) -> dict[str, Any]:
        """The options as arguments of `ctxlens.render` and as part of a run's configuration."""
        return {"system": self.system, "truncate": self.truncate, "truncation": self.truncation.value}


@dataclass(frozen=True)
class RunOptions:
    """The folder of the results, and the seed."""

    PANEL: ClassVar[str] = "Results"

    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the results. [dim]default: runs/VERB[/dim]", metavar="DIR"
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random choices.", metavar="N")] = 0
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start again; an earlier run in the folder is kept as DIR.old."),
    ] = False

    def check(self, study: str, known: Mapping[str, Any] | None = None) -> None:
        """Refuse a folder before anything heavy is imported, as far as that can be seen without a model.

        Args:
            study: the study that is to be run.
            known: the settings that are known already; in a nested mapping, only these keys are compared.

        Raises:
            RunExistsError: the folder holds something else, another study, or a run with other settings.
            InputError: it is a file.
        """
        from ctxlens.errors import InputError, RunExistsError
        from ctxlens.runs import MANIFEST, Run

        folder = self.out or Path("runs") / study
        if folder.is_file():
            raise InputError(f"{folder} is a file; give a folder for the results.")
        if not (folder / MANIFEST).is_file() and folder.is_dir() and any(folder.iterdir()):
            raise RunExistsError(
                f"{folder} already holds files that are not a ctxlens run; choose an empty or new folder."
            )
        if self.overwrite or not (folder / MANIFEST).is_file():
            return
        manifest = Run.read(folder).manifest
        found, config = manifest.get("study"), manifest.get("config") or {}
        wanted = json.loads(json.dumps({**(known or {}), "seed": self.seed}, default=str)) if known else {}
        keys = sorted(key for key, value in wanted.items() if _contradicts(config.get(key), value))
        if found != study or keys:
            why = (
                f"study {found!r} instead of {study!r}"
                if found != study
                else f"other settings: {', '.join(keys[:4])}"
            )
            raise RunExistsError(
                f"{folder} already holds another run ({why}); choose another folder, or pass --overwrite "
                "where the command has it."
            )

    def open(self, study: str, config: Mapping[str, Any], *models: Model) -> Run:
        """Open the run folder; record and print how the models were loaded. Call this after all checks."""
        from ctxlens.runs import Run

        config = {**config, "seed": self.seed}
        run = Run.open(self.out or Path("runs") / study, study=study, config=config, overwrite=self.overwrite)
        for model in models:
            note_choice(model)
        return record_choice(run, *models) if models else run

    def open_together(
        self, study: str, config: Mapping[str, Any], processes: Processes, *models: Model
    ) -> Run:
        """Open the run folder in several processes; the first one makes it, the others find it there."""
        if processes.is_first:
            self.open(study, config, *models)
        processes.wait()
        return replace(self, overwrite=False).open(study, config)


def _contradicts(found: Any, wanted: Any) -> bool:
    """Whether a recorded setting differs; of a mapping, only the wanted keys count, and none means empty."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted:
        return any(_contradicts(found.get(key), value) for key, value in wanted.items())
    return found != wanted and bool(found or wanted)


LayoutOption = Annotated[
    str | None,
    typer.Option(
        help="messages, sharegpt, alpaca or prompt-completion. [dim]default: detected[/dim]",
        metavar="NAME",
    ),
]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    """The annotations of a group's fields; the help text shows its options in the panel of the group."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        declared, option = hints[field.name].__origin__, copy(hints[field.name].__metadata__[0])
        option.rich_help_panel = kind.PANEL
        hints[field.name] = Annotated[declared, option]
    return hints


def _for_verb(annotation: Any, study: str, name: str) -> Any:
    """An option of one verb: flags show no placeholder, `runs/VERB` names the verb."""
    declared, option = annotation.__origin__, copy(annotation.__metadata__[0])
    if declared is bool:
        option.metavar = ""
    option.help = option.help.replace("runs/VERB", f"runs/{study}")
    option.autocompletion = find_completer(study, name)
    return Annotated[declared, option]


def verb(*commands: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb: every field of a dataclass parameter becomes an option.

    Args:
        *commands: examples for the help text.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        study = function.__name__.replace("_", "-")
        parameters: list[inspect.Parameter] = []
        groups: dict[str, Any] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            kind = hints[name]
            if is_dataclass(kind):
                groups[name] = kind
                kinds = _field_types(kind)
                spread = [(f.name, _default(f), kinds[f.name]) for f in fields(kind)]
            else:
                spread = [(name, parameter.default, kind)]
            parameters += [
                inspect.Parameter(
                    n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_for_verb(hint, study, n)
                )
                for n, default, hint in spread
            ]

        @wraps(function)
        def run(**given: Any) -> None:
            for name, kind in groups.items():
                given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            output = next((one for one in given.values() if isinstance(one, OutputOptions)), OutputOptions())
            with quieted(output.quiet), output.reserve():
                function(**given)

        del run.__wrapped__
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.epilog = examples(*commands)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate
