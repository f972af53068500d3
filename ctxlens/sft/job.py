"""A training before it runs: first resolved and checked, then prepared with model and rows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctxlens.chat.data import Conversation, as_conversations, describe_reading
from ctxlens.chat.data.given_rows import Source
from ctxlens.errors import InputError
from ctxlens.models.checkpoint import read_chat_template
from ctxlens.results import Selection
from ctxlens.runs import MANIFEST, Run
from ctxlens.sft.adapter import check_model_arguments, make_peft_config
from ctxlens.sft.arguments import changed_arguments, check_arguments, make_model_config, make_sft_config
from ctxlens.sft.before_after import EvaluationPlan
from ctxlens.sft.delivery import LOG
from ctxlens.sft.early import STUDY
from ctxlens.sft.evaluation import as_keys, plan
from ctxlens.sft.keys import RECORDED_KEYS, EvaluationKeys, TrainConfig
from ctxlens.sft.marks import Turns, hash_data, mark_data
from ctxlens.sft.packing import check_strategy
from ctxlens.sft.replay import draw_replay
from ctxlens.sft.rows import TrainRows, build_rows
from ctxlens.sft.start import (
    Start,
    choose_template,
    give_indicator,
    hash_weights,
    stop_where_turns_end,
)
from ctxlens.sft.switch import install_switch


@dataclass(frozen=True)
class Job:
    """A training that has been checked as far as possible without the model's weights.

    Attributes:
        out: folder of the run.
        config: ctxlens' keys of the recipe.
        args: TRL's `SFTConfig`.
        model_args: TRL's `ModelConfig`.
        start: the checkpoint to start from; None if the caller has loaded the model.
        hf_model: the model that the caller has loaded, or None.
        tokenizer: the tokenizer with the chat template of the training, without the indicator.
        data: the conversations with their marks.
        replayed: the raw texts to train on.
        reading: layout and counts of the rows that were read, for the manifest.
        unread: id of every conversation that `load_conversations` could not use, and why.
        noted: what `load_conversations` read in another way than the data have it, and how often.
        recipe: everything that the result depends on, as JSON values for the manifest.
        evaluation: what is asked after the training; None if nothing is.
    """

    out: Path
    config: TrainConfig
    args: Any
    model_args: Any
    start: Start | None
    hf_model: Any
    tokenizer: Any
    data: list[Conversation]
    replayed: list[str]
    reading: Mapping[str, Any]
    unread: tuple[tuple[str, str], ...]
    noted: Mapping[str, int]
    recipe: Mapping[str, Any]
    evaluation: EvaluationPlan | None

    @property
    def is_main(self) -> bool:
        """Whether this is the first of several processes, which writes the files."""
        return self.args.process_index == 0

    def is_finished(self) -> bool:
        """Whether the folder already holds this training, finished.

        Raises:
            RunExistsError: the folder holds another run.
        """
        if self.config.overwrite or not (self.out / MANIFEST).is_file():
            return False
        return Run.open(self.out, study=STUDY, config=self.recipe).has(LOG)

    def open_run(self) -> Run:
        """Open the folder of the run; the first process before the others.

        Raises:
            RunExistsError: the folder holds another run.
        """
        with self.args.main_process_first(local=False, desc="opening the run"):
            anew = self.config.overwrite and self.is_main
            return Run.open(self.out, study=STUDY, config=self.recipe, overwrite=anew)


@dataclass(frozen=True)
class Prepared:
    """What the trainer gets.

    Attributes:
        hf_model: the model, with the indicator.
        tokenizer: its tokenizer, with the indicator.
        rows: the training rows.
        peft_config: PEFT's configuration of the adapter, or None.
        has_indicator_rows: whether the model has an embedding for the indicator, so that an adapter's output
            head is untied.
    """

    hf_model: Any
    tokenizer: Any
    rows: TrainRows
    peft_config: Any
    has_indicator_rows: bool


def resolve(
    conversations: Iterable[Conversation] | Source,
    config: TrainConfig,
    *,
    out: Path,
    model: str | Path | Any,
    tokenizer: Any,
    selection: Selection | Turns | None,
    replay_texts: Sequence[str],
    args: Any,
    model_args: Any,
    evaluate: EvaluationKeys | Mapping[str, Any] | None,
) -> Job:
    """Resolve and check what `train` was asked for, without loading weights or writing files; see `train`."""
    args, model_args = _resolve_arguments(out, model, args, model_args)
    check_strategy(args, allowed=config.allow_cross_sample_attention)
    start = None
    if isinstance(model, str | Path):
        config = config.model_copy(update={"model": str(model)})
        start = Start.locate(config, args, model_args)
        identity = start.identity
    elif tokenizer is None:
        raise InputError("a loaded model needs its tokenizer; give tokenizer=.")
    else:
        identity = {"name": getattr(model.config, "_name_or_path", ""), "sha256": hash_weights(model)}
    if tokenizer is not None:
        choose_template(tokenizer, config)
    elif start is not None:
        tokenizer = start.load_tokenizer()
    template = read_chat_template(config.chat_template)
    evaluation = plan(as_keys(evaluate), start, tokenizer)
    conversations = as_conversations(conversations)
    read = list(conversations)
    data = mark_data(read, selection, config, seed=args.seed)
    replayed = draw_replay(replay_texts, len(data), config.replay_share, args.seed)
    return Job(
        out=out, config=config, args=args, model_args=model_args, start=start,
        hf_model=model if start is None else None, tokenizer=tokenizer, data=data, replayed=replayed,
        reading=describe_reading(conversations),
        unread=tuple(getattr(conversations, "skipped", ())),
        noted=dict(getattr(conversations, "noted", {})), evaluation=evaluation,
        recipe={
            "model": identity,
            **{key: getattr(config, key) for key in RECORDED_KEYS},
            "chat_template": template,
            **({"template_args": config.template_args} if config.template_args else {}),
            **({"context_stop_below": stop} if (stop := config.context_stop_below) is not None else {}),
            "selection": _describe(selection),
            "data": hash_data(data, replayed),
            "arguments": changed_arguments(args),
            "model_arguments": changed_arguments(model_args),
        },
    )  # fmt: skip


def _resolve_arguments(out: Path, model: Any, args: Any, model_args: Any) -> tuple[Any, Any]:
    """TRL's two argument classes from what the caller gave, checked; the caller's own are not changed."""
    is_given = args is not None and not isinstance(args, Mapping)
    args = copy.copy(args) if is_given else make_sft_config(out, args, model=model)
    args.output_dir = str(out)
    if model_args is None or isinstance(model_args, Mapping):
        model_args = make_model_config(model_args)
    check_arguments(args)
    check_model_arguments(model_args)
    return args, model_args


def _describe(selection: Selection | Turns | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    if isinstance(selection, Selection):
        return {key: value for key, value in selection.meta.items() if isinstance(value, str | int | float)}
    return {"turns": len(selection)}


def prepare(job: Job) -> Prepared:
    """Load the model, give it the indicator, and build the training rows.

    Raises:
        InputError: the model cannot be loaded, the tokenizer or the template does not carry the indicator, or
            there is nothing to train on.
    """
    config, tokenizer = job.config, job.tokenizer
    hf_model = job.hf_model if job.start is None else job.start.load_model()
    indicator_ids = give_indicator(hf_model, tokenizer, config)
    stop_where_turns_end(hf_model, tokenizer)
    rows = build_rows(
        tokenizer, job.data, indicator=config.indicator, loss_on=config.loss_on, replay_texts=job.replayed,
        max_tokens=_longest_row(job.args, hf_model), truncation=config.truncation, unusable=config.unusable,
    )  # fmt: skip
    counts = {**rows.counts, "skipped": rows.counts["skipped"] + len(job.unread)}
    rows = replace(rows, skipped=(*job.unread, *rows.skipped), counts=counts, noted=job.noted)
    if config.indicator is not None and tokenizer.chat_template is not None:
        install_switch(tokenizer, config.indicator)
    peft_config = make_peft_config(job.model_args, hf_model, indicator_ids)
    return Prepared(hf_model, tokenizer, rows, peft_config, bool(indicator_ids))


def _longest_row(args: Any, hf_model: Any) -> int | None:
    window = getattr(hf_model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (args.max_length, window) if limit is not None]
    return min(limits) if limits else None


__all__ = ["Job", "Prepared", "prepare", "resolve"]
