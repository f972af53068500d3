"""What a person has chosen on the explorer's page: checked, carried in a link, shown as code."""

import base64
import json
import zlib

import pytest

from ctxlens.errors import InputError
from ctxlens.explore.state import ChatPart, State, as_messages, read_part
from ctxlens.explore.work import Cache

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "{{7*7}}${7*7}",
    "javascript:alert(1)",
    "\u202eabc\u0000\ufeff",
    "</textarea><iframe src=//example.org>",
    "%{z}<b>bold</b>",
)

CHOSEN = {
    "screen": "where",
    "chat": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zürich 🙂?"}],
        "template": "own",
        "template_text": "{{ messages }}",
        "template_args": '{"enable_thinking": false}',
        "indicator": True,
        "answer_tokens": 7,
    },
    "where": {"role": "system", "view": "raw", "layer": 2, "head": 1, "query": 17},
    "steer": {"by": "share", "share": 0.7, "heads": "chosen", "chosen": "1.2,3.0", "phrase": "to paint"},
}


def test_a_state_comes_back_from_its_link():
    state = State.read(CHOSEN)
    assert State.from_link(state.link()) == state
    assert state.chat.arguments == {"enable_thinking": False}
    assert set(state.link()) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_a_link_leaves_out_what_was_not_changed():
    assert json.loads(zlib.decompress(base64.urlsafe_b64decode(State().link() + "=="), -15)) == {}
    assert len(State().link()) < 8


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_travel_as_text(payload):
    state = State.read({"chat": {"messages": [{"role": "user", "content": payload}]}})
    assert State.from_link(state.link()).chat.messages[0].content == payload


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sceen": "chat"}, "sceen: extra inputs are not permitted."),
        ({"screen": "admin"}, "screen: input should be 'chat', 'where'"),
        ({"chat": {"messages": []}}, "chat.messages: tuple should have at least 1 item"),
        ({"chat": {"messages": [{"role": "root", "content": ""}]}}, "chat.messages.0.role"),
        ({"chat": {"template_args": "[1]"}}, "template variables are a JSON object"),
        ({"where": {"role": "admin"}}, "unknown role 'admin'; choose from bos"),
        ({"where": {"layer": -1}}, "where.layer: input should be greater than or equal to 0."),
        ({"steer": {"alpha": 0}}, "steer.alpha: input should be greater than 0."),
        ({"steer": {"alpha": None}}, "steer.alpha: input should be a valid number."),
        ({"steer": {"chosen": "one"}}, "steer.chosen"),
        ("text", "the state: input should be a valid dictionary"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, words):
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        State.read(given)
    assert words in str(raised.value)


def test_a_bomb_in_a_link_is_refused_without_unpacking_it():
    packed = zlib.compressobj(9, wbits=-15)
    bomb = packed.compress(b" " * 50_000_000) + packed.flush()
    with pytest.raises(InputError, match="the link holds no state of this page"):
        State.from_link(base64.urlsafe_b64encode(bomb).decode())


@pytest.mark.parametrize("text", ["", "!!", "AAAA", "ä", State().link()[:-1] + "x"])
def test_damaged_links_are_refused(text):
    with pytest.raises(InputError, match="the link holds no state of this page"):
        State.from_link(text)


def test_messages_of_files_are_shown_or_refused():
    found = as_messages([
        {"role": "developer", "content": [{"text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hello", "name": None},
    ])  # fmt: skip
    assert [(one.role, one.content) for one in found] == [("system", "Be brief."), ("user", "Hello")]
    with pytest.raises(InputError, match="message 0 has tool_calls, which the editor does not show"):
        as_messages([{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}])
    with pytest.raises(InputError, match="message 0 has no text"):
        as_messages([{"role": "assistant", "content": None}])


def test_a_part_names_the_setting():
    with pytest.raises(InputError, match=r"^answer_tokens: input should be less than or equal to 512\.$"):
        read_part(ChatPart, {"answer_tokens": 4000})


class TestCache:
    def test_the_least_recently_used_goes_first(self):
        cache = Cache(100)
        for name in "abc":
            cache.put(name, name.upper(), 30)
        assert cache.get("a") == "A"
        cache.put("d", "D", 30)
        assert [cache.get(name) for name in "abcd"] == ["A", None, "C", "D"]
        assert cache.nbytes == 90

    def test_a_result_that_is_put_again_counts_once(self):
        cache = Cache(100)
        cache.put("a", 1, 60)
        cache.put("a", 2, 70)
        assert (cache.get("a"), cache.nbytes) == (2, 70)

    def test_what_is_larger_than_the_cache_is_refused(self):
        with pytest.raises(InputError, match="takes 200 bytes, but the cache holds 100 bytes; shorten"):
            Cache(100).put("a", 1, 200)
