"""Conversations cut to a window keep their roles, and say what was cut."""

import pytest
from chat_cases import BYTES, CONVERSATION, assistant, said, user

from ctxlens.chat.roles import render, render_plain
from ctxlens.errors import InputError


def test_window():
    messages = [user("abcdef"), assistant("gh"), user("ij"), assistant("klm")]
    whole = render(BYTES, messages)
    with pytest.raises(
        InputError, match=rf"has {whole.n_tokens} tokens, more than the window of 40; .*--truncate"
    ):
        render(BYTES, messages, max_tokens=40)
    assert render(BYTES, messages, max_tokens=whole.n_tokens).truncated is None
    cut = render(BYTES, messages, max_tokens=whole.n_tokens - 7, truncate=True)
    assert cut.truncated == f"Cut the first 7 of 10 context tokens to fit {whole.n_tokens - 7} tokens."
    assert [said(cut, turn) for turn in range(4)] == ["", "h", "ij", "klm"]
    assert is_subsequence(cut.tokens, whole.tokens)
    assert cut.tokens[cut.first_answer_position() + 1] == BYTES("k")["input_ids"][0]
    assert [cut.tokens[at] for at in cut.stops.values()] == [BYTES.eos_token_id] * 4


@pytest.mark.parametrize(
    ("side", "left", "kept", "beheaded", "said_of_it"),
    [
        ("left", 4, ["", "gh", "ij"], (), "the first 6 of 10 context tokens"),
        ("left", 3, ["", "h", "ij"], (1,), "the first 7 of 10 context tokens"),
        ("left", 2, ["", "", "ij"], (1,), "the first 8 of 10 context tokens"),
        ("right", 3, ["a", "", "ij"], (1,), "the last 7 of 8 context tokens before the final user message"),
        ("right", 7, ["abcde", "", "ij"], (1,), "the last 3 of 8 context tokens before the final user"),
        ("right", 9, ["abcdef", "g", "ij"], (), "the last 1 of 8 context tokens before the final user"),
        ("middle", 5, ["abc", "", "ij"], (1,), "5 of 10 context tokens in the middle"),
        ("middle", 8, ["abcd", "gh", "ij"], (), "2 of 10 context tokens in the middle"),
    ],
)
def test_window_from_each_side(side, left, kept, beheaded, said_of_it):
    whole = render(BYTES, CONVERSATION)
    window = whole.n_tokens - 10 + left
    cut = render(BYTES, CONVERSATION, max_tokens=window, truncate=True, truncation=side)
    assert cut.n_tokens == window
    assert [said(cut, turn) for turn in range(4)] == [*kept, "klm"]
    assert said_of_it in cut.truncated
    assert is_subsequence(cut.tokens, whole.tokens)
    assert cut.text[cut.spans[cut.first_answer_position() + 1, 0]] == "k"
    assert cut.beheaded_turns == beheaded
    if kept[1] and beheaded:
        with pytest.raises(InputError, match="first answer token of turn 1 was cut"):
            cut.first_answer_position(1)


def test_window_reaches_the_question_only_when_nothing_else_is_left():
    whole = render(BYTES, CONVERSATION[:3], add_generation_prompt=True)
    options = {"add_generation_prompt": True, "truncate": True, "max_tokens": whole.n_tokens - 9}
    cut = render(BYTES, CONVERSATION[:3], truncation="right", **options)
    assert [said(cut, turn) for turn in range(3)] == ["", "", "i"]
    assert "the last 8 of 8 context tokens before the final user message" in cut.truncated
    assert "the last 1 of 2 context tokens from the final user message on" in cut.truncated
    assert cut.first_answer_position() == cut.n_tokens - 1
    for side in ("left", "middle", "right"):
        with pytest.raises(InputError, match="do not fit"):
            render(BYTES, CONVERSATION[:3], truncation=side, **{**options, "max_tokens": 20})


def test_window_sides_are_checked_and_serve_without_template():
    with pytest.raises(InputError, match="Unknown truncation 'centre'; expected one of left, right, middle"):
        render(BYTES, CONVERSATION, truncation="centre")
    options = {"add_generation_prompt": True, "bos": False, "max_tokens": 5, "truncate": True}
    plain = {
        side: render_plain(BYTES, [user("abcdefgh")], truncation=side, **options)
        for side in ("left", "right", "middle")
    }
    assert {side: said(chat, 0) for side, chat in plain.items()} == {
        "left": "efgh",
        "right": "abcd",
        "middle": "abgh",
    }
    assert all(chat.first_answer_position() == 4 for chat in plain.values())


def test_default_system_message():
    given = [{"role": "system", "content": "S"}, *CONVERSATION]
    for how in (render, render_plain):
        added = how(BYTES, CONVERSATION, system="S")
        assert added.tokens.tolist() == how(BYTES, given).tokens.tolist()
        assert added.messages == tuple(given)
        assert said(added, 0) == "S"
        assert added.response_turns() == (2, 4)
        kept = how(BYTES, given, system="another")
        assert "another" not in kept.text
        developer = [{"role": "developer", "content": "D"}, *CONVERSATION]
        assert "another" not in how(BYTES, developer, system="another").text
    assert CONVERSATION[0]["role"] == "user"


def test_window_too_small_for_the_response_keeps_its_start_and_half_of_the_room():
    messages = [user("0123456789"), assistant("abcdefghij")]
    whole = render_plain(BYTES, messages, bos=True)
    cut = render_plain(BYTES, messages, bos=True, max_tokens=12, truncate=True)
    assert cut.n_tokens == 12
    assert [said(cut, 0), said(cut, 1)] == ["56789", "abcde"]
    assert "the last 5 tokens of the response" in cut.truncated
    assert is_subsequence(cut.tokens, whole.tokens)
    asked = render(BYTES, messages[:1], add_generation_prompt=True, max_tokens=28, truncate=True)
    assert asked.n_tokens == 28
    assert said(asked, 0) == "789"
    with pytest.raises(InputError, match="do not fit"):
        render(BYTES, messages[:1], add_generation_prompt=True, max_tokens=20, truncate=True)
    with pytest.raises(InputError, match="do not fit"):
        render(BYTES, messages, max_tokens=20, truncate=True)


def is_subsequence(part, whole):
    remaining = iter(whole.tolist())
    return all(token in remaining for token in part.tolist())
