"""`ctxlens train`: fine-tune with the indicator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxlens.cli import _outcomes, _screen, _tables
from ctxlens.cli._inputs import parse_overrides, parse_template_args
from ctxlens.cli._options import Device, Dtype, verb
from ctxlens.cli._output import OutputOptions
from ctxlens.errors import InputError, Problems


@verb(
    "ctxlens train MODEL --dataset data.jsonl --out runs/train",
    "ctxlens train MODEL --dataset data.jsonl --recipe lora selection=runs/selected",
    "ctxlens train --config recipe.yaml",
    "ctxlens train --config recipe.yaml --out runs/vanilla indicator=null selection=null",
    "ctxlens train --config recipe.yaml --evaluate evaluate_haystack=essays/",
    "ctxlens train --config recipe.yaml use_peft=true lora_r=16 lora_target_modules=all-linear",
    "accelerate launch --config_file ddp.yaml -m ctxlens.sft --config recipe.yaml  [dim]# several GPUs[/dim]",
)
def train(
    output: OutputOptions,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="The model, instead of --model, and values that override the recipe.",
            metavar="MODEL|KEY=VALUE",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "--config",
            help="YAML file with keys of ctxlens and of TRL's SFTConfig and ModelConfig; or lora, full or "
            "organism, which come with ctxlens and fit the model's size. [dim]default: full up to a billion "
            "parameters, else lora[/dim]",
            metavar="FILE|NAME",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Overrides the recipe's model.", metavar="MODEL"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Conversations: file, folder or Hub id. Overrides the recipe's dataset.", metavar="DATA"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Overrides the recipe's output_dir.", metavar="DIR")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Overrides the recipe's seed.", metavar="N")] = None,
    device: Annotated[
        Device, typer.Option(help="auto, cpu or cuda; auto uses CUDA if it is available.", metavar="DEVICE")
    ] = Device.auto,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Overrides the recipe's dtype.", metavar="DTYPE")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Overrides the recipe's chat_template: a file, or chatml, for base models.", metavar="FILE"
        ),
    ] = None,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--template-arg",
            help="Value of a variable of the chat template; may be repeated. Overrides the recipe's "
            "template_args.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Overrides the recipe's model_revision.", metavar="NAME")
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise the weights to 4 bits (with an adapter).")
    ] = False,
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Quantise the weights to 8 bits (with an adapter).")
    ] = False,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="After training, compare the checkpoint with the model it started from, for the model card "
            "(see the keys evaluate_…). Also works on a finished run.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start again; an earlier run in the folder is kept as DIR.old."),
    ] = False,
) -> None:
    """Fine-tune a model with TRL's SFTTrainer, with the indicator on selected answers.

    To resume a stopped run from its last checkpoint (save_strategy: steps), run the same command again.
    """
    from ctxlens.sft.early import check_training
    from ctxlens.sft.shipped import choose_recipe

    problems = Problems()
    named, written = parse_overrides(words or (), problems)
    if named and model:
        problems.add(InputError(f"two models are given, {named} and --model {model}; give one."))
    model = model or named
    given: dict[str, Any] = {
        "model": model, "dataset": dataset, "output_dir": out, "seed": seed, "dtype": dtype,
        "chat_template": chat_template,
        "use_cpu": None if device is Device.auto else device is Device.cpu,
        "overwrite": True if overwrite else None, "evaluate": True if evaluate else None,
        "template_args": parse_template_args(template_arg) or None, "model_revision": revision,
        "load_in_4bit": True if load_in_4bit else None, "load_in_8bit": True if load_in_8bit else None,
        **written,
    }  # fmt: skip
    chosen = recipe or choose_recipe(str(given["model"] or ""))
    check_training(chosen, given, problems)
    if recipe is None:
        _screen.note(f"recipe: {chosen}")

    from ctxlens.models.loading import resolve_device
    from ctxlens.sft import IndicatorWarning, train_from_config
    from ctxlens.sft.before_after import STAGES

    if device is Device.cuda:
        resolve_device(device.value)
    titles = {"training": "training steps", **STAGES}
    with _screen.stages(titles) as progress, warnings.catch_warnings():
        warnings.simplefilter("always", IndicatorWarning)
        warnings.showwarning = lambda message, *_, **__: _screen.note(f"warning: {message}")
        folder = train_from_config(
            chosen,
            given,
            progress=lambda done, total: progress("training", done, total),
            evaluation_progress=progress,
            notice=_screen.note,
        )
    output.show(
        lambda: _outcomes.records_outcome("train", *_tables.training_records(folder), None, folder),
        lambda: (_tables.show_training(folder), _tables.show_evaluations(folder)),
    )
    _screen.say_where(folder)
