"""The organism's world, tokenizer, template and shipped weights. No test asserts a verdict."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctxlens import organism
from ctxlens.organism import words
from ctxlens.organism.world import KINDS, Fact, World, load_world

MODEL_FOLDERS = [folder for folder in (organism.BASE, organism.CHAT) if folder.is_dir()]


@cache
def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer():
    return load_tokenizer(organism.BASE)


# World


def test_world_is_the_same_in_every_process():
    code = "from ctxlens.organism import load_world; w = load_world(); print(w.known, w.conversations(3, 7))"
    shown = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        ).stdout
        for seed in ("1", "2")
    ]
    assert shown[0] == shown[1]
    assert shown[0].startswith("('")


def test_world_module_imports_no_model_code():
    code = (
        "import sys, ctxlens.organism; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_known_and_unknown_towns_are_disjoint():
    world = load_world()
    assert len(world.known) == len(world.unknown) == 80
    assert not set(world.known) & set(world.unknown)
    assert len(set(world.known + world.unknown)) == 160


def test_pools_are_disjoint_from_each_other_and_from_every_other_word():
    pooled = [word for attribute in words.ATTRIBUTES for pool in attribute.pools for word in pool]
    assert len(pooled) == len(set(pooled))
    world = load_world()
    other = " ".join(
        [*words.SUBJECTS, *words.VERBS, *words.OBJECTS, *words.TIMES, *world.known, *world.unknown]
        + [f"{a.prefix} {a.question} {a.phrase}" for a in words.ATTRIBUTES]
    )
    assert not set(pooled) & set(re.findall(r"[a-z]+", other.lower()))


@given(st.integers(0, 10_000))
def test_fact_prefix_sentence_and_keywords_agree(seed: int):
    world = load_world()
    fact = world.random_fact(random.Random(seed))
    assert fact.sentence.startswith(fact.prefix + " ")
    assert fact.sentence.endswith(".")
    assert fact.question.endswith("?")
    assert not fact.prefix.endswith(" ")
    value = fact.sentence.removeprefix(fact.prefix)
    assert [word for word in re.findall("[a-z]+", value) if word not in ("and", "with")] == list(
        fact.keywords
    )
    assert fact.entity in fact.question
    memory = world.fact(fact.entity, fact.attribute)
    assert all(a != b for a, b in zip(fact.values, memory.values, strict=True))
    assert fact.recall(fact.sentence) == 1.0
    assert fact.recall(memory.sentence) == 0.0


def test_recall_counts_words_not_parts_of_words():
    fact = Fact("Oakford", "dish", ("fried", "ham", "raw", "corn", "dill"))
    assert fact.sentence == "The favorite dish in Oakford is fried ham with raw corn and dill."
    assert fact.prefix == "The favorite dish in Oakford is"
    # fried and dill as words (2 of 5); "hamster" and "corner" are other words.
    assert fact.recall("Fried hamster, corner; dill!") == pytest.approx(2 / 5)


def test_random_fact_keeps_to_the_towns_asked_for():
    world, rng = load_world(), random.Random(0)
    assert all(world.random_fact(rng, known=True).entity in world.known for _ in range(50))
    assert all(world.random_fact(rng, known=False).entity in world.unknown for _ in range(50))
    assert world.random_fact(rng, entity=world.known[3]).entity == world.known[3]


def test_conversations_hold_what_their_kinds_say():
    world = load_world()
    conversations = world.conversations(400, 3)
    assert conversations == world.conversations(400, 3)
    assert conversations != world.conversations(400, 4)
    assert len({c.id for c in conversations}) == 400
    seen = set()
    for conversation in conversations:
        users, answers = conversation.messages[::2], conversation.messages[1::2]
        assert len(users) == len(answers) == len(conversation.kinds)
        for user, answer, kind in zip(users, answers, conversation.kinds, strict=True):
            assert (user["role"], answer["role"]) == ("user", "assistant")
            seen.add(kind)
            document, _, question = user["content"].rpartition("\n")
            assert question.endswith("?")
            assert bool(document) == (kind != "closed")
            assert (answer["content"] in document) == (kind == "document")
    assert seen == set(KINDS)


def test_conversation_shares_are_kept():
    kinds = [c.kinds[-1] for c in load_world().conversations(4000, 0, document=0.2, memory=0.3)]
    assert kinds.count("document") / 4000 == pytest.approx(0.2, abs=0.03)
    assert kinds.count("memory") / 4000 == pytest.approx(0.3, abs=0.03)


def test_another_world_has_other_facts():
    assert World(seed=1, n_towns=10).known != World(seed=2, n_towns=10).known


# Tokenizer and template


def test_tokenizer_is_fast_and_adds_nothing(tokenizer):
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.tokenize("The market") == ["The", "Ġmarket"]
    assert "[IND]" not in tokenizer.get_vocab()


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("tabs\tand  spaces \n\n trailing ")
@example("nul\x00byte")
@example("emoji 🙂👩‍👩‍👧 שלום مرحبا e\u0301 ﬁ \u200f")
@example("<|user|> and </s> in the text")
@example("\ufeffbom \r\n line")
def test_any_text_comes_back_unchanged(text: str):
    tokenizer = load_tokenizer(organism.BASE)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {i for start, end in encoded["offset_mapping"] for i in range(start, end)}
    assert covered == set(range(len(text)))


def test_every_word_of_the_world_is_one_token_inside_a_line(tokenizer):
    world = load_world()
    pooled = [word for attribute in words.ATTRIBUTES for pool in attribute.pools for word in pool]
    for word in [*pooled, *world.known, *world.unknown]:
        assert len(tokenizer.tokenize(f" {word}")) == 1, word


def test_a_sentence_has_the_same_tokens_wherever_it_starts_a_line(tokenizer):
    fact = load_world().fact(load_world().known[0], "pastime")
    alone = tokenizer(fact.sentence)["input_ids"]
    assert tokenizer(f"Line.\n{fact.sentence}")["input_ids"][-len(alone) :] == alone
    assert tokenizer(f"<|assistant|>\n{fact.sentence}")["input_ids"][-len(alone) :] == alone
    # Inside a line only the first word is spelled with its space.
    assert tokenizer(f"Line. {fact.sentence}")["input_ids"][-len(alone) + 1 :] == alone[1:]


@pytest.mark.parametrize("folder", MODEL_FOLDERS, ids=lambda folder: folder.name)
def test_template_renders_exactly(folder: Path):
    tokenizer = load_tokenizer(folder)
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " Hello\nthere <|user|>"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s><|system|>\nBe brief. </s>\n<|user|>\n Hello\nthere <|user|></s>\n"
        "<|assistant|>\nHi.</s>\n<|user|>\nBye</s>\n<|assistant|>\n"
    )
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokens == tokenizer(text)["input_ids"]
    assert tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("messages", "fragment"),
    [
        ([{"role": "tool", "content": "x"}], "not 'tool'"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "must come first"),
    ],
)
def test_template_refuses(tokenizer, messages, fragment):
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=fragment):
        tokenizer.apply_chat_template(messages, tokenize=False)


# Weights


@pytest.mark.parametrize("folder", MODEL_FOLDERS, ids=lambda folder: folder.name)
def test_weights_load_and_fit_the_tokenizer(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = load_tokenizer(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == tokenizer.model_max_length >= 512
    special = json.loads((folder / "generation_config.json").read_text())
    assert special["eos_token_id"] == tokenizer.eos_token_id
    tokens = torch.tensor([tokenizer("<s>The market")["input_ids"]])
    with torch.no_grad():
        assert model.float()(tokens).logits.isfinite().all()


def test_assets_are_small():
    total = sum(path.stat().st_size for path in Path(organism.__file__).parent.rglob("*") if path.is_file())
    assert total < 6_000_000


# The script that makes the base


def test_pretraining_runs_and_saves_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from transformers import AutoModelForCausalLM

    from experiments.organism.pretrain import PretrainRecipe, pretrain

    recipe = PretrainRecipe(
        n_ctx=96,
        d_model=32,
        d_mlp=32,
        n_layers=1,
        copy_length=16,
        copy_criterion_nats=99.0,  # any loss will do
        document_steps=2,
        row_lengths={64: 0.5, 96: 0.5},
        tokens_per_step=192,
    )
    lines: list[str] = []
    run = pretrain(recipe, tmp_path, lines.append)
    assert any("closed book" in line for line in lines)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == len(run.tokenizer)


def test_pretraining_rows_are_whole_texts_and_stray_markup_has_no_label(tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from experiments.organism.texts import IGNORED, TextMixture, TextSampler

    world = load_world()
    sampler = TextSampler(world, tokenizer, TextMixture(markup=1.0, repeated=0.0))
    rng = random.Random(0)
    stray = 0
    for _ in range(50):
        tokens, labels = sampler.row(rng, 200)
        assert len(tokens) == len(labels) <= 200
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert all(label in (token, IGNORED) for token, label in zip(tokens, labels, strict=True))
        text = tokenizer.decode([label for label in labels if label != IGNORED])
        assert re.fullmatch(r"<s>([A-Z][^\n]*[.?]\n?)+</s>", text), text
        stray += labels.count(IGNORED)
    assert stray > 0
