"""Conversations in every layout and kind of file, cleaned and counted; all files are made here."""

import gzip
import json
import lzma

import pytest

from ctxlens.chat.data import (
    REFUSALS,
    Conversation,
    Fingerprint,
    fingerprint_conversations,
    load_conversations,
    open_conversations,
    read_messages_file,
    write_conversations,
)
from ctxlens.chat.data.reading import read_json_rows, read_rows, watch_files
from ctxlens.errors import InputError

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, rows):
    lines = path.name.split(".")[1] == "jsonl"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def turns(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("messages", {"messages": QA}, [("user", "q"), ("assistant", "a")]),
        ("messages", {"conversations": QA}, [("user", "q"), ("assistant", "a")]),
        ("messages", QA, [("user", "q"), ("assistant", "a")]),
        (
            "messages",
            [
                {"role": "user", "content": [{"type": "text", "text": "q "}, {"type": "text", "text": "r"}]},
                {"role": "model", "content": "a"},
                {"role": "ipython", "content": "1"},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ],
            [("user", "q r"), ("assistant", "a"), ("tool", "1"), ("assistant", "b")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "f()"},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [("user", "q"), ("assistant", "f()"), ("tool", "1"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {"conversations": ["q", "a", "r", "b"]},
            [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            "alpaca",
            {"instruction": "q", "context": "c", "response": "a"},
            [("user", "q\nc"), ("assistant", "a")],
        ),
        (
            "alpaca",
            {"instruction": "r", "output": "b", "history": [["q", "a"]], "system": "s"},
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ),
        ("prompt-completion", {"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ("prompt-completion", {"prompt": QA[:1], "completion": QA[1:]}, [("user", "q"), ("assistant", "a")]),
    ],
)
def test_layouts(tmp_path, layout, row, expected):
    path = write(tmp_path / "rows.json", [row])
    data = load_conversations(path)
    assert data.layout == layout
    assert [turns(c) for c in data] == [expected]
    assert (len(data), data.dropped.total(), len(data.skipped)) == (1, 0, 0)
    assert turns(load_conversations(path, layout=layout)[0]) == expected


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.jsonl.gz", "r.jsonl.xz", "r.json.gz"])
def test_kinds_of_file(tmp_path, name):
    path = write(tmp_path / name, [{"messages": QA, "task": "x"}] * 3)
    data = load_conversations(path, limit=2)
    assert [c.id for c in data] == ["0", "1"]
    assert data[0].labels == {"task": "x"}
    assert data[0].source == str(path)


def test_parquet_and_saved_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"messages": QA, "task": "x"}])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert turns(load_conversations(path)[0]) == [("user", "q"), ("assistant", "a")]
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    assert len(load_conversations(tmp_path / "splits", split="test")) == 1
    with pytest.raises(InputError, match="has no split 'train'; it has test"):
        load_conversations(tmp_path / "splits")


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_and_folders_are_read_at_once_or_as_a_stream(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_list([{"instruction": f"q{k}", "output": "a"} for k in range(5)])
    (tmp_path / "folder").mkdir()
    table.to_parquet(str(tmp_path / "folder" / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "folder", tmp_path / "folder" / "rows.parquet", arrow):
        data = load_conversations(path, streaming=streaming, limit=4)
        assert [c.messages[0]["content"] for c in data] == ["q0", "q1", "q2", "q3"]
        assert data.layout == "alpaca"


def test_a_stream_is_read_anew_and_holds_nothing(tmp_path):
    rows = [{"messages": QA if k % 3 else QA[:1], "id": k} for k in range(60)]
    stream = open_conversations(write(tmp_path / "rows.jsonl", rows))
    opened = iter(stream)
    assert next(opened).id == "1"
    assert stream.skipped == [("0", "no user turn with an answer")]
    for _ in range(2):  # what the first look has read is not missing
        assert [c.id for c in stream] == [str(k) for k in range(60) if k % 3]
        assert len(stream.skipped) == 20
        assert stream.dropped == {"user turn without an answer": 20}
    assert list(stream) == list(load_conversations(tmp_path / "rows.jsonl"))


def test_refusals_are_dropped_on_request(tmp_path):
    answers = [
        "I’m sorry, but I cannot do that.",
        "  As an AI, I have no taste.",
        "Sorry for the delay: 4.",
        "a",
    ]
    rows = [{"messages": [*QA, QA[0], {"role": "assistant", "content": text}]} for text in answers]
    path = write(tmp_path / "rows.json", rows)
    data = load_conversations(path, drop_refusals=True)
    assert [c.id for c in data] == ["2", "3"]
    assert data.skipped == (("0", "an answer is a refusal"), ("1", "an answer is a refusal"))
    assert len(load_conversations(path)) == 4
    assert all(text == text.lower() for text in REFUSALS)


def test_fingerprint_tells_data_sets_apart_and_adds_up():
    data = [Conversation(str(k), ({"role": "user", "content": f"q{k}"},), "here") for k in range(4)]
    whole = fingerprint_conversations(data)
    assert len(whole) == 32
    assert fingerprint_conversations(reversed(data)) == whole
    first, second = Fingerprint(), Fingerprint(fingerprint_conversations(data[2:]))
    for conversation in data[:2]:
        first.add(conversation)
    first += second
    assert str(first) == whole
    other = Conversation("3", ({"role": "user", "content": "q4"},), "here")
    labelled = Conversation("3", data[3].messages, "there", {"task": "x"})
    assert fingerprint_conversations([*data[:3], other]) != whole
    assert fingerprint_conversations(data[:3]) != whole
    assert fingerprint_conversations([*data[:3], labelled]) == whole


def test_cleaning_is_counted(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "q"},
                {"role": "user", "content": "  "},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "and?"},
            ]
        },
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "wizard", "content": "a"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": None},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        {"messages": [QA[0], {"role": "assistant", "content": "a", "reasoning_content": "\ud83d"}]},
    ]
    data = load_conversations(write(tmp_path / "rows.json", rows))
    assert [turns(c) for c in data] == [[("system", "s"), ("user", "q"), ("assistant", "a")]]
    assert data.dropped == {
        "assistant turn before the first user turn": 2,
        "empty turn": 1,
        "user turn without an answer": 2,
    }
    assert dict(data.skipped) == {
        "1": "no user turn with an answer",
        "2": "no user turn with an answer",
        "3": "turn 0 has unknown role 'wizard'",
        "4": "turn 0 has content of int, not text",
        "5": "no list of turns in 'messages'",
        "6": "turn 0: content must be text or a list of text parts, but part 0 is of type image",
        "7": "turn 1: reasoning_content holds half a surrogate pair, which is not text.",
    }


def test_ids_are_the_datas_own_and_unique(tmp_path):
    rows = [{"id": name, "messages": QA} for name in ("x", "y", "x", 7)] + [{"messages": QA}]
    path = write(tmp_path / "rows.json", rows)
    assert [c.id for c in load_conversations(path)] == ["x", "y", "x#2", "7", "4"]
    assert [c.id for c in load_conversations(path, limit=3)] == ["x", "y", "x#2"]


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (b"[]", {}, "holds no records"),
        (b'[{"a": 1,\n "b" 2}]', {}, r"not valid JSON: line 2, column 6: Expecting ':' delimiter at '2}]'"),
        (b"\xff\xfe\x00", {}, "is not a text file in UTF-16-LE: byte 0x00 at offset 2"),
        (b'[{"text": "a", "score": 1}]', {}, "found columns text, score; expected one of: messages: "),
        (b"[1]", {}, "found a row of int"),
        (
            b'[{"messages": [{"role": "user", "content": "q"}]}]',
            {"layout": "alpaca"},
            "lacks the layout alpaca",
        ),
        (b'[{"a": 1}]', {"layout": "csv"}, "Unknown layout 'csv'; expected one of messages, sharegpt"),
        (b'[{"a": 1}]', {"limit": 0}, "limit is 0"),
        (b"[" * 200_000, {}, "nested too deeply"),
    ],
)
def test_unusable_files(tmp_path, content, options, reason):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_conversations(path, **options)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"messages": QA}]).encode())
    assert turns(load_conversations(path)[0]) == [("user", "q"), ("assistant", "a")]


def test_unusable_lines_and_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\nnonsense\n')
    with pytest.raises(InputError, match="not valid JSON: line 2, column 1: Expecting value at 'nonsense'"):
        load_conversations(path)
    path.write_text('{"messages": []}\n' + "[" * 200_000)
    with pytest.raises(InputError, match="line 2, column 1: nested too deeply"):
        load_conversations(path)
    with pytest.raises(InputError, match="There is no file or folder"):
        load_conversations(tmp_path / "missing")
    with pytest.raises(InputError, match=r"There is no file or folder rows\.json"):
        load_conversations("rows.json")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(InputError, match=r"is not a known kind of file; expected one of \.json"):
        load_conversations(tmp_path / "rows.txt")


def test_unknown_hub_name_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        InputError, match="is not a file or folder here, and the Hub has no readable data set"
    ):
        load_conversations("nobody/no-such-data-set")


@pytest.mark.parametrize(
    ("value", "count"),
    [(QA, 1), ({"messages": QA}, 1), ([QA, QA], 2), ([{"messages": QA, "label": 1}, QA], 2)],
)
def test_messages_file(tmp_path, value, count):
    path = write(tmp_path / "m.json", value)
    assert read_messages_file(path) == [QA] * count
    lines = tmp_path / "m.jsonl"
    lines.write_text(f"{json.dumps(QA)}\n\n{json.dumps({'messages': QA})}\n")
    assert read_messages_file(lines) == [QA, QA]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "holds no conversation"),
        ([QA, []], "conversation 1: The conversation is empty"),
        ([QA, QA[1:]], "conversation 1: The conversation has no user turn"),
        (
            [{"messages": [{"role": "narrator", "content": "q"}]}],
            "conversation 0: Message 0 has unknown role 'narrator'",
        ),
        (
            [QA, [{"role": "user", "content": [1]}]],
            r"conversation 1: Message 0 \(user\): content must be text or .*, but part 0 is of type int",
        ),
        (["hello"], "has no known layout: found a row of str; expected one of: messages"),
        ({"text": "x"}, "has no known layout: found columns text; expected one of: messages"),
    ],
)
def test_malformed_messages_file(tmp_path, value, reason):
    with pytest.raises(InputError, match=reason):
        read_messages_file(write(tmp_path / "m.json", value))
    with pytest.raises(InputError, match="There is no file"):
        read_messages_file(tmp_path / "missing.json")


def test_written_conversations_are_read_back(tmp_path):
    rows = [{"id": "x", "messages": [QA[0] | {"indicator": True}, QA[1]], "task": "t"}]
    data = load_conversations(write(tmp_path / "rows.json", rows))
    write_conversations(tmp_path / "out.jsonl", data)
    again = load_conversations(tmp_path / "out.jsonl")
    assert [(c.id, c.messages, c.labels) for c in again] == [(c.id, c.messages, c.labels) for c in data]
    assert again[0].messages[0]["indicator"] is True


@pytest.mark.parametrize(
    ("name", "layout", "usable", "skipped"),
    [
        ("lima.json", "alpaca", 1029, 0),
        ("alpaca_5000.json", "alpaca", 4998, 2),
        ("kto_en_demo.json", "messages", 300, 0),
        ("dpo_en_demo.json", "sharegpt", 299, 0),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
        ("oaast_sft_zh.json", "alpaca", 689, 0),
        ("litgpt_fixture_dolly.json", "alpaca", 12, 0),
        ("dummy_conversation.json", "sharegpt", 500, 0),
    ],
)
def test_real_files(test_data, name, layout, usable, skipped):
    data = load_conversations(test_data / "instruct" / name)
    assert (data.layout, len(data), len(data.skipped)) == (layout, usable, skipped)
    assert len({c.id for c in data}) == usable
    assert all(c.messages[-1]["role"] == "assistant" for c in data)


def test_real_tool_turns_and_labels(test_data):
    tools = load_conversations(test_data / "instruct" / "glaive_toolcall_en_demo.json")
    assert sum(message["role"] == "tool" for c in tools for message in c.messages) == 211
    tasks = load_conversations(test_data / "instruct" / "t0_train_50k.jsonl.xz", limit=100)
    assert tasks.layout == "prompt-completion"
    assert all(c.labels["source"] for c in tasks)


def test_the_files_that_rows_come_from_are_known(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.json").write_text("[1, 2]")
    with watch_files() as read:
        list(read_rows(str(tmp_path / "a.jsonl"), split="train", limit=None))
        list(read_json_rows(tmp_path / "b.json"))
        list(read_json_rows(tmp_path / "b.json"))
        with pytest.raises(InputError):
            list(read_rows(str(tmp_path / "none.json"), split="train", limit=None))
    list(read_json_rows(tmp_path / "a.jsonl"))
    assert read == [tmp_path / "a.jsonl", tmp_path / "b.json"]
