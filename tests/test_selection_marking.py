"""Chosen instructions marked in a data set's own rows: nothing else changes, and it can be taken back."""

import copy
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlens.chat.data import load_conversations
from ctxlens.chat.data.annotate import annotate_messages
from ctxlens.chat.data.marked_files import (
    RECORD_COLUMN,
    Marks,
    check_marked,
    check_unmarked,
    marked_suffix,
    unmark_file,
    write_marked,
)
from ctxlens.errors import InputError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mark(source, out, turns, layout=None):
    data = load_conversations(source, layout=layout)
    marked = annotate_messages(data, turns)
    return write_marked(out, source, marked, layout=data.layout)


ROWS = {
    "messages": (
        {"messages": [{"role": "assistant", "content": "Hm"}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hi"}], "n": 1.5},
        ["messages", 1, "content"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "yes"}, {"from": "gpt", "value": "yes"},
                           {"from": "human", "value": "yes"}, {"from": "gpt", "value": "ok"}]},
        ["conversations", 2, "value"],
    ),
    "chosen": (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}},
        ["conversations", 0, "value"],
    ),
    "texts": ({"conversations": ["a", "b", "a", "b"]}, ["conversations", 2]),
    "variables": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}],
         "chat_template_kwargs": {"enable_thinking": False}},
        ["messages", 0, "content"],
    ),
    "alpaca": (
        {"instruction": "Say", "input": "", "output": "Say", "system": "Say"}, ["instruction"],
    ),
    "alpaca with input": (
        {"instruction": "Sum up", "input": "A text", "output": "Text"}, ["input"],
    ),
    "alpaca with history": (
        {"instruction": "And?", "output": "So.", "history": [["And?", "So."]]}, ["instruction"],
    ),
    "alpaca with a key of slashes": (
        {"a/b~c": "And?", "instruction": "", "context": "And?", "response": "So."}, ["context"],
    ),
    "prompt-completion": ({"prompt": "2+2", "completion": "4", "source": "sums"}, ["prompt"]),
    "prompt of messages": (
        {"prompt": [{"role": "user", "content": "2+2"}],
         "completion": [{"role": "assistant", "content": "4"}]},
        ["prompt", 0, "content"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_last_instruction_is_extended_and_nothing_else(name, tmp_path):
    row, place = ROWS[name]
    before = {"other": "row", **row}
    source = write_lines(tmp_path / "data.jsonl", [before, row])
    out = tmp_path / "selected.jsonl"
    last = load_conversations(source)[1]
    assert mark(source, out, {(last.id, len(last.messages) - 1)}) == Marks(
        rows=2, marked_rows=1, indicators=1
    )
    expected = copy.deepcopy(row)
    leaf = expected
    for key in place[:-1]:
        leaf = leaf[key]
    leaf[place[-1]] += " [IND]"
    pointer = "".join(f"/{key}" for key in place)
    expected[RECORD_COLUMN] = {"text": " [IND]", "at": [pointer]}
    assert read_lines(out) == [before, expected]
    back = tmp_path / "back.jsonl"
    assert unmark_file(out, back) == Marks(rows=2, marked_rows=1, indicators=1)
    assert read_lines(back) == read_lines(source)
    assert json.dumps(read_lines(back)) == json.dumps(read_lines(source)), "the order of keys too"


def test_an_earlier_turn_in_the_history_and_rows_that_are_bare_lists(tmp_path):
    history = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    source = write_lines(tmp_path / "data.jsonl", [history])
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    mark(source, out, {("0", 1), ("0", 3)})
    (row,) = read_lines(out)
    assert (row["history"], row["instruction"]) == ([["a [IND]", "b"]], "c [IND]")
    assert sorted(row[RECORD_COLUMN]["at"]) == ["/history/0/0", "/instruction"]
    unmark_file(out, back)
    assert read_lines(back) == [history]

    bare = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * 2
    source = write_lines(tmp_path / "bare.jsonl", bare)
    mark(source, out, {("0", 1)}, layout="sharegpt")
    assert read_lines(out)[0]["conversations"][0]["value"] == "a [IND]"
    assert read_lines(out)[1] == bare[1]
    assert load_conversations(out)[0].messages[0]["content"] == "a [IND]"
    unmark_file(out, back)
    assert read_lines(back) == bare


def test_rows_that_gave_no_conversation_are_copied(tmp_path):
    good = {"id": "x", "prompt": "a", "completion": "b"}
    rows = [{"prompt": "no answer"}, 5, {"prompt": "a", "completion": ""}, good, None, good]
    source = write_lines(tmp_path / "data.jsonl", rows)
    mark(source, tmp_path / "out.jsonl", {("x#5", 1)})
    written = read_lines(tmp_path / "out.jsonl")
    assert written[:5] == rows[:5]
    assert written[5]["prompt"] == "a [IND]"


def test_values_of_any_kind_survive(tmp_path):
    odd = {"nan": math.nan, "big": 2**70, "tiny": 5e-324, "emoji": "🙂\u2028", "none": None}
    row = {"prompt": "a", "completion": "b", **odd}
    source = write_lines(tmp_path / "data.jsonl", [{**row, "half": "\ud83d"}, row])
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    mark(source, out, {("1", 1)})
    assert "[IND]" not in out.read_text().split("\n")[0]  # a row that is skipped is copied unchanged
    unmark_file(out, back)
    restored, given = (path.read_text().strip().split("\n") for path in (back, source))
    assert [json.dumps(json.loads(line)) for line in restored] == given


texts = st.text(st.sampled_from("a \n/~[]IND☃"), min_size=0, max_size=6)
turns = st.builds(
    lambda role, text: {"role": role, "content": text},
    st.sampled_from(["user", "assistant", "system"]),
    texts,
)
rows = st.lists(st.fixed_dictionaries({"messages": st.lists(turns, max_size=6), "note": texts}), min_size=1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=rows)
def test_what_is_written_reads_as_the_marked_conversations_and_goes_back(tmp_path_factory, data, rows):
    folder = tmp_path_factory.mktemp("rows")
    # The first row makes sure that there is a layout and a conversation.
    fixed = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    source = write_lines(folder / "data.jsonl", [fixed, *rows])
    loaded = load_conversations(source)
    asked = [
        (c.id, k) for c in loaded for k, message in enumerate(c.messages) if message["role"] == "assistant"
    ]
    chosen = data.draw(st.sets(st.sampled_from(asked), min_size=1))
    marked = annotate_messages(loaded, chosen)
    write_marked(folder / "out.jsonl", source, marked, layout="messages")
    again = load_conversations(folder / "out.jsonl")
    expected = [
        [message["content"] + " [IND]" * bool(message.get("indicator")) for message in c.messages]
        for c in marked
    ]
    assert [[message["content"] for message in c.messages] for c in again] == expected
    unmark_file(folder / "out.jsonl", folder / "back.jsonl")
    assert read_lines(folder / "back.jsonl") == read_lines(source)


def test_parquet_stays_parquet_with_its_types(tmp_path):
    turn = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    schema = pa.schema(
        [("messages", pa.list_(turn)), ("when", pa.timestamp("ns", "UTC")), ("raw", pa.binary()),
         ("kind", pa.dictionary(pa.int8(), pa.string())), ("x", pa.float16())],
        metadata={"owner": "somebody"},
    )  # fmt: skip
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": talk, "when": k, "raw": bytes([k % 256]), "kind": "ab"[k % 2], "x": None}
        for k in range(2500)
    ]
    source = tmp_path / "data.parquet"
    columns = {name: [row[name] for row in rows] for name in schema.names if name != "x"}
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
    arrays.append(pa.array(np.full(2500, 0.5, dtype=np.float16)))
    table = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(table, source)
    out, back = tmp_path / f"out{marked_suffix(source)}", tmp_path / "back.parquet"
    assert mark(source, out, {("0", 1), ("2400", 1)}) == Marks(2500, 2, 2)
    written = pq.read_table(out)
    assert written.drop_columns(["messages", RECORD_COLUMN]).equals(table.drop_columns(["messages"]))
    contents = [row[0]["content"] for row in written["messages"].to_pylist()]
    assert [k for k, text in enumerate(contents) if text != "q"] == [0, 2400]
    assert contents[2400] == "q [IND]"
    again = load_conversations(out)
    assert again[2400].messages[0]["content"] == "q [IND]"
    assert unmark_file(out, back) == Marks(2500, 2, 2)
    restored = pq.read_table(back)
    assert restored.equals(table)
    assert restored.schema.equals(pq.read_schema(source), check_metadata=True)


def test_parquet_that_the_datasets_library_wrote_can_still_be_read_by_it(tmp_path):
    from datasets import Dataset, load_dataset

    source, out = tmp_path / "data.parquet", tmp_path / "out.parquet"
    Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3).to_parquet(source)
    mark(source, out, {("1", 1)})
    found = load_dataset("parquet", data_files=str(out), split="train", cache_dir=tmp_path / "cache")
    assert found["prompt"][:] == ["a", "a [IND]", "a"]


def test_data_that_hold_the_indicator_already_are_refused(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "say [IND]", "completion": "[IND]"}]
    source = write_lines(tmp_path / "data.jsonl", rows)
    data = load_conversations(source)
    with pytest.raises(
        InputError, match=r"1 of 2 conversations contain the text '\[IND\]' already \(for example '1'\)"
    ):
        check_unmarked(data)
    check_unmarked(data, "[CTX]")
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    mark(source, out, {("1", 1)})
    assert read_lines(out)[1]["prompt"] == "say [IND] [IND]"
    unmark_file(out, back)
    assert read_lines(back) == rows
    with pytest.raises(InputError, match="were marked by an earlier selection"):
        check_unmarked(load_conversations(out), "[CTX]")
    with pytest.raises(InputError, match="was marked before; undo that first"):
        mark(out, tmp_path / "twice.jsonl", {("0", 1)})
    assert not (tmp_path / "twice.jsonl").exists()


def test_rows_that_changed_since_they_were_read_are_refused(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    marked = annotate_messages(load_conversations(source), {("0", 1)})
    write_lines(source, [{"prompt": "A", "completion": "b"}])
    with pytest.raises(InputError, match="conversation '0' was not found in the rows"):
        write_marked(tmp_path / "out.jsonl", source, marked, layout="prompt-completion")
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_cannot_be_taken_back_are_refused(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    with pytest.raises(InputError, match="no record of an indicator"):
        check_marked(source)
    with pytest.raises(InputError, match="no record of an indicator"):
        unmark_file(source, back)
    table = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), table)
    with pytest.raises(InputError, match="no record of an indicator"):
        unmark_file(table, back)
    mark(source, out, {("0", 1)})
    (row,) = read_lines(out)
    for changed in ({**row, "prompt": "a"}, {"completion": "b", RECORD_COLUMN: row[RECORD_COLUMN]}):
        write_lines(out, [changed])
        with pytest.raises(InputError, match=r"row 1 of .* does not end with '\[IND\]' at /prompt"):
            unmark_file(out, back)
    write_lines(out, [{**row, RECORD_COLUMN: "here"}])
    with pytest.raises(InputError, match="that ctxlens did not write"):
        unmark_file(out, back)
    assert not back.exists()


def test_values_that_json_cannot_keep_name_the_row(tmp_path):
    from datasets import Dataset, Value

    data = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "raw": [b"x"]})
    data.cast_column("raw", Value("binary")).save_to_disk(tmp_path / "folder")
    with pytest.raises(
        InputError, match=r"row 1 of .*JSON cannot represent .*save the data set as a Parquet"
    ):
        mark(tmp_path / "folder", tmp_path / "out.jsonl", {("0", 1)})
