"""The bytes of text files: the encoding is read from the byte-order mark, and other bytes are refused."""

import pytest

from ctxlens.errors import InputError
from ctxlens.files import decode_text

TEXT = "Das Café schließt.\r\nNobody — knows 👩‍🌾 สวัสดี."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encoding_is_read_from_the_byte_order_mark(encoding):
    assert decode_text(TEXT.encode(encoding), "a.txt") == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32-be"])
def test_big_endian_mark_is_read(encoding):
    assert decode_text(f"\ufeff{TEXT}".encode(encoding), "a.txt") == TEXT


def test_empty_files_are_empty_texts():
    assert decode_text(b"", "a.txt") == ""
    assert decode_text(b"\xef\xbb\xbf", "a.txt") == ""
    assert decode_text(b"\xff\xfe", "a.txt") == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9 au lait", "a.txt is not a text file in UTF-8: byte 0xe9 at offset 3 cannot be decoded"),
        (b"\xef\xbb\xbfcaf\xe9", "in UTF-8: byte 0xe9 at offset 6 "),
        (b"word \xe2\x80", "byte 0xe2 at offset 5 "),
        (b"\xff\xfea\x00b", "in UTF-16-LE: byte 0x62 at offset 4 "),  # half a character at the end
        (b"\xff\xfea\x00\x00\xd8b\x00", "in UTF-16-LE: byte 0x00 at offset 4 "),  # half a surrogate pair
        ("ab".encode("utf-16-le"), "in UTF-8: there is a NUL at byte offset 1;"),  # no mark
        ("é\0".encode(), "NUL at byte offset 2;"),
        ("\ufeffé\0".encode("utf-16-be"), "in UTF-16-BE: there is a NUL at byte offset 4;"),
        (b"\0\5\x16\7", "NUL at byte offset 0;"),
    ],
)
def test_bytes_that_are_not_text_are_refused_by_their_offset(content, words):
    with pytest.raises(InputError) as caught:
        decode_text(content, "a.txt")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
