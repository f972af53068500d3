"""Tokenizers without usable offsets, followed exactly or refused."""

import numpy as np
import pytest
from chat_cases import BYTES, assistant, by_template, letters, said, user
from conftest import TOY_TEMPLATE, build_toy_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from ctxlens.chat.roles import render, render_plain
from ctxlens.errors import RenderError


def test_trimmed_offsets_do_not_matter():
    texts = [user("  What is\n\n two?  "), assistant(" It is four. \n")]
    trimming, keeping = build_toy_tokenizer(trim_offsets=True), build_toy_tokenizer(trim_offsets=False)
    one, other = render(trimming, texts), render(keeping, texts)
    assert one.text == other.text
    assert np.array_equal(one.spans, other.spans)
    assert np.array_equal(one.role, other.role)
    assert "".join(one.token_strings()) == one.text


class SlowLetters(PreTrainedTokenizer):
    """A tokenizer in Python without offsets, one token per letter."""

    fold = False

    def __init__(self, **options):
        super().__init__(bos_token="<s>", eos_token="</s>", **options)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(n): n for n in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return list(text.lower() if self.fold else text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)


class SlowFoldedLetters(SlowLetters):
    """The same, but it does not spell the text."""

    fold = True


def test_slow_tokenizers_are_followed_exactly_or_refused():
    messages = [user("Hi there"), assistant("Yo")]
    slow = SlowLetters()
    chat = render(slow, messages, chat_template=TOY_TEMPLATE)
    assert chat.tokens.tolist() == by_template(slow, messages, chat_template=TOY_TEMPLATE)
    assert letters(chat) == letters(render(BYTES, messages))
    with pytest.raises(RenderError, match="gives no offsets and its tokens do not spell the text"):
        render(SlowFoldedLetters(), messages, chat_template=TOY_TEMPLATE)


def test_slow_tokenizers_report_special_tokens_and_long_texts():
    slow = SlowLetters()
    spoof = render(slow, [user("a</s>b"), assistant("c")], chat_template=TOY_TEMPLATE)
    assert spoof.spoofed_special_tokens == ("</s>",)
    assert said(spoof, 0) == "a</s>b"
    long = render(slow, [user("x" * 100_000), assistant("c")], chat_template=TOY_TEMPLATE)
    assert (long.turn == 0).sum() == 100_000
    plain = render_plain(slow, [user("a"), assistant("b")], bos=True)
    assert letters(plain) == "BUtA"


class WithoutOffsets(PreTrainedTokenizerFast):
    """A fast tokenizer that answers as if it had no offsets."""

    @property
    def is_fast(self):
        return False


def test_tokens_are_laid_along_the_text_where_offsets_are_missing():
    texts = [user("  What 🙂\n\n two?  "), assistant(" It is é日本. \n")]
    fast = build_toy_tokenizer()
    bare = WithoutOffsets(tokenizer_object=fast.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    with_offsets, laid = (render(t, texts, chat_template=TOY_TEMPLATE) for t in (fast, bare))
    assert laid.tokens.tolist() == with_offsets.tokens.tolist()
    assert np.array_equal(laid.spans, with_offsets.spans)
    assert np.array_equal(laid.role, with_offsets.role)
