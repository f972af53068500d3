"""Small data, models and recipes for the tests of fine-tuning."""

import json

import torch
from conftest import build_toy_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from ctxlens.chat.data import Conversation

ARGUMENTS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 5e-3,
    "logging_steps": 2, "use_cpu": True,
}  # fmt: skip


def talk(name, *contents):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[k % 2], "content": text} for k, text in enumerate(contents))
    return Conversation(id=name, messages=messages, source="test", labels={})


def tiny(tokenizer, *, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=96, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_data():
    return [talk(f"c{k}", "Hello " * (1 + k % 5), "I am fine.") for k in range(12)]


def trained_text(tokenizer, row):
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def write_recipe(tmp_path):
    tokenizer = build_toy_tokenizer()
    tiny(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"id": c.id, "messages": c.messages}) for c in make_data()]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path / 'model'}\ndataset: {tmp_path / 'data.jsonl'}\noutput_dir: {tmp_path / 'out'}\n"
        "indicator: '[IND]'\nlearning_rate: 2e-5\nmax_steps: 1\nper_device_train_batch_size: 2\n"
        "use_cpu: true\n"
    )
    return path
