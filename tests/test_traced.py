"""Texts that remember who said their characters: every operation counted by hand, and in general."""

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlens.chat.roles.template import run_template, variables_of
from ctxlens.chat.roles.traced import (
    TEMPLATE,
    Rewritten,
    Traced,
    concat,
    owner_of_each,
    owners_in,
    pieces,
    plain_text,
)

SAID = Traced.said(" a cat ", 0)
OTHER = Traced.said("b\nc", 1)


def parts(text):
    """The text cut by owner: capitals of the alphabet name who said a piece, a dot the template."""
    return [(piece, "." if owner == TEMPLATE else "AB"[owner]) for piece, owner in pieces(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<" + SAID, [("<", "."), (" a cat ", "A")]),
        (SAID + OTHER, [(" a cat ", "A"), ("b\nc", "B")]),
        (SAID.strip() + " ", [("a cat", "A"), (" ", ".")]),
        (SAID.lstrip(" a") + SAID.rstrip(" t"), [("cat  a ca", "A")]),
        (SAID.replace("cat", "DOG"), [(" a ", "A"), ("DOG", "."), (" ", "A")]),
        (SAID.replace("a", OTHER, 1), [(" ", "A"), ("b\nc", "B"), (" cat ", "A")]),
        (OTHER.replace("", "."), [(".", "."), ("b", "B"), (".", "."), ("\n", "B"), (".", "."), ("c", "B"),
                                  (".", ".")]),
        (Traced.said("a\r\nb\n\n", 0).replace("\r\n", "\n").replace("\n\n", "\n") + ".",
         [("a\nb\n", "A"), (".", ".")]),
        (SAID.replace("at", "a"), [(" a ca ", "A")]),
        (SAID.replace("a", "at", 1), [(" ", "A"), ("at", "."), (" cat ", "A")]),
        (OTHER.replace("", ".", 1), [(".", "."), ("b\nc", "B")]),
        (Traced.said(", ", TEMPLATE).join(SAID.split()), [("a", "A"), (", ", "."), ("cat", "A")]),
        (concat(SAID.rsplit("a", 1)), [(" a ct ", "A")]),
        (concat(SAID.partition("a")), [(" a cat ", "A")]),
        (SAID.rpartition("a")[0], [(" a c", "A")]),
        (concat(OTHER.splitlines()), [("bc", "B")]),
        (concat(OTHER.splitlines(True)), [("b\nc", "B")]),
        (SAID.upper() + OTHER.title(), [(" A CAT ", "A"), ("B\nC", "B")]),
        (Traced.said("straße", 0).upper() + ".", [("STRASSE", "A"), (".", ".")]),
        (SAID[1] + OTHER[::-1] + SAID[-4:-1], [("a", "A"), ("c\nb", "B"), ("cat", "A")]),
        (SAID.removeprefix(" a").removesuffix(" ") + "!", [(" cat", "A"), ("!", ".")]),
        (OTHER * 2, [("b\ncb\nc", "B")]),
    ],
)  # fmt: skip
def test_operations_of_texts(text, expected):
    assert parts(text) == expected


TEMPLATES = {
    "<{{ a }}>": ".AAAAAAA.",
    "{{ a | trim | replace('cat', 'DOG') }}": "AA...",
    "{{ ', '.join(a.split()) }}": "A..AAA",
    "{{ a.split() | join(b) }}": "ABBBAAA",
    "{{ '%s=%s%%' % (a, b) }}": "AAAAAAA.BBB.",
    "{{ '{}:{x}'.format(a, x=b) }}": "AAAAAAA.BBB",
    "{{ '%s-%s' | format(b, 1) }}": "BBB..",
    "{{ b ~ '/' ~ 1 ~ a[1:2] }}": "BBB..A",
    "{{ b | tojson }}": ".BBBB.",
    "{{ {'k': b, 'n': [1, b]} | tojson }}": "......." + "BBBB" + "." * 13 + "BBBB" + "...",
    "{{ {'k': b} }}": "......." + "BBBB" + "..",
    "{{ [b] | string }}": "..BBBB..",
    "{{ b | indent(2) }}": "BB..B",
    "{{ b | e }}{{ a | safe }}": "BBBAAAAAAA",
    "{{ ('x ' ~ a) | wordwrap(3) }}": "..A.AAA",
    "{{ [a, b] | map('upper') | join('|') }}": "AAAAAAA.BBB",
    "{{ [a, b] | first | last }}{{ b | list | reverse | join }}": "ABBB",
    "{% set x %}[{{ b }}]{% endset %}{{ x }}": ".BBB.",
    "{% macro m(x) %}({{ x }}){% endmacro %}{{ m(b) }}": ".BBB.",
    "{% macro m() %}({{ caller() }}){% endmacro %}{% call m() %}{{ b }}{% endcall %}": ".BBB.",
    "{% generation %}{{ b }}!{% endgeneration %}": "BBB.",
    "{% set n = namespace(x='') %}{% for c in b %}{% set n.x = n.x + c + '.' %}{% endfor %}{{n.x}}": "B.B.B.",
    "{% for c in [a, b] %}{% if c is string and 'cat' in c %}{{ c[1] }}{% endif %}{% endfor %}": "A",
    "{% filter upper %}x{{ b }}{% endfilter %}": ".BBB",
    "{{ a | length }}{{ b | d('x') }}{{ nothing | d(b) }}": ".BBBBBB",
    "{{ {'x': b}.get('x') }}{{ dict(x=b)['x'] }}": "BBBBBB",
    "{{ a.center(1) }}": "AAAAAAA",
    "{{ 'b' in b }}{{ b == 'b\\nc' }}{{ b.find('c') }}": "........." ,
}  # fmt: skip


@pytest.mark.parametrize("source", TEMPLATES)
def test_operations_of_templates(source):
    text = run_template(source, {"a": SAID, "b": OTHER}, now=datetime(2026, 1, 2))
    plain = run_template(source, {"a": plain_text(SAID), "b": plain_text(OTHER)}, now=datetime(2026, 1, 2))
    assert plain_text(text) == plain
    shown = "".join("." if owner == TEMPLATE else "AB"[owner] for owner in owner_of_each(text))
    assert shown == TEMPLATES[source]


@pytest.mark.parametrize(
    ("source", "by"),
    [
        ("{{ a | urlize }}", "the filter urlize"),
        ("{{ a | center(20) }}", "the filter center"),
        ("{{ a | truncate(3) }}", "the filter truncate"),
        ("{{ a.center(20) }}", "center"),
        ("{{ '%10s' % a }}", "%"),
        ("{{ '{:>9}'.format(a) }}", "format"),
        ("{{ a.zfill(9) }}", "zfill"),
        ("{{ [a] | pprint }}", "the filter pprint"),
    ],
)
def test_what_cannot_be_followed_is_never_called_the_templates(source, by):
    said = Traced.said("see http://x.org", 0)
    text = run_template(source, {"a": said}, now=datetime(2026, 1, 2))
    owners = {owner for owner in owner_of_each(text) if owner != TEMPLATE}
    assert owners
    if owners != {0}:
        assert owners == {Rewritten(by, (0,))}
        assert owners_in(text) == {0}


def test_the_clock_is_the_one_that_is_given():
    assert run_template("{{ strftime_now('%d %b %Y') }}", {}, now=datetime(2026, 1, 2)) == "02 Jan 2026"


def test_the_variables_of_a_template():
    source = (
        "{% set a = b %}{% for m in messages %}{{ m.x }}{{ c if c is defined }}{% endfor %}{{ range(2) }}"
    )
    assert variables_of(source) == {"b", "c", "messages"}


ALPHABET = "abcdefgh \n\t.;ABCD'\"\\<>&"
steps = st.lists(
    st.sampled_from(["strip()", "lstrip()", "rstrip('.;')", "upper()", "title()", "split()|join('-')",
                     "split('a')|join('a')", "replace('b', 'xyz')", "replace('', '~')", "rsplit(';', 1)|last",
                     "partition('.')|join('+')", "splitlines()|join('/')", "removeprefix('a')"]),
    max_size=4,
)  # fmt: skip
filters = st.sampled_from(["", "|tojson", "|e", "|indent", "|reverse", "|capitalize", "|string", "|list"])


@settings(deadline=None)
@given(text=st.permutations(ALPHABET).map("".join), steps=steps, last=filters)
def test_a_character_with_an_owner_is_that_owners_character(text, steps, last):
    # Every character is said by a speaker of its own, so each output character can be checked.
    said = concat(Traced.said(character, number) for number, character in enumerate(text))
    source = "{% set x = a %}" + "".join(f"{{% set x = x.{step} %}}" for step in steps) + f"{{{{ x{last} }}}}"
    shown = run_template(source, {"a": said}, now=datetime(2026, 1, 2))
    assert plain_text(shown) == run_template(source, {"a": text}, now=datetime(2026, 1, 2))
    for piece, owner in pieces(shown):
        if isinstance(owner, int) and owner != TEMPLATE:
            character = text[owner]
            assert (
                piece.casefold() == character.casefold() or piece[0] in "\\&"  # an escape
            )
        elif owner == TEMPLATE:
            assert not set(piece.casefold()) & set("cdefgh")
