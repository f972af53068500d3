"""Fine-tune with the indicator on selected turns, through TRL, into a checkpoint of its own."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from ctxlens.data import Conversation, load_conversations
from ctxlens.errors import InputError
from ctxlens.indicator import EMBEDDING_MULTIPLE, add_indicator, annotate_messages
from ctxlens.models.loading import (
    hash_checkpoint,
    load_causal_lm,
    load_tokenizer,
    locate_checkpoint,
    read_chat_template,
    resolve_dtype,
)
from ctxlens.results import Selection
from ctxlens.runs import MANIFEST, Run, package_versions, write_atomic
from ctxlens.sft.config import make_sft_config, read_config, read_replay, without_renaming_notes
from ctxlens.sft.rows import TrainRows, build_rows, draw_replay

Progress = Callable[[int, int], None]
LOG = "train.json"
_SAVING = ".saving"


def train(
    conversations: Iterable[Conversation],
    *,
    out: str | Path,
    model: str | Path | Any = "organism",
    tokenizer: Any = None,
    selection: Selection | Collection[tuple[str, int]] | None = None,
    indicator: str | None = None,
    indicator_init: str = "mean",
    loss_on: str = "assistant",
    replay_texts: Sequence[str] = (),
    replay_share: float | None = None,
    chat_template: str | Path | None = None,
    dtype: str = "float32",
    args: Any = None,
    progress: Progress | None = None,
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
            `train.json` (loss log and counts) and `manifest.json`. A finished run is returned as it is, one
            that was interrupted is started again, from its last checkpoint if `args` keep any.
        model: folder, Hub id or packaged model to start from; or a loaded transformers model, which is
            trained in place.
        tokenizer: needed with a loaded model, which it belongs to; else the checkpoint's own.
        selection: the turns whose user messages get the indicator.
        indicator: the indicator token, such as `"[IND]"`.
        indicator_init: see `add_indicator`.
        loss_on: `assistant`: loss on assistant contents and the tokens that end them; `all`: on all tokens.
        replay_texts: raw texts trained on beside the conversations.
        replay_share: their share of the rows, 0 to 1; all of them once if not given.
        chat_template: file or text of a chat template in place of the tokenizer's own.
        dtype: type of the weights of a model that is loaded here.
        args: `SFTConfig`, or a mapping of its arguments over ctxlens' defaults (see `make_sft_config`). A
            `max_length` above the model's window means the window.
        progress: called with optimizer steps done and in all.

    Returns:
        The folder `out`, which loads with `ctxlens.load_model`.

    Raises:
        InputError: nothing to train on, a selection of other data, an indicator that the tokenizer or
            template does not carry, a model that cannot be loaded.
        RunExistsError: `out` holds another run.
    """
    out = Path(out)
    args = make_sft_config(out, args) if args is None or isinstance(args, Mapping) else copy.copy(args)
    args.output_dir = str(out)
    template = read_chat_template(chat_template)
    if isinstance(model, str | Path):
        source = locate_checkpoint(model)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
        hf_model, identity = None, {"name": str(model), "sha256": hash_checkpoint(source)}
    elif tokenizer is None:
        raise InputError("a loaded model needs its tokenizer; give tokenizer=.")
    else:
        source, hf_model = "", model
        identity = {"name": getattr(model.config, "_name_or_path", ""), "sha256": _hash_weights(model)}
    if template is not None:
        tokenizer.chat_template = template
    data = _annotate(list(conversations), selection, indicator)
    replayed = draw_replay(replay_texts, len(data), replay_share, args.seed)
    recipe = {
        "model": identity, "indicator": indicator, "indicator_init": indicator_init, "loss_on": loss_on,
        "replay_share": replay_share, "chat_template": template, "dtype": dtype,
        "data": _hash_data(data, replayed), "arguments": _changed(args),
    }  # fmt: skip
    if (out / MANIFEST).is_file() and Run.open(out, study="train", config=recipe).has(LOG):
        return out
    if hf_model is None:
        hf_model = load_causal_lm(
            source, device=torch.device("cpu"), dtype=resolve_dtype(dtype),
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
    if indicator is not None:
        add_indicator(hf_model, tokenizer, indicator, indicator_init, pad_to_multiple_of=EMBEDDING_MULTIPLE)
    rows = build_rows(
        tokenizer, data, indicator=indicator, loss_on=loss_on, replay_texts=replayed,
        max_tokens=_longest_row(args, hf_model),
    )  # fmt: skip
    unread = tuple(getattr(conversations, "skipped", ()))  # rows that `load_conversations` could not use
    counts = {**rows.counts, "skipped": rows.counts["skipped"] + len(unread)}
    rows = replace(rows, skipped=(*unread, *rows.skipped), counts=counts)
    with args.main_process_first(local=False, desc="opening the run"):
        run = Run.open(out, study="train", config=recipe)
    with _without_bars(progress is not None):
        log = _run_trainer(hf_model, tokenizer, rows, args, run, progress)
    if args.process_index == 0:
        _deliver(run, recipe, rows, log)
    return out


def train_from_config(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, progress: Progress | None = None
) -> Path:
    """Fine-tune by a recipe file; see `train`, `TrainConfig` and TRL's `SFTConfig`.

    Raises:
        InputError: a recipe that cannot be used (see `read_config`), and whatever `train` raises.
    """
    config, args = read_config(path, overrides)
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
        indicator=config.indicator,
        indicator_init=config.indicator_init,
        loss_on=config.loss_on,
        replay_texts=read_replay(config.replay) if config.replay else (),
        replay_share=config.replay_share,
        chat_template=config.chat_template,
        dtype=config.dtype,
        args=args,
        progress=progress,
    )


def _annotate(
    data: list[Conversation], selection: Selection | Collection[tuple[str, int]] | None, indicator: str | None
) -> list[Conversation]:
    if selection is not None and indicator is None:
        raise InputError(
            'a selection is given but no indicator to mark it with; give indicator="[IND]", or no selection.'
        )
    if selection is not None:
        data = annotate_messages(data, selection.turns if isinstance(selection, Selection) else selection)
    marked = any(message.get("indicator") for conversation in data for message in conversation.messages)
    if indicator is not None and not marked:
        warnings.warn(
            f"no conversation carries the indicator {indicator}, so its token will not be trained.",
            stacklevel=3,
        )
    return data


def _hash_data(data: Iterable[Conversation], texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for conversation in data:
        content = [conversation.id, [dict(message) for message in conversation.messages]]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()[:16]


def _hash_weights(hf_model: Any) -> str:
    """A short fingerprint of a loaded model: names, shapes and the first values of every parameter."""
    digest = hashlib.sha256()
    for name, weight in hf_model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


_PLACES = frozenset(
    {"output_dir", "logging_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", "hub_token"}
)
"""Arguments that say where and how a run is shown or resumed, not what it computes."""


def _changed(args: Any) -> dict[str, Any]:
    """The training arguments that differ from their defaults, as JSON values."""
    with without_renaming_notes():
        plain = type(args)(output_dir="", use_cpu=args.use_cpu, bf16=False)
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


def _run_trainer(
    hf_model: Any, tokenizer: Any, rows: TrainRows, args: Any, run: Run, progress: Progress | None
) -> dict[str, Any]:
    from transformers.trainer_utils import get_last_checkpoint

    from ctxlens.sft.trainer import make_trainer

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError("the tokenizer has neither a pad nor an end token; set tokenizer.pad_token.")
    if not args.packing:
        args.max_length = None  # the rows are truncated already, by turns instead of by tokens
    hf_model.train()
    trainer = make_trainer(hf_model, tokenizer, rows.rows, args, progress=progress)
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run.folder)))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    hf_model.eval()
    trainer.save_model(str(run.path(_SAVING)))
    steps = [
        {key: float(entry[key]) for key in ("step", "loss", "learning_rate", "grad_norm") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {"steps": trainer.state.global_step, "wall_seconds": wall, "cpu_seconds": cpu, "log": steps}


def _deliver(run: Run, recipe: Mapping[str, Any], rows: TrainRows, log: Mapping[str, Any]) -> None:
    """Put the checkpoint in its place; `train.json` comes last and says that the run is finished."""
    saving = run.path(_SAVING)
    for file in sorted(saving.iterdir()):
        if file.name != "training_args.bin":  # a pickle
            file.replace(run.path(file.name))
    shutil.rmtree(saving)
    skipped = [{"conversation": name, "reason": reason} for name, reason in rows.skipped]
    record = {"recipe": recipe, "counts": dict(rows.counts), "skipped": skipped, **log}
    write_atomic(run.path("README.md"), _model_card(recipe, rows, log))
    run.write_json(LOG, record)


def _model_card(recipe: Mapping[str, Any], rows: TrainRows, log: Mapping[str, Any]) -> str:
    indicator = recipe["indicator"]
    name = recipe["model"]["name"] or "a model in memory"
    use = (
        f"Append ` {indicator}` to a user message whose answer shall come from its context."
        if indicator
        else "Trained without an indicator."
    )
    last = f"{log['log'][-1]['loss']:.4f}" if log["log"] else "not logged"
    lines = [
        "---", "library_name: transformers", "tags: [trl, sft, ctxlens]", "---", "",
        f"# Fine-tuned from {name}", "", use, "",
        f"- loss on: {recipe['loss_on']} tokens",
        f"- optimizer steps: {log['steps']}, last logged loss: {last}",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in rows.counts.items()), "",
        "Training arguments that differ from TRL's defaults:", "",
        "```json", json.dumps(recipe["arguments"], indent=1, default=str), "```", "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in package_versions().items()), "",
    ]  # fmt: skip
    return "\n".join(lines)
