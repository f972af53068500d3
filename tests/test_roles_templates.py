"""What templates do to texts, each kind with a small template and labels counted by hand."""

import time

import numpy as np
import pytest
from chat_cases import BYTES, assistant, by_template, byte_tokenizer, letters, said, user
from conftest import TOY_TEMPLATE
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from ctxlens.chat.roles import Role, check_messages, render, render_plain
from ctxlens.chat.roles.locate import date_of_run
from ctxlens.errors import InputError, RenderError

EACH = "{% for m in messages %}[{{ CONTENT }}]{% endfor %}"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "a b"}}}


def each(content):
    return EACH.replace("CONTENT", content)


@pytest.mark.parametrize(
    ("content", "text", "expected"),
    [
        ("m.content | replace('cat', 'SYSTEM: obey')", "[a SYSTEM: obey b]", "tUUttttttttttttUUt"),
        ("m.content.split(' ') | join('--')", "[a--cat--b]", "tUttUUUttUt"),
        ("m.content | upper", "[A CAT B]", "tUUUUUUUt"),
        ("m.content | tojson", '["a cat b"]', "ttUUUUUUUtt"),
        ("m.content[2:5] ~ '!'", "[cat!]", "tUUUtt"),
        ("m.content ~ '=' ~ m.content", "[a cat b=a cat b]", "tUUUUUUUtUUUUUUUt"),
        ("m.content | wordwrap(3)", "[a\ncat\nb]", "tUtUUUtUt"),
    ],
)
def test_what_a_template_writes_inside_a_message_is_the_templates(content, text, expected):
    chat = render(BYTES, [user("a cat b")], chat_template=each(content))
    assert chat.text == text
    assert letters(chat) == expected


def test_indentation_and_escapes():
    chat = render(BYTES, [user('a\n"b"')], chat_template=each("m.content | indent(2)"))
    assert (chat.text, letters(chat)) == ('[a\n  "b"]', "tUUttUUUt")
    chat = render(BYTES, [user('a\n"b"')], chat_template=each("m.content | tojson"))
    assert (chat.text, letters(chat)) == ('["a\\n\\"b\\""]', "ttUUUUUUUUtt")
    chat = render(BYTES, [user("a<b")], chat_template=each("m.content | e"))
    assert (chat.text, letters(chat)) == ("[a&lt;b]", "tUUUUUUt")


@pytest.mark.parametrize(
    "content",
    ["m.content | urlize", "m.content | center(30)", "m.content | truncate(5)", "'%30s' % m.content"],
)
def test_what_cannot_be_followed_is_refused(content):
    with pytest.raises(RenderError, match=r"rewrites the content of message 0 \(user\) with .*; change that"):
        render(BYTES, [user("see http://x.org now")], chat_template=each(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("m.content.encode()", "bytes have no owners"),
        ("'x' | safe + m.content", "it adds messages to text that is marked as safe"),
        ("m.content | int + 1", "it reads a number from a message"),
        (
            "m.content }}{% autoescape true %}{{ m.content }}{% endautoescape %}{{ ''",
            "it switches autoescape on",
        ),
        ("{'x': m.content}.values()", "rewrites the content of message 0"),
        ("namespace(x=m.content)", "rewrites the content of message 0"),
    ],
)
def test_ways_out_of_text_are_refused(content, reason):
    with pytest.raises(RenderError, match=reason):
        render(BYTES, [user("12 a")], chat_template=each(content))


def test_text_that_is_marked_as_safe():
    template = each("m.content | safe") + "{{ 'a'|safe + '<' }}"
    chat = render(BYTES, [user("<b>")], chat_template=template)
    assert (chat.text, letters(chat)) == ("[<b>]a&lt;", "tUUU" + "t" * 6)


def test_a_filter_that_changes_nothing_is_no_reason_to_refuse():
    chat = render(BYTES, [user("ab")], chat_template=each("m.content | urlize"))
    assert letters(chat) == "tUUt"


THINKING = each(
    "('<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' "
    "+ m.content.split('</think>')[-1].lstrip('\\n')) if '</think>' in m.content else m.content"
)


def test_the_line_breaks_around_a_marker_are_the_templates():
    chat = render(BYTES, [user("u"), assistant("Aaa</think>Bbb")], chat_template=THINKING)
    assert chat.text == "[u][<think>\nAaa\n</think>\n\nBbb]"
    assert letters(chat) == "tUt" + "t" * 9 + "AAA" + "t" * 11 + "AAA" + "t"


def test_white_space_after_what_the_template_drops_is_the_speakers():
    template = each("m.content.split('</think>')[-1]")
    chat = render(BYTES, [user("u"), assistant("x</think>\n\n Yes\n")], chat_template=template)
    assert chat.text == "[u][\n\n Yes\n]"
    assert said(chat, 1) == "\n\n Yes\n"


def test_a_line_break_that_the_template_writes_for_one_that_it_trims_is_its_own():
    template = each("m.content.strip() + '\\n'")
    chat = render(BYTES, [user("a\n"), assistant("b\n\n")], chat_template=template)
    assert (chat.text, letters(chat)) == ("[a\n][b\n]", "tUtttAtt")


@pytest.mark.parametrize(
    ("template", "variants"),
    [
        (each("m.content | trim"), ["a b", " a b", "\na b\n", "a b \n"]),
        (each("m.content.strip() + '\\n'"), ["a b", "a b\n", "\n a b\n\n"]),
        (THINKING, ["<think>\nhm\n</think>\n\na", "<think>hm</think>a", "hm</think>\n\na", "hm\n</think>a"]),
    ],
)
def test_the_same_tokens_have_the_same_labels_whatever_white_space_was_dropped(template, variants):
    chats = [render(BYTES, [user(text), assistant(text)], chat_template=template) for text in variants]
    assert len({tuple(chat.tokens.tolist()) for chat in chats}) == 1
    assert len({(letters(chat), tuple(chat.turn.tolist())) for chat in chats}) == 1


def test_a_function_name_that_is_repeated_before_the_result_is_the_templates():
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set ns.f = c.function.name %}"
        "call:{{ ns.f }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ (ns.f ~ '=' if m.role == 'tool' else '') ~ (m.content or '') ~ ';' }}{% endfor %}"
    )
    template = "{% set ns = namespace(f='') %}" + template
    messages = [user("u"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "3"}]
    chat = render(BYTES, messages, chat_template=template)
    assert chat.text == 'u;call:f{"x": "a b"};f=3;'
    assert letters(chat) == "Ut" + "tttttA" + "ttttttt" + "AAA" + "ttt" + "ttTt"


def test_needless_refusals_are_gone():
    raw = "{% for m in messages %}{{ m.content + '\n[a\n]\n' }}{% endfor %}"
    assert letters(render(BYTES, [user("x")], chat_template=raw)) == "U" + "t" * 6
    printed = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}"
    )
    printed += "{% endfor %}{% endfor %}"
    chat = render(BYTES, [user("u"), assistant("", tool_calls=[CALL])], chat_template=printed)
    assert (chat.text, letters(chat)) == ('u{"x": "a b"}', "U" + "A" * 12)  # JSON, not Python's dictionary


def test_null_contents_and_arguments_are_passed_in_the_form_that_the_template_takes():
    adds = "{% for m in messages %}{{ '<' + m.content + '>' }}{% for c in m.tool_calls or [] %}"
    adds += "{{ 'call ' + c.function.arguments }}{% endfor %}{% endfor %}"
    chat = render(BYTES, [user("u"), assistant(None, tool_calls=[CALL])], chat_template=adds)
    assert chat.text == '<u><>call {"x": "a b"}'
    assert said(chat, 1) == '{"x": "a b"}'
    text = {"type": "function", "function": {"name": "f", "arguments": '{"x": "a b"}'}}
    dumps = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    dumps += "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    one, other = (
        render(BYTES, [user("u"), assistant("", tool_calls=[call])], chat_template=dumps)
        for call in (text, CALL)
    )
    assert one.text == other.text == 'u{"x": "a b"}'
    assert letters(one) == letters(other)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_contents_in_parts():
    reads = each("m.content if m.content is string else m.content | map(attribute='text') | join('')")
    chat = render(BYTES, [user(parts("a ", "b")), assistant(parts("c"))], chat_template=reads)
    assert (chat.text, letters(chat)) == ("[a b][c]", "tUUUttAt")
    assert chat.messages[0]["content"] == "a b"
    chat = render(BYTES, [user(parts("a", "b"))], chat_template=each("m.content"))
    assert (chat.text, letters(chat)) == ("[ab]", "tUUt")
    assert said(render_plain(BYTES, [user(parts("a", "b"))], bos=False), 0) == "ab"
    wants = each("m.content[0].text")
    assert letters(render(BYTES, [user("ab")], chat_template=wants)) == "tUUt"
    with pytest.raises(
        InputError,
        match=r"Message 0 \(user\): content must be text or a list .*, but part 1 is of type image",
    ):
        render(BYTES, [user([*parts("a"), {"type": "image", "url": "x"}])])


@pytest.mark.parametrize(
    ("role", "usual"),
    [("function", "tool"), ("ipython", "tool"), ("observation", "tool"), ("model", "assistant"),
     ("developer", "system")],
)  # fmt: skip
def test_other_names_of_roles(role, usual):
    messages = [user("a"), assistant("b"), {"role": role, "content": "c"}, user("d")]
    shown = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat = render(BYTES, messages, chat_template=shown)
    assert chat.text == f"<user>a<assistant>b<{role}>c<user>d"
    assert chat.role[chat.turn == 2].tolist() == [Role.parse(usual)]
    strict = shown.replace("{% for", "{% for").replace(
        "<{{",
        "{{ raise_exception('what role?') if m.role not in ['user', 'assistant', 'tool', 'system'] }}<{{",
    )
    chat = render(BYTES, messages, chat_template=strict)
    assert chat.text == f"<user>a<assistant>b<{usual}>c<user>d"
    known = "{% for m in messages if m.role in ['user', 'assistant', 'tool', 'system'] %}"
    dropping = known + "({{ m.content }}){% endfor %}"
    chat = render(BYTES, messages, chat_template=dropping)
    assert chat.text == "(a)(b)(c)(d)"


def test_a_role_that_the_template_does_not_know_is_no_guess_about_parts():
    with pytest.raises(
        RenderError, match=r"leaves out the content of message 0 \(user\), so the model would not"
    ):
        render(BYTES, [user("u")], chat_template="{% for m in messages if m.role == 'human' %}x{% endfor %}")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            assistant("", tool_calls=[5]),
            r"Message 1 \(assistant\): tool_calls must hold mappings, but item 0 is int",
        ),
        (assistant("", tool_calls="[]"), "tool_calls must be a list of mappings, not str"),
        (assistant("", tool_calls=CALL), "tool_calls must be a list of mappings, not dict"),
        (assistant("", tool_calls=[{"function": None}]), "item 0 of tool_calls has no function with a name"),
        (assistant("", tool_calls=[None]), "item 0 is NoneType"),
        (assistant("", tool_calls=[{"function": {"name": 3}}]), "has no function with a name"),
        (assistant("a", reasoning_content="\ud83d"), "reasoning_content holds half a surrogate pair"),
        (
            assistant("", tool_calls=[{"name": "f", "arguments": {"x": ["\ud83d"]}}]),
            "tool_calls holds half a",
        ),
        (assistant("a", name="\ud83d"), "name holds half a surrogate pair"),
        (assistant("a", **{"\ud83d": 1}), "holds half a surrogate pair"),
        (assistant([5]), "but part 0 is of type int"),
        (assistant([{"type": "text"}]), "but part 0 is of type text"),
    ],
)
def test_malformed_messages_give_one_sentence(message, reason):
    with pytest.raises(InputError, match=reason) as caught:
        check_messages([user("a"), message])
    assert str(caught.value).encode()
    with pytest.raises(InputError, match=reason):
        render(BYTES, [user("a"), message])


def test_a_call_whose_function_is_null_beside_its_name():
    call = {"name": "f", "arguments": {"x": "y"}, "function": None}
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name }}"
    template += "{% endfor %}{% endfor %}"
    chat = render(BYTES, [user("u"), assistant("", tool_calls=[call])], chat_template=template)
    assert letters(chat) == "UA"


def test_deep_nesting_is_one_sentence():
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match=r"Message 1 \(assistant\): tool_calls is nested too deeply"):
        render(BYTES, [user("u"), assistant("", tool_calls=[{"name": "f", "arguments": {"x": deep}}])])


VARIABLE = TOY_TEMPLATE + "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{{ style }}"


def test_variables_of_the_template():
    on = render(BYTES, [user("a")], chat_template=VARIABLE)
    off = render(BYTES, [user("a")], chat_template=VARIABLE, template_args={"enable_thinking": False})
    assert off.text == on.text + "<think></think>"
    assert (on.template_args, off.template_args) == ({}, {"enable_thinking": False})
    assert off.tokens.tolist() == by_template(
        BYTES, [user("a")], chat_template=VARIABLE, enable_thinking=False
    )
    with pytest.raises(
        InputError, match=r"no variable 'enable_thought' of its own; it uses enable_thinking, style\."
    ):
        render(BYTES, [user("a")], chat_template=VARIABLE, template_args={"enable_thought": False})
    with pytest.raises(InputError, match=r"no variable 'messages' of its own; it uses none"):
        render(BYTES, [user("a")], template_args={"messages": []})


def test_one_date_for_the_whole_run(monkeypatch):
    template = "{{ strftime_now('%Y-%m-%d') }}" + TOY_TEMPLATE
    date_of_run.cache_clear()
    monkeypatch.setenv("CTXLENS_DATE", "2024-02-29")
    try:
        chat = render(BYTES, [user("a")], chat_template=template)
        assert chat.text.startswith("2024-02-29<|user|>")
        assert letters(chat).startswith("t" * 19 + "U")
        date_of_run.cache_clear()
        monkeypatch.setenv("CTXLENS_DATE", "yesterday")
        with pytest.raises(InputError, match="CTXLENS_DATE is 'yesterday'; expected a date such as"):
            render(BYTES, [user("a")], chat_template=template)
    finally:
        date_of_run.cache_clear()


def composing(tokenizer):
    """The same tokenizer, but one that composes characters first."""
    backend = tokenizer.backend_tokenizer
    copy = type(backend).from_str(backend.to_str())
    copy.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "content", ["e\u0301", "cafe\u0301 x", "\u0338a", "e\u0301\u0301 ", "\u1100\u1161\u11a8k", "\u212b"]
)
def test_tokenizers_that_compose_characters_lose_nothing(content):
    tokenizer = composing(byte_tokenizer())
    template = "<{% for m in messages %}>{{ m.content }}{% endfor %}"
    chat = render(tokenizer, [user(content), assistant(content)], chat_template=template)
    held = [c for start, end in chat.spans.tolist() for c in range(start, end)]
    assert sorted(set(held)) == list(range(len(chat.text)))
    shown = [said(chat, turn).lstrip(">") for turn in (0, 1)]
    assert shown == [content, content]


def test_a_tokenizer_that_renders_in_its_own_way_is_refused():
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **options):
            return super().apply_chat_template(conversation, **options) + "!"

    own = Own(tokenizer_object=BYTES.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    with pytest.raises(RenderError, match="renders this conversation differently from the Jinja text"):
        render(own, [user("a")], chat_template=TOY_TEMPLATE)


def test_the_time_grows_with_the_conversation_and_no_faster():
    def seconds(exchanges):
        text = "<think>\nhm\n</think>\n\nIt is so.\n"
        messages = [message for n in range(exchanges) for message in (user(f" {n}? "), assistant(text))]
        began = time.process_time()
        chat = render(BYTES, messages, chat_template=THINKING)
        assert len(np.unique(chat.turn)) == 2 * exchanges + 1
        return time.process_time() - began

    seconds(5)
    few, many = (min(seconds(count) for _ in range(3)) for count in (20, 200))
    assert many < 30 * few
