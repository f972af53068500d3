"""What is measured: a random Llama-shaped model, a data set's conversations, and the batches of both ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxlens.chat.data import Conversation, load_conversations
from ctxlens.chat.roles import RenderedChat
from ctxlens.models import Model
from ctxlens.models.backends.batch import plan_batches

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""In the manner of zephyr and TinyLlama, which the paper uses for every model."""

SHARPER = 4.0
"""Factor on the query and key weights, so that attention is far from uniform."""


@dataclass(frozen=True)
class Shape:
    """The shape of the model."""

    n_layers: int = 22
    d_model: int = 256
    n_heads: int = 4
    n_key_value_heads: int = 2
    d_mlp: int = 704


def read_tokenizer(folder: Path) -> Any:
    """A tokenizer with the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(
    shape: Shape, tokenizer: Any, window: int, *, device: str = "cpu", dtype: str = "float32"
) -> Any:
    """A Llama with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_key_value_heads,
        max_position_embeddings=window,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(SHARPER)
            layer.self_attn.k_proj.weight.mul_(SHARPER)
    return model.eval()


def make_twin(model: Any, *, layers: int | None = None, attention: str = "sdpa") -> Any:
    """A model with its own modules and config that shares the weights, optionally without the last layers."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twin.set_attn_implementation(attention)
    if layers is not None:
        twin.model.layers = twin.model.layers[:layers]
        twin.config.num_hidden_layers = layers
    return twin


def choose_conversations(path: Path, count: int | None) -> list[Conversation]:
    """Conversations spread evenly over a data set, so that their lengths are representative."""
    data = load_conversations(path)
    if count is None or count >= len(data):
        return list(data)
    return [data[k * len(data) // count] for k in range(count)]


def render_all(model: Model, data: Sequence[Conversation], window: int) -> list[RenderedChat]:
    """The conversations as scoring renders them."""
    return [model.render(c.messages, max_tokens=window, truncate=True) for c in data]


def make_batches(chats: Sequence[RenderedChat], batch_tokens: int) -> list[list[RenderedChat]]:
    """The batches that scoring makes of them."""
    return [[chats[i] for i in batch] for batch in plan_batches([c.n_tokens for c in chats], batch_tokens)]
