"""Tiny Llama models as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from conftest import build_toy_tokenizer
from gguf import GGMLQuantizationType as Kind
from tiny_models import make_tiny

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def make_llama() -> tuple[Any, Any]:
    """A tiny Llama whose weights are exactly what a Q8_0 file can hold, and its tokenizer."""
    tokenizer = build_toy_tokenizer()
    model = make_tiny(
        "llama", vocab_size=len(tokenizer), intermediate_size=64, eos_token_id=1, bos_token_id=0
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                blocks = gguf.quants.quantize(weight.numpy(), Kind.Q8_0)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q8_0)))
    return model, tokenizer


def write_gguf(
    path: Path, model: Any, tokenizer: Any, *, architecture: str = "llama", leave_out: str | None = None
) -> None:
    """Write a Llama model as a Q8_0 file, its tokenizer and chat template within."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        of_layer = stem.startswith("model.layers.")
        short = f"blk.{layer}.{_NAMES[part]}" if of_layer else _NAMES[stem]
        if short == leave_out:
            continue
        values = weight.numpy()
        if n_heads := heads.get(short.rpartition(".")[2]):
            values = _interleave(values, n_heads)
        quantised = Kind.Q8_0 if values.ndim == 2 else None
        blocks = values if quantised is None else gguf.quants.quantize(values, quantised)
        writer.add_tensor(f"{short}.{kind}", blocks, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The order of rotary dimensions in GGUF: pairs side by side, where transformers has two halves."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    special = set(tokenizer.all_special_ids)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[i in special] for i in range(len(core["vocab"]))])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
