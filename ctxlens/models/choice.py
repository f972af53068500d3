"""How a model was loaded, in one line for the user and as an entry of a run's manifest."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from ctxlens.models.model import Model


def describe_choice(model: Model) -> str:
    """One line with the backend, number format and device of a model, and which options chose them.

    For instance `SmolLM2-135M: native backend, float32, cpu (chosen by --backend auto, --dtype auto)`.
    """
    choice = choice_of(model)
    name = PurePath(model.name).name or model.name
    weights = f", weights {choice['weights']}" if "weights" in choice else ""
    shares = f" with shares in {choice['readout']}" if "readout" in choice else ""
    options = ", ".join(f"--{key} auto" for key in ("backend", "dtype") if model.asked.get(key) == "auto")
    chosen = f" (chosen by {options})" if options else ""
    return (
        f"{name}: {choice['backend']} backend, {choice['dtype']}{shares}{weights}, {choice['device']}{chosen}"
    )


def choice_of(model: Model) -> dict[str, Any]:
    """The same as JSON values; `weights` and `readout` are left out unless they are special."""
    known = {key: model.identity[key] for key in ("weights", "readout") if key in model.identity}
    return {
        "backend": model.identity["backend"],
        "dtype": model.identity["dtype"],
        "device": str(model.device),
        **known,
        "asked": dict(model.asked),
    }


__all__ = ["choice_of", "describe_choice"]
