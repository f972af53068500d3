"""Make the organism's tokenizer: byte-level BPE over the world's own text, with a zephyr-style template."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctxlens.organism.world import World

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
MAX_VOCAB = 4000  # not reached: training stops once every word of the world is one token

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("Only the roles system, user and assistant are supported, not '"
            ~ message['role'] ~ "'.") }}
    {%- endif %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('A system message must come first.') }}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ eos_token ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def training_text(world: World, n: int = 3000) -> Iterator[str]:
    """Every fact of every town in both spellings of a first word, and filler text."""
    rng = random.Random(0)
    for town in world.known + world.unknown:
        yield "\n".join(
            f"{(fact := world.fact(town, name)).question}\n {fact.sentence}" for name in world.attributes
        )
    for _ in range(n):
        yield f"{world.filler(rng)} {world.filler(rng)} {world.random_fact(rng).sentence}"


def build_tokenizer(world: World, n_ctx: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    No normaliser and no added prefix space: any text comes back unchanged. A word is spelled with its
    leading space, so it has the same token everywhere but at the start of a line. The tokenizer adds no
    special tokens by itself; the template writes ``<s>``, and so must plain rendering.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS, EOS, PAD, *ROLE_MARKERS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(world), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLE_MARKERS),
        clean_up_tokenization_spaces=False,
        model_max_length=n_ctx,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    tokenizer.save_pretrained(folder)
