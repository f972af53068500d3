"""The indicator as a token of a model: one special token that tells it to answer from the context.

`add_indicator` adds the token to a model (paper section 4.1). `check_indicator` checks that a tokenizer keeps
it whole wherever a user can put it. `require_indicator` refuses models that have none. To mark the messages
that carry it, see `ctxlens.chat.data.annotate`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from ctxlens.chat.roles import DEFAULT_INDICATOR, INDICATOR_KEY, Role, render
from ctxlens.errors import InputError, RenderError

EMBEDDING_MULTIPLE = 64

_PLACES = (
    "{}", "text{}", "text {}", "text. {}", "text?{}", "text,{}", "text\n{}", "text\n\n{}", "text\t{}", "({})",
    "1{}", "é{}", "文{}", "{}\ntext", "{} text", "{}text", "{}.",
)  # fmt: skip
"""Places where a user may put the indicator."""


@runtime_checkable
class Indicated(Protocol):
    """Anything with a name that may have an indicator, for instance `ctxlens.models.Model`."""

    @property
    def name(self) -> str: ...
    @property
    def indicator(self) -> str | None: ...


def require_indicator(model: Indicated) -> None:
    """Refuse a model that has no indicator.

    Raises:
        InputError: the model has no indicator token.
    """
    if model.indicator is None:
        raise InputError(
            f"{model.name} has no indicator token; train it with one (ctxlens train), or ask it without the "
            "indicator."
        )


def add_indicator(
    hf_model: Any,
    tokenizer: Any,
    token: str = DEFAULT_INDICATOR,
    init: str = "mean",
    *,
    pad_to_multiple_of: int | None = EMBEDDING_MULTIPLE,
) -> int:
    """Add the indicator to a model as a special token, in place.

    The token's embedding, and its row of an untied output head, start at the mean of the existing rows. So do
    the rows that are added to round the size up; their logits can therefore never be the largest. All other
    rows stay as they are. A token that the tokenizer already has is used as it is.

    ```python
    import torch

    import ctxlens as cl
    from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint
    from ctxlens.models.loading import load_causal_lm

    folder = locate_checkpoint("organism-chat")
    tokenizer = load_tokenizer(folder)
    hf_model = load_causal_lm(folder, device=None, dtype=torch.float32)
    token_id = cl.add_indicator(hf_model, tokenizer, "[CTX]", init="answer from the context")
    assert tokenizer("Where?[CTX]")["input_ids"][-1] == token_id
    ```

    Args:
        hf_model: a transformers decoder; its embeddings are resized if they have no row for the token.
        tokenizer: its tokenizer; the token is added to it.
        token: the indicator.
        init: `mean` for the mean of all rows, or a phrase for the mean of the rows of its tokens.
        pad_to_multiple_of: round the number of rows up to a multiple of this when resizing.

    Returns:
        The token's id.

    Raises:
        InputError: the tokenizer does not give the token one id wherever a user can put it, the chat
            template loses it, or `init` has no tokens.
    """
    import torch

    if not token or token != token.strip():
        raise InputError(f"the indicator must be text without spaces around it, got {token!r}.")
    n_tokens = len(tokenizer)
    sources = list(range(n_tokens))
    if init != "mean":
        sources = tokenizer(init, add_special_tokens=False)["input_ids"]
        if not sources:
            raise InputError(f'init must be "mean" or a phrase to average the tokens of, got {init!r}.')
    is_new = token not in tokenizer.get_vocab()
    if is_new:
        from tokenizers import AddedToken

        special = AddedToken(token, special=True, normalized=False, lstrip=False, rstrip=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [special]}, replace_extra_special_tokens=False)
    number = check_indicator(tokenizer, token)
    with _whole_weights(hf_model):
        n_rows = hf_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_rows:
        hf_model.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False
        )
    with torch.no_grad(), _whole_weights(hf_model) as weights:
        for weight in weights:
            fresh = list(range(n_rows, weight.shape[0]))
            fresh += [number] if is_new and number < n_rows else []
            known = [row for row in sources if row < n_rows]
            weight[fresh] = weight[known].mean(dim=0)
    return number


@contextmanager
def _whole_weights(hf_model: Any) -> Iterator[list[Any]]:
    """The parameters with one row per token, gathered if ZeRO-3 has split them over processes."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    weights = _vocabulary_weights(hf_model)
    if not is_deepspeed_zero3_enabled():
        yield weights
        return
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(weights, modifier_rank=0):
        yield weights


def _vocabulary_weights(hf_model: Any) -> list[Any]:
    """The parameters with one row per token: embedding, and output head (weight and bias) if it is untied."""
    embedding = hf_model.get_input_embeddings().weight
    head = hf_model.get_output_embeddings()
    weights = [embedding]
    if head is not None and head.weight is not embedding:
        weights.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        weights.append(head.bias)
    return weights


def check_indicator(tokenizer: Any, token: str = DEFAULT_INDICATOR) -> int:
    """The id of the indicator, after checking that it is one token wherever a user can put it.

    Raises:
        InputError: it is not one token of the vocabulary, is split or merged somewhere, or the chat
            template (if there is one) changes or loses it.
    """
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise InputError(
            f"the tokenizer has no token {token!r}; add it with ctxlens.add_indicator, or train with it."
        )
    for place in _PLACES:
        text = place.replace("{}", token)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(number) != 1:
            raise InputError(
                f"the tokenizer splits the indicator {token!r} in {text!r}; choose another indicator, one "
                "that is a special token of its own."
            )
    if getattr(tokenizer, "chat_template", None):
        messages = [
            {"role": "user", "content": "text", INDICATOR_KEY: True},
            {"role": "assistant", "content": "text"},
        ]
        try:
            chat = render(tokenizer, messages, indicator=token)
        except RenderError as error:
            raise InputError(f"the chat template does not carry the indicator {token!r}: {error}") from error
        if chat.tokens[chat.mask(Role.INDICATOR)].tolist().count(number) != 1:
            raise InputError(f"the chat template does not carry the indicator {token!r} as one token.")
    return number


__all__ = ["Indicated", "add_indicator", "check_indicator", "require_indicator"]
