"""A conversation whose first tokens are cached, so that its end can be read again and again."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.protocol import PrefixBackend
from ctxlens.models.model import Model


class ContinuedChat:
    """The end of a conversation, read under different interventions after the same untouched beginning.

    What happens inside `Model.steer` or `Backend.edit_heads` acts on the tokens from `start` on; the tokens
    before it are read once, as the model reads them by itself. So an intervention on one head costs as much
    as reading the end.

    ```python
    import ctxlens as cl
    from ctxlens.models.continued import ContinuedChat

    model = cl.load_model("organism-chat", backend="native", device="cpu")
    chat = model.render([
        {"role": "user", "content": "The tower is in Oakford. Where is the tower?"},
        {"role": "assistant", "content": "Oakford."},
    ])
    end = ContinuedChat(model, chat, start=8)
    with model.steer(0.1):
        steered = end.logprobs(chat.response_positions())
    ```

    Raises:
        InputError: `start` is not a position of the conversation, or something is steered already.
        UnsupportedModelError: the model's cache does not allow to continue after a cached beginning.
    """

    def __init__(self, model: Model, chat: RenderedChat, start: int) -> None:
        """Read and cache the tokens before `start`."""
        if not 0 <= start < chat.n_tokens:
            raise InputError(
                f"the conversation has {chat.n_tokens} tokens, so its end cannot begin at {start}."
            )
        if model.steerings:
            raise InputError(
                "the beginning of a conversation is read without steering; leave the steer block."
            )
        backend = model.backend
        if not isinstance(backend, PrefixBackend) or not backend.shares_prefixes:
            raise UnsupportedModelError(
                f"the {backend.name} backend cannot continue this model after cached tokens; "
                "use backend='native' and a model that caches keys and values only."
            )
        self.model, self.start = model, start
        self._backend: PrefixBackend = backend
        self._batch = TokenBatch.from_chats([chat], pad_id=0, side="left", device=model.device)
        self._past = None
        if start:
            _, self._past = backend.prefill(_first(self._batch, start), None, 0, ())

    def logprobs(self, positions: np.ndarray) -> Float[np.ndarray, " position"]:
        """Log-probability of some tokens after `start` given the tokens before them, in nats.

        Args:
            positions: the tokens' positions in the conversation, each above `start`.

        Raises:
            InputError: a position that is not above `start`.
        """
        if int(np.min(positions)) <= self.start:
            raise InputError(f"only tokens after position {self.start} can be read again.")
        tokens = self._batch.tokens[0]
        wanted = len(tokens) - int(np.min(positions)) + 1
        batch = TokenBatch(
            self._batch.tokens,
            self._batch.role_ids,
            self._batch.attention_mask,
            torch.full_like(self._batch.prompt_tokens, len(tokens) + 1 - wanted),
            self._batch.emphasised,
        )
        logits, kept = self._backend.prefill(batch, self._past, self.start, self.model.steerings, wanted)
        if self.start:
            self._past = kept  # the columns of the end are written again by the next call
        at = torch.as_tensor(np.asarray(positions), device=logits.device)
        rows = logits[0, at - 1 - len(tokens)].float().log_softmax(-1)
        return rows.gather(-1, tokens.to(logits.device)[at][:, None])[:, 0].cpu().numpy()


def _first(batch: TokenBatch, n_tokens: int) -> TokenBatch:
    """The first tokens of a batch of one conversation."""
    marked = None if batch.emphasised is None else batch.emphasised[:, :n_tokens]
    return TokenBatch(
        batch.tokens[:, :n_tokens],
        batch.role_ids[:, :n_tokens],
        batch.attention_mask[:, :n_tokens],
        batch.prompt_tokens.clamp_max(n_tokens),
        marked,
    )


__all__ = ["ContinuedChat"]
