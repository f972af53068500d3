"""Fine-tune with the indicator on selected turns, through TRL, into a checkpoint of its own."""

from __future__ import annotations

import copy
import json
import shlex
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from ctxlens.chat.data import Conversation, load_conversations
from ctxlens.errors import InputError
from ctxlens.models.loading import read_chat_template
from ctxlens.results import Selection
from ctxlens.runs import MANIFEST, Run
from ctxlens.sft.adapter import check_model_arguments, make_peft_config
from ctxlens.sft.before_after import EvaluationKeys
from ctxlens.sft.config import (
    DATA_KEYS,
    EVALUATION_KEYS,
    check_arguments,
    first_line,
    make_model_config,
    make_sft_config,
    make_train_config,
    read_config,
    read_replay,
    without_renaming_notes,
)
from ctxlens.sft.delivery import LOG, SAVING, deliver, push
from ctxlens.sft.evaluation import StageProgress, as_keys, measure, plan
from ctxlens.sft.marks import hash_data, mark_data
from ctxlens.sft.rows import TrainRows, build_rows, draw_replay
from ctxlens.sft.start import Start, give_indicator, hash_weights, stop_where_turns_end
from ctxlens.sft.switch import install_switch

Progress = Callable[[int, int], None]


def train(
    conversations: Iterable[Conversation],
    *,
    out: str | Path,
    model: str | Path | Any = "organism",
    tokenizer: Any = None,
    selection: Selection | Collection[tuple[str, int]] | None = None,
    replay_texts: Sequence[str] = (),
    args: Any = None,
    model_args: Any = None,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
    evaluate: EvaluationKeys | Mapping[str, Any] | None = None,
    evaluation_progress: StageProgress | None = None,
    **options: Any,
) -> Path:
    """Fine-tune a model on conversations with TRL's `SFTTrainer` and save the checkpoint.

    With an `indicator`, the model gets that token, and the user messages that the selected turns answer
    end with it (paper section 4.1); without one this is plain SFT on the same rows. The batches of one
    optimizer step are drawn at random and then sorted by length, so with `gradient_accumulation_steps`
    above 1 little is spent on padding and the gradient stays the same.

    Args:
        conversations: the data; their user messages may carry `{"indicator": True}` already. What
            `load_conversations` has skipped is counted and recorded too.
        out: folder of the run: the checkpoint (safetensors, tokenizer, chat template), its `README.md`,
            `train.json` (loss log and counts) and `manifest.json`; where an adapter is trained, it lies in
            `adapter/` and the checkpoint has it merged. A finished run is returned as it is, one that was
            interrupted goes on from its last whole checkpoint if `args` keep any, else starts again.
        model: folder, Hub id or packaged model to start from; or a loaded transformers model, which is
            trained in place.
        tokenizer: needed with a loaded model, which it belongs to; else the checkpoint's own.
        selection: the turns whose user messages get the indicator.
        replay_texts: raw texts trained on beside the conversations.
        args: `SFTConfig`, or a mapping of its arguments over ctxlens' defaults (see `make_sft_config`). A
            `max_length` above the model's window means the window.
        model_args: TRL's `ModelConfig`, or a mapping of its arguments: `dtype`, `use_peft`, `lora_r`,
            `load_in_4bit` and so on.
        progress: called with optimizer steps done and in all.
        provenance: what the model card shall say about where the checkpoint came from, by name.
        evaluate: measure the delivered checkpoint against the model it started from, for its card:
            `EvaluationKeys`, or a mapping of them (`{"haystack": "essays/"}`; empty for a packaged model). It
            also works on a finished run, and goes on where it was stopped; of several processes the first
            one measures.
        evaluation_progress: called with the evaluation's stage, and done and total in it.
        options: keys of `TrainConfig` that say how to train: `indicator`, `indicator_init`, `loss_on`,
            `truncation`, `replay_share`, `chat_template`, `overwrite` and so on.

    Returns:
        The folder `out`, which loads with `ctxlens.load_model`.

    Raises:
        InputError: arguments out of their range, nothing to train on, a selection of other data, an
            indicator that the tokenizer or template does not carry, a model that cannot be loaded.
        RunExistsError: `out` holds another run.
    """
    out = Path(out)
    config = make_train_config(options)
    args = make_sft_config(out, args) if args is None or isinstance(args, Mapping) else copy.copy(args)
    args.output_dir = str(out)
    if model_args is None or isinstance(model_args, Mapping):
        model_args = make_model_config(model_args)
    check_arguments(args)
    check_model_arguments(model_args)
    start, hf_model = None, None
    if isinstance(model, str | Path):
        config = replace(config, model=str(model))
        start = Start.locate(config, args, model_args)
        tokenizer = start.load_tokenizer() if tokenizer is None else tokenizer
        identity = start.identity
    elif tokenizer is None:
        raise InputError("a loaded model needs its tokenizer; give tokenizer=.")
    else:
        hf_model = model
        identity = {"name": getattr(model.config, "_name_or_path", ""), "sha256": hash_weights(model)}
    template = read_chat_template(config.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    asked = plan(as_keys(evaluate), start, tokenizer)
    data = mark_data(list(conversations), selection, config, seed=args.seed)
    replayed = draw_replay(replay_texts, len(data), config.replay_share, args.seed)
    recipe = {
        "model": identity,
        **{key: getattr(config, key) for key in _RECORDED},
        "chat_template": template,
        "selection": _describe(selection),
        "data": hash_data(data, replayed),
        "arguments": _changed(args),
        "model_arguments": _changed(model_args),
    }
    finished = not config.overwrite and (out / MANIFEST).is_file()
    if finished and (run := Run.open(out, study="train", config=recipe)).has(LOG):
        if measure(out, asked, start, evaluation_progress) and args.push_to_hub:
            push(run, args)
        return out
    if start is not None:
        hf_model = start.load_model()
    indicator_ids = give_indicator(hf_model, tokenizer, config)
    stop_where_turns_end(hf_model, tokenizer)
    rows = build_rows(
        tokenizer, data, indicator=config.indicator, loss_on=config.loss_on, replay_texts=replayed,
        max_tokens=_longest_row(args, hf_model), truncation=config.truncation, unusable=config.unusable,
    )  # fmt: skip
    unread = tuple(getattr(conversations, "skipped", ()))  # rows that `load_conversations` could not use
    counts = {**rows.counts, "skipped": rows.counts["skipped"] + len(unread)}
    rows = replace(rows, skipped=(*unread, *rows.skipped), counts=counts)
    if config.indicator is not None and tokenizer.chat_template is not None:
        install_switch(tokenizer, config.indicator)
    peft_config = make_peft_config(model_args, hf_model, indicator_ids)
    with args.main_process_first(local=False, desc="opening the run"):
        anew = config.overwrite and args.process_index == 0
        run = Run.open(out, study="train", config=recipe, overwrite=anew)
    with _withdrawn_if_nothing_came(run, args), _without_bars(progress is not None):
        log, trained = _run_trainer(hf_model, tokenizer, rows, args, run, peft_config, progress)
        if args.process_index == 0:
            deliver(
                run, recipe, rows, log, tokenizer, provenance=provenance,
                merge=(start or trained) if peft_config is not None else None,
                is_untied=bool(indicator_ids),
            )  # fmt: skip
    hf_model = trained = None  # the evaluation needs the memory
    measure(out, asked, start, evaluation_progress)
    if args.push_to_hub and args.process_index == 0:
        push(run, args)
    return out


_RECORDED = (
    "indicator", "indicator_as", "indicator_init", "indicator_dropout", "negative_indicator",
    "selection_control", "upsample_selected", "loss_on", "truncation", "unusable", "replay_share",
)  # fmt: skip


def train_from_config(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    progress: Progress | None = None,
    evaluation_progress: StageProgress | None = None,
) -> Path:
    """Fine-tune by a recipe file; see `train`, `TrainConfig`, and TRL's `SFTConfig` and `ModelConfig`.

    Raises:
        InputError: a recipe that cannot be used (see `read_config`), and whatever `train` raises.
    """
    config, args, model_args = read_config(path, overrides)
    if not config.dataset:
        raise InputError(f"{path} names no dataset; add `dataset: FILE_OR_HUB_ID`.")
    selection = None
    if config.selection:
        given = Path(config.selection)
        selection = Selection.load(given / "selection.parquet" if given.is_dir() else given)
    data = load_conversations(config.dataset, split=config.split, layout=config.layout, limit=config.limit)
    return train(
        data,
        out=cast(str, args.output_dir),
        model=config.model,
        selection=selection,
        replay_texts=read_replay(config.replay) if config.replay else (),
        args=args,
        model_args=model_args,
        progress=progress,
        provenance={
            "data": config.dataset,
            "command": _command(path, overrides),
            "evaluate": _command(path, overrides, evaluate=True),
        },
        evaluate=config,
        evaluation_progress=evaluation_progress,
        **{
            f.name: getattr(config, f.name)
            for f in fields(config)
            if f.name not in DATA_KEYS | EVALUATION_KEYS
        },
    )


def _command(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any], *, evaluate: bool = False
) -> str:
    """The command that was given; or the one that evaluates the finished run, and so does not start anew.

    A token of the Hub is left out, because the command stands in the model card.
    """
    if isinstance(overrides, Mapping):
        given = {key: value for key, value in overrides.items() if value is not None and key != _SECRET}
        if evaluate:
            given = {key: value for key, value in given.items() if key != "overwrite"} | {"evaluate": "true"}
        words = ["ctxlens", "train", "--config", str(path)]
        words += [f"{key}={value}" for key, value in given.items()]
    else:
        words = ["python", "-m", "ctxlens.sft", "--config", str(path), *_without_secret(overrides)]
        if evaluate:
            words += ["--overwrite", "false", "--evaluate", "true"]
    return shlex.join(words)


_SECRET = "hub_token"


def _without_secret(words: Sequence[str]) -> list[str]:
    names = {f"--{_SECRET}", f"--{_SECRET.replace('_', '-')}"}
    before = ["", *words]
    return [
        word for last, word in zip(before, words, strict=False) if not {last, word.partition("=")[0]} & names
    ]


def _describe(selection: Selection | Collection[tuple[str, int]] | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    if isinstance(selection, Selection):
        return {key: value for key, value in selection.meta.items() if isinstance(value, str | int | float)}
    return {"turns": len(selection)}


_PLACES = frozenset({
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", _SECRET,
    "model_name_or_path",
})  # fmt: skip
"""Arguments that say where and how a run is shown or resumed, not what it computes."""


def _changed(args: Any) -> dict[str, Any]:
    """The arguments that differ from their defaults, as JSON values."""
    with without_renaming_notes():
        training = {"output_dir": "", "use_cpu": args.use_cpu, "bf16": False} if hasattr(args, "bf16") else {}
        plain = type(args)(**training)
    if plugin := getattr(args, "deepspeed_plugin", None):
        plugin.set_deepspeed_weakref()  # transformers follows the newest arguments, which end here
    return {
        f.name: getattr(args, f.name)
        for f in fields(args)
        if f.init and f.name not in _PLACES and getattr(args, f.name) != getattr(plain, f.name)
    }


def _longest_row(args: Any, hf_model: Any) -> int | None:
    window = getattr(hf_model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (args.max_length, window) if limit is not None]
    return min(limits) if limits else None


@contextmanager
def _without_bars(wanted: bool) -> Iterator[None]:
    """Keep transformers' own progress bars away while somebody else shows the progress."""
    from transformers.utils import logging

    if not wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def _withdrawn_if_nothing_came(run: Run, args: Any) -> Iterator[None]:
    """Take the manifest away again where training failed and left nothing beside it."""
    try:
        yield
    except Exception:
        left = [path.name for path in run.folder.iterdir()] if run.folder.is_dir() else []
        if args.process_index == 0 and left == [MANIFEST]:
            run.path(MANIFEST).unlink()
            run.folder.rmdir()
        raise


def find_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in a run's folder that was written to its end; None if there is none.

    The trainer writes `trainer_state.json` last, so one that was killed while it saved is passed over.
    """
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        whole.append((step, str(state.parent)))
    return max(whole)[1] if whole else None


def _checkpoint(given: Any, folder: Path) -> str | None:
    """Where to go on from: the checkpoint that is given, else the folder's last.

    Raises:
        InputError: what is given is no checkpoint; or none is wanted and the folder has one.
    """
    found, said = find_checkpoint(folder), str(given).lower()
    if said == "false" and found:
        raise InputError(
            f"resume_from_checkpoint is false, but {found} is there to go on from; set overwrite: true to "
            "start anew."
        )
    if given is None or said in {"true", "false"}:
        return found
    if not (Path(given) / "trainer_state.json").is_file():
        raise InputError(f"resume_from_checkpoint: {given} is no checkpoint's folder of the trainer.")
    return str(given)


def _run_trainer(
    hf_model: Any,
    tokenizer: Any,
    rows: TrainRows,
    args: Any,
    run: Run,
    peft_config: Any,
    progress: Progress | None,
) -> tuple[dict[str, Any], Any]:
    """Train and save to the folder `.saving`; returns the log and the trained model."""
    from ctxlens.sft.trainer import make_trainer

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(
            "the tokenizer has neither a pad nor an end token; give it one (pad_token in its "
            "tokenizer_config.json)."
        )
    if not args.packing:
        args.max_length = None  # the rows are truncated already, by turns instead of by tokens
    hf_model.train()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pad_token.*")
            trainer = make_trainer(
                hf_model, tokenizer, rows.rows, args, progress=progress, peft_config=peft_config
            )
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InputError(f"TRL refuses these arguments: {first_line(error)}.") from error
    checkpoint = _checkpoint(args.resume_from_checkpoint, run.folder)
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    hf_model.eval()
    trainer.save_model(str(run.path(SAVING)), _internal_call=True)  # `_push` uploads what is delivered
    steps = [
        {key: float(entry[key]) for key in ("step", "loss", "learning_rate", "grad_norm") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    log = {"steps": trainer.state.global_step, "wall_seconds": wall, "cpu_seconds": cpu, "log": steps}
    return log, trainer.accelerator.unwrap_model(trainer.model)
