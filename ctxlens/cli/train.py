"""`ctxlens train`: fine-tuning with the indicator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._options import Device, Dtype, verb
from ctxlens.errors import InputError


@verb(
    "ctxlens train --config recipe.yaml",
    "ctxlens train --config recipe.yaml --out runs/vanilla indicator=null selection=null",
    "ctxlens train --config recipe.yaml --evaluate evaluate_haystack=essays/",
    "ctxlens train --config recipe.yaml use_peft=true lora_r=16 lora_target_modules=all-linear",
    "accelerate launch --config_file ddp.yaml -m ctxlens.sft --config recipe.yaml  [dim](several GPUs)[/dim]",
)
def train(
    config: Annotated[
        Path,
        typer.Option(
            help="YAML recipe: keys of ctxlens, and of TRL's SFTConfig and ModelConfig.", metavar="FILE"
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys that go before the recipe's.", metavar="KEY=VALUE")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Overrides the recipe's model.", metavar="PATH_OR_HUB_ID"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Overrides the recipe's output_dir.", metavar="DIR")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Overrides the recipe's seed.")] = None,
    device: Annotated[Device, typer.Option(help="auto takes CUDA where there is one.")] = Device.auto,
    dtype: Annotated[Dtype | None, typer.Option(help="Overrides the recipe's dtype.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Overrides the recipe's chat_template.", metavar="FILE")
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Then measure the checkpoint against the model it started from, for its card (see the keys "
            "evaluate_…); also adds this to a finished run.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; a run in the folder is kept as DIR.old.")
    ] = False,
) -> None:
    """Fine-tune with the indicator on selected answers (TRL's SFTTrainer), into a checkpoint of its own.

    A stopped run goes on from its last checkpoint (save_strategy: steps) when the command is given again.
    """
    from ctxlens.models.loading import resolve_device
    from ctxlens.sft import IndicatorWarning, train_from_config
    from ctxlens.sft.before_after import STAGES

    if device is Device.cuda:
        resolve_device(device.value)
    given: dict[str, Any] = {
        "model": model, "output_dir": out, "seed": seed, "dtype": dtype, "chat_template": chat_template,
        "use_cpu": None if device is Device.auto else device is Device.cpu,
        "overwrite": True if overwrite else None, "evaluate": True if evaluate else None,
    }  # fmt: skip
    for word in overrides or ():
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is no override; give KEY=VALUE, such as learning_rate=1e-4.")
        given[key] = value
    titles = {"training": "training steps", **STAGES}
    with _screen.stages(titles) as progress, warnings.catch_warnings():
        warnings.simplefilter("always", IndicatorWarning)
        warnings.showwarning = lambda message, *_, **__: _screen.note(f"warning: {message}")
        folder = train_from_config(
            config,
            given,
            progress=lambda done, total: progress("training", done, total),
            evaluation_progress=progress,
        )
    _tables.show_training(folder)
    _tables.show_evaluations(folder)
    _screen.say_where(folder)
