"""How a text begins, with and without template: a BOS token, a marker that opens every turn, or neither."""

from __future__ import annotations

import numpy as np
import pytest
from chat_cases import assistant, byte_tokenizer, letters, user
from scoring_cases import talk
from tiny_models import make_tiny, make_tokenizer
from transformers import AutoTokenizer

from ctxlens.chat.roles import Role, render, render_plain
from ctxlens.evals.harness.prompts import Prompts
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Window, render_cell
from ctxlens.models.model import Model
from ctxlens.scoring import score_conversations

TURNS = "{% for m in messages %}{{ START + m.role[0] + ':' + m.content + END }}{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[' + m.content + ']' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
CHAT = [user("x"), assistant("y"), user("z")]


def template(start: str = "''", end: str = "eos_token", *, first: str = "") -> str:
    return first + TURNS.replace("START", start).replace("END", end)


def with_template(source, *, bos="<s>", eos="</s>", adds_bos=False):
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.eos_token = eos
    tokenizer.chat_template = source
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        pair = (bos, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[pair]
        )
    return tokenizer


MARKERS = {
    "ChatML": template("bos_token"),
    "a system prompt first": template("bos_token", first="{{ bos_token + 's:q' + eos_token }}"),
    "no end of a turn": template("bos_token", "''"),
    "line ends between turns": template("bos_token", "eos_token + '\n'"),
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_bos_token_before_every_turn_is_a_role_marker(name):
    tokenizer = with_template(MARKERS[name])
    assert set(letters(render(tokenizer, CHAT)).replace("U", "").replace("A", "")) == {"t"}
    assert letters(render_plain(tokenizer, CHAT)) == "UtAtU"
    assert letters(render_plain(tokenizer, CHAT, bos=False)) == "UtAtU"
    asked = render_plain(tokenizer, CHAT, bos=True)
    assert (asked.tokens[0], letters(asked)) == (tokenizer.bos_token_id, "tUtAtU")


def test_a_marker_opens_one_turn_as_it_opens_three():
    tokenizer = with_template(MARKERS["ChatML"])
    assert letters(render(tokenizer, CHAT[:1])) == "tttUt"
    assert letters(render(tokenizer, CHAT)) == "tttUttttAttttUt"


BEGINNINGS = {
    "Llama 3: once": (template("'>'", first="{{ bos_token }}"), {}),
    "Llama 2: before every question": (LLAMA_2, {}),
    "Gemma: by both": (template("'>'", first="{{ bos_token }}"), {"adds_bos": True}),
    "the end of a turn is the same token": (
        template("'>'", "bos_token", first="{{ bos_token }}"),
        {"eos": "<s>"},
    ),
    "before every turn, and by the tokenizer": (template("bos_token"), {"adds_bos": True}),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_bos_token_that_begins_the_text_is_bos_with_and_without_template(name):
    source, options = BEGINNINGS[name]
    tokenizer = with_template(source, **options)
    for messages in (CHAT, CHAT[:1]):
        templated = letters(render(tokenizer, messages))
        assert templated[0] == "B"
        assert "B" not in templated[1:]
    assert letters(render_plain(tokenizer, CHAT)) == "BUtAtU"
    assert letters(render_plain(tokenizer, CHAT, bos=False)) == "UtAtU"


def test_without_a_bos_token_nothing_comes_first():
    qwen = with_template(template("'<|im_start|>'"), bos=None)
    assert letters(render(qwen, CHAT[:1]))[0] == "t"
    assert letters(render_plain(qwen, CHAT)) == "UtAtU"
    tinyllama = with_template(template("'>'"), adds_bos=True)
    assert "B" not in letters(render(tinyllama, CHAT))
    assert letters(render_plain(tinyllama, CHAT)) == "BUtAtU"


def test_a_given_template_decides_and_one_that_cannot_be_probed_does_not():
    tokenizer = with_template(template("'>'"))
    assert letters(render_plain(tokenizer, CHAT, bos=True)) == "BUtAtU"
    assert letters(render_plain(tokenizer, CHAT, bos=True, chat_template=MARKERS["ChatML"])) == "tUtAtU"
    assert letters(render(tokenizer, CHAT[:1], chat_template=MARKERS["ChatML"])) == "tttUt"
    refusing = "{{ bos_token }}{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    refusing += "{{ messages[0].content }}"
    assert letters(render(tokenizer, CHAT[:1], chat_template=refusing)) == "BU"
    assert letters(render_plain(tokenizer, CHAT[:1], chat_template=refusing)) == "BU"
    tokenizer.chat_template = None
    assert letters(render_plain(tokenizer, CHAT, bos=True)) == "BUtAtU"


@pytest.mark.parametrize(
    ("name", "first", "plain"),
    [("llama3", "B", "BUtAtU"), ("qwen2.5_instruct", "t", "UtAtU"), ("phi-3-mini", "t", "UtAtU")],
)
def test_real_tokenizers_with_their_own_templates(test_data, name, first, plain):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers" / name)
    templated = letters(render(tokenizer, CHAT))
    assert templated[0] == first
    assert "B" not in templated[1:]
    assert letters(render_plain(tokenizer, CHAT)) == plain


def test_needle_prompts_begin_as_the_text_does():
    config = NeedleConfig(lengths=(400,), depths=(50.0,), needles=("known",), cases_per_cell=1)
    for source, first in ((MARKERS["ChatML"], (Role.TEMPLATE, Role.USER)), (LLAMA_2, (Role.BOS, Role.BOS))):
        window = Window("toy", with_template(source), 2000)
        [cell] = build_cells(window, config, load_haystack("organism", seed=0))
        for condition, role in zip(("template+prefix", "plain+prefix"), first, strict=True):
            assert render_cell(window, cell, config, condition).role[0] == role


def test_prompts_of_the_harness_begin_as_the_text_does():
    marked = with_template(MARKERS["ChatML"])
    assert letters(Prompts(marked, 64).chat("ab")) == "UU"
    asked = Prompts(marked, 64, add_bos_token=True)
    assert letters(asked.chat("ab")) == "tUU"
    assert letters(asked.shorten(asked.chat("ab"), 1)) == "tU"
    assert letters(Prompts(marked, 64, template=True).chat("ab"))[0] == "t"
    begun = Prompts(with_template(LLAMA_2, adds_bos=True), 64)
    assert letters(begun.chat("ab")) == "BUU"


@pytest.fixture(scope="module")
def marked_models():
    """A tiny model whose BOS token opens every turn, in both backends."""
    tokenizer = make_tokenizer()
    turns = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<s>{% endif %}"
    return [Model.from_hf(make_tiny("llama"), tokenizer, backend=kind) for kind in ("native", "lens")]


def test_both_backends_read_and_continue_the_same_beginning(marked_models):
    messages = [user("w5 w6 w7"), assistant("w8 w9"), user("w10")]
    native, lens = marked_models
    for render_one in ("render", "render_plain"):
        chats = [getattr(model, render_one)(messages, add_generation_prompt=True) for model in marked_models]
        assert chats[0].tokens.tolist() == chats[1].tokens.tolist()
        assert chats[0].role[0] == (Role.TEMPLATE if render_one == "render" else Role.USER)
        read, other = (model.read_roles(chats[0], queries="all") for model in (native, lens))
        np.testing.assert_allclose(read.shares, other.shares, atol=1e-5)
        assert not read.shares[..., Role.BOS].any()
        assert read.key_counts[:, Role.BOS].sum() == 0
        assert native.generate(chats[0], max_new_tokens=3) == lens.generate(chats[0], max_new_tokens=3)


def test_the_score_counts_the_first_marker_as_template(marked_models):
    data = [talk("a", "w5 w6 w7", "w8 w9", "w10", "w11 w12")]
    frames = [score_conversations(model, data).frame for model in marked_models]
    assert len(frames[0])
    for frame in frames:
        assert (frame.share_bos == 0).all()
        assert (frame.share_template > 0).all()
    np.testing.assert_allclose(frames[0].share_template, frames[1].share_template, atol=1e-4)
