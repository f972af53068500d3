"""Fine-tuning on selected turns through TRL: resolve, prepare, fit, deliver, and evaluate if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ctxlens.chat.data import Conversation, add_skipped, load_conversations
from ctxlens.chat.data.given_rows import Source
from ctxlens.results import Selection
from ctxlens.runs import Progress, Run, StageProgress
from ctxlens.sft.delivery import deliver, push
from ctxlens.sft.early import check_training
from ctxlens.sft.evaluation import measure
from ctxlens.sft.fit import fit, removed_if_empty
from ctxlens.sft.job import Job, prepare, resolve
from ctxlens.sft.keys import OPTION_KEYS, EvaluationKeys, make_train_config
from ctxlens.sft.marks import Turns
from ctxlens.sft.recipe import Overrides, describe_command
from ctxlens.sft.replay import read_replay


def train(
    conversations: Iterable[Conversation] | Source,
    *,
    out: str | Path,
    model: str | Path | Any = "organism",
    tokenizer: Any = None,
    selection: Selection | Turns | None = None,
    replay_texts: Sequence[str] = (),
    args: Any = None,
    model_args: Any = None,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
    evaluate: EvaluationKeys | Mapping[str, Any] | None = None,
    evaluation_progress: StageProgress | None = None,
    notice: Callable[[str], None] | None = None,
    **options: Any,
) -> Path:
    """Fine-tune a model on conversations with TRL's `SFTTrainer` and save the checkpoint.

    With an `indicator`, the model gets that token, and the user messages that the selected turns answer end
    with it (paper section 4.1); without one this is plain SFT on the same rows. The rows of one optimizer
    step are drawn at random and then sorted by length. With `gradient_accumulation_steps` above 1 this saves
    padding, and the gradient stays the same.

    A finished run is returned unchanged. An interrupted run resumes from its last complete checkpoint if
    `args` save any; otherwise it starts again.

    Args:
        conversations: the data; user messages may already carry `{"indicator": True}`. Anything else that
            `load_conversations` takes is loaded: a path, a `datasets.Dataset`, a data frame, a list of rows.
            Rows that it has skipped are counted and recorded too.
        out: folder of the run: the checkpoint (safetensors, tokenizer, chat template), its `README.md`,
            `train.json` (loss log and counts) and `manifest.json`. If an adapter is trained, it is saved in
            `adapter/`, and the checkpoint contains it merged.
        model: folder, Hub id or packaged model to start from; or a loaded transformers model, which is
            trained in place.
        tokenizer: the tokenizer. Required with a loaded model; default: the checkpoint's own.
        selection: the turns whose user messages get the indicator.
        replay_texts: raw texts to train on besides the conversations.
        args: `SFTConfig`, or a mapping of arguments that override our defaults (see `make_sft_config`). A
            `max_length` above the model's window is lowered to the window.
        model_args: TRL's `ModelConfig`, or a mapping of its arguments: `dtype`, `use_peft`, `lora_r`,
            `load_in_4bit` and so on.
        progress: called with the number of optimizer steps that are done, and of all.
        provenance: further entries of the model card about the origin of the checkpoint, by name.
        evaluate: compare the delivered checkpoint with the model before the training, and add the result to
            the model card: `EvaluationKeys`, or a mapping of them (`{"haystack": "essays/"}`; an empty
            mapping is enough for a packaged model). This also works on a finished run, and resumes after an
            interruption. Of several processes the first one evaluates.
        evaluation_progress: called with the stage of the evaluation, and how much of it is done, and of all.
        notice: called with one line on the number format and the device, when the model has been loaded.
        options: keys of `TrainConfig` that say how to train: `indicator`, `indicator_init`, `loss_on`,
            `truncation`, `replay_share`, `chat_template`, `overwrite` and so on; with `context=True`, how
            the model uses its context is measured meanwhile (`ContextCallback`).

    Returns:
        The folder `out`, which `ctxlens.load_model` loads.

    Raises:
        InputError: arguments are out of range, there is nothing to train on, the selection was made from
            other data, the tokenizer or template does not carry the indicator, or the model cannot be loaded.
        RunExistsError: `out` holds another run.
    """
    job = resolve(
        conversations,
        make_train_config(options),
        out=Path(out),
        model=model,
        tokenizer=tokenizer,
        selection=selection,
        replay_texts=replay_texts,
        args=args,
        model_args=model_args,
        evaluate=evaluate,
    )
    is_new = not job.is_finished()
    if is_new:
        _fit_and_deliver(job, progress, provenance, notice)
    is_measured = measure(job.out, job.evaluation, job.start, evaluation_progress)
    if job.args.push_to_hub and job.is_main and (is_new or is_measured):
        push(Run.read(job.out), job.args)
    return job.out


def _fit_and_deliver(
    job: Job,
    progress: Progress | None,
    provenance: Mapping[str, str] | None,
    notice: Callable[[str], None] | None,
) -> None:
    """Train and write the checkpoint; the models are released, because the evaluation needs the memory."""
    prepared = prepare(job)
    run = job.open_run()
    if job.is_main:
        run = run.record("rows", add_skipped(job.reading, prepared.rows.skipped))
        dtype = str(prepared.hf_model.dtype).removeprefix("torch.")
        dtype += " with bfloat16 autocast" * bool(job.args.bf16 and dtype == "float32")
        name, device = job.recipe["model"]["name"], str(job.args.device)
        run = run.record("loaded", {name: {"backend": "trl", "dtype": dtype, "device": device}})
        if notice:
            notice(f"{PurePath(name).name or name}: trained with TRL, {dtype}, {device}")
    with removed_if_empty(run, is_main=job.is_main):
        allow = job.config.allow_cross_sample_attention
        log, trained = fit(prepared, job.args, run, progress, allow_cross_sample=allow, context=job.config)
        if job.is_main:
            deliver(
                run, job.recipe, prepared.rows, log, prepared.tokenizer, provenance=provenance,
                merge=(job.start or trained) if prepared.peft_config is not None else None,
                is_untied=prepared.has_indicator_rows,
            )  # fmt: skip


def train_from_config(
    path: str | Path,
    overrides: Overrides = (),
    *,
    progress: Progress | None = None,
    evaluation_progress: StageProgress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """Fine-tune by a recipe file; see `train`, `TrainConfig`, and TRL's `SFTConfig` and `ModelConfig`.

    The environment variables of the recipe's `env` block are set first.

    Args:
        path: the YAML file, or the name of a recipe that comes with ctxlens: lora, full or organism.
        overrides: command-line words or a mapping; they override the file.
        progress: see `train`.
        evaluation_progress: see `train`.
        notice: see `train`.

    Raises:
        InputError: the recipe cannot be used (see `read_recipe`), or `train` raises it.
    """
    recipe = check_training(path, overrides)
    recipe.set_environment()
    args, model_args = recipe.build_arguments()
    config = recipe.config
    return train(
        load_conversations(config.dataset, split=config.split, layout=config.layout, limit=config.limit),
        out=args.output_dir,
        model=config.model,
        selection=_load_selection(config.selection),
        replay_texts=read_replay(config.replay) if config.replay else (),
        args=args,
        model_args=model_args,
        progress=progress,
        provenance={
            "data": config.dataset,
            "command": describe_command(path, overrides),
            "evaluate": describe_command(path, overrides, evaluate=True),
        },
        evaluate=config,
        evaluation_progress=evaluation_progress,
        notice=notice,
        **{key: getattr(config, key) for key in OPTION_KEYS},
    )


def _load_selection(given: str | None) -> Selection | None:
    """The selection of a file, or of the run folder that contains it."""
    if not given:
        return None
    path = Path(given)
    return Selection.load(path / "selection.parquet" if path.is_dir() else path)


__all__ = ["train", "train_from_config"]
