"""Quick teacher-forced probes for watching pretraining (the shipped table uses the library's own studies)."""

from __future__ import annotations

import random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ctxlens.organism.world import Fact, World


def word_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[tuple[str, Fact]]
) -> float:
    """Share of value words that the model ranks first, given the right words before them.

    Args:
        model: The model.
        tokenizer: Its tokenizer; every value word must be one token.
        prompts: Text up to the value, and the fact.
    """
    n_right = n_words = 0
    for start in range(0, len(prompts), 16):
        rows = []
        for text, fact in prompts[start : start + 16]:
            value = fact.sentence.removeprefix(fact.prefix)
            answer = tokenizer(value)["input_ids"]
            marks = [tokenizer.decode([token]).strip() in fact.values for token in answer]
            rows.append((tokenizer(text)["input_ids"], answer, marks))
        width = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
        tokens = torch.full((len(rows), width), tokenizer.pad_token_id, device=model.device)
        for i, (prompt, answer, _) in enumerate(rows):
            tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer, device=model.device)
        with torch.no_grad():
            best = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
        for i, (prompt, answer, marks) in enumerate(rows):
            guesses = best[i, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist()
            n_right += sum(g == a for g, a, mark in zip(guesses, answer, marks, strict=True) if mark)
            n_words += sum(marks)
    return n_right / n_words


def needle_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    n_fillers: int,
    *,
    template: bool,
    known: bool = True,
    n: int = 32,
) -> float:
    """Word accuracy on one needle among filler sentences, with or without the chat template."""
    rng = random.Random(f"probe-{n_fillers}")
    prompts = []
    for _ in range(n):
        fact = world.random_fact(rng, known=known)
        user = world.user_text(world.document(rng, [fact], n_fillers), fact.question)
        if template:
            text = f"<s><|user|>\n{user}</s>\n<|assistant|>\n{fact.prefix}"
        else:
            text = f"<s>{user}\n{fact.prefix}"
        prompts.append((text, fact))
    return word_accuracy(model, tokenizer, prompts)


def closed_book_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, world: World, n: int = 64
) -> float:
    """Word accuracy on memorised facts, without document and template."""
    return word_accuracy(
        model,
        tokenizer,
        [(f"<s>{fact.question}\n{fact.prefix}", fact) for fact in world.closed_book(n, seed=0)],
    )
