"""From the strings of lm-eval to conversations whose tokens have roles.

lm-eval lets the model render a conversation, and passes the text back later. The rendering is remembered
here, so that the tokens of the text keep their roles. Any other text is one user message, with or without
template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ctxlens.chat.data.annotate import mark_last_question
from ctxlens.chat.roles import RenderedChat, render, render_plain
from ctxlens.chat.roles.spans import encode_with_spans
from ctxlens.chat.roles.tokenizer import role_of_bos
from ctxlens.chat.roles.truncation import fit_to_window
from ctxlens.errors import InputError, RenderError


@dataclass
class Prompts:
    """Prompts of one model under one condition.

    Attributes:
        tokenizer: the model's tokenizer, with the chat template in use.
        n_ctx: the window in tokens.
        template: whether a text that was not rendered here is put into the chat template, as one message.
        indicator: appended to the last user message; None: no indicator.
        add_bos_token: whether the BOS token is put before a text that does not begin with it; None: the
            tokenizer decides.
    """

    tokenizer: Any
    n_ctx: int
    template: bool = False
    indicator: str | None = None
    add_bos_token: bool | None = None
    _known: dict[str, RenderedChat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._opening = _find_opening(self.tokenizer, self.add_bos_token)
        self._role_of_opening = role_of_bos(self.tokenizer)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the chat template and remember the roles of its tokens.

        If the template refuses a system message, the conversation is rendered without it.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the model answers next; if not, it continues the final message.
        """
        chat = self._render(messages, add_generation_prompt)
        self._known[chat.text] = self._complete(chat)
        return chat.text

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> RenderedChat:
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "indicator": self.indicator,
        }
        try:
            return render(self.tokenizer, self._marked(messages), **options)
        except RenderError:
            rest = [message for message in messages if message["role"] != "system"]
            if len(rest) == len(messages):
                raise
            return render(self.tokenizer, self._marked(rest), **options)

    def _marked(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        bare = [{"role": message["role"], "content": message["content"]} for message in messages]
        asks = any(message["role"] == "user" for message in bare)
        return mark_last_question(bare, self.indicator is not None and asks)

    def forget(self) -> None:
        """Forget the conversations rendered so far."""
        self._known.clear()

    def chat(self, text: str) -> RenderedChat:
        """The tokens of a text with their roles, not truncated."""
        known = self._known.get(text)
        if known is not None:
            return known
        messages = self._marked([{"role": "user", "content": text}])
        if self.template:
            return self._complete(self._render(messages, add_generation_prompt=True))
        chat = render_plain(self.tokenizer, messages, bos=False, indicator=self.indicator)
        return self._complete(replace(chat, open_ended=True))

    def fit(self, chat: RenderedChat, room: int) -> RenderedChat:
        """The prompt, truncated in the middle of its context so that `room` tokens are free after it.

        Raises:
            InputError: `room` fills the whole window.
        """
        if room >= self.n_ctx:
            raise InputError(
                f"the task asks for {room} tokens after the prompt, but the window is {self.n_ctx}; ask for "
                "fewer new tokens."
            )
        return fit_to_window(chat, self.n_ctx - room, truncate=True, truncation="middle")

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text and their character spans, including the tokens put before a text."""
        ids, spans = encode_with_spans(self.tokenizer, text)
        opening = self._before(text)
        spans = np.concatenate([np.zeros((len(opening), 2)), spans.reshape(-1, 2)])
        return np.concatenate([opening, ids]).astype(np.int64), spans.astype(np.int32)

    def shorten(self, chat: RenderedChat, end: int) -> RenderedChat:
        """The prompt up to a character of its text, encoded again; a token has its first character's role."""
        text = chat.text[:end]
        tokens, spans = self.encode(text)
        if len(tokens) <= chat.n_tokens and np.array_equal(tokens, chat.tokens[: len(tokens)]):
            owner = np.arange(len(tokens))
        else:
            starts = np.maximum.accumulate(chat.spans[:, 0])
            owner = (np.searchsorted(starts, spans[:, 0], side="right") - 1).clip(0)
        role, turn = chat.role[owner], chat.turn[owner]
        opening = len(self._before(text))
        role[:opening], turn[:opening] = self._role_of_opening, -1
        return replace(
            chat, text=text, tokens=tokens, spans=spans, role=role, turn=turn, stops={}, open_ended=True
        )

    def _before(self, text: str) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token
        return () if bos and text.startswith(bos) else self._opening

    def _complete(self, chat: RenderedChat) -> RenderedChat:
        """The chat with the tokens that are put before a text."""
        n = len(opening := self._before(chat.text))
        if not n:
            return chat
        return replace(
            chat,
            tokens=np.concatenate([opening, chat.tokens]).astype(np.int64),
            role=np.pad(chat.role, (n, 0), constant_values=int(self._role_of_opening)),
            turn=np.pad(chat.turn, (n, 0), constant_values=-1),
            spans=np.pad(chat.spans, ((n, 0), (0, 0))),
            stops={turn: at + n for turn, at in chat.stops.items()},
            openings={turn: at + n for turn, at in chat.openings.items()},
        )


def _find_opening(tokenizer: Any, add_bos_token: bool | None) -> tuple[int, ...]:
    """The tokens that are put before a text."""
    if add_bos_token is not None:
        if add_bos_token and tokenizer.bos_token_id is None:
            raise InputError("add_bos_token is on, but the tokenizer has no BOS token; switch it off.")
        return (tokenizer.bos_token_id,) if add_bos_token else ()
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


__all__ = ["Prompts"]
