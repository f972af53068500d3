"""The page that shows the role of every token."""

import re
from html.parser import HTMLParser

import pytest

from ctxlens.chat.roles import render
from ctxlens.report.plots import roles_view

SPOOF = "<script>alert(1)</script>\" onmouseover='x' </s>&\n\n\u202ea\u200b\tb"


class Reader(HTMLParser):
    """Collects the tokens of a page, the names of stretches, and every tag and attribute."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.tokens, self.names = set(), set(), [], []
        self.open = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        given = dict(attrs)
        kind = (given.get("class") or "").split(" ")[0]
        if tag == "span":
            self.open.append(kind)
        if kind == "tok":
            self.tokens.append((given["class"], given["title"]))
        if kind == "rolename":
            self.names.append("")

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "rolename":
            self.names[-1] += data


@pytest.fixture(scope="module")
def chat(organism_tokenizer):
    messages = [{"role": "user", "content": SPOOF}, {"role": "assistant", "content": "Yes."}]
    return render(organism_tokenizer, messages)


def test_every_token_has_its_role_turn_id_and_position(chat):
    page = Reader(roles_view([chat]).page())
    assert len(page.tokens) == chat.n_tokens
    for position, (classes, hint) in enumerate(page.tokens):
        name, turn, number, at = hint.split(" · ")[:4]
        assert f"r-{name}" in classes
        assert chat.mask(name)[position]
        assert turn == ("no turn" if chat.turn[position] < 0 else f"turn {chat.turn[position]}")
        assert number == f"id {chat.tokens[position]}"
        assert at == f"position {position}"
    ends = [position for position, (classes, _) in enumerate(page.tokens) if " stop" in classes]
    assert ends == sorted(chat.stops.values())


def test_stretches_are_named_where_they_begin(chat):
    names = Reader(roles_view([chat]).page()).names
    assert [name for name in names if name != "template"] == ["bos", "user 0", "assistant 1"]


def test_text_is_escaped_and_nothing_is_loaded(chat):
    view = roles_view([chat, chat], title="<b>model</b>")
    page = Reader(view.page())
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert "<script" not in view.page()
    assert "<b>model" not in view.page()
    assert page.attributes <= {"class", "title", "lang", "charset", "name", "content"}
    assert "prefers-color-scheme" in view.css
    assert not re.search(r"url\(|@import|https?:", view.page())


def test_special_tokens_of_a_speaker_are_shown(chat):
    assert chat.spoofed_special_tokens == ("</s>",)
    view = roles_view([chat])
    assert "Special tokens typed by a speaker: <code>&lt;/s&gt;</code>." in view.body
    typed = [hint for classes, hint in Reader(view.page()).tokens if " typed" in classes]
    assert len(typed) == 1
    assert typed[0].startswith("user · turn 0")


def test_unseen_characters_are_named(chat):
    body = roles_view([chat]).body
    assert "U+202E" in body
    assert "U+200B" in body
    assert "\u202e" not in body
    assert "↵" in body
    assert "⇥" in body


def test_what_was_cut_or_left_out_is_said(organism_tokenizer):
    messages = [{"role": "user", "content": "red " * 40}]
    options = {"add_generation_prompt": True, "max_tokens": 30, "truncate": True}
    cut = render(organism_tokenizer, messages, **options)
    body = roles_view([cut]).body
    assert str(cut.truncated) in body
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages += [{"role": "assistant", "content": "blue"}]
    left_out = render(organism_tokenizer, messages, chat_template=template)
    assert "leaves out the content of turn 1" in roles_view([left_out]).body
    assert roles_view([]).body.startswith("<h1>")
