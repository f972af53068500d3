"""Tiny decoders with random weights, one a family, and the eager reference for their role shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as tf

from ctxlens.chat.roles import N_ROLES, RenderedChat, Role
from ctxlens.models.backends.batch import TokenBatch

VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = {"sliding_window": 8}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", _WINDOW),
    "qwen2": ("Qwen2Config", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, **_WINDOW}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, **_WINDOW, "layer_types": _MIXED}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_positions": 64, "num_key_value_heads": None}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, **_WINDOW, **_EXPERTS}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("FalconConfig", {"alibi": True}),
    "bloom": ("BloomConfig", {"n_layer": 3, "n_head": 4}),
}


def make_tokenizer() -> Any:
    """A tokenizer of 64 words, one a token, with a plain chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", *(f"w{i}" for i in range(5, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}"
    )
    return tokenizer


def make_tiny(
    family: str, *, seed: int = 0, attn: str | None = None, scale: float = 12.0, **changes: Any
) -> Any:
    """A tiny model of a family; weights are enlarged so that attention is far from uniform."""
    name, options = FAMILIES[family]
    settings = {k: v for k, v in {**_COMMON, **options, **changes}.items() if v is not None}
    config = getattr(tf, name)(**settings)
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    config.architectures = [type(model).__name__]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name and "wte" not in name:
                weight.mul_(scale)
            if name.endswith("sinks"):
                weight.normal_()
    if family == "falcon-alibi" and attn == "eager":
        for block in model.transformer.h:
            block.self_attention.register_forward_pre_hook(_without_alibi, with_kwargs=True)
    return model.eval()


def _without_alibi(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Transformers' eager Falcon adds ALiBi twice, in the mask and in the scores; this leaves the mask's."""
    return args, {**kwargs, "alibi": torch.zeros_like(kwargs["alibi"])}


def make_chat(length: int, seed: int = 0, *, prompt: int | None = None) -> RenderedChat:
    """A conversation of random tokens and roles; from `prompt` on it is a response."""
    generator = np.random.default_rng(seed)
    role = generator.choice([1, 2, 2, 3, 5], length).astype(np.int8)
    role[0] = 0
    turn = np.where(np.isin(role, [1, 2]), 0, -1).astype(np.int32)
    turn[role == 3] = 1
    if prompt is not None:
        role[prompt:], turn[prompt:] = 3, 3
    tokens = generator.integers(3, VOCAB, length).astype(np.int64)
    spans = np.stack([np.arange(length), np.arange(length) + 1], -1).astype(np.int32)
    return RenderedChat("x" * length, tokens, role, turn, spans, (), True, {})


def eager_shares(family: str, chats: list[RenderedChat], **changes: Any) -> list[np.ndarray]:
    """Role shares `[layer, head, query, role]` from eager `output_attentions`, one chat at a time.

    What a pattern's rows lack to 1 is the share of the sink.
    """
    model = make_tiny(family, attn="eager", **changes)
    result = []
    for chat in chats:
        batch = TokenBatch.from_chats([chat], pad_id=0, side="right")
        with torch.no_grad():
            out = model(input_ids=batch.tokens, output_attentions=True, use_cache=False)
        one_hot = np.eye(N_ROLES, dtype=np.float64)[chat.role]
        shares = np.stack([a[0].double().numpy() @ one_hot for a in out.attentions])
        shares[..., Role.SINK] = 1 - shares.sum(-1)
        result.append(shares)
    return result
