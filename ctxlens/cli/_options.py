"""Groups of options that verbs share; `verb` turns every field of a group into one option."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from ctxlens.cli._screen import examples

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


@dataclass(frozen=True)
class CheckpointOptions:
    """The model, its device and its number format."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Folder, GGUF file, Hub id, [b]organism[/b] or [b]organism-chat[/b] (built in).",
            metavar="MODEL",
        ),
    ] = "organism"
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
        typer.Option(help="Jinja file that replaces the tokenizer's chat template.", metavar="FILE"),
    ] = None
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

    def check(self) -> None:
        """Raise `InputError` for a model or template that is not there; imports nothing heavy."""
        from ctxlens.models.checkpoint import locate_checkpoint, read_chat_template

        locate_checkpoint(self.model)
        read_chat_template(self.chat_template)

    def load_as(self, backend: str) -> Model:
        """Load the model that the options name, as `auto`, `lens` or `native`."""
        from ctxlens.models import load_model

        return load_model(
            self.model,
            backend=backend,
            device=self.device.value,
            dtype=self.dtype.value,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
            device_map=self.device_map,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
        )

    def load_tokenizer(self) -> Any:
        """Load only the tokenizer, with the chosen chat template."""
        from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint, read_chat_template

        template = read_chat_template(self.chat_template)
        source = locate_checkpoint(self.model)
        tokenizer = load_tokenizer(source, trust_remote_code=self.trust_remote_code, revision=self.revision)
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer


@dataclass(frozen=True)
class ModelOptions(CheckpointOptions):
    """The model, and the library that runs it."""

    backend: Annotated[
        Backend,
        typer.Option(
            help="native (transformers; less memory, longer inputs), lens (TransformerLens), or auto: "
            "native, or lens for a model that only TransformerLens can read.",
            metavar="NAME",
        ),
    ] = Backend.auto

    def load(self) -> Model:
        """Load the model that the options name."""
        return self.load_as(self.backend.value)


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

    def check(self, study: str) -> None:
        """Raise `RunExistsError` if the folder holds another study; imports nothing heavy."""
        from ctxlens.errors import RunExistsError
        from ctxlens.runs import MANIFEST, Run

        folder = self.out or Path("runs") / study
        if self.overwrite or not (folder / MANIFEST).is_file():
            return
        found = Run.read(folder).manifest.get("study")
        if found != study:
            raise RunExistsError(
                f"{folder} already holds another run (study {found!r} instead of {study!r}); choose another "
                "folder, or pass --overwrite where the command has it."
            )

    def open(self, study: str, config: Mapping[str, Any]) -> Run:
        """Open the run folder; call this after all other checks."""
        from ctxlens.runs import Run

        config = {**config, "seed": self.seed}
        return Run.open(
            self.out or Path("runs") / study, study=study, config=config, overwrite=self.overwrite
        )

    def open_together(self, study: str, config: Mapping[str, Any], processes: Processes) -> Run:
        """Open the run folder in several processes; the first one makes it, the others find it there."""
        if processes.is_first:
            self.open(study, config)
        processes.wait()
        return replace(self, overwrite=False).open(study, config)


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


def _for_help(annotation: Any, study: str) -> Any:
    """An option in one verb's help: flags show no placeholder, and `runs/VERB` names the verb."""
    declared, option = annotation.__origin__, copy(annotation.__metadata__[0])
    if declared is bool:
        option.metavar = ""
    option.help = option.help.replace("runs/VERB", f"runs/{study}")
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
                    n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_for_help(hint, study)
                )
                for n, default, hint in spread
            ]

        @wraps(function)
        def run(**given: Any) -> None:
            for name, kind in groups.items():
                given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            function(**given)

        del run.__wrapped__
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.epilog = examples(*commands)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate
