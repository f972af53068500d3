"""Writes the results of a training: the checkpoint, its model card and its log."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxlens.chat.roles.left_out import describe_left_out
from ctxlens.files import write_atomic
from ctxlens.results.markdown import code_block, code_span, escape_markdown
from ctxlens.runs import Run, package_versions
from ctxlens.sft.adapter import ADAPTER, merge_adapter
from ctxlens.sft.rows import TrainRows
from ctxlens.sft.start import Start
from ctxlens.sft.switch import SWITCH

LOG = "train.json"
SAVING = ".saving"
_MERGING = ".merging"
VARIANTS = {
    "indicator_dropout": 0.0, "negative_indicator": None, "selection_control": "none", "upsample_selected": 1,
}  # fmt: skip
"""The keys that change how a selection is used, with their defaults."""


def deliver(
    run: Run,
    recipe: Mapping[str, Any],
    rows: TrainRows,
    log: Mapping[str, Any],
    tokenizer: Any,
    *,
    merge: Start | Any = None,
    is_untied: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Move the saved model to its final place and write card and log.

    `train.json` is written last; it marks the run as finished.

    Args:
        run: the run; the trainer has saved the model to its folder `.saving`.
        recipe: everything that the result depends on, for the card and the log.
        rows: the training rows.
        log: the trainer's log.
        tokenizer: the tokenizer to save with a merged checkpoint.
        merge: the model into which an adapter is merged: the checkpoint that the training started from, or
            the trained model itself if the caller had loaded it. None if no adapter was trained.
        is_untied: whether the output head was untied for the training.
        provenance: further entries of the card about the origin of the checkpoint, by name.
    """
    saving = run.path(SAVING)
    for pickled in saving.glob("*.bin"):
        pickled.unlink()
    if merge is not None:
        saving = _merge(run, saving, merge, tokenizer, is_untied=is_untied)
    for file in sorted(saving.iterdir()):
        file.replace(run.path(file.name))
    shutil.rmtree(saving)
    skipped = [{"conversation": name, "reason": reason} for name, reason in rows.skipped]
    told = {"left_out": dict(rows.left_out), "noted": dict(rows.noted)}
    record = {"recipe": recipe, "counts": dict(rows.counts), "skipped": skipped, **told, **log}
    has_switch = SWITCH in str(tokenizer.chat_template)
    write_atomic(
        run.path("README.md"),
        model_card(recipe, rows, log, has_switch=has_switch, provenance=provenance, folder=str(run.folder)),
    )
    run.record("data", {"counts": dict(rows.counts), **told})
    run.write_json(LOG, record)


def _merge(run: Run, saving: Path, merge: Start | Any, tokenizer: Any, *, is_untied: bool) -> Path:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.trainer_utils import align_special_tokens

    adapter, merging = run.path(ADAPTER), run.path(_MERGING)
    for old in (adapter, merging):
        shutil.rmtree(old, ignore_errors=True)
    saving.replace(adapter)
    if isinstance(merge, Start):
        unset_hf_deepspeed_config()  # ZeRO-3 would split the model over processes that have ended
        base, _ = merge.load_both()
        merged = merge_adapter(base, adapter, is_untied=is_untied)
    else:
        merged = merge.merge_and_unload()
    align_special_tokens(merged, tokenizer)  # the trainer has done the same for the model that it trained
    merged.save_pretrained(str(merging))
    tokenizer.save_pretrained(str(merging))
    return merging


def model_card(
    recipe: Mapping[str, Any],
    rows: TrainRows,
    log: Mapping[str, Any],
    *,
    has_switch: bool,
    provenance: Mapping[str, str] | None = None,
    folder: str = "FOLDER",
) -> str:
    """The model card: use of the indicator, data, recipe, commands and versions.

    Text from data, names and commands is escaped. The entries `command` and `evaluate` of `provenance` are
    listed among the commands.
    """
    name = recipe["model"]["name"] or "a model in memory"
    last = f"{log['log'][-1]['loss']:.4f}" if log["log"] else "not logged"
    selection = recipe.get("selection")
    chosen = ["## Selection", "", *(
        f"- {escape_markdown(key)}: {escape_markdown(str(value))}" for key, value in (selection or {}).items()
    ), ""]  # fmt: skip
    arguments = {"arguments": recipe["arguments"], "model_arguments": recipe["model_arguments"]}
    lines = [
        "---", "library_name: transformers", "tags: [trl, sft, ctxlens]", "---", "",
        f"# Fine-tuned from {escape_markdown(name)}", "", *_use(recipe["indicator"], has_switch), "",
        "## Data", "",
        f"- loss on: {recipe['loss_on']} tokens",
        f"- optimizer steps: {log['steps']}, last logged loss: {last}", *_data_lines(rows), "",
        *(chosen if selection else ()),
        "## Recipe", "",
        *(
            f"- {escape_markdown(key)}: {code_span(value)}"
            for key, value in (provenance or {}).items() if key not in _COMMANDS
        ),
        f"- indicator: {code_span(recipe['indicator'])}, as {recipe['indicator_as']}, initialised from "
        f"{escape_markdown(recipe['indicator_init'])}" if recipe["indicator"] else "- indicator: none",
        *(f"- {name.replace('_', ' ')}: {code_span(str(recipe[name]))}"
          for name, plain in VARIANTS.items() if recipe[name] != plain),
        "- arguments that differ from TRL's defaults:", "",
        *code_block(json.dumps(arguments, indent=1, default=str), "json"), "",
        "## Commands", "", *code_block("\n".join(_commands(recipe, provenance or {}, folder)), "bash"), "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in package_versions().items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _data_lines(rows: TrainRows) -> list[str]:
    """The counts of the data, what the template leaves out, and what was read in another way."""
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in rows.counts.items()]
    lines += [f"- {escape_markdown(line)}" for line in describe_left_out(rows.left_out)]
    return lines + [f"- {escape_markdown(what)}: {count}" for what, count in rows.noted.items()]


_COMMANDS = {"command": "train", "evaluate": "compare it with the model before the training"}


def _commands(recipe: Mapping[str, Any], provenance: Mapping[str, str], folder: str) -> list[str]:
    """The exact commands, each below a comment that says what it does."""
    lines = []
    for key, meaning in _COMMANDS.items():
        if key in provenance:
            lines += [f"# {meaning}", provenance[key]]
    asked = ["ctxlens", "generate", "--model", folder, "--messages", "chat.json"]
    if recipe["indicator"]:
        lines += ["# answer from the context", shlex.join([*asked, "--indicator"])]
    return [*lines, "# answer", shlex.join(asked)]


def _use(indicator: str | None, has_switch: bool) -> list[str]:
    if not indicator:
        return ["Trained without an indicator."]
    lines = [
        f"Append {_appended(indicator)} to a user message that the model should answer from its context."
    ]
    if has_switch:
        lines += [
            "", "The chat template can append it to the last user message:", "",
            "```python",
            f"tokenizer.apply_chat_template(messages, add_generation_prompt=True, {SWITCH}=True)",
            "```",
        ]  # fmt: skip
    return lines


def _appended(indicator: str) -> str:
    """The indicator with a space before it, as Markdown code."""
    span = code_span(indicator)
    inside = span.lstrip("`")
    return f"{span[: len(span) - len(inside)]} {inside}"


def push(run: Run, args: Any) -> None:
    """Upload the delivered folder to the Hub, for `push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or run.folder.resolve().name
    repo = api.create_repo(name, private=args.hub_private_repo, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=str(run.folder),
        revision=args.hub_revision,
        ignore_patterns=["checkpoint-*", ".*", "context/best/*"],
        commit_message="End of training",
    )


__all__ = ["LOG", "SAVING", "deliver", "model_card", "push"]
