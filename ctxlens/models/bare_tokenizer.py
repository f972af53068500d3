"""A tokenizer read from its files, for commands that only render: importing transformers takes seconds.

Only checkpoints are read that hold nothing which transformers would change when it loads them. What
transformers makes of those is the same; the tests compare both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.chat.roles.locate import Template
from ctxlens.models.checkpoint import find_chat_template, has_plain_tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WITHOUT_EFFECT = frozenset({
    "backend", "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens", "is_local",
    "local_files_only", "model_max_length", "padding_side", "tokenizer_class", *_NAMED,
})  # fmt: skip
"""Keys of tokenizer_config.json that do not change how a text is encoded, given what `_is_exact` checks."""

_MOST_TOKENS = 100_000
"""Transformers patches larger vocabularies of some models."""


class BareTokenizer:
    """What rendering needs of a tokenizer, with the interface of transformers.

    Attributes:
        chat_template: the template's Jinja text, or several with their names.
        special_tokens_map: the named special tokens.
        all_special_ids: ids of the special tokens.
        bos_token, eos_token: the tokens that begin and end a text, if there are any.
        bos_token_id, eos_token_id: their ids.
    """

    is_fast = True

    def __init__(
        self, encoder: Any, config: Mapping[str, Any], chat_template: str | Mapping[str, str] | None
    ) -> None:
        self._encoder = encoder
        self.chat_template = chat_template
        self.special_tokens_map = {name: config[name] for name in _NAMED if config.get(name)}
        special = dict.fromkeys(
            [*self.special_tokens_map.values(), *(config.get("extra_special_tokens") or ())]
        )
        self.all_special_ids = [encoder.token_to_id(token) for token in special]
        self.bos_token, self.eos_token = config.get("bos_token"), config.get("eos_token")
        self.bos_token_id = encoder.token_to_id(self.bos_token) if self.bos_token else None
        self.eos_token_id = encoder.token_to_id(self.eos_token) if self.eos_token else None

    def __len__(self) -> int:
        return self._encoder.get_vocab_size(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by their ids."""
        return self._encoder.get_added_tokens_decoder()

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """Encode a text."""
        encoding = self._encoder.encode(text, add_special_tokens=add_special_tokens)
        offsets = {"offset_mapping": encoding.offsets} if return_offsets_mapping else {}
        return {"input_ids": encoding.ids, **offsets}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens with these ids."""
        return [self._encoder.id_to_token(int(number)) for number in ids]

    def get_chat_template(self, chat_template: str | None, tools: list[Any] | None) -> str:
        """The Jinja text of a template given by its text or name, or of the tokenizer's own.

        Raises:
            ValueError: there are several, and none is the default.
        """
        own = self.chat_template
        if not isinstance(own, Mapping):
            return str(own) if chat_template is None else chat_template
        if chat_template is not None:
            return own.get(chat_template, chat_template)
        name = "tool_use" if tools is not None and "tool_use" in own else "default"
        if name not in own:
            raise ValueError(
                f"This model has several chat templates and no default; choose from {sorted(own)}."
            )
        return own[name]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = False,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **arguments: Any,
    ) -> str:
        """Render a conversation; as text only."""
        if tokenize:
            raise ValueError("this tokenizer only renders text; encode it afterwards.")
        options = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        source = self.get_chat_template(chat_template, tools)
        return Template(self, source, options, arguments).run(conversation)


def read_bare_tokenizer(source: Path | str) -> BareTokenizer | None:
    """The tokenizer of a checkpoint's folder; None if only transformers can load it exactly."""
    if not isinstance(source, Path) or not has_plain_tokenizer(source):
        return None
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(source / "tokenizer.json"))
    return BareTokenizer(encoder, config, find_chat_template(source)) if _is_exact(encoder, config) else None


def _is_exact(encoder: Any, config: Mapping[str, Any]) -> bool:
    """Whether transformers would use the encoder as it is."""
    special = [config[name] for name in _NAMED if config.get(name)]
    more = config.get("extra_special_tokens") or []
    if not set(config) <= _WITHOUT_EFFECT or not isinstance(more, list):
        return False
    added = {token.content: token for token in encoder.get_added_tokens_decoder().values()}
    return (
        all(isinstance(token, str) and _is_plain(added.get(token)) for token in [*special, *more])
        and encoder.truncation is None
        and encoder.padding is None
        and encoder.post_processor is not None
        and encoder.get_vocab_size() <= _MOST_TOKENS
    )


def _is_plain(token: Any) -> bool:
    """Whether an added token is what transformers makes of a special one."""
    if token is None or not token.special:
        return False
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)


__all__ = ["BareTokenizer", "read_bare_tokenizer"]
