"""Rows of instruction data in every layout, chat templates of every kind, and ways to spoil a row."""

import copy
import json

from hypothesis import strategies as st

SCHEMA = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "tide", "arguments": {"port": "Saltby"}}}


def asked(*, call=CALL, result="2 m", **more):
    """A conversation in which the assistant calls a function and then answers."""
    return [
        {"role": "user", "content": "How high is the water in Saltby?"},
        {"role": "assistant", "content": "", "tool_calls": [call], **more},
        {"role": "tool", "content": result, "name": "tide", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It stands at 2 m."},
    ]


def told(*pairs):
    """ShareGPT turns from pairs of speaker and text."""
    return [{"from": speaker, "value": text} for speaker, text in pairs]


TALK = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which bird nests on the pier?"},
    {"role": "assistant", "content": "Gulls."},
    {"role": "user", "content": "And below it?"},
    {"role": "assistant", "content": "Terns."},
]
SEEDS = {
    "messages": [
        {"id": "m0", "messages": TALK, "source": "harbour"},
        {"id": "m1", "messages": asked(reasoning_content="Ask the gauge."), "tools": [SCHEMA]},
        {"conversations": TALK[1:], "system": "Answer in one word.", "label": True},
        TALK,
    ],
    "sharegpt": [
        {"conversations": told(("system", "Be kind."), ("human", "Is it high tide?"), ("gpt", "Yes."))},
        {
            "conversations": told(
                ("human", "How high is the water?"),
                ("function_call", json.dumps(CALL["function"])),
                ("observation", "2 m"),
                ("gpt", "It stands at 2 m."),
            ),
            "tools": json.dumps([SCHEMA["function"]]),
        },
        {"conversations": told(("human", "Is it noon?")), "chosen": {"from": "gpt", "value": "Not yet."}},
        {"conversations": ["Is it noon?", "Not yet.", "And now?", "Now it is."]},
    ],
    "alpaca": [
        {
            "instruction": "Name the colour.",
            "input": "The buoy is red.",
            "output": "Red",
            "system": "Be brief.",
        },
        {
            "instruction": "And the other?",
            "output": "Green",
            "history": [["One buoy?", "Red."]],
            "input": None,
        },
        {"instruction": "Name the colour.", "input": "", "chosen": "Red", "rejected": "Blue"},
    ],
    "prompt-completion": [
        {"prompt": "Is the lock open?", "completion": "It is."},
        {"prompt": TALK[:2], "chosen": TALK[:3], "rejected": TALK[:2] + TALK[4:]},
        {"chosen": TALK[1:3], "rejected": TALK[1:2] + TALK[4:], "prompt": None},
        {"prompt": "Is the lock open?", "completion": "Perhaps.", "label": False, "system": "Be brief."},
    ],
}

_HEAD = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
_TAIL = "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "json": _HEAD + "{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    + _TAIL,
    "either": _HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "({% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}){% endfor %}" + _TAIL,
    "text": _HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}" + _TAIL,
    "bare": _HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments }}){% endfor %}" + _TAIL,
    "keys": _HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "({% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}){% endfor %}" + _TAIL,
    "three roles": "{% for m in messages if m.role in ('system', 'user', 'assistant') %}"
    "<|{{ m.role }}|>{{ m.content }}" + _TAIL,
    "parts": "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}"
    + _TAIL,
}
"""Templates that differ in what they read: schemas, reasoning, arguments as a mapping, as text, as either."""

WRONG = [
    None, "", " ", "\ud83d", "half \udc00 pair", "\x00", "[", "null", "[]", '{"name": "tide"}', '"\\ud800"',
    "<|user|>", "</s>", "🙂", "word " * 99, 0, 1, 5, -1, 0.5, 1e308, float("nan"), float("inf"), 10**30,
    True, False, [], {}, [None], [[]], [{}], {"": None}, {"a": {"b": None}}, ["a", None, {"b": 1}],
    {"role": "user"}, {"from": 3}, [{"type": "text", "text": "part"}], [{"type": "image", "image": "x.png"}],
    [{"text": None}],
]  # fmt: skip
KEYS = [
    "role", "from", "content", "value", "text", "weight", "train", "training", "trainable", "train_detail",
    "tools", "tool_calls", "function_call", "function", "name", "arguments", "parameters", "type", "id",
    "reasoning_content", "thinking", "indicator", "system", "history", "label", "chosen", "messages",
    "conversations", "output", "input", "prompt", "half\udfff", "",
]  # fmt: skip


def deep(value, depth):
    """A value inside that many lists."""
    for _ in range(depth):
        value = [value]
    return value


wrong_values = st.one_of(
    st.sampled_from(WRONG),
    st.text(st.characters(codec=None), max_size=8),
    st.integers(1, 200).map(lambda depth: deep("x", depth)),
    st.sampled_from([SCHEMA, CALL, TALK, json.dumps([CALL]), json.dumps(TALK)]),
)


wrong = wrong_values.map(copy.deepcopy)  # a later change must not reach the values that are drawn from


def places(value, place=()):
    """The paths of everything inside a value."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


@st.composite
def spoiled_rows(draw, layout):
    """A row of this layout with one to four changes at random places."""
    row = copy.deepcopy(draw(st.sampled_from(SEEDS[layout])))
    for _ in range(draw(st.integers(1, 4))):
        row = spoil(draw, row, draw(st.sampled_from(list(places(row)))))
    return row


def spoil(draw, row, place):
    """The row with the value at a place replaced, removed, wrapped, written as JSON, or given another key."""
    if not place:
        return draw(wrong) if draw(st.integers(0, 20)) == 0 else row
    *before, last = place
    holder = row
    for key in before:
        holder = holder[key]
    how = draw(st.sampled_from(["replace", "replace", "null", "remove", "wrap", "json", "add", "repeat"]))
    if how == "replace":
        holder[last] = draw(wrong)
    elif how == "null":
        holder[last] = None
    elif how == "remove":
        del holder[last]
    elif how == "wrap":
        holder[last] = [holder[last]]
    elif how == "json":
        holder[last] = json.dumps(holder[last])
    elif how == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(KEYS))] = draw(wrong)
    elif how == "repeat" and isinstance(holder, list):
        holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(holder[last]))
    return row
