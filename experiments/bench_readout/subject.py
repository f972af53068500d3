"""The random model that every way runs on, its twins that share the weights, and its inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from ctxlens.chat.roles import Role
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.lens import bridge_from_hf
from ctxlens.models.backends.native import NativeBackend
from experiments.bench_readout.presets import Preset

SHARPER = 4.0
"""Factor on the query and key weights, so that attention is far from uniform."""


def build_model(preset: Preset, *, seed: int = 0, dtype: str | None = None) -> Any:
    """The preset's checkpoint, or a Llama with random weights, on its device with plain SDPA attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    options: dict[str, Any] = {"dtype": getattr(torch, dtype or preset.dtype), "attn_implementation": "sdpa"}
    if preset.checkpoint:
        loaded = AutoModelForCausalLM.from_pretrained(preset.checkpoint, local_files_only=True, **options)
        return loaded.to(preset.device).eval()

    config = LlamaConfig(
        vocab_size=preset.d_vocab,
        hidden_size=preset.d_model,
        intermediate_size=preset.d_mlp,
        num_hidden_layers=preset.n_layers,
        num_attention_heads=preset.n_heads,
        num_key_value_heads=preset.n_key_value_heads,
        head_dim=preset.d_head,
        max_position_embeddings=2**18,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(seed)
    with torch.device(preset.device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, **options)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(SHARPER)
            layer.self_attn.k_proj.weight.mul_(SHARPER)
    return model.eval()


def make_twin(model: Any) -> Any:
    """A second model with its own modules and config around the very same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_tokenizer(d_vocab: int) -> Any:
    """The tokenizer that TransformerLens insists on; no text is ever tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(d_vocab)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", bos_token="w1", eos_token="w2")


def make_batch(preset: Preset, length: int, *, seed: int = 0) -> TokenBatch:
    """One random conversation: bos, system, user, and in the last eighth the response."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, preset.d_vocab, (1, length), generator=generator)
    roles = torch.full((1, length), int(Role.USER))
    roles[:, : length // 16] = int(Role.SYSTEM)
    roles[:, 0] = int(Role.BOS)
    start = length - response_rows(length)
    roles[:, start:] = int(Role.ASSISTANT)
    for edge in (length // 16, start - 1):
        roles[:, edge] = int(Role.TEMPLATE)
    tokens, roles = tokens.to(preset.device), roles.to(preset.device)
    prompt_tokens = torch.tensor([length], device=preset.device)
    return TokenBatch(tokens, roles, torch.ones_like(tokens), prompt_tokens)


def response_rows(length: int) -> int:
    """How many tokens of a prompt of this length are the response."""
    return max(1, length // 8)


@dataclass
class Subject:
    """The model in the shapes that the ways need, made when first asked for, all with the same weights."""

    preset: Preset
    model: Any
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> NativeBackend:
        """Ours."""
        return self._once("backend", lambda: NativeBackend(make_twin(self.model)))

    @property
    def eager(self) -> Any:
        """The transformers model with eager attention."""

        def make() -> Any:
            twin = make_twin(self.model)
            twin.set_attn_implementation("eager")
            return twin

        return self._once("eager", make)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or one of the random model's words."""
        if not self.preset.checkpoint:
            return make_tokenizer(self.preset.d_vocab)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.preset.checkpoint, local_files_only=True)

    @property
    def bridge(self) -> Any:
        """TransformerLens around the model."""
        return self._once(
            "bridge",
            lambda: bridge_from_hf(make_twin(self.model), self.tokenizer, copied=False),
        )

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


__all__ = ["Subject", "build_model", "make_batch", "make_twin", "response_rows"]
