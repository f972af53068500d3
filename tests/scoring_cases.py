"""What the tests of scoring share: small conversations, and a model whose shares follow from the tokens."""

import time

import numpy as np
import torch

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import N_ROLES, Role, render


def talk(name, *contents):
    """A conversation whose turns alternate, the user's first."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[k % 2], "content": text} for k, text in enumerate(contents))
    return Conversation(id=name, messages=messages, source="test", labels={})


def many(n=300):
    """Conversations of different lengths."""
    return [talk(f"c{k}", "Hello " * (1 + k % 9), "I am fine. " * (1 + k % 3)) for k in range(n)]


class FakeModel:
    """Shares that depend on the tokens alone: layer l, head h, response token t have fixed numbers."""

    name = "fake"
    n_ctx = 200

    def __init__(self, tokenizer, *, n_layers=2, spoil=None, pause=0.0, on_batch=None):
        self.tokenizer, self.n_layers = tokenizer, n_layers
        self.identity = {"name": "fake", "sha256": "0"}
        self.spoil, self.pause, self.on_batch = spoil, pause, on_batch
        self.batches = []

    def render(self, messages, **options):
        return render(self.tokenizer, messages, **options)

    def reduce_responses(self, chats, reduce, *, layers, batch_tokens):
        time.sleep(self.pause)
        self.batches.append([chat.n_tokens for chat in chats])
        if self.on_batch is not None:
            self.on_batch(chats)
        return [
            {turn: self._reduced(chat, turn, layers, reduce) for turn in chat.response_turns()}
            for chat in chats
        ]

    def _reduced(self, chat, turn, layers, reduce):
        shares = torch.from_numpy(self.shares(chat, turn, layers))
        turn_of = torch.zeros(len(layers), shares.shape[2], dtype=torch.long)
        return reduce(shares, turn_of, 1)[:, 0].numpy()

    def shares(self, chat, turn, layers):
        """Role shares `[layer, head, response_pos, role]`."""
        token = chat.tokens[chat.response_positions(turn)]
        user = [
            [np.abs(np.sin((layer + 1) * (head + 2) * token.astype(float))) for head in range(3)]
            for layer in layers
        ]
        shares = np.zeros((len(layers), 3, len(token), N_ROLES), dtype=np.float32)
        shares[..., Role.USER] = user
        shares[..., Role.BOS] = 1 - shares[..., Role.USER]
        if self.spoil is not None and self.spoil in chat.messages[0]["content"]:
            shares[0, 0, 0, Role.USER] = np.nan
        return shares
