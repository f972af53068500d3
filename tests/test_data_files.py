"""Whatever file people bring is read, or one sentence names the file, the place and the reason."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctxlens.chat.data import load_conversations, read_messages_file
from ctxlens.chat.data.annotate import annotate_messages
from ctxlens.chat.data.marked_files import marked_suffix, unmark_file, write_marked
from ctxlens.errors import InputError

ROWS = [
    {"id": f"bus-{k}", "messages": [
        {"role": "user", "content": f"Where does bus {k} stop?"},
        {"role": "assistant", "content": f"At pier {k}, café side."},
    ]}
    for k in range(3)
]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstd(content):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


def read(path):
    data = load_conversations(path)
    assert data.skipped == ()
    return [{"id": c.id, "messages": list(c.messages)} for c in data]


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


WAYS = {
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "rows.jsonl.xz": lzma.compress(LINES.encode()),
    "rows.jsonl.zst": zstd(LINES.encode()),
    "rows.json.zst": zstd(json.dumps(ROWS, indent=2).encode()),
    "two-frames.jsonl.zst": zstd(LINES[:90].encode()) + zstd(LINES[90:].encode()),
    "compressed-without-saying.jsonl": gzip.compress(LINES.encode()),
    "not-compressed.jsonl.gz": LINES,
    "lines.json": LINES,
    "a-list.jsonl": json.dumps(ROWS),
    "one-object-after-another.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "joined.jsonl": LINES.replace("}\n{", "}{"),
    "no-ending": LINES,
    "wrong-ending.txt": LINES,
    "LOUD.JSONL": LINES,
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "joined-with-marks.jsonl": "".join("\ufeff" + line + "\n" for line in LINES.splitlines()),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16-without-mark.jsonl": LINES.encode("utf-16-le"),
    "utf32.json": json.dumps(ROWS).encode("utf-32"),
    "carriage-returns.jsonl": LINES.replace("\n", "\r"),
    "windows.jsonl": LINES.replace("\n", "\r\n\r\n"),
    "line-separators.jsonl": LINES,
}


@pytest.mark.parametrize("name", WAYS)
def test_one_file_in_many_ways(tmp_path, name):
    assert read(put(tmp_path, name, WAYS[name])) == ROWS


def test_a_text_may_hold_the_line_ends_of_other_scripts(tmp_path):
    row = {"prompt": "a\u2028b\x85c\0d", "completion": "e"}
    path = put(tmp_path, "rows.jsonl", json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row))
    assert [c.messages[0]["content"] for c in load_conversations(path)] == [row["prompt"]] * 2


def test_parquet_and_arrow_are_known_by_their_bytes(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.json")
    with pa.OSFile(str(tmp_path / "rows.csv"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with (
        pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    put(tmp_path, "rows.parquet.zst", zstd((tmp_path / "rows.json").read_bytes()))
    put(tmp_path, "rows.parquet", LINES)
    for name in ("rows.json", "rows.csv", "rows.arrow", "rows.parquet.zst", "rows.parquet"):
        assert read(tmp_path / name) == ROWS
    assert marked_suffix(tmp_path / "rows.json") == ".parquet"
    assert marked_suffix(tmp_path / "rows.parquet") == ".jsonl"


FIRST, _, THIRD = LINES.splitlines()
ENDS = "the text ends within a value"
SPLIT = LINES.replace("bus 1 stop", "bus\n1 stop")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
REFUSED = {
    "torn.jsonl": (LINES[:-30], f"line 3, column {THIRD.rindex('content')}: {ENDS} that begins"),
    "split.jsonl": (SPLIT, f"line 2, column {FIRST.index(' 0 stop') + 1}: {ENDS}"),
    "comma.json": ("[\n" + LINES.replace("}\n", "},\n") + "]", ": a comma after the last"),
    "commas.jsonl": (LINES.replace("}\n", "},\n"), f"line 1, column {len(FIRST) + 1}: a comma after a row"),
    "comment.jsonl": ("// buses\n" + LINES, "line 1, column 1: a comment ('// buses"),
    "quotes.jsonl": (LINES + "{'id': 1}\n", "line 4, column 2: \"'id': 1}\" is in single quotes"),
    "power.jsonl": (LINES + "\0" * 64, "line 4, column 1: NUL bytes, as a power cut"),
    "latin.jsonl": (LINES.encode("latin-1"), f"line 1, byte {FIRST.index('é') + 1}: 0xe9 is not UTF-8"),
    "cut.jsonl.gz": (gzip.compress((LINES * 900).encode())[:-40], "the compressed file is cut off"),
    "cut.jsonl.zst": (zstd((LINES * 900).encode())[:-40], "the compressed file is cut off"),
    "pointer.jsonl": (POINTER, "a Git LFS pointer"),
    "saved.json": ("<!DOCTYPE html><html>", "is a web page, not data"),
    "rows.zip": (b"PK\x03\x04rest", "a zip archive or an Excel file"),
    "words.txt": ("Dear diary", "is not a known kind of file; expected one of .json, "),
    "broken.parquet": (b"PAR1" + b"x" * 50, "cannot be read as Parquet after row 0"),
    "empty.jsonl": ("", "holds no records"),
    "blank.csv": ("\n\n", "holds no records"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name):
    content, reason = REFUSED[name]
    path = put(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        load_conversations(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_where_a_compressed_file_is_cut_off(tmp_path):
    path = put(tmp_path, "cut.jsonl.gz", gzip.compress((LINES * 5000).encode())[:-200])
    with pytest.raises(InputError, match=r"cannot be read after line 1\d{4}: the compressed file is cut off"):
        load_conversations(path)


ANSWERS = ["None", "NA", "null", "nan", "5", "True", "", " x "]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("r.csv", ","), ("r.tsv", "\t"), ("r.csv", ";"), ("r.csv.gz", ",")]
)
def test_cells_of_csv_are_text(tmp_path, name, delimiter):
    path = tmp_path / "plain"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["instruction", "input", "output", "n"])
        writer.writerows(
            [f'q{k}\nwith, a; line\t"end"', "", answer, "007"] for k, answer in enumerate(ANSWERS)
        )
    content = path.read_bytes()
    data = load_conversations(put(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content))
    found = [c.messages[-1]["content"] for c in data]
    assert found == [answer for answer in ANSWERS if answer.strip()]
    assert data[0].messages[0]["content"] == 'q0\nwith, a; line\t"end"'
    assert data[0].labels["n"] == "007"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prompt,completion\na,b\nc\n", "rows.csv, line 3: a row of 1 cell, but the header has 2 (prompt"),
        ("prompt,completion\na,b,c\n", "line 2: a row of 3 cells"),
        ('prompt,completion\na,"b\nc,d\n', "line 3: not valid CSV: the file ends within a quoted text"),
        ("prompt,prompt\na,b\n", "two columns 'prompt'"),
        ("prompt,completion\na,b\xff\n".encode("latin-1"), "rows.csv, line 2, byte 4: 0xff is not UTF-8"),
    ],
)  # fmt: skip
def test_torn_csv_is_named_by_its_line(tmp_path, content, reason):
    with pytest.raises(InputError) as caught:
        load_conversations(put(tmp_path, "rows.csv", content))
    assert reason in str(caught.value)


def test_csv_of_old_computers_and_of_data_frames(tmp_path):
    for content in (
        "prompt,completion\ra,b\rc,d\r",
        ",prompt,completion\n0,a,b\n1,c,d\n",
        "\ufeffprompt,completion\na,b\nc,d",
    ):
        data = load_conversations(put(tmp_path, "rows.csv", content))
        assert [[m["content"] for m in c.messages] for c in data] == [["a", "b"], ["c", "d"]]


TURNS = [{"role": "user", "content": 'Is it "open"?'}, {"role": "assistant", "content": "Yes é\n"}] * 2


@pytest.mark.parametrize(
    "written", [json.dumps(TURNS), json.dumps(TURNS, ensure_ascii=False, indent=1), repr(TURNS)]
)
def test_turns_as_text_in_a_column(tmp_path, written):
    rows = [{"id": "x", "messages": written, "note": "[1]"}]
    lines = put(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "messages", "note"], ["x", written, "[1]"]])
    for path in (lines, tmp_path / "rows.parquet", tmp_path / "rows.csv"):
        data = load_conversations(path)
        assert (data.layout, list(data[0].messages), data[0].labels) == ("messages", TURNS, {"note": "[1]"})


def test_a_prompt_that_only_looks_like_a_list_stays_text(tmp_path):
    path = put(tmp_path, "rows.json", json.dumps([{"prompt": "[1, 2] sorted?", "completion": '["a"]'}]))
    assert [m["content"] for m in load_conversations(path)[0].messages] == ["[1, 2] sorted?", '["a"]']


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("style", [{}, {"ensure_ascii": False, "indent": 2}])
def test_turns_as_text_are_marked_in_the_text_and_restored(tmp_path, kind, style):
    rows = [{"id": f"r{k}", "conversations": json.dumps(TURNS, **style)} for k in range(2)]
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        put(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), source)
    data = load_conversations(source)
    marked, back = tmp_path / f"marked.{kind}", tmp_path / f"back.{kind}"
    write_marked(
        marked, source, annotate_messages(data, {("r1", 1), ("r1", 3)}), layout=data.layout, indicator="[é]"
    )
    after = load_conversations(marked)
    assert list(after[0].messages) == TURNS
    assert [m["content"] for m in after[1].messages] == ['Is it "open"? [é]', "Yes é\n"] * 2
    unmark_file(marked, back)
    restored = (
        pq.read_table(back).to_pylist()
        if kind == "parquet"
        else list(map(json.loads, back.read_text().splitlines()))
    )
    assert restored == rows


def test_folders_with_side_files(tmp_path):
    half = [json.dumps(row) + "\n" for row in ROWS]
    put(tmp_path, "a.jsonl", "".join(half[:2]))
    put(tmp_path, "b.jsonl.zst", zstd(half[2].encode()))
    for name, content in {
        "README.md": "# Buses", "CHANGELOG.md": "-", "LICENSE": "free", ".hidden.jsonl": "{",
        "a.jsonl.lock": "", "notes.txt": "hello", "dataset_info.json": '{"a": 1}', ".DS_Store": b"\0",
        "manifest.json": '{"rows": 3}',
    }.items():  # fmt: skip
        put(tmp_path, name, content)
    assert read(tmp_path) == ROWS


def test_one_conversation_per_file_is_not_a_side_file(tmp_path):
    for row in ROWS:
        put(tmp_path, f"{row['id']}.json", json.dumps(row))
    assert read(tmp_path) == ROWS


def test_folders_by_split(tmp_path):
    put(tmp_path, "train.jsonl", LINES)
    put(tmp_path, "test.jsonl", LINES.splitlines()[0])
    assert len(read(tmp_path)) == 3
    assert len(load_conversations(tmp_path, split="test")) == 1
    with pytest.raises(InputError, match="has no split 'dev'; it has train, test"):
        load_conversations(tmp_path, split="dev")
    with pytest.raises(InputError, match=r"expected files that end in one of \.json, "):
        load_conversations(put(tmp_path, "none/README.md", "x").parent)


def test_a_broken_file_in_a_folder_is_named(tmp_path):
    put(tmp_path, "a.jsonl", LINES)
    put(tmp_path, "b.jsonl", LINES[:50])
    with pytest.raises(InputError, match=r"b\.jsonl is not valid JSON: line 1, column"):
        load_conversations(tmp_path)


HALF = "\\ud83d"


@pytest.mark.parametrize("place", ["content", "reasoning_content", "name", "tool_calls", "id", "label"])
def test_half_a_surrogate_pair_ends_no_reading(tmp_path, place):
    bad = {"id": "bad", "label": "x", "messages": [dict(m) for m in ROWS[0]["messages"]]}
    if place in bad:
        bad[place] = "HALF"
    else:
        bad["messages"][1][place] = (
            "HALF" if place != "tool_calls" else [{"function": {"name": "f", "arguments": {"x": "HALF"}}}]
        )
    path = put(tmp_path, "rows.jsonl", LINES + json.dumps(bad).replace("HALF", HALF) + "\n")
    data = load_conversations(path)
    assert [c.id for c in data][:3] == [row["id"] for row in ROWS]
    assert len(data) + len(data.skipped) == 4
    for name, reason in [*data.skipped, *((c.id, "") for c in data)]:
        (name + reason).encode()
    if place in ("content", "reasoning_content", "name", "tool_calls"):
        assert "half a surrogate pair" in data.skipped[0][1]


def test_texts_of_a_table_that_are_not_utf8_skip_the_row(tmp_path):
    texts = pa.array([b"Where?", b"W\xed\xa0\xbdere?", b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": texts, "completion": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    data = load_conversations(tmp_path / "rows.parquet")
    assert [c.id for c in data] == ["0"]
    assert [(name, "half a surrogate pair" in reason) for name, reason in data.skipped] == [
        ("1", True),
        ("2", True),
    ]


def test_json_features_of_datasets_are_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no such feature")
    calls = [
        {"function": {"name": "f", "arguments": {"x": 1}}},
        {"function": {"name": "g", "arguments": {"y": [2]}}},
    ]
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "calls": calls,
        }
    ]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "calls": datasets.Json(),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    assert load_conversations(tmp_path / "rows.parquet")[0].labels == {"calls": calls}


def test_messages_are_read_from_every_layout_and_kind(tmp_path):
    question = [{"role": "user", "content": "q"}]
    talk = [*question, {"role": "assistant", "content": "a"}]
    alpaca = put(tmp_path, "rows.csv", "instruction,input,output\nq,,a\n")
    shared = put(
        tmp_path,
        "rows.jsonl.bz2",
        bz2.compress(json.dumps({"conversations": [{"from": "human", "value": "q"}]}).encode()),
    )
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "completion": "a"}]), tmp_path / "rows.parquet")
    lines = put(tmp_path, "turns.jsonl", "".join(json.dumps(m) + "\n" for m in talk))
    assert read_messages_file(alpaca) == read_messages_file(tmp_path / "rows.parquet") == [talk]
    assert read_messages_file(lines) == [talk], "one message per line is one conversation"
    assert read_messages_file(shared) == [question], "a question stays open"
