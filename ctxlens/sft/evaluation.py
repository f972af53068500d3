"""The evaluation of a recipe: planned before the training, run on the delivered checkpoint after it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models import Model, load_model
from ctxlens.models.checkpoint import hash_checkpoint
from ctxlens.models.loading import resolve_device
from ctxlens.runs import StageProgress
from ctxlens.sft.before_after import RESULT, EvaluationPlan, evaluate_checkpoint, plan_evaluation
from ctxlens.sft.keys import EVALUATION_KEYS, EvaluationKeys, check_known
from ctxlens.sft.start import Start


def as_keys(given: EvaluationKeys | Mapping[str, Any] | None) -> EvaluationKeys:
    """The keys of an evaluation: a mapping asks for an evaluation, None for none.

    Raises:
        InputError: an unknown key, or a value of the wrong kind.
    """
    if given is None:
        return EvaluationKeys()
    if isinstance(given, EvaluationKeys):
        return EvaluationKeys(**{key: getattr(given, key) for key in EVALUATION_KEYS})
    named = {key if key in EVALUATION_KEYS else f"evaluate_{key}": value for key, value in given.items()}
    check_known(named, EVALUATION_KEYS, "evaluate")
    return EvaluationKeys(**{"evaluate": True, **named})


def plan(keys: EvaluationKeys, start: Start | None, tokenizer: Any) -> EvaluationPlan | None:
    """Plan the evaluation and check it before the training; None if no evaluation is wanted.

    Args:
        keys: the recipe's keys.
        start: the checkpoint to start from; None if the caller has loaded the model.
        tokenizer: the tokenizer with the template of the training, without the indicator.

    Raises:
        InputError: see `plan_evaluation`; or the caller has loaded the model, so that the model before the
            training cannot be loaded again.
    """
    if not keys.evaluate:
        return None
    if start is None:
        raise InputError(
            "an evaluation loads the model as it was before the training; give model= as a folder, a Hub id "
            "or a packaged model."
        )
    config = start.config
    return plan_evaluation(
        keys,
        model=config.model,
        tokenizer=tokenizer,
        n_ctx=start.read_window(),
        indicator=config.indicator if config.indicator_as == "text" else None,
        seed=start.args.seed,
    )


def measure(
    folder: Path, asked: EvaluationPlan | None, start: Start | None, progress: StageProgress | None = None
) -> bool:
    """Evaluate a delivered checkpoint in the first of several processes; returns whether that was new."""
    if asked is None or start is None or start.args.process_index != 0:
        return False
    gc.collect()
    device = resolve_device("cpu" if start.args.use_cpu else "auto")
    is_there = (folder / asked.folder / RESULT).is_file()
    evaluate_checkpoint(
        folder,
        asked,
        base=start.identity,
        trained={"name": folder.resolve().name, "sha256": hash_checkpoint(folder)},
        load_base=lambda: _on_some_backend(lambda backend: _load_base(start, device, backend)),
        load_trained=lambda: _on_some_backend(
            lambda backend: load_model(
                folder,
                backend=backend,
                device=str(device),
                dtype=start.model_args.dtype or "float32",
                trust_remote_code=start.args.trust_remote_code,
            )
        ),
        progress=progress,
    )
    return not is_there


def _load_base(start: Start, device: Any, backend: str) -> Model:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # ZeRO-3 would split the model over processes that have ended
    hf_model = start.load_model(quantized=False).to(device)
    return Model.from_hf(hf_model, start.load_tokenizer(), backend=backend, name=start.config.model)


def _on_some_backend(load: Callable[[str], Model]) -> Model:
    """Load a model on the backend that needs the least memory, or on the other if that cannot read it."""
    try:
        return load("native")
    except UnsupportedModelError:
        return load("lens")


__all__ = ["as_keys", "measure", "plan"]
