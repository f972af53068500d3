"""The options that verbs share, as dataclasses that `verb` spreads into single options."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ctxlens.cli._screen import examples

if TYPE_CHECKING:
    from ctxlens.models import Model
    from ctxlens.runs import Run


class Backend(enum.StrEnum):
    """Which library runs the model."""

    lens = "lens"
    native = "native"


class Dtype(enum.StrEnum):
    """Number format of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(enum.StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Side(enum.StrEnum):
    """Where a conversation that is too long is cut."""

    left = "left"
    right = "right"
    middle = "middle"


@dataclass(frozen=True)
class CheckpointOptions:
    """Which model, where and in which numbers it is run."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Folder, Hub id, or [b]organism[/b] (built in).", metavar="PATH_OR_HUB_ID"
        ),
    ] = "organism"
    device: Annotated[Device, typer.Option(help="auto takes CUDA where there is one.")] = Device.auto
    dtype: Annotated[Dtype, typer.Option(help="Shares are read to about 0.4 % in bfloat16.")] = Dtype.float32
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file to use instead of the tokenizer's own template.", metavar="FILE"),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")
    ] = False

    def load_as(self, backend: str) -> Model:
        """Load the model that the options name, as `lens` or `native`."""
        from ctxlens.models import load_model

        return load_model(
            self.model,
            backend=backend,
            device=self.device.value,
            dtype=self.dtype.value,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
        )

    def load_tokenizer(self) -> Any:
        """Load the tokenizer alone, with the chat template in use."""
        from ctxlens.models.loading import load_tokenizer, locate_checkpoint, read_chat_template

        template = read_chat_template(self.chat_template)
        source = locate_checkpoint(self.model)
        tokenizer = load_tokenizer(source, trust_remote_code=self.trust_remote_code)
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer


@dataclass(frozen=True)
class ModelOptions(CheckpointOptions):
    """Which model, and how it is run."""

    backend: Annotated[
        Backend,
        typer.Option(
            help="TransformerLens (lens), or transformers itself (native: less memory, long inputs)."
        ),
    ] = Backend.lens

    def load(self) -> Model:
        """Load the model that the options name."""
        return self.load_as(self.backend.value)


@dataclass(frozen=True)
class RenderOptions:
    """How conversations become tokens."""

    system: Annotated[
        str | None, typer.Option(help="System message for conversations that have none.", metavar="TEXT")
    ] = None
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut conversations that are longer than the model's window.")
    ] = False
    truncation: Annotated[
        Side,
        typer.Option(help="What --truncate cuts first: the earliest context, the latest, or its middle."),
    ] = Side.left

    def as_dict(self) -> dict[str, Any]:
        """The options of `ctxlens.render`; those of a run's config."""
        return {"system": self.system, "truncate": self.truncate, "truncation": self.truncation.value}


@dataclass(frozen=True)
class RunOptions:
    """Where results go."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the results. [dim]default: runs/VERB[/dim]", metavar="DIR"
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn at random.")] = 0
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; a run in the folder is kept as DIR.old.")
    ] = False

    def open(self, study: str, config: Mapping[str, Any]) -> Run:
        """Open the run folder, once everything else has been checked."""
        from ctxlens.runs import Run

        config = {**config, "seed": self.seed}
        return Run.open(
            self.out or Path("runs") / study, study=study, config=config, overwrite=self.overwrite
        )


LayoutOption = Annotated[
    str | None, typer.Option(help="messages, sharegpt, alpaca or prompt-completion; found out by default.")
]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def verb(*commands: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb: dataclass parameters become one option a field, commands become examples."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
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
                inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                for n, default, annotation in spread
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
