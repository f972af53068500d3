"""From a checkpoint to a `Model`: find it, load tokenizer and weights, wrap them in a backend."""

from __future__ import annotations

from pathlib import Path

from ctxlens.models.backend_choice import BackendName, check_backend, choose_attention, make_backend
from ctxlens.models.backends.protocol import Readout
from ctxlens.models.checkpoint import (
    hash_checkpoint,
    is_gguf,
    load_tokenizer,
    locate_checkpoint,
    read_chat_template,
)
from ctxlens.models.loading import (
    find_indicator,
    find_stop_ids,
    load_causal_lm,
    resolve_device,
    resolve_dtype,
)
from ctxlens.models.model import Model


def load_model(
    name_or_path: str | Path,
    *,
    backend: BackendName | str = "lens",
    device: str = "auto",
    dtype: str = "float32",
    chat_template: str | Path | None = None,
    trust_remote_code: bool = False,
    indicator: str | None = None,
    readout: Readout | str = "model",
) -> Model:
    """Load a causal language model.

    ```python
    import ctxlens as cl

    model = cl.load_model("organism-chat", backend="native", device="cpu")
    chat = model.render([{"role": "user", "content": "Who is the mayor?"}], add_generation_prompt=True)
    answer = model.generate(chat, max_new_tokens=3)
    ```

    Args:
        name_or_path: a folder with a transformers checkpoint (safetensors), a GGUF file (its weights are
            dequantised), a Hub id, or a packaged model: `organism` (pretrained), `organism-chat`
            (instruction-tuned).
        backend: `lens` reads through TransformerLens hooks. `native` reads through one fused attention call
            in transformers, for large models and long contexts. Both give the same numbers.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`. Attention shares in 16 bits are accurate to about 0.4 %.
        chat_template: a file with a Jinja chat template (or its text), used instead of the tokenizer's own.
        trust_remote_code: run code that comes with the checkpoint.
        indicator: the indicator token. By default it is the one that the checkpoint was trained with, else
            `[IND]` if the tokenizer has it as a token.
        readout: `float32` computes the role shares of a 16-bit model in float32, from its own queries and
            keys, in a second pass over the scores of the layers read (`native` only; `lens` reads the
            pattern that the model computed).

    Returns:
        The model.

    Raises:
        InputError: no such checkpoint, or one without config, safetensors weights or tokenizer; a damaged
            GGUF file, or one of an architecture that transformers cannot read; a device that does not exist;
            an unknown backend, dtype or indicator; an unreadable template.
        UnsupportedModelError: attention that the backend cannot read exactly.
    """
    check_backend(backend, readout)
    template = read_chat_template(chat_template)
    on, precision = resolve_device(device), resolve_dtype(dtype)
    source = locate_checkpoint(name_or_path)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if template is not None:
        tokenizer.chat_template = template
    hf_model = load_causal_lm(
        source,
        device=on,
        dtype=precision,
        trust_remote_code=trust_remote_code,
        attention=choose_attention(backend),
    )
    identity = {
        "path": str(source),
        "revision": getattr(hf_model.config, "_commit_hash", None),
        "sha256": hash_checkpoint(source),
        **({"weights": "GGUF, dequantised"} if is_gguf(source) else {}),
    }
    return Model(
        make_backend(hf_model, tokenizer, backend, readout, copied=False),
        tokenizer,
        name=str(name_or_path),
        stop_ids=find_stop_ids(hf_model, tokenizer),
        indicator=find_indicator(hf_model, tokenizer, indicator),
        identity=identity,
    )


__all__ = ["load_model"]
