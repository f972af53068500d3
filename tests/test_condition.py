"""The one spelling of conditions: read, written, and read from earlier versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.errors import InputError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plain", Condition(template=False)),
        ("template", Condition()),
        ("template+prefix", Condition(prefix=True)),
        ("plain+prefix", Condition(template=False, prefix=True)),
        ("assistant+prefix", Condition(prefix=True, context_in="assistant")),
        ("template+indicator", Condition(indicator=True)),
        ("template+steered:0.95", Condition(alpha=0.95)),
        ("plain+prefix+indicator+steered:0.5:1.2/3.0",
         Condition(template=False, prefix=True, indicator=True, alpha=0.5, heads="1.2/3.0")),
        ("template+steered:share=0.6", Condition(target_share=0.6)),
    ],
)  # fmt: skip
def test_a_spelling_is_read_and_written_back(words, expected):
    assert Condition.parse(words) == expected
    assert expected.name == words == str(expected)


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("vanilla", "template"),
        ("indicator", "template+indicator"),
        ("steered:0.95", "template+steered:0.95"),
        ("indicator+steered:0.5", "template+indicator+steered:0.5"),
        ("steered:0.5+plain", "plain+steered:0.5"),
        ("vanilla+steered:0.3:0.1,1.0", "template+steered:0.3:0.1/1.0"),
        (" template + prefix ", "template+prefix"),
    ],
)
def test_spellings_of_earlier_versions_are_understood(earlier, now):
    assert Condition.parse(earlier).name == now


CONDITIONS = st.builds(
    Condition,
    template=st.just(True),
    prefix=st.booleans(),
    context_in=st.sampled_from(["user", "assistant"]),
    indicator=st.booleans(),
    alpha=st.none() | st.sampled_from([1.0, 0.95, 0.5, 0.001]),
    heads=st.just("all"),
) | st.builds(Condition, template=st.booleans(), target_share=st.sampled_from([0.1, 0.6]),
              heads=st.sampled_from(["all", "retrieval", "0.1/2.3"]))  # fmt: skip


@given(CONDITIONS)
def test_every_condition_is_read_back_from_its_name(condition):
    assert Condition.parse(condition.name) == condition
    assert Condition.parse(condition) is condition


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("chatml", "unknown word 'chatml'"),
        ("", "unknown word ''"),
        ("template:x", "unknown word 'template:x'"),
        ("plain+template", "contradicts itself"),
        ("plain+vanilla", "contradicts itself"),
        ("prefix+prefix", "repeats a word"),
        ("steered", "unknown word 'steered'"),
        ("steered:much", "needs a number after the colon"),
        ("steered:nan", "needs a number after the colon"),
        ("steered:dose=0.5", "needs a number after the colon"),
        ("steered:=0.5", "needs a number after the colon"),
        ("steered:1.5", r"alpha must be in \(0, 1\], got 1.5"),
        ("steered:0", r"alpha must be in \(0, 1\], got 0.0"),
        ("steered:share=1", r"the target share must be in \(0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(words, complaint):
    with pytest.raises(InputError, match=complaint):
        Condition.parse(words)


def test_parts_that_exclude_each_other_are_refused():
    with pytest.raises(InputError, match="without a chat template"):
        Condition(template=False, context_in="assistant")
    with pytest.raises(InputError, match="not both"):
        Condition(alpha=0.5, target_share=0.5)


def test_the_asking_part_leaves_out_indicator_and_steering():
    whole = Condition.parse("template+prefix+indicator+steered:0.3:1.2")
    assert whole.asking.name == "template+prefix"
    assert whole.steered
    assert not whole.asking.steered


def test_several_conditions_are_read_from_one_text():
    assert [c.name for c in parse_conditions("plain, vanilla,template+indicator")] == [
        "plain", "template", "template+indicator",
    ]  # fmt: skip
    with pytest.raises(InputError, match="no condition is given"):
        parse_conditions(" , ")
    with pytest.raises(InputError, match="given twice: template, template"):
        parse_conditions(["vanilla", "template"])
