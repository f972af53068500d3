"""Conversations and a tokenizer small enough to count by hand."""

from conftest import TOY_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "BSUATtIPK"
"""One letter per role, by value: Bos, System, User, Assistant, Tool, template, Indicator, Pad, sinK."""


def byte_tokenizer(*merges: str, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` and `</s>` apart, and for each merge one token for these two letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *merges])}
    pairs = [(merge[0], merge[1:]) for merge in merges]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "</s>"} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TOY_TEMPLATE
    return tokenizer


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def letters(chat):
    return "".join(LETTERS[role] for role in chat.role)


def said(chat, turn):
    held = {c for start, end in chat.spans[chat.turn == turn].tolist() for c in range(start, end)}
    return "".join(chat.text[c] for c in sorted(held))


def by_template(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


BYTES = byte_tokenizer()
TRIMMING = TOY_TEMPLATE.replace("message['content']", "message['content'] | trim")
CONVERSATION = [user("abcdef"), assistant("gh"), user("ij"), assistant("klm")]
