"""From a checkpoint to a `Model`: find it, load tokenizer and weights, wrap them in a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ctxlens.chat.roles import bind_arguments
from ctxlens.errors import MissingPackageError, UnsupportedModelError
from ctxlens.models.backend_choice import BackendName, check_backend, choose_attention, make_backend
from ctxlens.models.backends.protocol import Backend, Readout
from ctxlens.models.checkpoint import (
    hash_checkpoint,
    is_gguf,
    load_tokenizer,
    locate_checkpoint,
    read_chat_template,
)
from ctxlens.models.dtype_choice import choose_dtype
from ctxlens.models.loading import find_indicator, find_stop_ids, load_causal_lm, resolve_device
from ctxlens.models.model import Model
from ctxlens.models.placement import place


def load_model(
    name_or_path: str | Path,
    *,
    backend: BackendName | str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    chat_template: str | Path | None = None,
    trust_remote_code: bool = False,
    indicator: str | None = None,
    readout: Readout | str | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> Model:
    """Load a causal language model.

    ```python
    import ctxlens as cl

    model = cl.load_model("organism-chat", device="cpu")
    answer = model.generate("Who is the mayor?", max_new_tokens=3)
    ```

    Args:
        name_or_path: a folder with a transformers checkpoint (safetensors), a GGUF file (its weights are
            dequantised), a Hub id, or a packaged model: `organism` (pretrained), `organism-chat`
            (instruction-tuned).
        backend: `native` reads through one fused attention call in transformers, for large models and long
            contexts. `lens` reads through TransformerLens hooks, for work on whole patterns and as the
            reference (extra `lens`). Both give the same numbers. `auto` is `native`, or `lens` for a model
            that only TransformerLens can read.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`. Attention shares in 16 bits are accurate to about 0.4 %.
            `auto` is the checkpoint's own format on a GPU. On a CPU it is `float32`, or `bfloat16` for
            models above 50 million parameters if the processor multiplies bfloat16 fast.
        chat_template: a file with a Jinja chat template (or its text), used instead of the tokenizer's own.
        trust_remote_code: run code that comes with the checkpoint.
        indicator: the indicator token. By default it is the one that the checkpoint was trained with, else
            `[IND]` if the tokenizer has it as a token.
        readout: `float32` computes the role shares of a 16-bit model in float32, from its own queries and
            keys, in a second pass over the scores of the layers read (`native` only; `lens` reads the
            pattern that the model computed). `model` reads in the model's own format. By default it is
            `float32` where `dtype="auto"` led to 16 bits, else `model`.
        revision: branch, tag or commit of a model on the Hub.
        device_map: how to spread the model over devices, such as `auto` or `balanced`, as in transformers
            (`native` only).
        load_in_4bit: quantise the weights to 4 bits with bitsandbytes (`native` only).
        load_in_8bit: quantise the weights to 8 bits with bitsandbytes (`native` only).
        template_args: JSON values for the chat template's own variables, such as
            `{"enable_thinking": False}`, for everything that this model renders.

    Returns:
        The model.

    Raises:
        InputError: no such checkpoint, or one without config, safetensors weights or tokenizer; a damaged
            GGUF file, or one of an architecture that transformers cannot read; a device that does not exist;
            an unknown backend, dtype or indicator; an unreadable template, or one without a variable that
            is given; a revision of a local model; quantisation without bitsandbytes, or `lens` without
            TransformerLens (the extra `lens`).
        UnsupportedModelError: attention that the backend cannot read exactly.
    """
    check_backend(backend, readout or "model")
    template = read_chat_template(chat_template)
    on, source = resolve_device(device), locate_checkpoint(name_or_path)
    found = {"trust_remote_code": trust_remote_code, "revision": revision}
    precision = choose_dtype(dtype, source, on, backend=backend, **found)
    bits = 4 * load_in_4bit + 8 * load_in_8bit
    placed, options = place(source, on, precision, backend=backend, device_map=device_map, bits=bits)
    tokenizer = load_tokenizer(source, **found)
    if template is not None:
        tokenizer.chat_template = template
    bind_arguments(tokenizer.chat_template, template_args)  # refuses unknown ones before weights are loaded
    if readout is None:
        readout = "float32" if dtype == "auto" and precision.itemsize == 2 and backend != "lens" else "model"
    hf_model, made = _run(
        partial(load_causal_lm, source, device=placed, dtype=precision, **found, **options),
        tokenizer,
        backend,
        readout,
    )
    identity = {
        "path": str(source),
        "revision": getattr(hf_model.config, "_commit_hash", None),
        "sha256": hash_checkpoint(source),
        **({"weights": "GGUF, dequantised"} if is_gguf(source) else {}),
        **({"weights": f"quantised to {bits} bits"} if bits else {}),
        **({"readout": readout} if dtype == "auto" and made.name == "native" and readout != "model" else {}),
    }
    return Model(
        made,
        tokenizer,
        name=str(name_or_path),
        stop_ids=find_stop_ids(hf_model, tokenizer),
        indicator=find_indicator(hf_model, tokenizer, indicator),
        identity=identity,
        template_args=template_args,
        asked={"backend": backend, "dtype": dtype, "device": device},
    )


def _run(load: Callable[..., Any], tokenizer: Any, backend: str, readout: str) -> tuple[Any, Backend]:
    """A loaded model and the backend around it; `auto` tries `native` first."""
    if backend != "auto":
        hf_model = load(attention=choose_attention(backend))
        return hf_model, make_backend(hf_model, tokenizer, backend, readout, copied=False)
    hf_model = load(attention=choose_attention("native"))
    try:
        return hf_model, make_backend(hf_model, tokenizer, "native", readout, copied=False)
    except UnsupportedModelError as refusal:
        del hf_model
        try:
            check_backend("lens", "model")
        except MissingPackageError as missing:
            raise UnsupportedModelError(f"{refusal} {missing}") from None
        hf_model = load(attention=choose_attention("lens"))
        try:
            return hf_model, make_backend(hf_model, tokenizer, "lens", "model", copied=False)
        except Exception:  # TransformerLens raises all kinds of errors for models it does not know
            raise refusal from None


__all__ = ["load_model"]
