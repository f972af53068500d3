"""The checkpoint that a training starts from, and how model and tokenizer get the indicator."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.chat.roles import bind_arguments, render
from ctxlens.errors import InputError, RenderError, first_line
from ctxlens.models.checkpoint import hash_checkpoint, load_tokenizer, locate_checkpoint, read_chat_template
from ctxlens.models.indicator_token import EMBEDDING_MULTIPLE, add_indicator
from ctxlens.models.loading import INDICATOR_RECORD, load_causal_lm, resolve_dtype
from ctxlens.sft.adapter import make_quantization_config
from ctxlens.sft.keys import TrainConfig


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from; it can be loaded several times.

    Attributes:
        source: folder or Hub id of the checkpoint.
        config: ctxlens' keys of the recipe.
        args: TRL's `SFTConfig`.
        model_args: TRL's `ModelConfig`.
    """

    source: Path | str
    config: TrainConfig
    args: Any
    model_args: Any

    @classmethod
    def locate(cls, config: TrainConfig, args: Any, model_args: Any) -> Start:
        """Find the recipe's model.

        Raises:
            InputError: it is neither the folder of a checkpoint nor a Hub id.
        """
        return cls(locate_checkpoint(config.model), config, args, model_args)

    @property
    def identity(self) -> dict[str, Any]:
        """Name and fingerprint of the checkpoint, for the manifest."""
        return {"name": self.config.model, "sha256": hash_checkpoint(self.source)}

    def load_tokenizer(self) -> Any:
        """Load the tokenizer with the recipe's chat template, without the indicator."""
        tokenizer = load_tokenizer(
            self.source, trust_remote_code=self.args.trust_remote_code, **self._revision()
        )
        choose_template(tokenizer, self.config)
        return tokenizer

    def read_window(self) -> int:
        """Read the model's window in tokens from its configuration; a very large number if it has none.

        Raises:
            InputError: the configuration cannot be read.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.source, trust_remote_code=self.args.trust_remote_code, **self._revision()
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"the model's configuration cannot be read from {self.source} ({first_line(error)})."
            ) from error
        return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1

    def load_model(self, *, quantized: bool = True) -> Any:
        """Load the model without the indicator, on the device that transformers chooses.

        Args:
            quantized: whether to apply the recipe's quantization, if it has one; otherwise the model has the
                recipe's dtype.
        """
        options = {**self._revision(), **(self.args.model_init_kwargs or {})}
        quantization = make_quantization_config(self.model_args) if quantized else None
        if quantization is not None:
            options["quantization_config"] = quantization
        return load_causal_lm(
            self.source,
            device=None,
            dtype=resolve_dtype(self.model_args.dtype or "float32"),
            trust_remote_code=self.args.trust_remote_code,
            attention=self.model_args.attn_implementation,
            **options,
        )

    def load_both(self) -> tuple[Any, Any]:
        """Load the model without quantization, and its tokenizer, both with the indicator."""
        hf_model, tokenizer = self.load_model(quantized=False), self.load_tokenizer()
        give_indicator(hf_model, tokenizer, self.config)
        stop_where_turns_end(hf_model, tokenizer)
        return hf_model, tokenizer

    def _revision(self) -> dict[str, str]:
        revision = self.model_args.model_revision
        return {} if revision == "main" else {"revision": revision}


def choose_template(tokenizer: Any, config: TrainConfig) -> None:
    """Give a tokenizer the recipe's chat template and the values of the template's variables.

    Raises:
        InputError: the template cannot be read, or has no such variable.
    """
    template = read_chat_template(config.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    if config.template_args:
        tokenizer.chat_template = bind_arguments(tokenizer.chat_template, config.template_args)


def give_indicator(hf_model: Any, tokenizer: Any, config: TrainConfig) -> tuple[int, ...]:
    """Add the recipe's indicators to model and tokenizer, and record them in the model's configuration.

    Returns:
        The ids of their tokens; empty if there is no indicator, or if it is ordinary text.

    Raises:
        InputError: the tokenizer or the chat template does not keep an indicator intact.
    """
    if config.indicator is None:
        return ()
    numbers = []
    record = {"text": config.indicator, "as": config.indicator_as}
    if config.negative_indicator is not None:
        record["negative"] = config.negative_indicator
    for text in (config.indicator, config.negative_indicator):
        if text is not None and config.indicator_as == "token":
            numbers.append(
                add_indicator(
                    hf_model,
                    tokenizer,
                    text,
                    config.indicator_init,
                    pad_to_multiple_of=EMBEDDING_MULTIPLE,
                )
            )
        elif text is not None:
            _check_text(tokenizer, text)
    setattr(hf_model.config, INDICATOR_RECORD, record)
    return tuple(numbers)


def stop_where_turns_end(hf_model: Any, tokenizer: Any) -> None:
    """Let generated text end at the token with which the chat template ends an answer.

    Base models often have another end-of-text token only, so that servers would continue after the answer.
    The token is added to `generation_config.eos_token_id`; tokens that are already there remain.
    """
    settings = getattr(hf_model, "generation_config", None)
    if settings is None or not tokenizer.chat_template:
        return
    try:
        chat = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except RenderError:
        return
    known = settings.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = [int(chat.tokens[at]) for turn, at in chat.stops.items() if turn == 1]
    if not set(ends) <= {*known, tokenizer.eos_token_id}:
        known = [*known, *([] if tokenizer.eos_token_id in (None, *known) else [tokenizer.eos_token_id])]
        settings.eos_token_id = [*known, *ends]


def _check_text(tokenizer: Any, indicator: str) -> None:
    if not indicator or indicator != indicator.strip():
        raise InputError(f"the indicator must be text without surrounding spaces, got {indicator!r}.")
    probe = [
        {"role": "user", "content": "text", "indicator": True},
        {"role": "assistant", "content": "text"},
    ]
    render(tokenizer, probe, indicator=indicator)


def hash_weights(hf_model: Any) -> str:
    """A short fingerprint of a loaded model, from names, shapes and first values of all parameters."""
    digest = hashlib.sha256()
    for name, weight in hf_model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


__all__ = ["Start", "choose_template", "give_indicator", "hash_weights", "stop_where_turns_end"]
